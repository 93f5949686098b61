"""``preview``: shows what a run would train on and the memory it would need, before it starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.text import Text

from milora_lightning.cli.main import MiLoRACLI, command_line
from milora_lightning.data.batches.batching import learned_spans, round_up
from milora_lightning.data.batches.budget import Batches
from milora_lightning.data.batches.step_batch import in_batches
from milora_lightning.data.datamodule import SFTDataModule
from milora_lightning.data.model_check import check_fits
from milora_lightning.data.streaming.encoding import check_trainer
from milora_lightning.models.choosing_attention import AUTO, choose_attention
from milora_lightning.models.memory import LOADED, Estimate, Part, estimate, planned_model
from milora_lightning.models.pretrained import load_config
from milora_lightning.models.processor import held_as
from milora_lightning.strategies.base import shards
from milora_lightning.utils import process_memory
from milora_lightning.utils.allocator import maps_large_tensors
from milora_lightning.utils.counting import counted
from milora_lightning.utils.memory import available
from milora_lightning.utils.printable import printable

LEARNED = "bold green"
BARS = 10
REMEDIES = (
    "--model.gradient_checkpointing true, --model.dtype bfloat16, a smaller --data.batch_size or --data.max_length"
)


class PreviewCLI(MiLoRACLI):
    """The command line of ``fit``, which creates all objects but does not train."""

    command = "preview"

    def _run_subcommand(self, subcommand: str) -> None:
        if self.datamodule.streaming:
            check_trainer(self.trainer)
        self.datamodule.planned_devices = self.trainer.num_devices * self.trainer.num_nodes
        self.datamodule.setup("fit")


def preview(fit: Sequence[str], examples: int = 3, max_tokens: int = 400) -> None:
    """Show what fit would train on and the memory it would need, before it starts.

    Takes the options of fit. Prints examples as the model sees them, with learned tokens in colour (in a pipe:
    between « and »), the lengths, what is truncated, the steps, and an estimate of the memory. Weights are not loaded.

    Args:
        fit: Options of ``fit``.
        examples: Number of examples to print.
        max_tokens: Maximum number of tokens to print of each.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
        cli = command_line(PreviewCLI, ["fit", *fit])
    console = Console(soft_wrap=True, highlight=False)
    data: SFTDataModule = cli.datamodule
    for number, example in enumerate(data.examples("train").select(range(min(examples, _size(data)))), 1):
        console.rule(f"example {number}, {counted(len(example['input_ids']), 'token')}")
        console.print(shown(example, data.tokenizer_object, max_tokens, has_colours(console)))
    console.rule("data")
    lengths = data.examples("train")["length"][:]
    console.print("\n".join(histogram(lengths)))
    batches = epoch(data)
    for line in of_the_data(data, lengths, batches):
        console.print(line)
    console.rule("run")
    model = planned(cli)
    for line in of_the_run(cli, model, len(batches), batches):
        console.print(line)
    check_fits(data, model, cli.trainer, "fit", cli.model.max_new_tokens, data.pad_to_multiple_of)


def planned(cli: MiLoRACLI) -> Any:
    """Return the model with its adapters, without weights."""
    module, adapters = cli.model, cli.config_init["fit"]["adapter"].config
    config = load_config(module.name_or_path)
    return planned_model(config, held_as(module.dtype_name, config.dtype, _kind(cli)), adapters)


def shown(example: dict[str, Any], tokenizer: Any, most: int, colours: bool) -> Text:
    """Format an example as text, with learned tokens in colour or between marks «».

    Args:
        example: A tokenized example.
        tokenizer: Its tokenizer.
        most: Maximum number of tokens to show.
        colours: Whether to use colour instead of marks.

    Returns:
        The text, special tokens included.
    """
    ids, text, end = example["input_ids"][:most], Text(), 0
    for start, stop in [*learned_spans(example), (len(ids), len(ids))]:
        start, stop = min(start, len(ids)), min(stop, len(ids))
        text.append(printable(tokenizer.decode(ids[end:start])))
        if stop > start:
            learned = printable(tokenizer.decode(ids[start:stop]))
            text.append(*((learned, LEARNED) if colours else (f"«{learned}»",)))
        end = stop
    if len(example["input_ids"]) > most:
        text.append(f" ... and {counted(len(example['input_ids']) - most, 'more token')}")
    return text


def has_colours(console: Console) -> bool:
    """Return whether a console shows colours; terminals may not, for example with ``NO_COLOR`` or ``TERM=dumb``."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def histogram(lengths: Sequence[int], width: int = 40) -> list[str]:
    r"""Draw a histogram of the lengths of examples.

    Args:
        lengths: Number of tokens of each example.
        width: Length of the longest bar.

    Returns:
        The lines.

    >>> print(*histogram([3, 14, 90, 100], width=4), sep="\n")
    tokens       examples
         1 -    10  1  ████
        11 -    20  1  ████
        21 -    30  0
        31 -    40  0
        41 -    50  0
        51 -    60  0
        61 -    70  0
        71 -    80  0
        81 -    90  1  ████
        91 -   100  1  ████
    """
    step = max(1, _round(max(lengths) / BARS))
    counts = [0] * math.ceil(max(lengths) / step)
    for length in lengths:
        counts[max(0, length - 1) // step] += 1
    digits = len(str(max(counts)))
    bars = ["█" * math.ceil(count * width / max(counts)) for count in counts]
    rows = [
        f"{i * step + 1:>6} - {(i + 1) * step:>5}  {count:>{digits}}  {bar}".rstrip()
        for i, (count, bar) in enumerate(zip(counts, bars, strict=True))
    ]
    return ["tokens       examples", *rows]


def epoch(data: SFTDataModule) -> list[list[int]]:
    """Return the lengths of the rows in each batch of an epoch, or of the beginning of a stream."""
    loader = data.epoch()
    rows = loader.dataset.source if isinstance(loader.dataset, Batches) else loader.dataset
    lengths = getattr(rows, "lengths", None) or data.examples("train")["length"][:]
    batches: Any = loader.batch_sampler or loader.sampler  # batches by number of examples, or by number of tokens
    return [[lengths[i] for i in batch] for batch in batches]


def shape(data: SFTDataModule, batch: Sequence[int]) -> tuple[int, int]:
    """Return the number of rows and the padded length of a batch, given the lengths of its rows before padding."""
    rows = [sum(batch)] if data.has_one_row() else batch
    return len(rows), round_up(max(rows), data.pad_to_multiple_of)


def of_the_data(data: SFTDataModule, lengths: Sequence[int], batches: list[list[int]]) -> list[str]:
    """Describe the data: how much is learned, truncated and padded."""
    examples = data.examples("train")
    learned = sum(stop - start for e in examples.select_columns(["spans"]) for start, stop in learned_spans(e))
    padded = sum(math.prod(shape(data, batch)) for batch in batches)
    truncated = sum(examples["truncated"][:])
    where = " at the beginning of the stream, the only ones read" if data.streaming else ""
    whole = "of these" if data.streaming else "an epoch"
    return [
        f"{counted(len(lengths), 'example')}{where}; "
        f"mean {sum(lengths) / len(lengths):.0f}, longest {counted(max(lengths), 'token')}; "
        f"{truncated:,} truncated at max_length={data.max_length}",
        f"tokens {whole}: {sum(lengths):,}, of which {learned:,} are learned ({learned / sum(lengths):.0%}); "
        f"padding adds {1 - sum(map(sum, batches)) / padded:.1%} of the batches",
        f"template: {data.template_in_words}",
    ]


def of_the_run(cli: MiLoRACLI, model: Any, batches: int, lengths: list[list[int]]) -> list[str]:
    """Describe the run: its length, the parameters that train, and the memory it needs."""
    trainer, data = cli.trainer, cli.datamodule
    step, epochs = data.step_batch(), trainer.max_epochs or -1
    if data.global_batch_size is None:
        step = replace(step, accumulated=trainer.accumulate_grad_batches)
    counts_steps = data.global_batch_size is not None
    batches = limited(trainer.limit_train_batches, batches, step.accumulated, counts_steps)
    steps = math.ceil(batches / step.accumulated)
    limits = [limit for limit in (trainer.max_steps, 0 if data.streaming else steps * epochs) if limit > 0]
    most = data.max_tokens_per_batch
    rows = counted(step.examples, "row") if most is None else f"up to {counted(most, 'token')}"
    rows += f" x {step.accumulated} batches" if step.accumulated > 1 else ""
    rows += f" x {step.devices} devices" if step.devices > 1 else ""
    length = counted(min(limits), "step") if limits else "steps without end"
    kind = _kind(cli)
    expected = of_memory(cli, model, lengths)
    here = (process_memory.resident() or 0) + LOADED
    held = (
        [Part("program and data", here, "what preview takes, and what torch loads to train")] if kind == "cpu" else []
    )
    peak = expected.peak + sum(part.size for part in held)
    free = available(kind)
    fits = free is None or peak < free
    verdict = "" if free is None else f"; {_bytes(free)} are available: it {'fits' if fits else 'does NOT fit'}"
    share = expected.trainable / expected.total
    lines = [
        f"{length} of {rows}, " + ("over as much of the stream" if data.streaming else f"{steps:,} an epoch"),
        f"{expected.trainable:,} of {expected.total:,} parameters train ({share:.2%})",
        f"memory on {kind}, estimated: {_bytes(peak)}{verdict}",
        *(f"  {_bytes(part.size):>9}  {part.name} ({part.reason})" for part in [*held, *expected.parts]),
    ]
    return lines if fits else [*lines, f"What takes less: {REMEDIES}."]


def limited(asked: int | float, batches: int, accumulated: int, counts_steps: bool) -> int:
    """Return how many of the batches of an epoch ``limit_train_batches`` leaves.

    Args:
        asked: A number, or as a float a fraction of the epoch.
        batches: Number of batches in an epoch.
        accumulated: Number of batches in an optimizer step.
        counts_steps: Whether the number is one of steps, as with ``data.global_batch_size``.

    >>> limited(1.0, 42, 4, False), limited(10, 42, 4, False), limited(10, 42, 4, True), limited(0.5, 42, 4, True)
    (42, 10, 40, 20)
    """
    limit = in_batches(asked, accumulated, batches) if counts_steps else asked
    return min(batches, int(limit)) if isinstance(limit, int) else int(batches * limit)


def of_memory(cli: MiLoRACLI, model: Any, lengths: list[list[int]]) -> Estimate:
    """Estimate the memory that the run needs for its largest batch."""
    module, data, trainer, kind = cli.model, cli.datamodule, cli.trainer, _kind(cli)
    config, adapters = load_config(module.name_or_path), cli.config_init["fit"]["adapter"].config
    dtype = held_as(module.dtype_name, config.dtype, kind)
    attention = module.attn_implementation
    if attention == AUTO:
        attention = choose_attention(config, dtype, cli.trainer.strategy.root_device).name
    largest = max((shape(data, batch) for batch in lengths), key=math.prod)
    examples = data.examples("train")
    learned = sum(b - a for e in examples.select_columns(["spans"]) for a, b in learned_spans(e))
    optimizer = cli.config["fit"]["model"]["optimizer"]
    return estimate(
        model,
        config,
        *largest,
        supervised=learned / sum(examples["length"][:]),
        dropout=adapters.lora_dropout if adapters else 0.0,
        gradient_checkpointing=module.gradient_checkpointing,
        optimizer=str(getattr(optimizer, "class_path", "AdamW")).rpartition(".")[2],
        attention=attention or "sdpa",
        quantization=module.quantization,
        device="cpu" if kind == "cpu" else "cuda",
        shards=trainer.world_size // getattr(trainer.strategy, "replicate_size", 1) if shards(trainer.strategy) else 1,
        mapped=maps_large_tensors(),
    )


def _kind(cli: MiLoRACLI) -> str:
    return str(cli.trainer.strategy.root_device.type)


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _round(step: float) -> int:
    """Round up to 1, 2, 5 or 10 times a power of ten."""
    scale = 10 ** max(0, math.floor(math.log10(max(step, 1))))
    return next(int(n * scale) for n in (1, 2, 5, 10) if n * scale >= step)


def _size(data: SFTDataModule) -> int:
    return len(data.examples("train"))
