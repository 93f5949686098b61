"""The text of ``--help``: the options that people change, on a screen or two, with examples."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from milora_lightning.cli.commands import COMMANDS, LIGHTNING
from milora_lightning.cli.signatures import Option, describe
from milora_lightning.utils.suggestions import closest

ALL = ("--help_all", "--help-all")
WIDTH = 120
COLUMN = 34


@dataclass(frozen=True)
class Group:
    """The options of a class.

    Attributes:
        title: Title, including remarks on all of them.
        prefix: Prefix of their names.
        place: Where the class is defined, ``module:name``.
        rare: Options that only ``--help_all`` shows.
    """

    title: str
    prefix: str
    place: str
    rare: tuple[str, ...] = ()


DATA = "milora_lightning.data"
GROUPS = (
    Group(
        "The model",
        "model",
        "milora_lightning.module:CausalLMModule",
        ("metric", "lr_scheduler_kwargs", "optimizer", "liger", "loss_agg_mode", "num_beams", "loraplus_lr_ratio"),
    ),
    Group(
        "The adapters",
        "adapter",
        "milora_lightning.callbacks.milora_init:MiLoRAInit",
        (
            "seed",
            "cache",
            "rank_pattern",
            "alpha_pattern",
            "module",
            "dropout_on",
            "use_rslora",
            "decay_to_start",
            "target_parameters",
            "statistics_batches",
            "preserve",
            "fused_parts",
        ),
    ),
    Group(
        "Your data, read by Files (--data.source CLASS for another source, --data.source.help CLASS for its options)",
        "data.source",
        f"{DATA}.files:Files",
        ("train_split", "validation_split", "test_split", "tools_field", "system_field", "text_field", "seed"),
    ),
    Group(
        "Preparing the data",
        "data",
        f"{DATA}.datamodule:SFTDataModule",
        (
            *("source", "tokenizer", "num_test_generation_examples", "generation_prompt_suffix", "train_on_inputs"),
            *("group_by_length", "padding_free", "shuffle_buffer"),
            *("pad_to_multiple_of", "num_proc", "num_workers", "seed"),
        ),
    ),
)

OPTIMIZER = [
    Option("lr", "float", "0.0003", "Highest learning rate of the optimizer, AdamW unless --model.optimizer CLASS."),
    Option("weight_decay", "float", "0.0", "Its weight decay."),
]
GENERAL = [
    Option("config", "FILE", "None", "YAML file with options, yours or a shipped one; later ones win."),
    Option(
        "ckpt_path", "FILE | last | best", "None", "Checkpoint to resume from, or to use; its options are the defaults."
    ),
    Option("print_config", "", "None", "Print all options, as YAML, and exit."),
    Option("logger", "tensorboard | wandb | mlflow | csv | none", "csv", "Where metrics are logged."),
    Option("seed_everything", "INT", "random", "Seed of all random numbers."),
]
TRAINER = [
    Option("max_epochs", "int", "3", "Number of passes over the data."),
    Option("max_steps", "int", "-1", "Or number of optimizer steps."),
    Option("max_time", "DD:HH:MM:SS", "None", "Or time limit."),
    Option("accumulate_grad_batches", "int", "1", "Number of batches in an optimizer step."),
    Option("gradient_clip_val", "float", "None", "Maximum norm of the gradient."),
    Option("val_check_interval", "int | float", "1.0", "Batches, or fraction of an epoch, between validations."),
    Option("limit_val_batches", "int | float", "1.0", "Number, or fraction, of batches to validate on."),
    Option("devices", "int", "auto", "Number of GPUs."),
    Option("strategy", "str", "auto", "How they share the work: ddp, or a --config strategy/fsdp2.yaml."),
    Option("precision", "str", "32-true", "Leave as is for --model.dtype bfloat16; 16-mixed for float16."),
    Option("callbacks+", "CLASS", "None", "Adds a callback, such as EarlyStopping, followed by its options."),
    Option("default_root_dir", "str", "None", "Where logs and checkpoints go."),
    Option("fast_dev_run", "bool", "False", "Try everything on one batch."),
]
PREDICTIONS = Group("What predict writes", "predictions", "milora_lightning.callbacks.predictions:PredictionWriter")

EXAMPLES = {
    "fit": (
        "--config milora.yaml",
        "--model.name_or_path Qwen/Qwen2.5-0.5B --data.source.train my.jsonl",
        "--config milora.yaml --adapter.r 16 --model.optimizer.lr 3e-4 --trainer.max_epochs 2",
        "--config mine.yaml --ckpt_path last            # resume a run",
        "--config mine.yaml --print_config              # show the whole configuration",
    ),
    "validate": ("--config mine.yaml --ckpt_path runs/milora/last.ckpt",),
    "test": ("--config mine.yaml --ckpt_path runs/milora/last.ckpt",),
    "predict": ("--config mine.yaml --ckpt_path runs/milora/last.ckpt --predictions.output answers.jsonl",),
    "compare": ("--config milora.yaml --methods [milora,lora] --learning_rates [3e-4,1e-3] --output compared",),
    "continual": ("--config milora.yaml --tasks [first.yaml,second.yaml,third.yaml] --output learned",),
    "export": (
        "--ckpt_path runs/milora/last.ckpt --output adapters",
        "--ckpt_path runs/milora/last.ckpt --output merged --format merged --dtype bfloat16",
        "--ckpt_path runs/milora/last.ckpt --output shrunk --shrink_intruders 0.75",
        "--ckpt_path runs/milora/last.ckpt --output adapters --push_to_hub USER/NAME --private true",
    ),
    "evaluate": ("--ckpt_path runs/milora/last.ckpt --tasks gsm8k,arc_easy --limit 100 --base true",),
    "ranks": ("--config milora.yaml --output ranks.yaml", "--config milora.yaml --adapter.r 16 --output ranks16.yaml"),
    "analyze": ("--ckpt_path runs/milora/last.ckpt --output analysis",),
}


def program() -> str:
    """Return the name under which the user has called the program."""
    name = Path(sys.argv[0]).name
    return "python -m milora_lightning" if name == "__main__.py" else f"python {name}" if name[-3:] == ".py" else name


def help_text(args: Sequence[str]) -> str | None:
    """Return the help that the arguments request.

    Args:
        args: Command-line arguments.

    Returns:
        The text; None if no help is requested, or only the parser can provide it.

    Raises:
        SystemExit: If the command does not exist.
    """
    command = args[0] if args else ""
    asked = "--help" in args or "-h" in args
    if command in COMMANDS:
        return _command(command) if asked else None
    if command in LIGHTNING:
        return _lightning(command) if asked else None
    if asked or not command:
        return overview()
    if not command.startswith("-"):
        known = closest(command, [*LIGHTNING, *COMMANDS])
        meant = f"Did you mean {known}?" if known else f"There are {', '.join([*LIGHTNING, *COMMANDS])}."
        sys.exit(f"error: there is no command {command!r}. {meant}")
    return None


def overview() -> str:
    """Return the list of commands."""
    commands = {**LIGHTNING, **{name: describe(place).summary for name, place in COMMANDS.items()}}
    lines = [
        f"usage: {program()} COMMAND [--config FILE] ... [--OPTION VALUE] ...",
        "",
        "Fine-tune language models with MiLoRA, and use the results.",
        "",
        "commands:",
        *(line for name, text in commands.items() for line in _entry(name, text, 12)),
        "",
        "examples:",
        *(f"  {program()} {name} {EXAMPLES[name][0]}" for name in ("fit", "predict", "export")),
        "",
        f"{program()} COMMAND --help explains a command. Keep options of several runs in YAML files (--config).",
    ]
    return "\n".join(lines)


def _command(name: str) -> str:
    description = describe(COMMANDS[name])
    takes_fit = bool(description.options) and description.options[0].name == "fit"
    usage = [f"usage: {program()} {name} [--OPTION VALUE] ..." + (" [options of fit]" if takes_fit else "")]
    options = description.options[takes_fit:]
    paragraphs = [_wrapped(paragraph) for paragraph in description.text.split("\n\n")]
    more = ["", f"Options of fit: {program()} fit --help"] if takes_fit else []
    return "\n".join(
        [*usage, "", "\n\n".join(paragraphs), *_examples(name), "", "options:", *_entries("", options), *more]
    )


def _lightning(name: str) -> str:
    usage = f"usage: {program()} {name} [--config FILE] ... [--OPTION VALUE] ..."
    lines = [usage, "", LIGHTNING[name], *_examples(name), "", "In general:", *_entries("", GENERAL)]
    for group in [*GROUPS, *([PREDICTIONS] if name == "predict" else [])]:
        options = [option for option in describe(group.place).options if option.name not in group.rare]
        lines += ["", f"{group.title}:", *_entries(group.prefix, options, short=True)]
        if group.prefix == "model":
            lines += _entries("model.optimizer", OPTIMIZER)
    lines += ["", "The Trainer of Lightning:", *_entries("trainer", TRAINER)]
    rest = (
        f"{program()} {name} --help_all explains all options; --data.source.help CLASS those of a class (Files, "
        "WordProblems, Instructions ...), and so do --trainer.callbacks.help and --model.metric.help."
    )
    return "\n".join([*lines, "", _wrapped(rest)])


def _entries(prefix: str, options: Sequence[Option], short: bool = False) -> list[str]:
    dot = f"{prefix}." if prefix else ""
    return [
        line
        for option in options
        for line in _entry(_with_kind(f"--{dot}{option.name}", option), _with_default(option, short))
    ]


def _with_kind(name: str, option: Option) -> str:
    return f"{name} {option.kind.upper() if option.kind.isidentifier() else option.kind}".rstrip()


def _with_default(option: Option, short: bool = False) -> str:
    """Return an option's text, or its first sentence, followed by its default."""
    text = option.text
    if short:
        end = next((i for i in range(len(text)) if text[i] == "." and text[i + 1 : i + 3].strip()[:1].isupper()), -1)
        text = text[: end + 1] if end >= 0 else text
    if option.default is None:
        return f"{text} (needed)"
    return text if option.default in ("None", "") else f"{text} (default: {option.default})"


def _entry(name: str, text: str, column: int = COLUMN) -> list[str]:
    """Lay out an option and its text in two columns."""
    indent = " " * (column + 4)
    body = textwrap.wrap(text, _width() - len(indent)) or [""]
    head = f"  {name}"
    if len(head) + 2 > len(indent):
        return [head, *(indent + line for line in body)]
    return [head.ljust(len(indent)) + body[0], *(indent + line for line in body[1:])]


def _examples(name: str) -> list[str]:
    given = EXAMPLES.get(name, ())
    return ["", "examples:", *(f"  {program()} {name} {example}" for example in given)] if given else []


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _width())


def _width() -> int:
    return max(60, min(WIDTH, shutil.get_terminal_size().columns))
