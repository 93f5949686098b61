"""Data for starts that depend on data: taken from a run's batches without affecting the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from milora_lightning.checkpoint.fingerprint import fingerprint
from milora_lightning.config import LoRAConfig
from milora_lightning.data.code_key import PACKAGE, code_key
from milora_lightning.data.held_out import pack, read_texts
from milora_lightning.starts import Start, Statistics, find_start
from milora_lightning.statistics.collecting import in_groups, layers_with_needs, size_of
from milora_lightning.statistics.kept import computes_with, key_of, with_cache
from milora_lightning.statistics.passes import Pass, Track
from milora_lightning.strategies.base import data_rank, needs_early_start
from milora_lightning.utils.compat.lightning import placed_for_training, read_apart, training_data
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn

MOMENT_BATCHES, GRADIENT_BATCHES = 64, 8
"""Default numbers of batches: second moments of many features need many tokens; gradients stand for the first step."""

BLOCK, ROWS = 256, 8
"""Tokens per block of text, and blocks per batch."""


class StartingData:
    """Statistics of data for the start of a run.

    Args:
        batches: Number of batches; None for the default.
        preserve: Text that represents the knowledge to preserve, as for :class:`milora_lightning.ForgettingMonitor`.
        cache: Whether to keep statistics in the user's cache folder.

    Raises:
        ValueError: If the number is below 1.
    """

    def __init__(self, batches: int | None, preserve: str | None, cache: bool) -> None:
        if batches is not None and batches < 1:
            raise InvalidInputError(
                f"statistics_batches must be at least 1, not {batches}; leave it out for a default."
            )
        self.batches, self.preserve, self.cache = batches, preserve, cache
        self._texts: list[str] | None = None

    def check(self, trainer: Trainer, module: LightningModule, config: LoRAConfig | None) -> None:
        """Refuse options that cannot work, and read the text, before the model is loaded.

        Raises:
            ValueError: If the options do not fit the start, or if the strategy or the module does not allow running
                data through the model before training.
            FileNotFoundError: If there is no such text.
        """
        start = None if config is None else find_start(config.init)
        name = "full" if start is None else start.name
        needs = () if start is None else start.needs
        if self.preserve is not None and not (start is not None and (start.keeps or "preserved" in needs)):
            raise InvalidInputError(
                f"preserve={self.preserve!r} names text of what is to be preserved, of which init={name!r} takes no "
                "notice: leave it out, or take corda, lora_null or sc_lora."
            )
        if not needs:
            if self.batches is not None:
                raise InvalidInputError(
                    f"statistics_batches={self.batches} is for starts that depend on data, and init={name!r} does not: "
                    "leave it out."
                )
            return
        if "preserved" in needs and self.preserve is None:
            raise InvalidInputError(
                f"init={name!r} weighs training data against text of what is to be preserved: name such text, a .txt, "
                "JSON, JSON lines or Parquet file or a Hub name (preserve)."
            )
        if needs_early_start(trainer):
            raise InvalidInputError(
                f"init={name!r} runs training data through the model before training, which "
                f"{type(trainer.strategy).__name__} with {type(trainer.precision_plugin).__name__} does not allow: its "
                "weights are sharded or quantized by then. Use one device, strategy: ddp or milora_fsdp2, or another "
                "init."
            )
        if not module.automatic_optimization and not hasattr(module, "start_loss"):
            raise InvalidInputError(
                f"init={name!r} runs training data through {type(module).__name__} before training, and its "
                "training_step steps optimizers itself: give the module a method start_loss(batch) that returns the "
                "loss of a batch."
            )
        if self.preserve is not None and self._texts is None:
            self._texts = read_texts(self.preserve, split="train")  # monitors measure on a test split
            if any(self.preserve in _files_read_by(each) for each in trainer.callbacks):  # type: ignore[attr-defined]
                warn(
                    f"preserve={self.preserve!r} is also a text on which forgetting is measured. What is measured then "
                    "is what the start has seen; measure on another text to compare starts."
                )

    def groups(self, trainer: Trainer, module: LightningModule, track: Track) -> Iterator[dict[str, Statistics]]:
        """Yield statistics of the layers that need them, a group of layers at a time; nothing if no layer does.

        The order of training data, random states and metrics are not affected.
        """
        layers, needs = layers_with_needs(module)
        if not needs:
            return
        start = find_start(next(iter(layers.values())).init)  # type: ignore[arg-type]
        with isolate_rng(), _undisturbed(module):
            torch.manual_seed(0)  # the same shuffled data on all ranks and in all runs
            learned, kept = self._data(trainer, module, start)
            share = data_rank(trainer)
            learned = _as_many_on_all_ranks(learned, share.size)
            over = Pass(
                module,
                learned,
                _call(module),
                partial(placed_for_training, trainer),
                trainer.strategy.root_device,
                share.number,
                share.size,
                trainer.precision_plugin.train_step_context,
                track,
            )
            collect = partial(in_groups, layers, needs, over, kept)
            if not self.cache:
                yield from collect()
                return
            code = [_code(each) for each in (module, getattr(trainer, "datamodule", None))]
            described = needs, list(layers), fingerprint(module, frozen_only=False), trainer.precision, code
            key = key_of(
                [*learned, *(kept or ()), dict(module.named_buffers())],
                *described,
                repr(dict(module.hparams)),
                computes_with(module),
                len(kept or ()),
            )
            yield from with_cache(key, layers, collect, size_of(layers, needs), share.size)

    def _data(self, trainer: Trainer, module: LightningModule, start: Start) -> tuple[list[Any], list[Any] | None]:
        """Return training batches and, if needed, batches of the text to preserve, on the CPU."""
        number = self.batches or (GRADIENT_BATCHES if "gradient" in start.needs else MOMENT_BATCHES)
        text = None if self._texts is None else _text_batches(self._texts, module, number)
        if start.keeps and text is not None:
            return text, None
        return _training_batches(trainer, number), text


def _training_batches(trainer: Trainer, number: int) -> list[Any]:
    sample: Callable[[int], list[Any]] | None = getattr(getattr(trainer, "datamodule", None), "sample_batches", None)
    if sample is not None:
        return sample(number)
    source = training_data(trainer)
    if isinstance(source, Iterator) and not isinstance(source, CombinedLoader):
        raise InvalidInputError(
            "A start from data takes batches before training, and the training data are an iterator that can be read "
            "only once: pass a DataLoader or another iterable that begins anew."
        )
    together = read_apart(source)
    with _generators_restored(together):
        return [batch for batch, *_ in islice(together, number)]


def _files_read_by(callback: Any) -> list[Any]:
    text = getattr(callback, "text", None)  # of ForgettingMonitor or a custom monitor
    texts = list(text.values()) if isinstance(text, dict) else [text]
    return [each for each in texts if isinstance(each, str) and Path(each).exists()]


def _code(instance: Any) -> str:
    kind = type(instance)
    return "" if kind is NoneType or kind.__module__.partition(".")[0] == PACKAGE else code_key(kind)


def _as_many_on_all_ranks(batches: list[Any], ranks: int) -> list[Any]:
    """Drop surplus batches, so that all ranks have equally many; a custom sampler may give some ranks more."""
    if ranks == 1:
        return batches
    numbers: list[Any] = [None] * ranks
    dist.all_gather_object(numbers, len(batches))
    return batches[: min(numbers)]


def _text_batches(texts: list[str], module: LightningModule, number: int) -> list[Any]:
    tokenizer = getattr(module, "tokenizer", None)
    if tokenizer is None:
        raise InvalidInputError(
            f"{type(module).__name__} has no attribute tokenizer, which is to read the text of preserve: set it."
        )
    rows = torch.split(pack(texts, tokenizer, BLOCK, number * BLOCK * ROWS), ROWS)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]


def _call(module: LightningModule) -> Callable[[Any], Any]:
    if (start_loss := getattr(module, "start_loss", None)) is not None:
        return start_loss  # type: ignore[no-any-return]
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return lambda batch: module.training_step(batch, 0) if takes_index else module.training_step(batch)


@contextmanager
def _undisturbed(module: LightningModule) -> Iterator[None]:
    """Within this context, a module's ``training_step`` logs nothing; unused metrics are reset afterwards."""
    fresh = [m for m in module.modules() if isinstance(m, Metric) and not m.update_called]
    before = {name: vars(module).get(name) for name in ("log", "log_dict")}
    vars(module).update(dict.fromkeys(before, lambda *_, **__: None))
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                del vars(module)[name]
            else:
                vars(module)[name] = method
        for metric in fresh:
            metric.reset()


@contextmanager
def _generators_restored(source: Any) -> Iterator[None]:
    """Restore the state of loaders' generators after this context, within which loaders may be read."""
    loaders = source.flattened if isinstance(source, CombinedLoader) else [source]
    holders = [getattr(loader, name, None) for loader in loaders for name in ("sampler", "batch_sampler")] + loaders
    holders += [getattr(holder, "sampler", None) for holder in holders]
    generators = [g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)]
    states: list[tuple[torch.Generator, Tensor]] = [(g, g.get_state()) for g in generators]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
