"""Recomputation: decoder layers that keep only their input for backward."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from milora_lightning.models.pretrained import decoder_layers
from milora_lightning.utils.errors import InvalidInputError


def recompute_layers(model: PreTrainedModel, share: bool | float) -> None:
    """Make decoder layers keep only their input, and recompute the rest in backward.

    With frozen weights, backward takes no longer than forward, so recomputing all layers makes a step up to half as
    long again, and a share of them proportionally less. The first layers are chosen: when they are recomputed, the
    activations of the others are already freed.

    Args:
        model: Any causal language model of transformers; modified in place.
        share: Share of the layers, from 0 to 1; True for all.

    Raises:
        ValueError: If the share is out of range, or the model cannot recompute some of its layers.
    """
    check_share(share)
    if not share:
        return
    # Reentrant checkpoints would give adapters no gradient, because no input of a layer requires one.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if share < 1:
        for layer in kept_layers(model, share, "gradient_checkpointing to true or false"):
            layer.gradient_checkpointing = False  # type: ignore[assignment]


def kept_layers(model: PreTrainedModel, share: bool | float, remedy: str) -> list[nn.Module]:
    """Return the layers that are not recomputed.

    Args:
        model: Any causal language model of transformers.
        share: Share of the layers that are recomputed.
        remedy: What to do, for the error message.

    Raises:
        ValueError: If the model can recompute only all of its layers or none.
    """
    layers = decoder_layers(model, f"cannot recompute a part of them: set {remedy}")
    if not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        raise InvalidInputError(f"{type(model).__name__} recomputes all of its layers or none: set {remedy}.")
    return layers[recomputed(len(layers), share) :]


def recomputed(layers: int, share: bool | float) -> int:
    """Return how many of a number of layers are recomputed.

    >>> recomputed(32, 0.25), recomputed(32, True)
    (8, 32)
    """
    return round(share * layers)


def check_share(share: bool | float) -> None:
    """Refuse a share that is out of range.

    Raises:
        ValueError: If it is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise InvalidInputError(
            f"gradient_checkpointing must be true, false, or the share of the layers to recompute, not {share}: for 8 "
            "of 32 layers, 0.25."
        )
