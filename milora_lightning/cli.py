"""The command line: Lightning's CLI with the package's module, data, adapter and configs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace, auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from rich.console import Console

from milora_lightning.analysis import analyze_model, summary, write_tables
from milora_lightning.callbacks import EvaluationSummary, MiLoRAInit, PredictionWriter, RandomState, RunProgress
from milora_lightning.callbacks.given_options import GivenOptimizerOptions
from milora_lightning.callbacks.run_config import RunConfig
from milora_lightning.checkpoint_io import CheckpointError
from milora_lightning.checkpoint_options import (
    KEYWORDS,
    base_may_have_moved,
    differences,
    find_checkpoint,
    read_options,
    say,
)
from milora_lightning.config_files import CONFIGS, replaced_checkpoints, resolve_configs
from milora_lightning.data import Files, SFTDataModule
from milora_lightning.ending import ending, resumption
from milora_lightning.export import export_merged, export_peft
from milora_lightning.folder import check_output, new_folder
from milora_lightning.inference import load_module
from milora_lightning.logger_choice import LoggerName, make_logger
from milora_lightning.merging import rounding_note
from milora_lightning.module import CausalLMModule
from milora_lightning.notices import leave_out, leave_out_bars
from milora_lightning.trainer_defaults import LOG_EVERY_N_STEPS, missing_options, replaced_files, with_screen

PACKAGE = Path(__file__).parent
BASE = "model.name_or_path"
INTERRUPTED = 130  # the exit status of what Ctrl-C ends, as shells have it


class MiLoRACLI(LightningCLI):
    """LightningCLI whose parts know one another.

    ``adapter`` configures :class:`MiLoRAInit`, ``predictions`` the file that ``predict`` writes; the tokenizer
    follows the model. ``--config`` may name a shipped config.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has, and say nothing twice."""
        parser.add_lightning_class_args(MiLoRAInit, "adapter")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(EvaluationSummary, "summary")
        parser.link_arguments(BASE, "data.tokenizer")
        parser.add_argument(
            "--logger",
            type=LoggerName | None,
            default=None,
            help="tensorboard, wandb, mlflow, csv or none, in place of trainer.logger: it logs where that would have.",
        )
        parser.set_defaults({"data.source": {"class_path": f"{Files.__module__}.{Files.__name__}"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with the names of shipped configs resolved; what is not given comes from a checkpoint that is."""
        if args is None:
            sys.argv[1:] = resolve_configs(sys.argv[1:])
        elif isinstance(args, list):
            args = resolve_configs(args)
        self._args = args
        self._from_checkpoint: dict[str, Any] = {}
        self._given_optimizer: dict[str, Any] = {}
        path = self._given_checkpoint(parser)
        # now, before a model is loaded for it
        if path is not None and path not in KEYWORDS and not path.startswith("registry"):
            self._take_options(path)
        super().parse_arguments(parser, args)
        for line in replaced_checkpoints(sys.argv[1:] if args is None else args):
            say(line)

    def _given_checkpoint(self, parser: LightningArgumentParser) -> str | None:
        """Return ``ckpt_path`` as given, of a command line that may lack what the checkpoint brings."""
        parsers = list(getattr(self, "_subcommand_parsers", {}).values()) or [parser]
        defaults = [each.get_default(BASE) for each in parsers]
        for each in parsers:  # the tokenizer follows it, and would be missed
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
            parser.error(
                f"{BASE} is missing: give the model's Hub name, folder or .gguf file, or a --config that does."
            )
        return None if path is None else str(path)

    def _take_options(self, path: str) -> None:
        """Make a checkpoint's options the defaults: what is given, in whichever way, goes before these."""
        full = self._given.get("adapter.init") == "full"
        saved = read_options(path, adapters=not full)
        if full and any(name.startswith("adapter.") for name in saved):
            raise CheckpointError(f"{path!r} holds adapters, and adapter.init is full: leave that out.")
        parser = self._parser(self._given_to)
        known = parser.get_defaults(skip_validation=True)
        self._from_checkpoint = {name: value for name, value in saved.items() if name in known}
        parser.set_defaults(self._from_checkpoint)

    def _parse_ckpt_path(self) -> None:
        """Show where what was given differs from the checkpoint, which Lightning would put above it."""
        config = self.config.get(str(self.config.get("subcommand")), self.config)
        for line in differences({name: config[name] for name in self._from_checkpoint}, self._from_checkpoint):
            say(line)

    def instantiate_classes(self) -> None:
        """Instantiate; that brings to light which checkpoint a keyword stands for, and that may bring options."""
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
        """Make the Trainer, with the command line's own answers to what was not given."""
        given = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        options, lines = missing_options(given, trains=self.subcommand in ("fit", None))
        for line in lines:
            say(line)
        go_on, trains = resumption(self._arguments()), self.subcommand == "fit"
        options["callbacks"] = with_screen({**given, **options}, go_on, trains)
        if "logger" not in kwargs and (name := self._get(self.config, "logger")) is not None:
            options["logger"] = make_logger(name, given.get("logger"), given.get("default_root_dir"))
        trainer = super().instantiate_trainer(**{**kwargs, **options})
        leave_out_bars()
        if self._given_optimizer:
            trainer.callbacks.insert(0, GivenOptimizerOptions(self._given_optimizer))  # type: ignore[attr-defined]
        return trainer

    def _arguments(self) -> list[str]:
        return [str(arg) for arg in self._args] if isinstance(self._args, list) else sys.argv[1:]

    def _run_subcommand(self, subcommand: str) -> None:
        name = self._from_checkpoint.get(BASE)
        own = name if name == self._get(self.config, BASE) else None
        bar = self.trainer.progress_bar_callback
        if isinstance(bar, RunProgress) and self.trainer.is_global_zero:
            bar.begin("Preparing the data")
        try:
            with base_may_have_moved(f"--{BASE}", own):
                super()._run_subcommand(subcommand)
        except SystemExit as error:
            if self.trainer.interrupted:
                raise SystemExit(INTERRUPTED) from error
            raise
        finally:
            if isinstance(bar, RunProgress):
                bar.stop()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        options = super()._prepare_subcommand_kwargs(subcommand)
        if "verbose" in options:  # Lightning's table has a column for each loader, all with the same results
            self._get(self.config_init, "summary").tables = options["verbose"]
            options["verbose"] = False
        return options

    def before_fit(self) -> None:
        """Say if checkpoints of an earlier run will be replaced."""
        for line in replaced_files(self.trainer, self._get(self.config, "ckpt_path")):
            say(line)

    def after_fit(self) -> None:
        """Say where the result is, and what to do with it."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(*ending(self.trainer), sep="\n")


def export(
    ckpt_path: str,
    output: str,
    format: Literal["peft", "merged"] = "peft",
    rank: int | None = None,
    name_or_path: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Export the adapters of a checkpoint.

    Args:
        ckpt_path: Checkpoint written by ``fit``; a file, or the folder of a sharded run.
        output: Folder to make.
        format: ``peft`` for an adapter folder that opens in every PEFT tool, ``merged`` for a whole model.
        rank: For ``peft``: compress each update to this rank; says how much of it is lost.
        name_or_path: Where the base model is now; by default where it was in training.
        dtype: For ``merged``: of the whole model. By default each weight keeps its own; says how much of the updates
            rounding to it has cost.
    """
    if rank is not None and format == "merged":
        raise ValueError("rank compresses adapters; a merged model has none. Leave it out, or use --format peft.")
    if dtype is not None and format == "peft":
        raise ValueError("Adapters stay float32; dtype is of a merged model. Leave it out, or use --format merged.")
    check_output(output)
    base: dict[str, Any] = {"quantization": None} if format == "merged" else {}
    module, checkpoint = load_module(ckpt_path, name_or_path, **base)
    scores = checkpoint.get("callbacks", {}).get("EvaluationSummary", {}).get("after")
    data = checkpoint.get("SFTDataModule", {}).get("description")
    if format == "merged":
        if note := rounding_note(
            export_merged(module, output, module.tokenizer, scores, data, dtype, module.prompt_format)
        ):
            print(note)
    else:
        lost = export_peft(module, output, rank, module.tokenizer, scores, data, module.prompt_format)
        if rank is not None:
            print(f"Rank {rank} keeps {1 - lost:.2%} of the updates' energy and loses {lost:.2%}.")
    print(f"Exported to {output}")


def analyze(ckpt_path: str, output: str, name_or_path: str | None = None) -> None:
    """Show where the updates of a checkpoint lie in the spectra of the weights they update.

    Writes similarity.csv, spectra.csv, energy.csv and plots of them, and prints averages.

    Args:
        ckpt_path: Checkpoint written by ``fit``.
        output: Folder to make.
        name_or_path: Where the base model is now; by default where it was in training.
    """
    from milora_lightning.plots import plot_analysis  # needs the extra package matplotlib: missing before any work

    check_output(output)
    module, _ = load_module(ckpt_path, name_or_path)
    matrices = analyze_model(module)
    with new_folder(output) as folder:
        write_tables(folder, matrices)
        plot_analysis(folder, matrices)
    Console().print(summary(matrices))
    print(f"Tables and plots are in {output}")


__all__ = ["CONFIGS", "MiLoRACLI", "analyze", "export", "main", "resolve_configs"]

COMMANDS: dict[str, Callable[..., None] | str] = {
    "export": export,
    "analyze": analyze,
    "chat": "milora_lightning.commands.chat",
    "generate": "milora_lightning.commands.generate",
}
"""What can be done beside the subcommands of Lightning's CLI: functions, or the files of functions of these names."""


def _command(name: str) -> Callable[..., None]:
    command = COMMANDS[name]
    return getattr(import_module(command), name) if isinstance(command, str) else command


def main(args: ArgsType = None) -> Any:
    """Run the command line; see ``python main.py --help``.

    Errors that this package raises are messages to the user, and end the program as such; all others keep their
    traceback.
    """
    leave_out()
    argv = sys.argv[1:] if args is None else args
    usage = {"usage": "%(prog)s [--config FILE] ... [--OPTION VALUE] ...   (--help explains every option)"}
    try:
        if isinstance(argv, list) and argv[:1] == ["compare"]:
            from milora_lightning.compare import compare_command  # which is made of this module's CLI

            return compare_command(argv[1:])
        if isinstance(argv, list) and argv and argv[0] in COMMANDS:
            return auto_cli(_command(argv[0]), args=argv[1:], as_positional=False)
        return MiLoRACLI(
            CausalLMModule,
            SFTDataModule,
            args=args,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "description": "Fine-tune language models with MiLoRA. More commands, each with its own --help: export "
                "makes a PEFT or merged folder of a checkpoint, chat talks to a model, generate answers prompts, "
                "analyze shows where updates lie in the weights' spectra, compare trains several methods alike and "
                "reports how they compare.",
                **dict.fromkeys(MiLoRACLI.subcommands(), usage),
            },
            trainer_defaults={
                "callbacks": [RandomState()],
                "log_every_n_steps": LOG_EVERY_N_STEPS,
                "enable_model_summary": False,  # which says less than MiLoRAInit's
            },
            auto_configure_optimizers=False,  # the module makes its own, from model.optimizer
        )
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (ValueError, FileNotFoundError, FileExistsError, ModuleNotFoundError) as error:
        if _raised_here(error):
            sys.exit(f"error: {error}")
        raise
    except MisconfigurationException as error:  # Lightning's own message to the user
        sys.exit(f"error: {error}")


def _raised_here(error: BaseException) -> bool:
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return traceback is not None and PACKAGE in Path(traceback.tb_frame.f_code.co_filename).parents
