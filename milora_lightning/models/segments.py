"""The examples of a batch that consists of a single packed row."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from milora_lightning.utils.compat.transformers import attention_of


class Segments(NamedTuple):
    """The examples that share the only row of a batch.

    Attributes:
        position_ids: Positions (1, length), starting from 0 in each example and in the padding at the end.
        cu_seq_lens: Start of each example and of the padding, and end of the row; int32.
        max_length: Length of the longest example. A Python number, because with a tensor the host would wait in each
            layer.
    """

    position_ids: Tensor
    cu_seq_lens: Tensor
    max_length: int


Positions = Tensor | Segments | None
"""Positions (batch, length) of packed rows; the segments of a single row; None if each row is one example."""


def positions_of(batch: Mapping[str, Any]) -> Positions:
    """Return the positions of the examples in a batch."""
    if "cu_seq_lens" in batch:
        return Segments(batch["position_ids"], batch["cu_seq_lens"], int(batch["max_length"]))
    return batch.get("position_ids")


def skips_other_examples(model: PreTrainedModel) -> bool:
    """Return whether a model's attention skips pairs of tokens from different examples in a row."""
    name = attention_of(model)
    return "flash" in name or name == "flex_attention"


def attention_arguments(model: PreTrainedModel, positions: Positions) -> dict[str, Any]:
    """Return the arguments that make a model keep the examples of a row apart.

    All attention implementations derive this from the positions. Without the other arguments, flash attention would
    search the positions for boundaries, with the host waiting in every layer.
    """
    if positions is None:  # some models take no positions
        return {}
    if not isinstance(positions, Segments):
        return {"position_ids": positions}
    ids, starts, longest = positions
    passes = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    if "flash" not in attention_of(model) or not passes:
        return {"position_ids": ids}
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return {"position_ids": ids, **lengths}
