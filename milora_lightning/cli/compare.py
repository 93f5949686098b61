"""``compare``: trains several methods under the same conditions, and reports how they compare."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from rich.console import Console

from milora_lightning.cli.config_files import CONFIGS
from milora_lightning.cli.main import MiLoRACLI
from milora_lightning.cli.runs import Row, Run, best_rate, read_rows, write_rows
from milora_lightning.data import SFTDataModule
from milora_lightning.metrics.results import results
from milora_lightning.module import CausalLMModule
from milora_lightning.starts import find_start
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import check_file, new_folder
from milora_lightning.utils.messages import each_said_once


class Trajectory(Callback):
    """Records the results of every validation, from before training to its end."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._started = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is validation data, before time is spent on training."""
        if not self.rows:
            raise InvalidInputError(
                "Methods are compared by their validation loss, and there is no validation data: set "
                "data.source.validation."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the step, the seconds since the start, and all results of the validation."""
        if self.rows and self.rows[-1]["step"] == trainer.global_step:
            return
        measured = results(trainer.callback_metrics, "val")
        self.rows.append({"step": trainer.global_step, "seconds": time.monotonic() - self._started, **measured})


class RunCLI(MiLoRACLI):
    """The command line of one run, which is parsed immediately and instantiated when the run starts.

    Loggers and checkpoint callbacks of the configs are left out, so the run itself logs and saves nothing.
    """

    command = "compare"

    def __init__(self, args: list[str]) -> None:
        self.trajectory = Trajectory()
        options: dict[str, Any] = {"save_config_callback": None, "auto_configure_optimizers": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
            super().__init__(CausalLMModule, SFTDataModule, args=args, run=False, **options)

    def instantiate_classes(self) -> None:
        """Do nothing; :meth:`fit` instantiates the classes."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the Trainer, with the callback that records the trajectory."""
        callbacks = [c for c in self.config_init.trainer.callbacks or [] if not isinstance(c, Checkpoint)]
        kwargs.update(callbacks=[*callbacks, self.trajectory], logger=False, enable_checkpointing=False)
        kwargs.update(enable_model_summary=False)  # the same table for every run; MiLoRAInit shows a more specific one
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.world_size > 1:
            raise InvalidInputError(
                "compare trains on one device, and this run would use several: add --trainer.devices 1."
            )
        return trainer

    def fit(self) -> list[Row]:
        """Train, and return the results of every validation; the last row is from the end of training."""
        seed_everything(self.config.seed_everything, workers=True, verbose=False)
        super().instantiate_classes()
        self.trainer.fit(self.model, self.datamodule)
        if self.trajectory.rows[-1]["step"] != self.trainer.global_step:
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        return self.trajectory.rows


class Comparison:
    """Runs that differ only in method, learning rate and seed, each in a folder that appears when it is finished.

    Args:
        fit: Options of ``fit`` that all runs share.
        methods: The options that make each method, by its name.
        output: Folder in which each run gets a folder.
    """

    def __init__(self, fit: Sequence[str], methods: Mapping[str, Sequence[str]], output: Path) -> None:
        self.fit = list(fit)
        self.methods = methods
        self.output = output

    def parse(self, run: Run) -> RunCLI:
        """Parse the configuration of a run."""
        own = [
            *self.methods[run.method],
            f"--seed_everything={run.seed}",
            f"--data.seed={run.seed}",
            f"--model.optimizer.lr={run.learning_rate}",
            "--model.learning_rate=null",  # it would override the optimizer's
            "--trainer.num_sanity_val_steps=-1",
        ]
        return RunCLI([*self.fit, *own])

    def check(self, runs: Sequence[Run]) -> None:
        """Parse the configuration of each method, and read the results of finished runs.

        Raises:
            ValueError: If a finished run had other settings.
        """
        parsed: set[str] = set()
        for run in runs:
            folder = self.output / run.name
            if run.method in parsed and not folder.is_dir():
                continue  # it differs only by two numbers from one that has been parsed
            cli = self.parse(run)
            if (init := cli.config.adapter.init) != "full":
                find_start(init)  # now, and not when this run begins
            settings = _settings(cli)
            parsed.add(run.method)
            if folder.is_dir():
                if (folder / "config.yaml").read_text(encoding="utf-8") != settings:
                    raise InvalidInputError(
                        f"{folder} holds a run with other settings (its config.yaml differs from the current one). "
                        "Choose another output, or remove the folder to run it again."
                    )
                run.rows = read_rows(folder / "trajectory.csv")

    def run(self, runs: Sequence[Run], what: str, save: bool) -> None:
        """Train the runs that are not finished; with ``save``, keep their adapters."""
        pending = [run for run in runs if not run.rows]
        for number, run in enumerate(pending, 1):
            Console().rule(f"{what}, run {number} of {len(pending)}: {run.name}")
            cli = self.parse(run)
            with new_folder(self.output / run.name) as folder:
                run.rows = cli.fit()
                write_rows(folder / "trajectory.csv", run.rows)
                (folder / "config.yaml").write_text(_settings(cli), encoding="utf-8")
                if save:
                    cli.trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
            del cli
            gc.collect()  # a module and its Trainer refer to each other: without this, two models would be in memory


def method_options(method: str) -> list[str]:
    """Return the options that make a method: an overlay, or a start.

    >>> method_options("pissa"), method_options("mine.yaml"), method_options("gaussian x minor")
    (['--config', 'method/pissa.yaml'], ['--config', 'mine.yaml'], ['--adapter.init', 'gaussian x minor'])

    Raises:
        ValueError: If there is neither an overlay nor a start of that name.
    """
    if method.endswith((".yaml", ".yml")):
        return ["--config", method]
    overlay = f"method/{method}.yaml"
    if Path(overlay).is_file() or (CONFIGS / overlay).is_file():
        return ["--config", overlay]
    try:
        return ["--adapter.init", find_start(method).name]
    except InvalidInputError as error:
        raise InvalidInputError(f"There is no config {overlay!r}, and {error}") from error


def _settings(cli: RunCLI) -> str:
    return str(cli.parser.dump(cli.config))


def compare(
    fit: Sequence[str],
    methods: list[str],
    output: str,
    learning_rates: list[float],
    seeds: list[int] = [0, 1, 2],  # noqa: B006 (never modified, and shown in the help)
    sweep_seed: int | None = None,
    text: str | None = None,
    text_field: str = "text",
    text_tokens: int = 16384,
) -> None:
    """Train several methods with several seeds, and write a report of how they compare.

    Every method has the same learning rates to choose from. Each rate is tried with a separate seed, and the one with
    the lowest final validation loss is used for the reported runs. All other options are those of fit (--config,
    --trainer.max_steps ...) and apply to all runs; --trainer.val_check_interval sets how often results are recorded. An
    interrupted comparison continues with the first unfinished run.

    Args:
        fit: Options of ``fit`` that all runs share.
        methods: Names of shipped overlays (milora, pissa, lora, mica, milora-strict ...), paths of your own, or starts
            as adapter.init takes them ("gaussian x minor").
        output: Folder for results.csv, report.md, the plots and a folder for each run.
        learning_rates: Learning rates to choose from, for every method.
        seeds: Seeds of the reported runs.
        sweep_seed: Seed of the learning-rate sweep; by default none of the reported seeds.
        text: Held-out text on which forgetting is measured: a .txt, JSON, JSON lines or Parquet file, or a Hub name.
        text_field: Field that holds the text; not used for .txt files.
        text_tokens: Maximum number of tokens to measure on.

    Raises:
        ValueError: If a list is empty or has duplicates, or finished runs had other settings.
    """
    from milora_lightning.cli.report import (
        write_report,
    )  # imports matplotlib, an optional package: fail before any work

    overlays = {Path(m).stem if m.endswith((".yaml", ".yml")) else m: method_options(m) for m in methods}
    for name, values in (("methods", methods), ("learning_rates", learning_rates), ("seeds", seeds)):
        if not values or len(set(values)) < len(values) or len(overlays) < len(methods):
            raise InvalidInputError(f"{name}={values} must have at least one entry and no duplicates.")
    if text is not None:
        options = {"text": text, "field": text_field, "max_tokens": text_tokens}
        fit = [*fit, "--trainer.callbacks+=milora_lightning.ForgettingMonitor"]
        fit += [f"--trainer.callbacks.{name}={value}" for name, value in options.items()]
    check_file(Path(output) / "report.md", "The comparison")
    comparison = Comparison(fit, overlays, Path(output).expanduser())
    sweep_seed = max(seeds) + 1 if sweep_seed is None else sweep_seed
    grid = [(method, rate) for method in overlays for rate in learning_rates]
    sweep = [Run(*point, sweep_seed) for point in grid if len(learning_rates) > 1]
    # The sweep decides which of these will run; all of them are checked now.
    possible = {run.name: run for run in [*(Run(*point, seed) for point in grid for seed in seeds), *sweep]}
    with each_said_once():
        comparison.check(list(possible.values()))
        comparison.run(sweep, "Learning-rate sweep", save=sweep_seed in seeds)
        best = {m: best_rate([run for run in sweep if run.method == m]) or learning_rates[0] for m in overlays}
        runs = [possible[Run(m, best[m], seed).name] for seed in seeds for m in overlays]
        comparison.run(runs, "Comparison", save=True)
    write_report(comparison.output, runs, sweep, comparison.parse(runs[0]).config)
    print(f"The report is in {comparison.output / 'report.md'}")
