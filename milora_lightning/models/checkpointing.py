"""Recomputing activations in backward instead of keeping them: of all decoder layers, some, or all but attention."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from milora_lightning.models.recompute import kept_layers, recompute_layers

Recomputation = Literal["full", "selective"] | int
"""``"full"`` for every decoder layer, n for every n-th, ``"selective"`` for every layer without its attention."""


def checkpoint_layers(model: PreTrainedModel, how: Recomputation = "full") -> None:
    """Make decoder layers recompute their activations in backward.

    Args:
        model: Any causal language model of transformers; modified in place.
        how: Which layers, and whether attention is recomputed, too. With ``"selective"``, only torch's fused attention
            is kept, which takes the most time with long sequences; other implementations are recomputed in any case.

    Raises:
        ValueError: If the model does not support recomputation, or only of all layers together.
    """
    if how == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        return
    recompute_layers(model, True)
    if isinstance(how, int):
        for number, layer in enumerate(kept_layers(model, 0.0, "activation_checkpointing to full")):
            layer.gradient_checkpointing = number % how == 0  # type: ignore[assignment]


def _keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(getattr(op, "name", lambda: op)())
    kept = "scaled_dot_product" in name and not name.endswith("_backward")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
