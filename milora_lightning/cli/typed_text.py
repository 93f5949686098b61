"""Keeping options as typed: the parser reads values as YAML, where ``#`` begins a comment and yields None."""

from __future__ import annotations

from typing import Any

from jsonargparse import get_loader, set_loader
from yaml import YAMLError

from milora_lightning.cli.option_errors import Parser
from milora_lightning.utils.compat.jsonargparse import try_int_before_float

_read_yaml = get_loader("yaml")


def read_value(text: str) -> Any:
    """Read an option's value as YAML, but return the text itself if YAML reads it as None.

    Only ``null`` means no value; the parser handles it before it calls this function.

    >>> read_value("#1"), read_value("~"), read_value("[1, 2]")
    ('#1', '~', [1, 2])
    """
    value = _read_yaml(text)
    return text if value is None else value


def take_values_as_typed() -> None:
    """Make all parsers of this process read text by :func:`read_value`, and 1 as an int; may be called repeatedly."""
    set_loader("yaml", read_value, (YAMLError,))
    try_int_before_float()


class CommandParser(Parser):
    """Also reads ``null`` as text for text options: without configs there is no value that it could unset."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse arguments, treating optional text options as text options."""
        for action in self._actions:
            if getattr(action, "_typehint", None) == (str | None):
                action._typehint = str  # type: ignore[attr-defined]
        return super().parse_args(*args, **kwargs)
