"""Checks that a language model keeps the examples of a packed row apart."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from milora_lightning.config import IGNORE_INDEX
from milora_lightning.models.segments import Segments
from milora_lightning.models.supervision import supervised_logits
from milora_lightning.utils.compat.transformers import attention_of
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.modes import eval_mode

REMEDY = "set data.packing to false"
CPU_TOKENS = 48  # most tokens of the test example on CPUs
COMPARED_TOKENS = 16  # last tokens of the example whose logits are compared
# Recurrent layers carry their state from one example to the next, regardless of the positions.
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


def reason_to_mix(model: PreTrainedModel) -> str | None:
    """Return why a model's architecture cannot keep the examples of a row apart; None if it may."""
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} takes no position_ids, by which packed examples are kept apart"
    layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    others = sorted({str(layer_type) for layer_type in layer_types} - {*ATTENTION_LAYERS})
    return f"{name} has layers of {others[0]}, which see all of a packed row" if others else None


def check_takes_positions(model: PreTrainedModel, remedy: str = REMEDY) -> None:
    """Refuse a model whose architecture cannot keep the examples of a row apart.

    Args:
        model: The model.
        remedy: What to do, for the error message.

    Raises:
        ValueError: If its forward takes no positions, or it has layers other than attention.
    """
    if reason := reason_to_mix(model):
        raise InvalidInputError(f"{reason}: {remedy}.")


@torch.no_grad()
def check_separation(model: PreTrainedModel, tokens: Sequence[int], remedy: str = REMEDY) -> None:
    """Check that an example gets the same logits after other examples in a packed row as alone in a row.

    Args:
        model: The model, on the device and in the dtype of training.
        tokens: Token ids of an example.
        remedy: What to do if they differ.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    check_takes_positions(model, remedy)
    device = model.get_input_embeddings().weight.device
    # Only a few tokens on CPUs, to save time: whether examples are kept apart does not depend on their length.
    example = torch.tensor(tokens[: CPU_TOKENS if device.type == "cpu" else None], device=device)
    with eval_mode(model):
        alone = _last_logits(model, [example])
        packed = [_last_logits(model, [neighbour, example]) for neighbour in (example, example.flip(0))]
    eps, scale = torch.finfo(model.dtype).eps, float(alone.abs().max())
    for what, a, b, tolerance in (
        # In rows of the same shape, only rounding in experts that examples share may differ.
        ("changes with its neighbour", packed[0], packed[1], max(2 * eps, 1e-5)),
        ("is not what it is in a row of its own", packed[0], alone, eps**0.5),
    ):
        difference = float((a - b).abs().max())
        if not difference <= tolerance * scale:
            implementation = attention_of(model)
            other = ", or try model.attn_implementation: sdpa" if implementation != "sdpa" else ""
            raise InvalidInputError(
                f"The output of {type(model).__name__} with attn_implementation={implementation!r} for an example in a "
                f"packed row {what} (its logits differ by {difference:.3g} of {scale:.3g}): {remedy}{other}."
            )


def _last_logits(model: PreTrainedModel, examples: Sequence[Tensor]) -> Tensor:
    ids = torch.cat(list(examples))[None]
    lengths = [len(example) for example in examples]
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])[None]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=ids.device)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, -min(COMPARED_TOKENS, len(examples[-1]) - 1) :] = 0
    return supervised_logits(model, ids, labels, Segments(positions, starts, max(lengths))).double()
