"""Names of modules, parameters and tensors as the plain model has them, whatever has been put around its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from milora_lightning.utils.compat import CHECKPOINT_WRAPPED, COMPILED, FSDP_WRAPPED

# The first, unlike the other wrappers, leaves its name in a state dict's keys.
WRAPPERS = frozenset({COMPILED, FSDP_WRAPPED, CHECKPOINT_WRAPPED})


def unwrapped_name(name: str) -> str:
    """Return a name without what ``torch.compile``, FSDP1 and activation checkpointing put into it.

    >>> unwrapped_name("_fsdp_wrapped_module.layers.0._orig_mod.weight"), unwrapped_name("head._orig_mod")
    ('layers.0.weight', 'head')
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def pristine_name(name: str) -> str:
    """Return the name that a parameter of an adapted model had before surgery, without wrappers.

    >>> pristine_name("layers.0._orig_mod.up_proj.base_layer.weight")
    'layers.0.up_proj.weight'
    """
    return unwrapped_name(name).replace(".base_layer.", ".")


def key_in(module: nn.Module) -> Callable[[str], str]:
    """Return what turns a tensor's name, with or without wrappers, into the key that a module's state dict has for it.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> model[1].compile(), key_in(model)("1._orig_mod.weight")
    (None, '1.weight')
    """
    # Inner modules come after their wrappers, and take their place.
    keys = {
        unwrapped_name(name): ".".join(part for part in name.split(".") if part not in WRAPPERS - {COMPILED})
        for name, _ in module.named_modules(remove_duplicate=False)
    }

    def key(name: str) -> str:
        parts = unwrapped_name(name).split(".")
        for depth in range(len(parts) - 1, 0, -1):  # a quantized weight's own names have dots, too
            holder = keys.get(".".join(parts[:depth]))
            if holder is not None:
                return ".".join([holder, *parts[depth:]])
        return ".".join([*filter(None, [keys[""]]), *parts])

    return key


def rename_keys(state: dict[str, Any], prefix: str, rename: Callable[[str], str]) -> None:
    """Rename the entries of a state dict, behind a prefix that they have in common."""
    for key in [key for key in state if key.startswith(prefix)]:
        renamed = prefix + rename(key.removeprefix(prefix))
        if renamed != key:
            state[renamed] = state.pop(key)
