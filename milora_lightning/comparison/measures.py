"""The measures by which runs are judged."""

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
        title: Its title in the report.
        lower_is_better: Whether lower values are better.
        relative: Whether it is compared by ratios, because it spans orders of magnitude.
    """

    name: str
    title: str
    lower_is_better: bool = True
    relative: bool = False

    @property
    def is_share(self) -> bool:
        """Whether it is the fraction of examples that are right."""
        return self.name.endswith("accuracy")

    @property
    def is_forgetting(self) -> bool:
        """Whether it measures forgetting."""
        return self.name.startswith("forgetting_")


JUDGED = (
    Measure(LOSS, "loss"),
    Measure(f"{REPORTED}accuracy", "accuracy", lower_is_better=False),
    Measure(KL, "KL from the base", relative=True),
    Measure("forgetting_choice_loss", "loss of right choices"),
    Measure("forgetting_choice_accuracy", "accuracy on other tasks", lower_is_better=False),
)
"""The measures by which methods are judged."""

TOLD = (
    *JUDGED,
    Measure("forgetting_cross_entropy", "cross-entropy with the base"),
    Measure(SIZE, "‖ΔW‖/‖W‖"),
    Measure(EFFECT, "‖ΔWx‖/‖Wx‖"),
)
"""The measures that the report lists for each run, including neutral ones and those that follow from others."""

PLACES = {LOSS: "loss", SIZE: "size of the update, ‖ΔW‖/‖W‖", EFFECT: "effect of the update, ‖ΔWx‖/‖Wx‖"}
"""The quantities at whose equal values trajectories are compared."""


def title_of(name: str) -> str:
    """Return the title of a result in the report; results for one text or file have its name after a slash.

    >>> title_of("forgetting_kl/code"), title_of("val_perplexity")
    ('KL from the base, code', 'val_perplexity')
    """
    general, _, part = name.partition("/")
    title = next((measure.title for measure in TOLD if measure.name == general), general)
    return f"{title}, {part}" if part else title


def parts(names: Iterable[str]) -> list[str]:
    """Return the names of results that measure forgetting of single texts and files."""
    reported = {
        measure.name for measure in TOLD if measure.is_forgetting and measure.name != "forgetting_cross_entropy"
    }
    return [name for name in names if "/" in name and name.partition("/")[0] in reported]
