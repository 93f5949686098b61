"""Names of modules and parameters without the prefixes of wrappers, and as they were before surgery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from milora_lightning.utils.compat.torch import CHECKPOINT_WRAPPED, COMPILED, FSDP_WRAPPED

# Of these, only COMPILED also appears in state dict keys.
WRAPPERS = frozenset({COMPILED, FSDP_WRAPPED, CHECKPOINT_WRAPPED})


def unwrapped_name(name: str) -> str:
    """Return a name without the parts that ``torch.compile``, FSDP1 and activation checkpointing add.

    >>> unwrapped_name("_fsdp_wrapped_module.layers.0._orig_mod.weight"), unwrapped_name("head._orig_mod")
    ('layers.0.weight', 'head')
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def pristine_name(name: str) -> str:
    """Return the name that a parameter of an adapted model had before surgery, without wrappers' prefixes.

    >>> pristine_name("layers.0._orig_mod.up_proj.base_layer.weight")
    'layers.0.up_proj.weight'
    """
    return unwrapped_name(name).replace(".base_layer.", ".")


def key_in(module: nn.Module) -> Callable[[str], str]:
    """Return a function that maps a tensor's name, with or without wrappers' prefixes, to its state dict key.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> model[1].compile(), key_in(model)("1._orig_mod.weight")
    (None, '1.weight')
    """
    # Inner modules come after their wrappers, and replace them in the dictionary.
    keys = {
        unwrapped_name(name): ".".join(part for part in name.split(".") if part not in WRAPPERS - {COMPILED})
        for name, _ in module.named_modules(remove_duplicate=False)
    }

    def key(name: str) -> str:
        parts = unwrapped_name(name).split(".")
        for depth in range(len(parts) - 1, 0, -1):  # the names of a quantized weight's parts have dots, too
            holder = keys.get(".".join(parts[:depth]))
            if holder is not None:
                return ".".join([holder, *parts[depth:]])
        return ".".join([*filter(None, [keys[""]]), *parts])

    return key


def rename_keys(state: dict[str, Any], prefix: str, rename: Callable[[str], str]) -> None:
    """Rename the entries of a state dict that begin with a prefix; the prefix stays.

    Args:
        state: The state dict; changed in place.
        prefix: The prefix.
        rename: Maps the rest of a key to its new form.
    """
    for key in [key for key in state if key.startswith(prefix)]:
        renamed = prefix + rename(key.removeprefix(prefix))
        if renamed != key:
            state[renamed] = state.pop(key)
