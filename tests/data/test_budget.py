"""Batches by a budget of tokens: never above it, with every example once, on any number of ranks, resumed exactly."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data_fixtures import InMemory, make_tokenizer, rows
from helpers.models import quiet_trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from milora_lightning.data import SFTDataModule
from milora_lightning.data.batches.budget import TokenBudgetSampler
from milora_lightning.data.batches.resuming import Resumption
from milora_lightning.data.batches.sampling import Position

pytestmark = [
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Alone:
    trainer = None


def shares(lengths: list[int], budget: int, ranks: int, start: Position, **options: Any) -> list[list[list[int]]]:
    samplers = [
        TokenBudgetSampler(Resumption(Alone()), lengths, budget, seed=start.seed, num_replicas=ranks, rank=r, **options)
        for r in range(ranks)
    ]
    return [list(sampler.share(start)) for sampler in samplers]


def tokens(batch: list[int], lengths: list[int], padded: bool) -> int:
    sizes = [lengths[i] for i in batch]
    return len(sizes) * max(sizes) if padded else sum(sizes)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_every_example_comes_once_and_no_batch_is_above_the_budget(seed: int, padded: bool) -> None:
    generator = random.Random(seed)
    ranks, size = generator.randint(1, 5), generator.randint(20, 400)
    lengths = [generator.randint(1, 99) for _ in range(size)]
    budget = generator.randint(104, 900)
    counts = set()
    for epoch in range(3):
        start = Position(epoch, seed, ranks)
        parts = shares(lengths, budget, ranks, start, padded=padded, multiple=8)
        counts.add((len(parts[0]), *{len(part) for part in parts}))
        seen = Counter(i for part in parts for batch in part for i in batch)
        assert set(seen) == set(range(size))
        many = max(len(batch) for part in parts for batch in part) >= ranks  # enough of them to divide the last batches
        assert seen.total() - size < (1 if many else ranks)
        assert max(tokens(batch, lengths, padded) for part in parts for batch in part) <= budget
    assert len(counts) == 1  # Lightning counts the batches of an epoch once


def test_batches_are_nearly_full_and_differ_between_epochs() -> None:
    generator = random.Random(0)
    lengths = [round(generator.gammavariate(2, 60)) + 8 for _ in range(3000)]
    for padded in (True, False):
        epochs = [shares(lengths, 4096, 1, Position(epoch, 0, 1), padded=padded, multiple=8)[0] for epoch in range(2)]
        assert sum(lengths) / (4096 * len(epochs[0])) > 0.93
        first, second = ({frozenset(batch) for batch in batches} for batches in epochs)
        assert len(first & second) < len(first) / 10


def test_fewer_examples_than_ranks_come_again() -> None:
    parts = shares([5, 5, 5], 8, 4, Position(0, 0, 4))
    assert [len(part) for part in parts] == [1] * 4
    assert {i for part in parts for batch in part for i in batch} == {0, 1, 2}


@pytest.mark.parametrize("seed", range(10))
def test_other_ranks_share_what_is_left(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 99) for _ in range(generator.randint(20, 200))]
    old, new = generator.randint(1, 4), generator.randint(1, 4)
    before = shares(lengths, 300, old, Position(1, 7, old))
    done = generator.randint(0, len(before[0]) - 1)
    after = shares(lengths, 300, new, Position(1, 7, old, consumed=done * old))
    seen = [b for part in before for b in part[:done]] + [b for part in after for b in part]
    assert Counter(i for batch in seen for i in batch) == Counter(range(len(lengths)))


# ---- In a run ----


class Data(SFTDataModule):
    def __init__(self, ranks: int = 1, rank: int = 0, **options: Any) -> None:
        super().__init__(InMemory(train=rows(23)), make_tokenizer(), template="plain", **options)
        self.share = {"num_replicas": ranks, "rank": rank}

    def _rank(self) -> dict[str, int]:
        return self.share


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[tuple[int, list[tuple[int, ...]]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if "cu_seq_lens" in batch:
            starts, length = batch["cu_seq_lens"].tolist(), int(batch["lengths"])
            ids = batch["input_ids"][0].tolist()
            parts = [ids[start:stop] for start, stop in pairwise(starts) if start < length]
        else:
            parts = [ids[m > 0].tolist() for ids, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        self.batches.append((self.current_epoch, [tuple(part) for part in parts]))
        return self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder: Path, data: SFTDataModule, *callbacks: Any, ckpt: Any = None, **options: Any) -> list[Any]:
    module = Recorder()
    trainer = quiet_trainer(
        folder, callbacks=[*callbacks], enable_checkpointing=bool(callbacks), **{"max_epochs": 2, **options}
    )
    with contextlib.suppress(ConnectionError):
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module.batches


def examples(batches: list[Any], epoch: int) -> Counter[Any]:
    return Counter(example for number, batch in batches if number == epoch for example in batch)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("padding_free", [False, True])
def test_a_resumed_run_goes_on_within_an_epoch(packing: bool, padding_free: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"padding_free": padding_free, "max_tokens_per_batch": 64}
    options |= {"packing": packing, "max_length": 40} if packing else {}
    saved = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
    if packing and not padding_free:
        pytest.skip("its batches have no mask to tell examples apart")
    whole = fit(tmp_path, Data(**options), saved)
    assert examples(whole, 0) == examples(whole, 1)
    assert sum(examples(whole, 0).values()) == 23
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) > 1
    for path in paths:
        steps = torch.load(path, weights_only=True)["global_step"]
        assert fit(tmp_path, Data(**options), ckpt=path) == whole[steps:]


def test_another_number_of_ranks_finishes_the_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_tokens_per_batch": 64}
    saved = ModelCheckpoint(tmp_path, "a", every_n_train_steps=2, save_top_k=1)
    begun = fit(tmp_path, Data(**options), saved, max_steps=2)
    resumed = [b for rank in range(2) for b in fit(tmp_path, Data(2, rank, **options), ckpt=tmp_path / "a.ckpt")]
    seen = examples(begun, 0) + examples(resumed, 0)
    assert sum(seen.values()) == 23
    assert set(seen.values()) == set(examples(resumed, 1).values())


def test_overfitting_repeats_the_same_batches(tmp_path: Path) -> None:
    batches = fit(tmp_path, Data(max_tokens_per_batch=64), overfit_batches=2, max_epochs=3)
    assert len(batches) == 6
    assert len({str(batch) for _, batch in batches}) == 2


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_batch groups all of the data by length"):
        Data(max_tokens_per_batch=64, streaming=True)
    with pytest.raises(ValueError, match="max_tokens_per_batch must be at least 1"):
        Data(max_tokens_per_batch=0)
    data = Data(max_tokens_per_batch=8)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"max_tokens_per_batch=8 is less than the longest row .*, \d+ tokens: set it"):
        data.train_dataloader()
