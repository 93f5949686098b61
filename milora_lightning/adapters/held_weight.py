"""A parameter that acts as a layer: an adapter's base where the weight belongs to no layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn


class HeldWeight:
    """A parameter that a module's code multiplies by directly.

    This is not a module: the parameter stays in place under its name, and is looked up whenever it is needed.

    Args:
        holder: The module that holds the parameter.
        parameter: The parameter's name there.
    """

    out_features: int
    in_features: int

    def __init__(self, holder: nn.Module, parameter: str) -> None:
        self.holder, self.parameter = holder, parameter

    @property
    def weight(self) -> Tensor:
        """The parameter."""
        return cast(Tensor, self.holder._parameters[self.parameter])

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self.holder._parameters[self.parameter] = value

    @property
    def bias(self) -> Tensor | None:
        """None: the holder adds its bias itself."""
        return None

    @property
    def training(self) -> bool:
        """Whether the holder is in training mode."""
        return self.holder.training

    @property
    def _parameters(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight}

    @property
    def _buffers(self) -> Mapping[str, Tensor]:
        return self.holder._buffers  # type: ignore[return-value]

    def parameters(self) -> Iterator[Tensor]:
        """Yield the parameter."""
        yield self.weight

    def children(self) -> Iterator[nn.Module]:
        """Yield nothing."""
        return iter(())

    def _apply(self, fn: Any) -> None:
        """Do nothing: the holder converts its parameters itself."""

    def __getattr__(self, name: str) -> Any:  # marks that are set on modules as attributes
        if name.startswith("__") or name == "holder":
            raise AttributeError(name)
        return getattr(self.holder, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeldWeight) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[int, str]:
        return id(self.holder), self.parameter


def holder(layer: nn.Module) -> nn.Module:
    """Return the module that holds a layer's weight: the layer, or the holder of a parameter that acts as one."""
    return layer.holder if isinstance(layer, HeldWeight) else layer
