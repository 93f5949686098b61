"""Ranks by the explained variance of layers' inputs, distributed as in EVA."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from milora_lightning.starts import Statistics
from milora_lightning.starts.activations import covariance
from milora_lightning.utils.errors import InvalidInputError


def ranks_by_variance(statistics: Mapping[str, Statistics], r: int, rho: float = 2.0) -> dict[str, int]:
    """Distribute a total rank of r times the number of layers by explained variance (EVA, arXiv 2410.07170).

    The principal components of all layers' inputs are sorted by the share of their layer's variance that they explain.
    A layer's rank is the number of its components among the first. Unlike in PEFT, every layer gets at least rank 1.

    Args:
        statistics: Second moments of inputs by layer, from :func:`milora_lightning.collect_statistics`.
        r: Mean rank.
        rho: No layer gets more than rank ρ r, rounded; with ρ = 1 each gets rank r.

    Returns:
        A ``rank_pattern`` with an entry for each layer. Do not set ``lora_alpha`` with it: by default it equals the
        rank, so that all scales are equal.

    Raises:
        ValueError: If r or ρ is below 1, or there are no statistics of inputs.

    >>> few, many = torch.diag(torch.tensor([9.0, 1.0, 0.0, 0.0])), torch.eye(4)
    >>> ranks_by_variance({"a": Statistics(few), "b": Statistics(many)}, r=2, rho=2.0)
    {'a': 1, 'b': 3}
    """
    if r < 1 or rho < 1:
        raise InvalidInputError(f"Ranks are shared out with r and rho of at least 1, not r={r} and rho={rho}.")
    entries: list[tuple[float, str]] = []
    spectra: dict[int, torch.Tensor] = {}
    for name, each in statistics.items():
        if each.inputs is None:
            raise InvalidInputError(f"There are no statistics of the inputs of layer {name!r}: collect them for eva.")
        if (spectrum := spectra.get(id(each.inputs))) is None:
            values = torch.linalg.eigvalsh(covariance(each, each.inputs)).flip(0).clamp(min=0)
            total, inputs = values.sum(), each.inputs.diagonal().sum()
            noise = torch.finfo(each.inputs.dtype).eps * len(values) * inputs  # of inputs that are always the same
            spectrum = spectra[id(each.inputs)] = values / total if total > noise else torch.zeros_like(values)
        most = min(len(spectrum), round(r * rho))
        entries += [(float(share), name) for share in spectrum[1:most]]
    ranks = dict.fromkeys(statistics, 1)
    budget = r * len(ranks) - len(ranks)
    for _, name in sorted(entries, key=lambda entry: -entry[0])[:budget]:
        ranks[name] += 1
    return {re.escape(name): rank for name, rank in ranks.items()}
