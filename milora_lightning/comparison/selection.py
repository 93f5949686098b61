"""Choosing learning rates: on examples and seeds that are not reported, on a grid that grows at its edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

import numpy as np

from milora_lightning.comparison.runs import Run
from milora_lightning.utils.errors import InvalidInputError

MEASURED = "val_"
"""Prefix of the names of results on the validation data."""
SELECTION, REPORTED = "selection_", "reported_"
"""The same for the selection set, on which rates are chosen, and for the reported part."""
LOSS = f"{REPORTED}loss"
SELECTION_LOSS = f"{SELECTION}loss"


def set_apart(run: Run, share: float | None, seed: int = 0) -> None:
    """Split a run's validation examples into a selection set and a reported set, and add the results on both.

    Args:
        run: A finished run; its validation examples are replaced by those of the two sets, unless that has been done.
        share: The share of examples in the selection set; None to report all examples, 1 to report none.
        seed: Seed of the split.

    Raises:
        ValueError: If too few examples are left in one of the two sets.
    """
    whole = {name: each for name, each in run.examples.items() if name.startswith(MEASURED)}
    if not whole:
        return
    numbers = whole["val_loss"].index
    chosen = numbers[:0]
    if share is not None:
        order = np.random.default_rng(seed).permutation(len(numbers))
        chosen = np.sort(numbers[order[: round(share * len(numbers))]])
        if len(chosen) < 1 or (share < 1 and len(numbers) - len(chosen) < 2):
            raise InvalidInputError(
                f"Of {len(numbers)} validation examples, a share of {share:g} to choose rates on leaves too few: give "
                "more validation data, or another --selection_size."
            )
    for name, each in whole.items():
        del run.examples[name]
        for prefix, members in ((SELECTION, chosen), (REPORTED, np.setdiff1d(numbers, chosen))):
            part = each.only(members)
            if not len(part.index):
                continue
            new = prefix + name.removeprefix(MEASURED)
            run.examples[new] = part
            values = dict(zip(part.steps.tolist(), part.means().tolist(), strict=True))
            for row in run.rows:
                if row["step"] in values:
                    row[new] = values[row["step"]]


def mean_losses(sweep: Sequence[Run]) -> dict[float, float]:
    """Return the final loss on the selection set for each rate: the mean over seeds, infinite if one diverged."""
    rates = sorted({run.learning_rate for run in sweep})
    losses = {rate: [run.last[SELECTION_LOSS] for run in sweep if run.learning_rate == rate] for rate in rates}
    return {rate: mean(each) if all(map(math.isfinite, each)) else math.inf for rate, each in losses.items()}


def best_rate(sweep: Sequence[Run]) -> float | None:
    """Return the learning rate with the lowest mean loss on the selection set; None if there are no runs.

    Raises:
        ValueError: If every rate has a run whose loss is not finite.
    """
    losses = mean_losses(sweep)
    if sweep and not any(map(math.isfinite, losses.values())):
        raise InvalidInputError(f"{sweep[0].method} diverges with every learning rate of the sweep: give smaller ones.")
    return min(losses, key=losses.__getitem__, default=None)


def next_rate(sweep: Sequence[Run], given: Sequence[float], limit: int) -> float | None:
    """Return the next rate of a method's grid: one step beyond the edge, if the best rate is at the edge.

    Args:
        sweep: The method's runs so far.
        given: The rates that the user gave; the step is the ratio of the two at the edge.
        limit: Maximum number of added rates.

    Returns:
        The rate, rounded to three digits; None if the best is within the grid, or the limit is reached.
    """
    tried = sorted({run.learning_rate for run in sweep})
    best = best_rate(sweep)
    if len(given) < 2 or len(tried) - len(given) >= limit or best not in (tried[0], tried[-1]):
        return None
    ordered = sorted(given)
    if best == tried[-1]:
        return float(f"{best * ordered[-1] / ordered[-2]:.3g}")
    return float(f"{best * ordered[0] / ordered[1]:.3g}")


def at_edge(sweep: Sequence[Run]) -> bool:
    """Return whether a method's best rate is the smallest or the largest one tried."""
    rates = sorted({run.learning_rate for run in sweep})
    return len(rates) > 1 and best_rate(sweep) in (rates[0], rates[-1])
