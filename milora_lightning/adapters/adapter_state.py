"""The state of adapters: factors keep their precision, and state dicts record whether they were initialized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from milora_lightning.parallel.dtensor import full_tensor
from milora_lightning.utils.precision import without_rounding

INITIALIZED = "initialized"
"""Key in a state dict's metadata: whether an adapter's factors have their initial values."""


class AdapterState(nn.Module):
    """Base class of adapter layers: casting and saving of their parameters.

    Attributes:
        base_layer: The layer that is adapted.
        initialized: Whether the factors have their initial values.
    """

    base_layer: nn.Linear
    initialized: bool

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterState:
        if recurse:
            self.base_layer._apply(fn)  # type: ignore[no-untyped-call]
        # The factors and their optimizer state stay in full precision when a plugin casts the model.
        super()._apply(without_rounding(fn), recurse=False)  # type: ignore[no-untyped-call]
        return self

    # A state dict holds the parameters only. Whether they were initialized is in its metadata, along with torch's
    # version numbers; adapter checkpoints (AdapterCheckpoint) have an entry for it.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][INITIALIZED] = self.initialized

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        saved = state_dict.pop(prefix + INITIALIZED, local_metadata.get(INITIALIZED))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if f"{prefix}lora_A" in state_dict:
            self.initialized = bool(saved) or factors_tell(state_dict, prefix)


def factors_tell(state: Mapping[str, Any], prefix: str) -> bool:
    """Whether the factors in a state dict are known to be initialized: before, all of them are zero.

    If all factors are zero, they may still have been initialized.

    Args:
        state: A state dict.
        prefix: Prefix of the adapter's keys in it.

    >>> import torch
    >>> factors_tell({"0.lora_A": torch.zeros(1, 2), "0.lora_B": torch.ones(2, 1)}, "0.")
    True
    """
    factors = (state.get(prefix + name) for name in ("lora_A", "lora_B", "initial_A", "initial_B"))
    return any(bool(full_tensor(f).any()) for f in factors if f is not None and not f.is_meta)
