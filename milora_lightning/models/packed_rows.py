"""Whether a language model keeps the examples of a packed row apart."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_lightning.config import IGNORE_INDEX
from milora_lightning.models.supervision import supervised_logits
from milora_lightning.utils.compat import attention_of
from milora_lightning.utils.errors import InvalidInputError

REMEDY = "set data.packing to false"
TRIED_ON_CPU = 48  # tokens of an example
COMPARED = 16  # last tokens of an example whose logits are compared
# Recurrent layers carry a state from one example to the next, whatever the positions.
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def check_takes_positions(model: PreTrainedModel) -> None:
    """Refuse a model that by what it is cannot keep the examples of a row apart.

    Raises:
        ValueError: If its forward takes no positions, or it has layers other than attention.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise InvalidInputError(f"{name} takes no position_ids, by which packed examples are kept apart: {REMEDY}.")
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    others = sorted({str(kind) for kind in kinds} - {*ATTENTION})
    if others:
        raise InvalidInputError(f"{name} has layers of {others[0]}, which see all of a packed row: {REMEDY}.")


@torch.no_grad()
def check_separation(model: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Try whether an example gets the same logits behind others in its row, and alone.

    Args:
        model: The model, where and as it will be trained.
        tokens: Token ids of an example.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    check_takes_positions(model)
    device = model.get_input_embeddings().weight.device
    # On CPUs a few tokens: what keeps examples apart does not hang on their length, and time does.
    example = torch.tensor(tokens[: TRIED_ON_CPU if device.type == "cpu" else None], device=device)
    with _evaluating(model):
        alone = _last_logits(model, [example])
        beside = [_last_logits(model, [neighbour, example]) for neighbour in (example, example.flip(0))]
    eps, scale = torch.finfo(model.dtype).eps, float(alone.abs().max())
    for what, a, b, tolerance in (
        # In rows of the same shape nothing but the rounding of shared experts may differ.
        ("changes with its neighbour", beside[0], beside[1], max(2 * eps, 1e-5)),
        ("is another than alone", beside[0], alone, eps**0.5),
    ):
        difference = float((a - b).abs().max())
        if not difference <= tolerance * scale:
            implementation = attention_of(model)
            other = ", or try model.attn_implementation: sdpa" if implementation != "sdpa" else ""
            raise InvalidInputError(
                f"What {type(model).__name__} with attn_implementation={implementation!r} makes of an example in a "
                f"packed row {what}, its logits by {difference:.3g} of {scale:.3g}: {REMEDY}{other}."
            )


def _last_logits(model: PreTrainedModel, examples: Sequence[Tensor]) -> Tensor:
    ids = torch.cat(list(examples))[None]
    positions = torch.cat([torch.arange(len(example), device=ids.device) for example in examples])[None]
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, -min(COMPARED, len(examples[-1]) - 1) :] = 0
    return supervised_logits(model, ids, labels, positions).double()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and each module back to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
