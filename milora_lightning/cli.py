"""The command line: Lightning's CLI with the package's module, data, adapter and configs."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import auto_cli
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from rich.console import Console

from milora_lightning.analysis import analyze_model, summary, write_tables
from milora_lightning.callbacks import EvaluationSummary, MiLoRAInit, PredictionWriter, RandomState
from milora_lightning.checkpoint import read_checkpoint
from milora_lightning.data import SFTDataModule
from milora_lightning.export import check_output, export_merged, export_peft, new_folder
from milora_lightning.module import CausalLMModule

PACKAGE = Path(__file__).parent
# In a wheel the configs are inside the package; in a checkout they are beside it.
CONFIGS = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())


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
        parser.link_arguments("model.name_or_path", "data.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with the names of shipped configs resolved."""
        if args is None:
            sys.argv[1:] = resolve_configs(sys.argv[1:])
        elif isinstance(args, list):
            args = resolve_configs(args)
        super().parse_arguments(parser, args)
        config = self.config.get(str(self.config.get("subcommand")), {})
        path = config.get("ckpt_path")
        # now, before a model is loaded for it; one of full fine-tuning is as large as that, and read once
        adapters = config.get("adapter.init") != "full"
        if path and adapters and path not in ("best", "last", "hpc", "registry") and not Path(path).is_dir():
            read_checkpoint(path)


def export(
    ckpt_path: str,
    output: str,
    format: Literal["peft", "merged"] = "peft",
    rank: int | None = None,
    name_or_path: str | None = None,
) -> None:
    """Export the adapters of a checkpoint.

    Args:
        ckpt_path: Checkpoint written by ``fit``; a file, or the folder of a sharded run.
        output: Folder to make.
        format: ``peft`` for an adapter folder that opens in every PEFT tool, ``merged`` for a whole model.
        rank: For ``peft``: compress each update to this rank; says how much of it is lost.
        name_or_path: Where the base model is now; by default where it was in training.
    """
    if rank is not None and format == "merged":
        raise ValueError("rank compresses adapters; a merged model has none. Leave it out, or use --format peft.")
    check_output(output)
    module, checkpoint = _load(ckpt_path, name_or_path)
    scores = checkpoint.get("callbacks", {}).get("EvaluationSummary", {}).get("after")
    data = checkpoint.get("SFTDataModule", {}).get("description")
    if format == "merged":
        export_merged(module, output, module.tokenizer, scores, data)
    else:
        lost = export_peft(module, output, rank, module.tokenizer, scores, data)
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
    module, _ = _load(ckpt_path, name_or_path)
    matrices = analyze_model(module)
    with new_folder(output) as folder:
        write_tables(folder, matrices)
        plot_analysis(folder, matrices)
    Console().print(summary(matrices))
    print(f"Tables and plots are in {output}")


def _load(ckpt_path: str, name_or_path: str | None) -> tuple[CausalLMModule, dict[str, Any]]:
    """Load what a checkpoint holds and its base model, which may have moved."""
    checkpoint = read_checkpoint(ckpt_path)
    moved: dict[str, Any] = {} if name_or_path is None else {"name_or_path": name_or_path}
    whole = io.BytesIO()  # also of a folder, which Lightning could not load outside a sharded run
    torch.save(checkpoint, whole)
    whole.seek(0)
    return CausalLMModule.load_from_checkpoint(whole, map_location="cpu", **moved), checkpoint


COMMANDS: dict[str, Callable[..., None]] = {"export": export, "analyze": analyze}
"""What can be done beside the subcommands of Lightning's CLI."""


def resolve_configs(args: list[str]) -> list[str]:
    """Replace configs after ``--config`` by their paths: a local file, or else the shipped one of that name.

    Args:
        args: Command-line arguments.

    Returns:
        The arguments with paths. A config that holds nothing but a list ``config`` of others, relative to itself, is
        replaced by these.

    Raises:
        SystemExit: If a config is neither here nor shipped; lists those that are shipped.

    >>> resolve_configs(["fit", "--trainer.max_steps=3"])
    ['fit', '--trainer.max_steps=3']
    """
    resolved: list[str] = []
    for previous, argument in zip(["", *args], args, strict=False):
        if previous in ("--config", "-c"):
            resolved.pop()
            resolved += [part for path in _expanded(_config_path(argument)) for part in (previous, path)]
        elif argument.startswith("--config="):
            resolved += [f"--config={path}" for path in _expanded(_config_path(argument.removeprefix("--config=")))]
        else:
            resolved.append(argument)
    return resolved


def _expanded(path: str) -> list[str]:
    """Return the configs that a list of configs stands for, or the path itself of any other."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else None
    except yaml.YAMLError:
        return [path]  # the parser says what is wrong with it
    if not isinstance(content, dict) or content.keys() != {"config"} or not isinstance(content["config"], list):
        return [path]
    return [str((Path(path).parent / part).resolve()) for part in content["config"]]


def _config_path(name: str) -> str:
    shipped = CONFIGS / name
    if Path(name).is_file() or not name.endswith((".yaml", ".yml")):
        return name
    if shipped.is_file():
        return str(shipped)
    names = ", ".join(sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")))
    sys.exit(f"There is no config {name!r}, neither here nor among the shipped ones: {names}.")


def main(args: ArgsType = None) -> Any:
    """Run the command line; see ``python main.py --help``.

    Errors that this package raises are messages to the user, and end the program as such; all others keep their
    traceback.
    """
    argv = sys.argv[1:] if args is None else args
    usage = {"usage": "%(prog)s [--config FILE] ... [--OPTION VALUE] ...   (--help explains every option)"}
    try:
        if isinstance(argv, list) and argv[:1] == ["compare"]:
            from milora_lightning.compare import compare_command  # which is made of this module's CLI

            return compare_command(argv[1:])
        if isinstance(argv, list) and argv and argv[0] in COMMANDS:
            return auto_cli(COMMANDS[argv[0]], args=argv[1:], as_positional=False)
        return MiLoRACLI(
            CausalLMModule,
            SFTDataModule,
            args=args,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "description": "Fine-tune language models with MiLoRA. More commands, each with its own --help: export "
                "makes a PEFT or merged folder of a checkpoint, analyze shows where its updates lie in the weights' "
                "spectra, compare trains several methods alike and reports how they compare.",
                **dict.fromkeys(MiLoRACLI.subcommands(), usage),
            },
            trainer_defaults={"callbacks": [RandomState()]},
            auto_configure_optimizers=False,  # the module makes its own, from model.optimizer
        )
    except (ValueError, FileNotFoundError, FileExistsError, ModuleNotFoundError) as error:
        if _raised_here(error):
            sys.exit(f"error: {error}")
        raise


def _raised_here(error: BaseException) -> bool:
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return traceback is not None and PACKAGE in Path(traceback.tb_frame.f_code.co_filename).parents
