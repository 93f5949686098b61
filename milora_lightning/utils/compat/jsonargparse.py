"""Private APIs of jsonargparse, read in version 4.53."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def option_strings(parser: Any) -> set[str]:
    """Return all option strings of a parser."""
    return {option for action in parser._actions for option in action.option_strings}


def class_resolver() -> Callable[[Any, str], str]:
    """Return jsonargparse's function that resolves a class name and base class to an import path."""
    from jsonargparse import _typehints

    return _typehints.resolve_class_path_by_name


def set_class_resolver(resolve: Callable[[Any, str], str]) -> None:
    """Replace that function."""
    from jsonargparse import _typehints

    _typehints.resolve_class_path_by_name = resolve  # type: ignore[assignment]


def try_int_before_float() -> None:
    """Make jsonargparse read whole numbers as int wherever int and float are both allowed; may be called repeatedly.

    It tries the types of a union in order. ``typing`` caches unions regardless of order, so the union in
    ``Optional[Union[int, float]]`` may come back in the order of an earlier use, with float before int. Then a
    Trainer's ``limit_train_batches: 1`` would be 1.0, which means all batches.
    """
    from jsonargparse import _typehints

    rank = _typehints.union_subtype_sort_key
    if getattr(rank, "__module__", None) != _typehints.__name__:
        return

    def rank_with_float_behind(subtype: Any) -> float:
        return 0.5 if subtype is float else rank(subtype)

    _typehints.union_subtype_sort_key = rank_with_float_behind  # type: ignore[assignment]
