"""``continual``: learns a sequence of tasks, and measures all of them after each.

After each task its adapters are merged into the weights. The next task decomposes the merged model and, like any
adapters here, starts exactly at it.
"""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import xxhash
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from rich.console import Console

from milora_lightning.cli.config_files import CONFIGS
from milora_lightning.cli.continual_report import show, write_report
from milora_lightning.cli.ending import by_ctrl_c
from milora_lightning.cli.main import MiLoRACLI
from milora_lightning.data import SFTDataModule
from milora_lightning.export.folders import export_merged
from milora_lightning.metrics.results import results
from milora_lightning.module import CausalLMModule
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import new_folder, replaced_file
from milora_lightning.utils.messages import each_said_once

RESULTS, CONFIG, MODEL, FOLDING = "results.json", "config.yaml", "model", "folding.json"
Results = dict[str, dict[str, float]]
"""Validation results by task name."""


class TaskCLI(MiLoRACLI):
    """The command line of one task, parsed immediately; the classes are instantiated when the task begins.

    Loggers and checkpoint callbacks of the configs are left out.
    """

    command = "continual"

    def __init__(self, args: list[str], evaluates: bool = False) -> None:
        self.evaluates = evaluates
        options: dict[str, Any] = {"save_config_callback": None, "auto_configure_optimizers": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
            super().__init__(CausalLMModule, SFTDataModule, args=args, run=False, **options)

    def instantiate_classes(self) -> None:
        """Do nothing; :meth:`begin` instantiates the classes."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the Trainer; for an evaluation, without callbacks that observe training."""
        given = [] if self.evaluates else self.config_init.trainer.callbacks or []
        kwargs.update(callbacks=[c for c in given if not isinstance(c, Checkpoint)], logger=False)
        trainer = super().instantiate_trainer(**kwargs, enable_checkpointing=False, enable_model_summary=False)
        if trainer.world_size > 1:
            raise InvalidInputError(
                "continual trains on one device, and this run would use several: add --trainer.devices 1."
            )
        return trainer

    def _set_seed(self) -> None:
        """Use seed 0 if none is given: with a random one, an interrupted command could not be continued."""
        if self.config.seed_everything is True:
            self.config.seed_everything = 0

    def begin(self) -> None:
        """Seed, and instantiate the classes."""
        if self.config.seed_everything is not False:
            seed_everything(self.config.seed_everything, workers=True, verbose=False)
        super().instantiate_classes()

    def settings(self) -> str:
        """Return the whole configuration."""
        return str(self.parser.dump(self.config))


class TaskSequence:
    """Tasks in order, each with a folder that appears when the task is finished.

    Args:
        fit: Options of ``fit`` that all tasks share.
        tasks: The overlay of each task, by its name.
        output: Folder in which each task gets a folder.
    """

    def __init__(self, fit: Sequence[str], tasks: dict[str, str], output: Path) -> None:
        self.fit, self.tasks, self.output = list(fit), tasks, output

    def folder(self, number: int) -> Path:
        """Return the folder of the results after a number of tasks."""
        return self.output / f"{number}-{[*self.tasks][number - 1] if number else 'before'}"

    def parse(self, task: str, after: int, evaluates: bool = False) -> TaskCLI:
        """Parse the command line of a task on the model after a number of tasks."""
        base = [f"--model.name_or_path={self.folder(after) / MODEL}"] if after else []
        alone = ["--adapter.init=full"] if evaluates else []
        return TaskCLI([*self.fit, "--config", self.tasks[task], *base, *alone], evaluates)

    def check(self) -> None:
        """Parse the configuration of each task.

        Raises:
            ValueError: If its adapters cannot be merged, or a finished task had other settings.
        """
        for number, task in enumerate(self.tasks):
            cli = self.parse(task, 0)
            adapter = cli.config.adapter
            for wrong, remedy in (
                (adapter.init == "full", "adapter.init is full, and only adapters are folded: choose a start"),
                (adapter.start_from is not None, "adapter.start_from would start each task at the same: leave it out"),
                (
                    getattr(cli.config.model, "quantization", None) is not None,
                    "a quantized model cannot take what is folded: leave model.quantization out",
                ),
            ):
                if wrong:
                    raise InvalidInputError(f"Task {task!r} cannot be one of a sequence: {remedy}.")
            done = self.folder(number + 1) / CONFIG
            if done.exists() and done.read_text(encoding="utf-8") != self.parse(task, number).settings():
                raise InvalidInputError(
                    f"{done.parent} holds a task with other settings (its {CONFIG} differs from the current one). "
                    "Choose another output, or remove that folder and the later ones."
                )

    def evaluate(self, after: int) -> Results:
        """Validate the merged model after a number of tasks on each task, unless that has been done before."""
        path = self.folder(after) / RESULTS
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known = {}
        for task in self.tasks:
            cli = self.parse(task, after, evaluates=True)
            settings = xxhash.xxh3_128_hexdigest(cli.settings().encode())
            if before.get(task, {}).get("settings") != settings:
                if after and not (self.folder(after) / MODEL).is_dir():
                    raise InvalidInputError(
                        f"The model in {self.folder(after)} is to be validated on {task!r} and has not been kept "
                        "(keep_models last): choose another output to run the sequence again."
                    )
                before[task] = {"settings": settings, "results": self._validate(task, cli)}
                write_json(path, before)
            known[task] = before[task]["results"]
            del cli
            gc.collect()  # a module and its Trainer refer to each other
        return known

    def _validate(self, task: str, cli: TaskCLI) -> dict[str, float]:
        cli.begin()
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
        if not (found := results(cli.trainer.callback_metrics, "val")):
            raise InvalidInputError(f"Task {task!r} has no validation data: set data.source.validation.")
        return found

    def learn(self, number: int) -> None:
        """Train the task with this number, counted from 1, and merge its adapters."""
        cli = self.parse([*self.tasks][number - 1], number - 1)
        cli.begin()
        try:
            cli.trainer.fit(cli.model, cli.datamodule)
        except SystemExit as error:
            if by_ctrl_c(cli.trainer, error):
                raise KeyboardInterrupt from error
            raise
        with new_folder(self.folder(number)) as folder:
            cli.trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
            # Without a chat template for the prompt format: the next task would take it for the model's chat template.
            lost = export_merged(cli.model, folder / MODEL, cli.model.tokenizer)
            (folder / CONFIG).write_text(cli.settings(), encoding="utf-8")
            write_json(folder / FOLDING, {"lost_by_rounding": lost})

    def run(self, keep_models: Literal["all", "last"]) -> tuple[list[Results], list[float]]:
        """Learn and measure the unfinished tasks; return the results before training and after each task."""
        rows, lost = [], []
        for number in range(len(self.tasks) + 1):
            folder = self.folder(number)
            if number and not (folder / CONFIG).exists():
                Console().rule(f"Task {number} of {len(self.tasks)}: {[*self.tasks][number - 1]}")
                self.learn(number)
            if number:
                lost.append(json.loads((folder / FOLDING).read_text(encoding="utf-8"))["lost_by_rounding"])
            rows.append(self.evaluate(number))
            if keep_models == "last" and number > 1:
                shutil.rmtree(self.folder(number - 1) / MODEL, ignore_errors=True)
        return rows, lost


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with replaced_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def continual(fit: Sequence[str], tasks: list[str], output: str, keep_models: Literal["all", "last"] = "all") -> None:
    """Learn a sequence of tasks, and measure all of them before training and after each.

    Takes the options of fit. Each task is a separate config, for example with another data.source. After each task, its
    adapters are merged into the weights (output/1-NAME/model), which the next task decomposes. Writes results.csv and
    report.md with the matrix of results, averages, backward transfer and forgetting. An interrupted sequence continues
    with the unfinished task, and tasks may be appended.

    Args:
        fit: Options of ``fit`` that all tasks share.
        tasks: YAML files, one for each task, in order.
        output: Folder for the models and the report.
        keep_models: Whether to keep the merged model after each task, or only after the last one.
    """
    names = {Path(task).stem: task for task in tasks}
    if not tasks or len(names) < len(tasks):
        raise InvalidInputError(f"tasks={tasks} must have at least one entry, and files of different names.")
    for task in tasks:
        if not (Path(task).is_file() or (CONFIGS / task).is_file()):
            raise InvalidInputError(f"There is no config {task!r}: tasks takes YAML files.")
    sequence = TaskSequence(fit, names, Path(output).expanduser())
    with each_said_once():
        sequence.check()
        rows, lost = sequence.run(keep_models)
    write_report(sequence.output, list(names), rows, lost)
    Console().print(show(list(names), rows))
    print(f"The report is in {sequence.output / 'report.md'}")
