"""Causal attention for training on CPUs, where torch's own kernels are slow at the lengths of fine-tuning."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from milora_lightning.block_attention import attend

NAME = "causal_blocks"
"""What ``attn_implementation`` calls it."""

PACKING = "packing"
"""Option of the attention layers: how :mod:`milora_lightning.packing` has packed a batch."""


def causal_blocks_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend causally, as an attention function of transformers.

    Plain causal attention over a whole sequence goes block by block, and so do packed rows; whatever else is
    asked for (a mask, one query against a cache, dropout, another device) through torch's
    scaled_dot_product_attention.

    Args:
        module: The attention layer.
        query: Queries (batch, heads, length, head_dim).
        key: Keys (batch, key-value heads, length, head_dim).
        value: Values, likewise.
        attention_mask: A mask, or None for plain causal attention.
        options: What transformers passes along.

    Returns:
        The output (batch, length, heads, head_dim), and None in place of the attention weights.

    Raises:
        ValueError: If the model caps its attention scores, which neither kernel does.
    """
    if options.get("softcap"):
        raise ValueError(f"attn_implementation={NAME!r} does not cap attention scores as this model does: use 'eager'.")
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    if options.get(PACKING) is not None:
        if options.get("dropout"):
            raise ValueError("Attention over packed rows has no dropout: set the model's to 0.")
        return attend(query, key, value, scaling, options[PACKING]), None
    causal = options.get("is_causal")
    plain = (
        attention_mask is None
        and query.device.type == "cpu"
        and query.shape[2] == key.shape[2] > 1
        and query.shape[-1] == value.shape[-1]
        and not options.get("dropout")
        and (getattr(module, "is_causal", True) if causal is None else causal)
    )
    if not plain:
        return cast(
            "tuple[Tensor, None]",
            sdpa_attention_forward(module, query, key, value, attention_mask, **options),
        )
    return attend(query, key, value, scaling), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Compute softmax(s q kᵀ + causal mask) v with grouped key-value heads, without weights that causality hides.

    Args:
        query: Queries (batch, heads, queries, head_dim), those of the last positions.
        key: Keys (batch, key-value heads, length, head_dim); heads are a multiple of key-value heads.
        value: Values, likewise.
        scaling: The factor s.

    Returns:
        The output (batch, heads, queries, head_dim).

    >>> import torch
    >>> q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    >>> reference = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    >>> torch.allclose(causal_attention(q, k, v, 4**-0.5), reference, atol=1e-6)
    True
    """
    return attend(query, key, value, scaling).transpose(1, 2)


AttentionInterface.register(NAME, causal_blocks_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
