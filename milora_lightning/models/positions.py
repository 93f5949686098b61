"""Positions in a batch whose next label counts, found while labels are on the CPU to avoid waiting for a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from milora_lightning.config import IGNORE_INDEX

CARRIED = "supervised"
"""Entry of a batch with the positions during the transfer to the device."""

_KNOWN = "_supervised_positions"


def supervised_positions(labels: Tensor) -> Tensor:
    """Return the positions whose next label counts, as indices (supervised tokens,) into the flattened labels.

    Their number depends on the labels, so if these are on a GPU, the host must wait for it, unless the positions are
    known from :func:`found_before_transfer`.

    Args:
        labels: Labels (batch, length), ``IGNORE_INDEX`` where they do not count.

    >>> supervised_positions(torch.tensor([[-100, -100, 7], [-100, 8, 9]]))
    tensor([1, 3, 4])
    """
    if (positions := _known(labels)) is not None:
        return positions
    supervised = torch.zeros_like(labels, dtype=torch.bool)
    supervised[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return supervised.flatten().nonzero()[:, 0]


def supervised_count(labels: Tensor) -> Tensor:
    """Return how many tokens are supervised, as a scalar on the device of the labels, without waiting for it."""
    if (positions := _known(labels)) is not None:
        return torch.full((), len(positions), device=labels.device)
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def next_labels(labels: Tensor, positions: Tensor) -> Tensor:
    """Return the label after each position, (supervised tokens,)."""
    return labels.flatten().index_select(0, positions + 1)


def at_positions(values: Tensor, positions: Tensor) -> Tensor:
    """Select values (batch, length, width) at the positions; returns (supervised tokens, width)."""
    return values.flatten(0, 1).index_select(0, positions)


def found_before_transfer(batch: Any) -> Any:
    """Add the supervised positions to a batch with labels on the CPU, so that they move to the device with it."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.device.type != "cpu":
        return batch
    positions = supervised_positions(labels)
    return {**batch, CARRIED: positions.pin_memory() if labels.is_pinned() else positions}


def known_after_transfer(batch: Any) -> Any:
    """Remove the positions from a batch after the transfer, and remember them for :func:`supervised_positions`.

    They are not used for labels that are replaced or modified later.
    """
    if not isinstance(batch, Mapping) or CARRIED not in batch:
        return batch
    batch = dict(batch)
    positions, labels = batch.pop(CARRIED), batch["labels"]
    if not labels.is_inference():  # such tensors have no version counter
        setattr(labels, _KNOWN, (positions, labels._version))
    return batch


def _known(labels: Tensor) -> Tensor | None:
    positions, version = getattr(labels, _KNOWN, (None, None))
    return positions if positions is not None and version == labels._version else None
