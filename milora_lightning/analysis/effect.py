"""The effect of updates on their layers' outputs, ‖ΔW x‖ relative to ‖W x‖, measured by hooks in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from milora_lightning.adapters.experts import LoRAExperts
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_convolution, is_embedding
from milora_lightning.statistics.passes import arguments_of, tells_of

NUMBERS = 2**24
"""Maximum number of outputs processed at once."""


def is_measurable(layer: LoRALinear) -> bool:
    """Whether an adapter is called with whole inputs, unlike those of experts or under tensor parallelism."""
    return not isinstance(layer, LoRAExperts) and layer.part is None


class EffectMeter:
    """Sums up ‖ΔW x‖ / ‖W x‖ over the inputs x that layers see, without waiting for the device.

    Args:
        layers: The adapters by name.
        device: Device of the sums.

    Attributes:
        sums: For each layer, the sum of the ratios over all inputs and their number, shape (layers, 2), which may be
            summed over ranks.
    """

    def __init__(self, layers: Mapping[str, LoRALinear], device: torch.device) -> None:
        self.layers = {name: layer for name, layer in layers.items() if is_measurable(layer)}
        self.sums = torch.zeros(len(self.layers), 2, device=device)

    @contextmanager
    def watching(self, mask: Tensor | None = None) -> Iterator[None]:
        """Within this context, forward passes are measured.

        Args:
            mask: Which positions of the inputs count, such as a batch's ``attention_mask`` (batch, length). In layers
                whose inputs have other positions, all count.
        """
        hooks = [
            # Before other hooks: after FSDP2's hook the parameters are sharded again.
            layer.register_forward_hook(partial(self._add, row, mask), prepend=True, with_kwargs=True)
            for row, layer in enumerate(self.layers.values())
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def effects(self) -> dict[str, Tensor]:
        """Compute the mean ratio of each layer that has seen inputs, as scalars."""
        seen = (self.sums[:, 1] > 0).tolist()
        means = self.sums[:, 0] / self.sums[:, 1]
        return {name: mean for name, mean, was in zip(self.layers, means, seen, strict=True) if was}

    @torch.no_grad()
    def _add(
        self, row: int, mask: Tensor | None, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> None:
        assert isinstance(layer, LoRALinear)
        if layer.enabled:
            # Attention calls projections of several parts with the rows that it wants.
            x, *rows = arguments_of(layer, args, kwargs)
            self.sums[row] += relative_effect(layer, x, y, mask, *rows).to(self.sums.device)


def relative_effect(
    layer: LoRALinear, x: Tensor, y: Tensor, mask: Tensor | None = None, rows: slice = slice(None)
) -> Tensor:
    """Compute ‖ΔW x‖ / ‖W x‖ for each position of a layer's input, and sum up.

    Args:
        layer: The adapter.
        x: Its input.
        y: Its output for x, W x + bias + ΔW x.
        mask: Which positions count, if its shape fits them, or they are in one row of the same length.
        rows: Which features of the whole output y has.

    Returns:
        The sum of the ratios and their number, shape (2,), float32. Positions where W x is zero are left out.
    """
    base = layer.base_layer
    positions = x.shape if is_embedding(base) else x.shape[:-1]
    if is_convolution(base):
        batched = len(base.kernel_size) + 2
        x, y = (part.reshape(-1, *part.shape[-batched + 1 :]) for part in (x, y))
    else:
        x, y = x.flatten() if is_embedding(base) else x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    piece = max(1, NUMBERS // max(1, y[:1].numel()))  # float32 copies of all outputs could take much memory
    with torch.autocast(y.device.type, enabled=False):
        norms = [_norms(layer, rows, *both) for both in zip(torch.split(x, piece), torch.split(y, piece), strict=True)]
    of_update, of_base = (torch.cat(parts) for parts in zip(*norms, strict=True))
    counts = of_base > 0
    if mask is not None and tells_of(mask, counts.shape if is_convolution(base) else positions):
        counts = counts & mask.flatten().bool()
    ratios = torch.where(counts, of_update / of_base, 0.0)
    return torch.stack([ratios.sum(), counts.sum().to(ratios.dtype)])


def _norms(layer: LoRALinear, rows: slice, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖ΔW x‖ and ‖W x‖ of each position."""
    update = layer.update(x.to(layer.lora_A.dtype) if x.is_floating_point() else x)[..., rows]
    bias = getattr(layer.base_layer, "bias", None)
    base = y.to(update.dtype) - update
    if is_convolution(layer.base_layer):
        update, base = update.movedim(1, -1), base.movedim(1, -1)
    base = base if bias is None else base - bias[rows]
    of_update, of_base = (torch.linalg.vector_norm(part.float(), dim=-1).flatten() for part in (update, base))
    return of_update, of_base


def mask_of(batch: Any) -> Tensor | None:
    """Return the attention mask of a batch, or None if it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None
