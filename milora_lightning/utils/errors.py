"""Errors that say in one sentence what is wrong, why, and what to do.

Whatever this package raises for its user to read derives from :class:`MiLoRAError`, and from the built-in class that
fits. The command line prints the sentence of these and the traceback of all others, which are mistakes in a program.
"""

from __future__ import annotations


class MiLoRAError(Exception):
    """What all errors have in common that this package raises for its user to read."""


class InvalidInputError(MiLoRAError, ValueError):
    """An option, a file or a model cannot be used as it is."""


class MissingFileError(MiLoRAError, FileNotFoundError):
    """A file, a folder or something on the Hub is not there."""


class OutputExistsError(MiLoRAError, FileExistsError):
    """There is something where a result was to go."""


class MissingPackageError(MiLoRAError, ModuleNotFoundError):
    """An optional package is needed and not installed."""


def sentence(error: BaseException) -> str | None:
    """Return what to tell the user of an error, or of the one that it was made from; nothing if it is not ours.

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
