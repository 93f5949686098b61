"""Choosing answers from given choices by their likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from milora_lightning.models.positions import next_labels, supervised_positions


def choose_likeliest(logits: Tensor, labels: Tensor, choices: Sequence[Sequence[str]]) -> list[str]:
    """Choose the likeliest answer to each question.

    Args:
        logits: Logits of the supervised tokens, (supervised tokens, vocabulary), row after row.
        labels: (rows, length); one row for each choice of each question, in order.
        choices: The choices of each question.

    Returns:
        For each question the choice whose response has the largest log-likelihood, summed over its tokens.

    >>> certain = 10 * torch.eye(3)  # predicts token i at the i-th of these positions
    >>> choose_likeliest(certain[:2], torch.tensor([[-100, 0], [-100, 2]]), [["no", "yes"]])
    ['no']
    """
    positions = supervised_positions(labels)
    losses = F.cross_entropy(logits.float(), next_labels(labels, positions), reduction="none")
    scores = -losses.new_zeros(len(labels)).index_add_(0, positions // labels.shape[1], losses)
    parts = torch.split(scores.cpu(), [len(each) for each in choices])
    return [each[int(part.argmax())] for each, part in zip(choices, parts, strict=True)]
