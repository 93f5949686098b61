"""Recomputation: decoder layers that keep no more than their input for backward."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from milora_lightning.models.pretrained import decoder_layers
from milora_lightning.utils.errors import InvalidInputError


def recompute_layers(model: PreTrainedModel, share: bool | float) -> None:
    """Have decoder layers keep only their input, and compute the rest again in backward.

    Where weights are frozen, backward takes no longer than forward, so all layers take up to half a step's time more,
    and a share of them its share of that. The first layers are chosen: when they are computed again, what the others
    have kept is free.

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
        remedy: What the error says to set, where the model recomputes all of them or none.

    Raises:
        ValueError: If the model's layers do not decide for themselves.
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
    """Refuse what is no share.

    Raises:
        ValueError: If it is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise InvalidInputError(
            f"gradient_checkpointing must be true, false, or the share of the layers to recompute, not {share}: for 8 "
            "of 32 layers, 0.25."
        )
