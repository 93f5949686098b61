"""Remarks on the time that generated answers in validations take, and on how to reduce it."""

from __future__ import annotations

import time

from lightning.pytorch import LightningModule, Trainer

from milora_lightning.data import SFTDataModule
from milora_lightning.screen.figures import duration
from milora_lightning.strategies.base import data_rank
from milora_lightning.utils.counting import counted
from milora_lightning.utils.messages import inform

REMEDY = "data.num_generation_examples makes them fewer (0: none), model.max_new_tokens shorter"
LONG = 30.0
"""Seconds of generating answers in a validation that cause a remark."""


class Patience:
    """Tells the user how many answers come before training and, once, that they take long; each with a remedy."""

    def __init__(self) -> None:
        self._ahead = 0
        self._started = 0.0
        self._said = False

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin a validation within ``fit``."""
        self._started, self._ahead = time.monotonic(), answers_ahead(trainer)
        if trainer.sanity_checking and self._ahead:
            inform(
                f"Before training, {counted(self._ahead, 'held-out prompt')} {'is' if self._ahead == 1 else 'are'} "
                f"answered, in up to {counted(getattr(module, 'max_new_tokens', 0), 'token')} each: {REMEDY}."
            )

    def answered(self, number: int) -> None:
        """Count answers, and remark on it if they take long.

        Args:
            number: Number of answers so far in this validation.
        """
        seconds = time.monotonic() - self._started
        if number and self._ahead and seconds > LONG and not self._said:
            self._said = True
            inform(
                f"{number} of {counted(self._ahead, 'answer')} took {duration(seconds)}, and every validation has as "
                f"many: {REMEDY}."
            )


def answers_ahead(trainer: Trainer) -> int:
    """Return for how many prompts this process will generate answers in the validation that begins."""
    data = getattr(trainer, "datamodule", None)
    batches = list(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
    if not isinstance(data, SFTDataModule) or data.answer_by != "generation" or len(batches) < 2:
        return 0
    share = -(-len(data.answered("validation")) // data_rank(trainer).size)
    return int(min(share, batches[1] * data.generation_batch_size))
