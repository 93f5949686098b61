"""Changing one aspect of an existing module by giving it a subclass of its class.

Parametrizations and ``fully_shard`` do the same: the module stays the same object under the same name, with its
parameters, buffers and hooks.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Derived:
    """Base class of the mixins. It makes modules copyable and picklable although their class is created at run time."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        mixin, base, names = type(self)._origin  # type: ignore[attr-defined]
        return (_blank, (mixin, base, names), *reduced[2:])


def derive(module: nn.Module, mixin: type[Derived], names: tuple[str, ...] = ()) -> None:
    """Change a module's class in place to a subclass with a mixin, unless it already has the mixin.

    Args:
        module: The module.
        mixin: The class whose methods come first in the subclass.
        names: Names that are passed to the mixin's ``namespace`` method, if it has one, which returns class attributes.
    """
    if not isinstance(module, mixin):
        module.__class__ = _subclass(mixin, type(module), names)


_CLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}


def _subclass(mixin: type[Derived], base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass, created once per combination of arguments. It has the original class's name."""
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
