"""Runs of a comparison whose truth is planted."""

from __future__ import annotations

import numpy as np

from milora_lightning.comparison.findings import Margins
from milora_lightning.comparison.runs import Examples, Run
from milora_lightning.comparison.selection import set_apart

STEPS = np.array([0.0, 50.0, 100.0, 150.0, 200.0])
MARGINS = Margins(0.01, 0.05)
RATES = {3e-4: 0.5, 1e-3: 1.0, 3e-3: 0.8}
"""How fast a run learns with each rate."""


def planted(method: str, rate: float, seed: int, examples: int, gain: float, keeps: float, noise: float) -> Run:
    """A run of a method that ends with a loss lower by ``gain``, and forgets ``keeps`` times as much at equal loss."""
    rng = np.random.default_rng([seed, *method.encode()])
    shared = np.random.default_rng(examples)
    difficulty, ids = 0.3 * shared.normal(size=examples), np.arange(examples)
    progress = 1 - np.exp(-STEPS / 80 * RATES[rate])
    loss = (1.6 - (1.1 + gain) * progress)[:, None] + difficulty + noise * rng.normal(size=(5, examples))
    kl = keeps * (np.expm1(3 * progress))[:, None] * np.exp(0.3 * shared.normal(size=40) + 0.01 * rng.normal(size=40))
    kept = {
        "val_loss": Examples(loss + noise / 20 * rng.normal(), shared.integers(20, 60, examples) * 1.0, STEPS, ids),
        "forgetting_kl": Examples(kl, np.ones(40), STEPS, np.arange(40)),
    }
    means = {name: each.means() for name, each in kept.items()}
    rows = [
        {"step": step, "seconds": 60.0, "update_size": 0.01 * i, **{name: of[i] for name, of in means.items()}}
        for i, step in enumerate(STEPS.tolist())
    ]
    return Run(method, rate, seed, rows, kept)


TRUTH = {"lora": (0.0, 1.0), "same": (0.0, 1.0), "good": (0.1, 1.0), "keeper": (0.0, 0.5), "bad": (-0.2, 1.5)}
"""The gain in loss of each method, and how much it forgets."""


def comparison(seeds: int, examples: int = 400, noise: float = 0.02) -> tuple[list[Run], list[Run]]:
    made = [
        [planted(m, 1e-3, seed, examples, *truth, noise) for seed in range(seeds) for m, truth in TRUTH.items()],
        [
            planted(m, rate, seed, examples, *truth, noise)
            for seed in (8, 9)
            for m, truth in TRUTH.items()
            for rate in RATES
        ],
    ]
    for run in [*made[0], *made[1]]:
        set_apart(run, 0.3)
    return made[0], made[1]
