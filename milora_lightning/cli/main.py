"""The command line: Lightning's CLI with the package's module, data, adapter and configs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from milora_lightning.callbacks import EvaluationSummary, MiLoRAInit, PredictionWriter, RandomState, RunProgress
from milora_lightning.checkpoint.io import CheckpointError
from milora_lightning.checkpoint.options import (
    BASE,
    KEYWORDS,
    base_may_have_moved,
    differences,
    find_checkpoint,
    options_in,
    read_for_options,
)
from milora_lightning.cli.commands import COMMANDS, LIGHTNING
from milora_lightning.cli.commands.running import run_command
from milora_lightning.cli.config_files import CONFIGS, replaced_checkpoints, resolve_configs
from milora_lightning.cli.ending import by_ctrl_c, ending, resumption
from milora_lightning.cli.given_options import GivenOptimizerOptions
from milora_lightning.cli.help import ALL, help_text
from milora_lightning.cli.loggers import LoggerName, make_logger, no_logs_of_refused_runs, start
from milora_lightning.cli.option_errors import Parser, missing_package
from milora_lightning.cli.run_config import RunConfig
from milora_lightning.cli.trainer_defaults import LOG_EVERY_N_STEPS, earlier_checkpoints, missing_options, with_screen
from milora_lightning.cli.typed_text import take_values_as_typed
from milora_lightning.data import Files, SFTDataModule
from milora_lightning.data.datamodule import TRAIN_ON, TRAIN_ON_INPUTS
from milora_lightning.data.encoding.prompt_format import PromptFormat, data_state
from milora_lightning.models.processor import warn_of_more_processes, warn_of_unused_gpu
from milora_lightning.module import CausalLMModule
from milora_lightning.utils.errors import InvalidInputError, sentence
from milora_lightning.utils.messages import inform
from milora_lightning.utils.notices import leave_out, leave_out_bars

INTERRUPTED = 130  # exit status after Ctrl-C, by the convention of shells

CLI = TypeVar("CLI", bound="MiLoRACLI")


class MiLoRACLI(LightningCLI):
    """LightningCLI with options for adapters, predictions and the summary, and with shipped configs.

    ``adapter`` configures :class:`MiLoRAInit`, ``predictions`` the file that ``predict`` writes, and ``summary`` the
    results that are shown. The data use the model's tokenizer. ``--config`` may name a shipped config.
    """

    command: str | None = None
    """The command that takes these options, if it is not the subcommand itself: errors refer to its help."""

    def __init__(self, *classes: Any, **options: Any) -> None:
        given = sys.argv[1:] if options.get("args") is None else options["args"]
        self._first_argument = given[0] if isinstance(given, list) and given else None
        self._with_parser = LightningCLI.subcommands()
        super().__init__(*classes, **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the subcommands that have a parser."""
        return self._with_parser  # Lightning's own function is static, but called on the object

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Set up the parser, which is made for the one subcommand that the arguments begin with: four take long."""
        name = self._first_argument
        if name in self._with_parser:
            self._with_parser = {name: self._with_parser[name]}
        super().setup_parser(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create the parser, whose errors are single sentences."""
        self.parser_class = Parser
        take_values_as_typed()
        return super().init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks of every run, and link options that would have to be given twice."""
        parser.add_lightning_class_args(MiLoRAInit, "adapter")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(EvaluationSummary, "summary")
        parser.link_arguments(BASE, "data.tokenizer")
        parser.add_argument(
            "--logger",
            type=LoggerName | None,
            default=None,
            help="tensorboard, wandb, mlflow, csv or none: replaces trainer.logger and logs in the same place.",
        )
        parser.set_defaults({"data.source": {"class_path": f"{Files.__module__}.{Files.__name__}"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, resolving shipped configs; options of a given checkpoint are the defaults."""
        self._as_typed = [str(arg) for arg in args] if isinstance(args, list) else sys.argv[1:]
        if args is None:
            sys.argv[1:] = resolve_configs(sys.argv[1:])
        elif isinstance(args, list):
            args = resolve_configs(args)
        self._args = args
        if self.command is not None:
            for each in list(getattr(self, "_subcommand_parsers", {}).values()) or [parser]:
                each.prog = f"{Path(sys.argv[0]).name} {self.command}"
        self._from_checkpoint: dict[str, Any] = {}
        self._trained_with: PromptFormat | None = None
        self._given_optimizer: dict[str, Any] = {}
        path = self._given_checkpoint(parser)
        # The checkpoint is read now, before a model is loaded.
        if path is not None and path not in KEYWORDS and not path.startswith("registry"):
            self._take_options(path)
        super().parse_arguments(parser, args)
        for line in replaced_checkpoints(sys.argv[1:] if args is None else args):
            inform(line)

    def _given_checkpoint(self, parser: LightningArgumentParser) -> str | None:
        """Return ``ckpt_path``, from a command line that may lack options that the checkpoint provides."""
        parsers = list(getattr(self, "_subcommand_parsers", {}).values()) or [parser]
        defaults = [each.get_default(BASE) for each in parsers]
        for each in parsers:  # data.tokenizer is linked to it and would be missing
            each.set_defaults({BASE: ""})
        if isinstance(self._args, (dict, Namespace)):
            config = parser.parse_object(self._args, _skip_validation=True)
        else:
            args = sys.argv[1:] if self._args is None else list(self._args)
            config = parser.parse_args([a for a in args if not a.startswith("--print_config")], _skip_validation=True)
        for each, default in zip(parsers, defaults, strict=True):
            each.set_defaults({BASE: default})
        self._given_to = str(config.get("subcommand"))
        self._given = config.get(self._given_to, config)
        path = self._given.get("ckpt_path")
        if path is not None and self._given_to == "fit" and not isinstance(self._args, (dict, Namespace)):
            alone = parser.parse_args([*args, f"--{BASE}=."], defaults=False, _skip_validation=True)
            given = alone.get("fit.model.optimizer.init_args")
            self._given_optimizer = {} if given is None else given.as_dict()
        if not self._given.get(BASE) and (path is None or path in KEYWORDS):
            with_it = (
                "--data.source.train, your data" if self._given_to == "fit" else "--ckpt_path, which can bring both"
            )
            self._parser(self._given_to).error(
                f"{BASE} is missing: give the model's Hub name, folder or .gguf file (and {with_it}), or a --config "
                "that does, such as milora.yaml."
            )
        return None if path is None else str(path)

    def _take_options(self, path: str) -> None:
        """Use the options of a checkpoint as defaults; options that are given override them."""
        full = self._given.get("adapter.init") == "full"
        checkpoint = read_for_options(path, adapters=not full)
        saved = options_in(checkpoint)
        if self._given_to != "fit":  # fit has its own options for training
            state = data_state(checkpoint)
            self._trained_with = PromptFormat.found_in(checkpoint)
            saved.update({f"data.{name}": state[name] for name in (TRAIN_ON, TRAIN_ON_INPUTS) if name in state})
        if full and any(name.startswith("adapter.") for name in saved):
            raise CheckpointError(f"{path!r} holds adapters, but adapter.init is full: leave adapter.init out.")
        parser = self._parser(self._given_to)
        known = parser.get_defaults(skip_validation=True)
        self._from_checkpoint = {name: value for name, value in saved.items() if name in known}
        parser.set_defaults(self._from_checkpoint)

    def _parse_ckpt_path(self) -> None:
        """Show where given options differ from the checkpoint's, instead of letting the checkpoint override them."""
        config = self.config.get(str(self.config.get("subcommand")), self.config)
        for line in differences({name: config[name] for name in self._from_checkpoint}, self._from_checkpoint):
            inform(line)

    def instantiate_classes(self) -> None:
        """Instantiate the classes; if ``ckpt_path`` is a keyword, find its checkpoint and use its options."""
        super().instantiate_classes()
        keyword = self._get(self.config, "ckpt_path")
        if keyword not in KEYWORDS:
            return
        path = find_checkpoint(self.trainer, keyword, str(self.subcommand))
        before = self.config
        self._take_options(path)
        LightningCLI.parse_arguments(self, self.parser, self._args)
        self._parse_ckpt_path()
        if self.config != before:
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the Trainer, with the command line's defaults for options that were not given."""
        given = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        options, lines = missing_options(given, trains=self.subcommand in ("fit", None))
        for line in (
            lines if not hasattr(self, "trainer") else ()
        ):  # not when it is created again with options from a checkpoint
            inform(line)
        go_on, trains = resumption(self._as_typed), self.subcommand == "fit"
        options["callbacks"] = with_screen({**given, **options}, go_on, trains)
        if "logger" not in kwargs and (name := self._get(self.config, "logger")) is not None:
            options["logger"] = make_logger(name, given.get("logger"), given.get("default_root_dir"))
        try:
            trainer = super().instantiate_trainer(**{**kwargs, **options})
        except (ValueError, ModuleNotFoundError) as error:  # conflicting options, or a missing package
            raise InvalidInputError(f"The Trainer's options: {error}") from error
        leave_out_bars()
        if trainer.strategy.root_device.type == "cpu":
            warn_of_more_processes(trainer.num_devices)
            if given.get("accelerator") in (None, "auto"):
                warn_of_unused_gpu()
        if self._given_optimizer:
            trainer.callbacks.insert(0, GivenOptimizerOptions(self._given_optimizer))  # type: ignore[attr-defined]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        name = self._from_checkpoint.get(BASE)
        base = name if name == self._get(self.config, BASE) else None
        for logger in self.trainer.loggers:
            start(logger)
        bar = self.trainer.progress_bar_callback
        if isinstance(bar, RunProgress) and self.trainer.is_global_zero:
            bar.begin("Preparing the data")
        try:
            with base_may_have_moved(f"--{BASE}", base), no_logs_of_refused_runs(self.trainer):
                if self._trained_with is not None:
                    self.datamodule.ask_as(self._trained_with)
                super()._run_subcommand(subcommand)
        except SystemExit as error:
            if by_ctrl_c(self.trainer, error):
                raise SystemExit(INTERRUPTED) from error
            raise
        finally:
            if isinstance(bar, RunProgress):
                bar.stop()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        options = super()._prepare_subcommand_kwargs(subcommand)
        if "verbose" in options:  # Lightning's table repeats the same results in a column for each data loader
            self._get(self.config_init, "summary").tables = options["verbose"]
            options["verbose"] = False
        return options

    def before_fit(self) -> None:
        """Tell the user what happens to the checkpoints of an earlier run."""
        for line in earlier_checkpoints(self.trainer, self._get(self.config, "ckpt_path")):
            inform(line)

    def after_fit(self) -> None:
        """Tell the user where the checkpoints are and how to use them."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(*ending(self.trainer), sep="\n")


__all__ = ["CONFIGS", "MiLoRACLI", "main", "resolve_configs"]


def command_line(kind: type[CLI], args: ArgsType = None) -> CLI:
    """Run a command line for the package's module and data.

    Args:
        kind: Class of the command line.
        args: Arguments; by default those of the process.

    Returns:
        The command line, with the objects that it has created.
    """
    usage = {"usage": "%(prog)s [--config FILE] ... [--OPTION VALUE] ..."}
    return kind(
        CausalLMModule,
        SFTDataModule,
        args=args,
        save_config_callback=RunConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={name: {**usage, "description": text} for name, text in LIGHTNING.items()},
        trainer_defaults={
            "callbacks": [RandomState()],
            "log_every_n_steps": LOG_EVERY_N_STEPS,
            "enable_model_summary": False,  # MiLoRAInit shows a more specific one
        },
        auto_configure_optimizers=False,  # the module creates its own, from model.optimizer
    )


def main(args: ArgsType = None) -> Any:
    """Run the command line; see ``python main.py --help``.

    An error that this package raises for the user ends the program with its message; any other error shows a traceback.
    See :mod:`milora_lightning.utils.errors`.
    """
    leave_out()
    argv = list(args) if isinstance(args, list) else sys.argv[1:] if args is None else []
    if (args is None or argv) and (text := help_text(argv)) is not None:
        print(text)
        sys.exit(0)
    if any(argument in ALL for argument in argv):
        args = ["--help" if argument in ALL else argument for argument in argv]
    try:
        if argv and argv[0] in COMMANDS:
            return run_command(argv[0], argv[1:])
        return command_line(MiLoRACLI, args)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except MisconfigurationException as error:  # a message from Lightning to the user
        sys.exit(f"error: {error}")
    except Exception as error:
        if message := sentence(error) or missing_package(error):
            sys.exit(f"error: {message}")
        raise
