"""Where the examples of a batch are when they share its only row."""

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
        cu_seq_lens: Where examples and padding begin, and where the row ends; int32.
        max_length: Length of the longest of them. A number, because the host would wait for a tensor in each layer.
    """

    position_ids: Tensor
    cu_seq_lens: Tensor
    max_length: int


Positions = Tensor | Segments | None
"""Positions (batch, length) of packed rows; where examples are in a single row; None if each row is one example."""


def positions_of(batch: Mapping[str, Any]) -> Positions:
    """Return what a batch says of the examples in its rows."""
    if "cu_seq_lens" in batch:
        return Segments(batch["position_ids"], batch["cu_seq_lens"], int(batch["max_length"]))
    return batch.get("position_ids")


def skips_other_examples(model: PreTrainedModel) -> bool:
    """Tell whether a model's attention spends no time on pairs of tokens of different examples in a row."""
    name = attention_of(model)
    return "flash" in name or name == "flex_attention"


def attention_arguments(model: PreTrainedModel, positions: Positions) -> dict[str, Any]:
    """Return the arguments with which a model keeps the examples of a row apart.

    All implementations of attention do so by the positions. Flash attention would look for the boundaries in them, with
    the host waiting in every layer, if it were not given these.
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
