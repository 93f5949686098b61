"""Master weights: parameters that train in full are kept in float32 and cast to the model's dtype for computing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from milora_lightning.utils.compat.torch import flat_weights
from milora_lightning.utils.derived_class import Derived, derive
from milora_lightning.utils.names import unwrapped_name
from milora_lightning.utils.precision import without_rounding


class CastParameter:
    """Class attribute through which a module reads a parameter in the dtype that it computes in.

    ``parameters()`` and ``state_dict()`` still show the float32 parameter. FSDP1 sets a plain tensor on the instance,
    which takes precedence, because this is not a data descriptor. FSDP2's shards, which are not used for computing, are
    returned unchanged.
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
    """Mixin of a module whose parameters stay float32 when it is cast; the cast only changes the dtype it computes in.

    All code that reads a parameter as an attribute gets it in that dtype, in the module's ``forward`` or in a module
    around it (``F.linear(x, head.weight)``). Gradients go to the float32 parameter.
    """

    _compute_dtypes: dict[str, torch.dtype]

    @staticmethod
    def namespace(base: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
        """Return the class attributes for parameters with these names."""
        attributes: dict[str, Any] = {name: CastParameter(name) for name in names}
        if issubclass(base, nn.RNNBase):  # it keeps a list of its parameters
            attributes["_flat_weights"] = property(flat_weights, lambda module, value: None)
        return attributes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module: Any = self
        buffers = {id(buffer) for buffer in module._buffers.values()}

        for name, dtype in self._compute_dtypes.items():
            sample = torch.empty(0, dtype=dtype, device=module._parameters[name].device)
            self._compute_dtypes = {**self._compute_dtypes, name: fn(sample).dtype}
        if recurse:
            for child in module.children():
                child._apply(fn)
        keep = without_rounding(fn)
        super()._apply(lambda tensor: fn(tensor) if id(tensor) in buffers else keep(tensor), recurse=False)  # type: ignore[misc]
        return self


class BaseDtype(Derived):
    """Mixin of a model whose ``dtype`` property reads its first parameter, as in Hugging Face's models."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        module: Any = self
        owners = ((child, key, p) for child in module.modules() for key, p in child._parameters.items())
        child, key, parameter = next(owner for owner in owners if _is_floating_point(owner[2]))
        dtypes: dict[str, torch.dtype] = getattr(child, "_compute_dtypes", {})
        dtype: torch.dtype = dtypes.get(key, parameter.dtype)
        return dtype


def keep_master_weights(module: nn.Module, kept: Collection[nn.Module]) -> None:
    """Convert the parameters of modules that train in full to float32; they still compute in their former dtype.

    The parameters stay the same objects, so weights tied to them are converted as well, and read in their former dtype.

    Args:
        module: The module that contains all of them.
        kept: The modules that train in full; modules inside them are included.
    """
    trained = {p for saved in kept for p in saved.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    for child in module.modules():
        dtypes = {name: p.dtype for name, p in child._parameters.items() if p is not None and p in trained}
        if dtypes and child is not module and not isinstance(child, MasterWeights):
            child.__dict__.pop("_flat_weights", None)
            child._compute_dtypes = dtypes  # type: ignore[assignment]
            derive(child, MasterWeights, tuple(dtypes))
        first = next(filter(_is_floating_point, child.parameters()), None)
        if first in trained and child is not module and isinstance(getattr(type(child), "dtype", None), property):
            derive(child, BaseDtype)
    for parameter in trained:
        if parameter.dtype.itemsize < torch.float32.itemsize:
            parameter.data = parameter.data.float()  # in place: optimizers and tied modules hold this very parameter


def compute_dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """Return, by name, the dtype in which parameters that are kept in float32 for training compute.

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
