"""Changing what a module of somebody else's does in one respect, by a subclass made of its own class.

Parametrizations and ``fully_shard`` do it in the same way: the module stays the object that it is, in its place and
under its name, with its parameters, buffers and hooks.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Derived:
    """Base of the mixins: modules that have one can be copied and pickled, although no file holds their class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        mixin, base, names = type(self)._origin  # type: ignore[attr-defined]
        return (_blank, (mixin, base, names), *reduced[2:])


def derive(module: nn.Module, mixin: type[Derived], names: tuple[str, ...] = ()) -> None:
    """Give a module, in place, the subclass of its class that has a mixin before it; at most once.

    Args:
        module: The module.
        mixin: What the subclass does otherwise.
        names: Names that the mixin's ``namespace`` makes class attributes of, if it has that method.
    """
    if not isinstance(module, mixin):
        module.__class__ = _subclass(mixin, type(module), names)


_CLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}


def _subclass(mixin: type[Derived], base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return that subclass; one for each combination. It goes by the name of the module's own class."""
    origin = (mixin, base, names)
    if origin in _CLASSES:
        return _CLASSES[origin]
    namespace: dict[str, Any] = getattr(mixin, "namespace", lambda base, names: {})(base, names)
    attributes = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    _CLASSES[origin] = type(base.__name__, (mixin, base), {**attributes, **namespace, "_origin": origin})
    return _CLASSES[origin]


def _blank(mixin: type[Derived], base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _subclass(mixin, base, names)
    module: nn.Module = cls.__new__(cls)
    return module
