"""Weights that train in full on a half-precision base: kept in float32, computing in the base's dtype."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from milora_lightning.utils.compat import flat_weights
from milora_lightning.utils.derived_class import Derived, derive
from milora_lightning.utils.names import unwrapped_name


class CastParameter:
    """Class attribute that stands before a parameter, and gives it in the dtype that its module computes in.

    The parameter itself, which ``parameters()`` and ``state_dict()`` show, is another: the float32 one. Where FSDP1
    puts a plain tensor in its place, that comes first, as this is no data descriptor; FSDP2's shards, with which
    nothing is computed, are given as they are.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        parameters = module._parameters
        if self.name not in parameters:
            raise AttributeError(self.name)
        parameter = parameters[self.name]
        dtype = module._compute_dtypes[self.name]
        if parameter is None or parameter.dtype == dtype or isinstance(parameter, DTensor):
            return parameter
        return parameter.to(dtype)


class MasterWeights(Derived):
    """Mixin of a module whose own parameters are float32, whatever it is cast to; that is what it computes in.

    Everything that reads a parameter as an attribute gets it in the dtype to compute in, the module's own ``forward``
    as well as a module around it (``F.linear(x, head.weight)``), and gradients go to the float32 one.
    """

    _compute_dtypes: dict[str, torch.dtype]

    @staticmethod
    def namespace(base: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
        """Return the class attributes that the parameters of these names need."""
        attributes: dict[str, Any] = {name: CastParameter(name) for name in names}
        if issubclass(base, nn.RNNBase):  # which keeps a list of its parameters
            attributes["_flat_weights"] = property(flat_weights, lambda module, value: None)
        return attributes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module: Any = self
        buffers = {id(buffer) for buffer in module._buffers.values()}

        def in_full_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) not in buffers and result.dtype.itemsize < tensor.dtype.itemsize:
                return tensor.to(result.device)
            return result

        for name, dtype in self._compute_dtypes.items():
            sample = torch.empty(0, dtype=dtype, device=module._parameters[name].device)
            self._compute_dtypes = {**self._compute_dtypes, name: fn(sample).dtype}
        if recurse:
            for child in module.children():
                child._apply(fn)
        super()._apply(in_full_precision, recurse=False)  # type: ignore[misc]
        return self


class BaseDtype(Derived):
    """Mixin of a model whose ``dtype`` is that of its first parameter, as Hugging Face's: the one it computes in."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        module: Any = self
        owners = ((child, key, p) for child in module.modules() for key, p in child._parameters.items())
        child, key, parameter = next(owner for owner in owners if _is_floating_point(owner[2]))
        dtypes: dict[str, torch.dtype] = getattr(child, "_compute_dtypes", {})
        found: torch.dtype = dtypes.get(key, parameter.dtype)
        return found


def keep_master_weights(module: nn.Module, kept: Collection[nn.Module]) -> None:
    """Turn the floating-point parameters of modules that train in full into float32, computing in their dtype.

    The parameters stay the objects that they are, wherever else they are used: weights that are tied to them, too,
    are read in the dtype to compute in.

    Args:
        module: The module that holds all of them.
        kept: Those that train in full, with all modules inside them.
    """
    trained = {p for saved in kept for p in saved.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    for child in module.modules():
        own = {name: p.dtype for name, p in child._parameters.items() if p is not None and p in trained}
        if own and child is not module and not isinstance(child, MasterWeights):
            child.__dict__.pop("_flat_weights", None)
            child._compute_dtypes = own  # type: ignore[assignment]
            derive(child, MasterWeights, tuple(own))
        first = next(filter(_is_floating_point, child.parameters()), None)
        if first in trained and child is not module and isinstance(getattr(type(child), "dtype", None), property):
            derive(child, BaseDtype)
    for parameter in trained:
        if parameter.dtype.itemsize < torch.float32.itemsize:
            parameter.data = parameter.data.float()


def compute_dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype to compute in of all parameters that are kept in float32 for training, by their names.

    >>> compute_dtypes(nn.Linear(2, 2))
    {}
    """
    return {
        unwrapped_name(f"{name}.{key}".lstrip(".")): dtype
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, MasterWeights)
        for key, dtype in child._compute_dtypes.items()
    }


def _is_floating_point(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.is_floating_point()
