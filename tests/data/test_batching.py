from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler

from milora_lightning.data import Collator, EvaluationSampler, LengthGroupedSampler, PromptCollator
from milora_lightning.data.batches.batching import PaddedDataset

LENGTHS = random.Random(0).choices(range(10, 401), k=1003)


def batches(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def padding(order: list[int], size: int) -> float:
    """Fraction of a padded epoch that is padding."""
    padded = sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batches(order, size))
    return 1 - sum(LENGTHS[i] for i in order) / padded


def test_every_example_comes_once_per_epoch():
    assert sorted(LengthGroupedSampler(LENGTHS, 8)) == list(range(len(LENGTHS)))


def test_grouping_removes_most_of_the_padding():
    shuffled = random.Random(1).sample(range(len(LENGTHS)), len(LENGTHS))
    assert padding(shuffled, 8) > 0.4
    assert padding(list(LengthGroupedSampler(LENGTHS, 8)), 8) < 0.05


def test_without_grouping_every_order_is_as_likely():
    """Lengths play no part, and of three examples each of the six orders comes equally often."""
    sampler = LengthGroupedSampler([1, 2, 3], 1, group_by_length=False)
    seen = Counter()
    for epoch in range(1200):
        sampler.set_epoch(epoch)
        seen[tuple(sampler)] += 1
    assert len(seen) == 6
    assert max(abs(count - 200) for count in seen.values()) < 60  # 4.6 standard deviations
    whole = LengthGroupedSampler(LENGTHS, 8, group_by_length=False)
    assert sorted(whole) == list(range(len(LENGTHS)))
    assert list(whole) == list(LengthGroupedSampler(LENGTHS[::-1], 8, group_by_length=False))
    assert padding(list(whole), 8) > 0.4


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(LENGTHS, 8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(*key)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4


@pytest.mark.parametrize("size", [64, 1003])
def test_batches_differ_between_epochs(size):
    # Sorting everything would put the same examples together each time.
    sampler = LengthGroupedSampler(LENGTHS[:size], 8)
    first = {frozenset(batch) for batch in batches(list(sampler), 8)}
    sampler.set_epoch(1)
    second = {frozenset(batch) for batch in batches(list(sampler), 8)}
    assert len(first & second) < len(first) / 4


def test_without_shuffling_all_epochs_are_equal():
    sampler = LengthGroupedSampler(LENGTHS, 8, shuffle=False)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == first
    assert first != list(LengthGroupedSampler(LENGTHS, 8))


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_ranks_together_see_the_batches_of_one_process(replicas):
    alone = batches(list(LengthGroupedSampler(LENGTHS, 4 * replicas)), 4 * replicas)
    ranks = [LengthGroupedSampler(LENGTHS, 4, num_replicas=replicas, rank=rank) for rank in range(replicas)]
    shares = [batches(list(rank), 4) for rank in ranks]
    together = [sorted(i for part in parts for i in part) for parts in zip(*shares, strict=True)]
    assert together[:-1] == [sorted(batch) for batch in alone[:-1]]
    assert len({len(rank) for rank in ranks}) == 1
    # Only the last batch may hold repeated examples, those the order starts with.
    assert set(alone[-1]) <= set(together[-1])
    assert set(together[-1]) - set(alone[-1]) <= set(alone[0])


def test_fewer_examples_than_ranks_are_repeated():
    shares = [list(LengthGroupedSampler([3], 2, num_replicas=4, rank=rank)) for rank in range(4)]
    assert shares == [[0]] * 4


@pytest.mark.parametrize("size", [1, 5, 6, 7])
def test_evaluation_counts_each_example_once_in_equally_many_batches(size):
    shares = [list(EvaluationSampler(range(size), num_replicas=3, rank=rank)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for i in share if i >= 0) == list(range(size))
    assert sum(share.count(-1) for share in shares) == -size % 3


def test_lightning_leaves_the_samplers_alone():
    for sampler in (LengthGroupedSampler(LENGTHS, 8), EvaluationSampler(range(4))):
        assert isinstance(sampler, DistributedSampler)
    loader = DataLoader(PaddedDataset([EXAMPLE]), batch_size=2, sampler=EvaluationSampler([0]))
    # This is how Lightning builds a loader for prediction anew.
    assert isinstance(_update_dataloader(loader, loader.sampler).sampler, EvaluationSampler)


EXAMPLE = {
    "input_ids": [5, 6, 7, 8, 9],
    "prompt_length": 3,
    "prompt": "p",
    "instruction": "P",
    "reference": "r",
    "task": "",
}
SHORT = {"input_ids": [4, 3], "prompt_length": 1, "prompt": "q", "instruction": "Q", "reference": "s", "task": "t"}


def test_labels_are_the_response_alone():
    batch = Collator(pad_token_id=0, pad_to_multiple_of=4)([EXAMPLE, SHORT])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [4, 3, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 9, -100, -100, -100], [-100, 3] + [-100] * 6]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_padding_is_no_label_even_if_its_token_is_the_end_token():
    batch = Collator(pad_token_id=9)([EXAMPLE, SHORT])
    assert (batch["labels"] == 9).sum() == 1


def test_prompts_end_where_generation_begins():
    batch = PromptCollator(pad_token_id=0, pad_to_multiple_of=2)([EXAMPLE, SHORT])
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7], [0, 0, 0, 4]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert batch["prompt"] == ["p", "q"]
    assert batch["reference"] == ["r", "s"]
    assert batch["instruction"] == ["P", "Q"]
    assert batch["task"] == ["", "t"]


def test_filler_counts_nothing():
    filled = PaddedDataset([EXAMPLE])
    assert len(filled) == 1
    assert filled[0] == EXAMPLE
    assert (Collator(0)([filled[-1]])["labels"] == -100).all()
    assert PromptCollator(0)([filled[-1]])["reference"] == [None]
    assert EXAMPLE["input_ids"] == [5, 6, 7, 8, 9]
