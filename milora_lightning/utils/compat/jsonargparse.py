"""Private APIs of jsonargparse, read in version 4.53."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def option_strings(parser: Any) -> set[str]:
    """Return all options of a parser, as they are written."""
    return {option for action in parser._actions for option in action.option_strings}


def class_resolver() -> Callable[[Any, str], str]:
    """Return what jsonargparse calls to find the full path of a class that is given by its name, and by its base."""
    from jsonargparse import _typehints

    return _typehints.resolve_class_path_by_name


def set_class_resolver(resolve: Callable[[Any, str], str]) -> None:
    """Have jsonargparse call something else for it."""
    from jsonargparse import _typehints

    _typehints.resolve_class_path_by_name = resolve  # type: ignore[assignment]
