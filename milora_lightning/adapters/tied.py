"""Tied weights: which parameters of a model share their memory."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, nn

from milora_lightning.utils.compat.torch import is_traceable_wrapper_subclass
from milora_lightning.utils.names import unwrapped_name

Owners = dict[tuple[object, ...], list[tuple[nn.Module, str]]]
"""For each storage, the modules with a parameter in it and the parameters' full names."""


def parameter_owners(module: nn.Module) -> Owners:
    """Return the modules and names of all parameters, grouped by storage."""
    owners: Owners = defaultdict(list)
    for name, child in module.named_modules():
        for key, parameter in child._parameters.items():
            if parameter is not None:
                owners[_memory(parameter)].append((child, unwrapped_name(f"{name}.{key}".lstrip("."))))
    return owners


def tied_to(layer: nn.Module, weight: Tensor, owners: Owners) -> list[str]:
    """Return the names of the parameters of other modules that share a layer's weight.

    Args:
        layer: The module that holds the weight.
        weight: The weight.
        owners: The result of :func:`parameter_owners` for the whole model.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].weight = model[0].weight
    >>> tied_to(model[0], model[0].weight, parameter_owners(model))
    ['1.weight']
    """
    return sorted(name for owner, name in owners[_memory(weight)] if owner is not layer)


def _memory(parameter: Tensor) -> tuple[object, ...]:
    """Return a key that two parameters share if and only if they are tied: the storage or, without one, the object."""
    if parameter.is_meta or parameter.numel() == 0 or is_traceable_wrapper_subclass(parameter):
        return ("object", id(parameter))
    try:
        address = parameter.data_ptr()
    except RuntimeError:  # fake tensors, with which tools estimate memory
        address = 0
    return (parameter.device, address) if address else ("object", id(parameter))
