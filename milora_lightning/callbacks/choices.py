"""Measures a language model's performance on other tasks while it is fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from milora_lightning.callbacks._monitoring import check_alone, language_model_of, mark_of, tokenizer_of
from milora_lightning.config import IGNORE_INDEX
from milora_lightning.data.tasks.questions import Question, read_questions
from milora_lightning.models.loss import row_losses
from milora_lightning.parallel.work import in_step
from milora_lightning.strategies.base import data_rank, refuse_flat_shards
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.modes import eval_mode

LOSS, ACCURACY = "forgetting_choice_loss", "forgetting_choice_accuracy"


class ChoiceMonitor(Callback):
    """Measures how well a model answers multiple-choice questions of tasks that it is not trained on.

    A question is asked as plain text, and each choice continues it. The model's answer is the choice with the largest
    log-likelihood per token. Logs ``forgetting_choice_accuracy``, and ``forgetting_choice_loss``: minus the
    log-likelihood of the right choice, in nats per token, averaged over questions. With several files, both are also
    logged for each (``/NAME``); the values without a name are then means over all questions. The values before training
    are logged as step 0.

    Attributes:
        examples: Values for each question in the latest measurement, by name of the metric.
        results: The results of the latest measurement.

    Args:
        questions: A file of questions, a list of files, or files by their names. For the format see
            :func:`milora_lightning.data.tasks.questions.read_questions`.
        number: Maximum number of questions from each file; they are drawn with ``seed``.
        every: ``"validation"`` asks them at each validation, ``"end"`` only before and after training. Each measurement
            takes a forward pass over every choice of every question.
        batch_size: Number of rows (choices with their questions) in a batch, on each rank.
        seed: Seed for drawing the questions.
        tokenizer: Name of the model whose tokenizer is used; by default the module's ``tokenizer``.

    Raises:
        FileNotFoundError: In ``setup``, if there is no such file.
        ValueError: In ``setup`` if a file holds no questions, if there is another ChoiceMonitor, or under FSDP1; when
            fitting starts if the module has no causal language model of Hugging Face.
    """

    def __init__(
        self,
        questions: str | list[str] | dict[str, str],
        number: int = 200,
        every: Literal["validation", "end"] = "validation",
        batch_size: int = 16,
        seed: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        if number < 2 or batch_size < 1:
            raise InvalidInputError(f"number={number} and batch_size={batch_size} must be at least 2 and 1.")
        if every not in ("validation", "end"):
            raise InvalidInputError(f"every must be 'validation' or 'end', not {every!r}.")
        self.files = named_files(questions)
        self.number = number
        self.every = every
        self.batch_size = batch_size
        self.seed = seed
        self.tokenizer = tokenizer
        self.examples: dict[str, Tensor] = {}
        self.results: dict[str, float] = {}
        self._questions: dict[str, list[Question]] = {}
        self._rows: list[tuple[int, list[int], int]] = []
        self._of: object = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the questions before the model is loaded, so that a wrong path is found early."""
        refuse_flat_shards(trainer.strategy, "ChoiceMonitor cannot call the language model")
        check_alone(trainer, self, "give one of them all files, questions={one: FILE, two: FILE}")
        if not self._questions:
            self._questions = {name: read_questions(file, self.number, self.seed) for name, file in self.files.items()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run, and check that there is a language model."""
        language_model_of(pl_module, "ChoiceMonitor")
        self.results = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        if self.every == "validation" or trainer.sanity_checking:
            pl_module.log_dict(self.measure(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values from before training, because Lightning does not log its sanity check."""
        if trainer.global_step == 0:
            self._log(trainer, self.results or self.measure(trainer, pl_module), step=0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end, when WeightAveraging has given the module its average."""
        if self.every == "end":
            self._log(trainer, self.measure(trainer, pl_module), trainer.global_step)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Ask all questions, and return the results over all ranks.

        Args:
            trainer: The Trainer; all ranks must call this.
            pl_module: The module with the model.
        """
        model = language_model_of(pl_module, "ChoiceMonitor")
        if self._of is not (mark := mark_of(pl_module)):  # a monitor may measure several models, one after the other
            self._of, self._rows = mark, []
        rows = self._encoded(pl_module)
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        losses = torch.zeros(len(rows), device=pl_module.device)
        share = data_rank(trainer)
        with torch.no_grad(), eval_mode(model), trainer.precision_plugin.forward_context():
            for batch, counts in in_step(batches, share.number, share.size):
                sums, tokens = row_losses(model, *(x.to(pl_module.device) for x in collate(batch)))
                if counts:
                    losses[[place for place, _, _ in batch]] = sums / tokens
        if share.size > 1:
            losses = trainer.strategy.reduce(losses if share.first else torch.zeros_like(losses), reduce_op="sum")
        self._keep(losses.cpu())
        return self.results

    def _keep(self, losses: Tensor) -> None:
        """Store the results, given the loss per token of every choice of every question."""
        questions = [question for each in self._questions.values() for question in each]
        choices = torch.split(losses, [len(question.choices) for question in questions])
        pairs = list(zip(questions, choices, strict=True))
        loss = torch.stack([each[question.right] for question, each in pairs])
        # Of NaN, argmin would give the place: a model that has diverged answers nothing.
        right = torch.tensor(
            [float(bool(each.isfinite().all()) and int(each.argmin()) == question.right) for question, each in pairs]
        )
        self.examples = {LOSS: loss, ACCURACY: right}
        self.results = {name: values.mean().item() for name, values in self.examples.items()}
        if len(self._questions) > 1:
            sizes = [len(each) for each in self._questions.values()]
            for name, values in self.examples.items():
                parts = zip(self._questions, torch.split(values, sizes), strict=True)
                self.results |= {f"{name}/{file}": part.mean().item() for file, part in parts}

    def _encoded(self, pl_module: LightningModule) -> list[tuple[int, list[int], int]]:
        """Return the index of each row, its token ids, and where its choice begins, sorted by length."""
        if not self._rows:
            tokenizer = tokenizer_of(pl_module, self.tokenizer, "ChoiceMonitor")
            questions = [question for each in self._questions.values() for question in each]
            rows = [row for question in questions for row in encode(question, tokenizer)]
            self._rows = sorted(((i, ids, start) for i, (ids, start) in enumerate(rows)), key=lambda row: -len(row[1]))
        return self._rows

    def _log(self, trainer: Trainer, results: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(results, step=step)


def named_files(files: str | Sequence[str] | dict[str, str]) -> dict[str, str]:
    """Return files by name; files without names are named by their stems.

    >>> named_files(["data/piqa_test.json", "data/boolq.json"])
    {'piqa_test': 'data/piqa_test.json', 'boolq': 'data/boolq.json'}

    Raises:
        ValueError: If two files have the same name.
    """
    if isinstance(files, dict):
        return files
    places = [files] if isinstance(files, str) else list(files)
    named = {Path(place).stem: place for place in places}
    if len(named) < len(places):
        raise InvalidInputError(f"Several of {places} have the same name: name them, as in {{one: FILE, two: FILE}}.")
    return named


def encode(question: Question, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], int]]:
    """Tokenize a question with each of its choices; return token ids and where the choice begins."""
    prompt = list(tokenizer(question.prompt)["input_ids"])
    choices = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in question.choices]
    if not prompt or not all(choices):
        raise InvalidInputError(f"The tokenizer makes no tokens of a choice in {question}. Leave the question out.")
    return [([*prompt, *ids], len(prompt)) for ids in choices]


def collate(rows: Sequence[tuple[int, list[int], int]]) -> tuple[Tensor, Tensor]:
    """Pad rows on the right; return token ids and labels, in which only the choices count."""
    width = max(len(ids) for _, ids, _ in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, (_, ids, start) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, start : len(ids)] = input_ids[row, start : len(ids)]
    return input_ids, labels
