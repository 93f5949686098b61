"""What runs are judged by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from milora_lightning.comparison.selection import LOSS, REPORTED

KL = "forgetting_kl"
SIZE, EFFECT = "update_size", "update_effect"


@dataclass(frozen=True)
class Measure:
    """A result of a run.

    Attributes:
        name: The name of the result.
        title: What the report calls it.
        lower_is_better: Whether little of it is an advantage.
        relative: Whether it is compared by ratios, since it spans orders of magnitude.
    """

    name: str
    title: str
    lower_is_better: bool = True
    relative: bool = False

    @property
    def is_forgetting(self) -> bool:
        """Whether it tells what is forgotten."""
        return self.name.startswith("forgetting_")


JUDGED = (
    Measure(LOSS, "loss"),
    Measure(f"{REPORTED}accuracy", "accuracy", lower_is_better=False),
    Measure(KL, "KL from the base", relative=True),
    Measure("forgetting_choice_loss", "loss of right choices"),
    Measure("forgetting_choice_accuracy", "accuracy on other tasks", lower_is_better=False),
)
"""What methods are judged by."""

TOLD = (
    *JUDGED,
    Measure("forgetting_cross_entropy", "cross-entropy with the base"),
    Measure(SIZE, "‖ΔW‖/‖W‖"),
    Measure(EFFECT, "‖ΔWx‖/‖Wx‖"),
)
"""What the report tells of each run: also what is neither good nor bad in itself, and what follows from the others."""

PLACES = {LOSS: "loss", SIZE: "size of the update, ‖ΔW‖/‖W‖", EFFECT: "effect of the update, ‖ΔWx‖/‖Wx‖"}
"""What trajectories are compared at equal values of."""


def title_of(name: str) -> str:
    """Return what the report calls a result; one of several texts or files has their name behind a slash.

    >>> title_of("forgetting_kl/code"), title_of("val_perplexity")
    ('KL from the base, code', 'val_perplexity')
    """
    general, _, part = name.partition("/")
    title = next((measure.title for measure in TOLD if measure.name == general), general)
    return f"{title}, {part}" if part else title


def parts(names: Iterable[str]) -> list[str]:
    """Return the names of what is forgotten of single texts and files."""
    told = {measure.name for measure in TOLD if measure.is_forgetting and measure.name != "forgetting_cross_entropy"}
    return [name for name in names if "/" in name and name.partition("/")[0] in told]
