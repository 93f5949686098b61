"""The adapter of an embedding: it looks up columns of A, as the base layer looks up rows of its weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milora_lightning.adapters.added_update import AddedUpdate
from milora_lightning.adapters.linear_layers import is_embedding


class LoRAEmbedding(AddedUpdate):
    """An embedding with a low-rank update that starts at zero: a :class:`LoRALinear` on one-hot inputs.

    Its weight (tokens, features) is the transpose of a matrix (out, in) = (features, tokens). There is no dropout.

    Args:
        base_layer: ``nn.Embedding`` without ``max_norm``.
        r: Rank of the factors.
        **options: The other arguments of :class:`LoRALinear`.

    Attributes:
        lora_A: Trainable factor (r, tokens).
        lora_B: Trainable factor (features, r).

    Raises:
        TypeError: If ``base_layer`` is not such an embedding, or has a custom ``forward``.
    """

    fits = staticmethod(is_embedding)
    _ADAPTS = "nn.Embedding"
    padding_idx: int | None

    def __init__(self, base_layer: nn.Module, r: int, *options: Any, **named: Any) -> None:
        super().__init__(base_layer, r, *options, **named)
        self.transposed = True
        for name in ("num_embeddings", "embedding_dim", "padding_idx"):  # models read these
            setattr(self, name, getattr(base_layer, name))

    def update(self, ids: Tensor) -> Tensor:
        """Compute the update's part of the output, s (B A − B₀A₀) of each token (..., features), for ids (...)."""
        A, B, initial_A, initial_B = self.factors
        dtype = self.base_layer.weight.dtype
        rows = F.embedding(ids, A.T, self.padding_idx)
        if initial_A is not None and initial_B is not None:
            rows = torch.cat([rows, rows - F.embedding(ids, initial_A.T)], dim=-1)
            B = torch.cat([B - initial_B, initial_B], dim=1)
        return F.linear(rows.to(dtype), (self.scaling * B).to(dtype))
