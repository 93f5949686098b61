"""Text options as they are typed: the parser reads values as YAML, where ``#`` begins a comment and makes them None."""

from __future__ import annotations

from typing import Any

from jsonargparse import get_loader, set_loader
from yaml import YAMLError

from milora_lightning.cli.option_errors import Parser

_read_yaml = get_loader("yaml")


def read_value(text: str) -> Any:
    """Read an option's value as YAML, but what YAML takes for nothing as the text that it is.

    The one word for no value is ``null``, which the parser knows before it asks here.

    >>> read_value("#1"), read_value("~"), read_value("[1, 2]")
    ('#1', '~', [1, 2])
    """
    value = _read_yaml(text)
    return text if value is None else value


def take_text_as_typed() -> None:
    """Have all parsers of this process read values so; once is enough, and twice does no harm."""
    set_loader("yaml", read_value, (YAMLError,))


class CommandParser(Parser):
    """Takes also ``null`` as text where text is wanted: no config has given a value that it could take back."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse; an option of text that may be left out is one of text."""
        for action in self._actions:
            if getattr(action, "_typehint", None) == (str | None):
                action._typehint = str  # type: ignore[attr-defined]
        return super().parse_args(*args, **kwargs)
