"""Ranks by energy: with equal ranks, the trained slices hold very different shares of their weights.

Here ranks are chosen such that each slice holds the same share of its ‖W‖²_F, as nearly as integers allow, and that
they have the same sum as equal ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from rich.progress import track
from torch import Tensor, nn

from milora_lightning.adapters.base_weight import dense_weight
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.linear_layers import groups_of
from milora_lightning.config import LoRAConfig
from milora_lightning.linalg.products import in_double
from milora_lightning.utils.errors import InvalidInputError

Which = Literal["minor", "principal"]

MOST = 4
"""Maximum rank in multiples of ``r``; otherwise a weight of low rank could take the ranks of all others."""


@torch.no_grad()
def shares(weight: Tensor, which: Which) -> Tensor:
    """Compute the share of ‖W‖²_F that the slice of each rank holds.

    Args:
        weight: A matrix (out, in), or several (number, out, in), whose shares are averaged.
        which: Whether a slice is of the smallest or the largest singular values.

    Returns:
        The shares of the slices of rank 1, 2, …, min(out, in), in ascending order; all 1 for a weight of zeros.

    >>> shares(torch.diag(torch.tensor([3.0, 1.0, 0.0])), "minor")
    tensor([0.0000, 0.1000, 1.0000], dtype=torch.float64)
    """
    matrices = in_double(weight).reshape(-1, *weight.shape[-2:])
    energies = torch.stack([torch.linalg.eigvalsh(W @ W.mT if len(W) <= W.shape[1] else W.mT @ W) for W in matrices])
    energies = energies.clamp(min=0)
    cumulative = (energies if which == "minor" else energies.flip(-1)).cumsum(-1)
    total = cumulative[:, -1:]
    return torch.where(total > 0, cumulative / total, 1.0).mean(0)


def ranks_by_share(layers: Mapping[str, Tensor], r: int, most: int | None = None) -> dict[str, int]:
    """Choose ranks whose slices hold the same share of each weight, and whose mean is r.

    Args:
        layers: The result of :func:`shares` for each layer.
        r: The mean of the ranks.
        most: The largest rank; by default ``MOST`` times r.

    Returns:
        The rank of each layer, from 1 to ``most`` and to the number of its singular values. Their sum is r times the
        number of layers, unless the layers do not allow that much.

    >>> ranks_by_share({"even": torch.tensor([0.25, 0.5, 0.75, 1.0]), "steep": torch.tensor([0.0, 0.1, 0.2, 1.0])}, 2)
    {'even': 1, 'steep': 3}
    """
    most = MOST * r if most is None else most
    steps = sorted(
        (share, rank, name)
        for name, values in layers.items()
        for rank, share in enumerate(values.tolist()[:most], 1)
        if rank > 1
    )
    ranks = dict.fromkeys(layers, 1)
    for _, _, name in steps[: r * len(layers) - len(layers)]:  # in order for each layer, since its shares ascend
        ranks[name] += 1
    return ranks


def rank_pattern(
    module: nn.Module, r: int, which: Which = "minor", most: int | None = None, description: str = "Reading spectra"
) -> dict[str, int]:
    """Choose the ranks of a module's adapters by energy, with a progress bar.

    Args:
        module: A module with adapters, initialized or not, and with weights.
        r: The mean rank.
        which: Whether adapters start at the smallest or the largest singular triplets.
        most: The largest rank; by default ``MOST`` times r.
        description: Label of the progress bar.

    Returns:
        ``rank_pattern`` for :class:`milora_lightning.LoRAConfig`: each layer's name as a regular expression, with its
        rank. Grouped convolutions and fused projections are left out, so they keep r.

    Raises:
        ValueError: If there are no adapters.
    """
    adapters = lora_layers(module).items()
    layers = {n: layer for n, layer in adapters if groups_of(layer.base_layer) == 1 and not layer.parts}
    if not layers:
        raise InvalidInputError("There are no adapters whose ranks could be chosen: inject some first.")
    found = {
        name: shares(dense_weight(layer), which).cpu()
        for name, layer in track(layers.items(), description, transient=True)
    }
    return {re.escape(name): rank for name, rank in ranks_by_share(found, r, most).items()}


def default_slice(config: LoRAConfig) -> Which:
    """Return the slice of a start: the largest triplets for ``pissa`` and ``principal …``, otherwise the smallest.

    >>> default_slice(LoRAConfig()), default_slice(LoRAConfig(init="principal x minor"))
    ('minor', 'principal')
    """
    return "principal" if config.init.split(" ")[0] in ("pissa", "principal", "olora") else "minor"
