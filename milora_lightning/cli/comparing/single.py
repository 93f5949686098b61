"""A single run of a comparison: its command line and its folder."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint

from milora_lightning.cli.comparing.measuring import MeasuredModule, Trajectory
from milora_lightning.cli.config_files import CONFIGS
from milora_lightning.cli.main import MiLoRACLI
from milora_lightning.comparison.runs import Run
from milora_lightning.data import SFTDataModule
from milora_lightning.starts import find_start
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import new_folder

CONFIG = "config.yaml"


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
            super().__init__(MeasuredModule, SFTDataModule, args=args, run=False, **options)

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
                "compare trains on one device, and this run would use several: add --trainer.devices 1, or leave out "
                "--parallel 1 to have a run on each."
            )
        return trainer

    def fit(self) -> Trajectory:
        """Train, and return the measurements; the last row is from the end of training."""
        seed_everything(self.config.seed_everything, workers=True, verbose=False)
        super().instantiate_classes()
        self.trainer.fit(self.model, self.datamodule)
        if self.trajectory.rows[-1]["step"] != self.trainer.global_step:
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        self.trajectory.end(self.trainer)
        return self.trajectory


class Comparison:
    """Runs that differ only in method, learning rate and seed, each in a folder that appears when it is finished.

    Args:
        fit: Options of ``fit`` that all runs share.
        methods: The options of each method, by its name.
        output: Folder in which each run gets a folder.
    """

    def __init__(self, fit: Sequence[str], methods: Mapping[str, Sequence[str]], output: Path) -> None:
        self.fit = list(fit)
        self.methods = {name: list(options) for name, options in methods.items()}
        self.output = output

    def parse(self, run: Run) -> RunCLI:
        """Parse the configuration of a run."""
        options = [
            *self.methods[run.method],
            f"--seed_everything={run.seed}",
            f"--data.seed={run.seed}",
            f"--model.optimizer.lr={run.learning_rate}",
            "--model.learning_rate=null",  # it would override the optimizer's rate
            "--trainer.num_sanity_val_steps=-1",
        ]
        return RunCLI([*self.fit, *options])

    def check(self, runs: Sequence[Run]) -> None:
        """Parse the configuration of each method, and read the results of finished runs.

        Raises:
            ValueError: If a finished run had other settings.
        """
        parsed: set[str] = set()
        for run in runs:
            folder = self.output / run.name
            if run.method in parsed and not folder.is_dir():
                continue  # it differs only in two numbers from one that has been parsed
            cli = self.parse(run)
            if (init := cli.config.adapter.init) != "full":
                find_start(init)  # fail now rather than when this run begins
            settings = _settings(cli)
            parsed.add(run.method)
            if folder.is_dir():
                run.read(folder)
                if (folder / CONFIG).read_text(encoding="utf-8") != settings:
                    raise InvalidInputError(
                        f"{folder} holds a run with other settings (its config.yaml differs from the current one). "
                        "Choose another output, or remove the folder to run it again."
                    )

    def train(self, run: Run, save: bool) -> None:
        """Train a run and write its folder, including its adapters if ``save`` is set."""
        cli = self.parse(run)
        with new_folder(self.output / run.name) as folder:
            trajectory = cli.fit()
            run.rows, run.examples = trajectory.rows, trajectory.kept
            run.write(folder)
            (folder / CONFIG).write_text(_settings(cli), encoding="utf-8")
            if save:
                cli.trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
        del cli, trajectory
        gc.collect()  # a module and its Trainer refer to each other: without this, two models would be in memory


def method_options(method: str) -> list[str]:
    """Return the options of a method, which is an overlay or a start.

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
