"""Errors whose message says in one sentence what is wrong, why, and what to do.

All errors that users are meant to see derive from :class:`MiLoRAError` and from the matching built-in class. The
command line prints only their message; all other errors are bugs, and it prints their traceback.
"""

from __future__ import annotations


class MiLoRAError(Exception):
    """Base class of all errors that this package raises for users."""


class InvalidInputError(MiLoRAError, ValueError):
    """An option, a file or a model cannot be used."""


class MissingFileError(MiLoRAError, FileNotFoundError):
    """A file, a folder or something on the Hub does not exist."""


class OutputExistsError(MiLoRAError, FileExistsError):
    """The place for a result is already taken."""


class MissingPackageError(MiLoRAError, ModuleNotFoundError):
    """An optional package is needed but not installed."""


def sentence(error: BaseException) -> str | None:
    """Return the message for the user in an error or its causes; None if there is none.

    >>> try:
    ...     try:
    ...         raise InvalidInputError("r is -1. Take 16.")
    ...     except InvalidInputError as error:
    ...         raise RuntimeError("loading failed") from error
    ... except RuntimeError as error:
    ...     print(sentence(error), sentence(ValueError("of another package")))
    r is -1. Take 16. None
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, MiLoRAError):
        cause = cause.__cause__
    return None if cause is None else str(cause)
