"""Finding modules by the names that a configuration uses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from torch import nn

from milora_lightning.adapters.attention import packed_weights
from milora_lightning.adapters.experts import stacked_weights
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_adaptable
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.names import WRAPPERS, unwrapped_name


class TargetNotFoundError(InvalidInputError):
    """Something named in the configuration is not in the model, at least not yet."""


def modules_by_name(module: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by name, without the names of wrappers such as ``torch.compile``'s."""
    return {
        unwrapped_name(name): child for name, child in module.named_modules()
    }  # a wrapped module comes after its wrapper


def layers_by_name(module: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by name, and parameters that act as layers and have no adapters."""
    return modules_by_name(module) | held_weights(module)


def held_weights(module: nn.Module) -> dict[str, nn.Module]:
    """Return the parameters that act as layers and have no adapters, by the names that their adapters would have.

    >>> list(held_weights(nn.Sequential(nn.MultiheadAttention(4, 2))))
    ['0.in_proj']
    """
    return cast(dict[str, nn.Module], {**stacked_weights(module), **packed_weights(module)})


def ends_with(name: str, target: str) -> bool:
    """Whether a name equals another, or ends in it after a dot.

    Args:
        name: The full name.
        target: The ending.

    >>> [ends_with("layers.0.q_proj", target) for target in ("q_proj", "proj")]
    [True, False]
    """
    return name == target or name.endswith(f".{target}")


def find_modules(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Find all modules whose name ends in one of ``names``.

    Raises:
        TargetNotFoundError: If a name matches nothing.
    """
    found = []
    for wanted in names:
        matches = [
            child
            for name, child in module.named_modules()
            if ends_with(unwrapped_name(name), unwrapped_name(wanted)) and name.rpartition(".")[2] not in WRAPPERS
        ]
        if not matches:
            raise TargetNotFoundError(
                f"modules_to_save names {wanted!r}, but {type(module).__name__} has no such module."
            )
        found += matches
    return found


def modules_inside(modules: Sequence[nn.Module]) -> set[nn.Module]:
    """Return modules and all modules inside them."""
    return {child for module in modules for child in module.modules()}


def find_part(module: nn.Module, name: str | None) -> nn.Module:
    """Return the submodule with this name, or the whole module if the name is None.

    Args:
        module: The whole module.
        name: Name of the submodule, or None.

    Raises:
        TargetNotFoundError: If there is no such submodule.
    """
    if name is None:
        return module
    try:
        part = module.get_submodule(name)
    except AttributeError as error:
        parts = ", ".join(child for child, _ in module.named_children())
        raise TargetNotFoundError(
            f"module={name!r} is no part of {type(module).__name__}, whose parts are: {parts or 'none'}."
        ) from error
    if is_adaptable(part) or isinstance(part, LoRALinear):
        raise InvalidInputError(f"module={name!r} is a single layer: name it in target_modules instead.")
    return part


def excluded_names(module: nn.Module, exclude_modules: str | Sequence[str]) -> set[str]:
    """Return the names of all excluded modules and of the modules inside them."""
    names = [name for name in layers_by_name(module) if name]
    found: set[str] = set()
    for entry in [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules:
        is_name = not isinstance(exclude_modules, str)
        matches = {n for n in names if (ends_with(n, unwrapped_name(entry)) if is_name else re.fullmatch(entry, n))}
        if not matches:
            raise TargetNotFoundError(
                f"exclude_modules names {entry!r}, but {type(module).__name__} has no such module."
            )
        found |= matches
    return found | {name for name in names if any(name.startswith(f"{outer}.") for outer in found)} if found else found


def first_few(names: Sequence[str], most: int = 3) -> str:
    """List names, the first few of many.

    Args:
        names: The names.
        most: How many of them to list.

    >>> first_few(["a", "b"]), first_few(["a", "b", "c"], 1)
    ("'a', 'b'", "'a' and 2 more")
    """
    listed = ", ".join(map(repr, names[:most]))
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed
