"""Which share of the data and of the random states a process has, without starting several."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from milora_lightning import RandomState
from milora_lightning.callbacks._patience import answers_ahead
from milora_lightning.callbacks.random_state import current_state
from milora_lightning.data import SFTDataModule
from milora_lightning.strategies.base import DataRank, data_rank


def rank_of(rank: int, world: int, /, **share: int) -> Any:
    return SimpleNamespace(global_rank=rank, world_size=world, distributed_sampler_kwargs=share or None)


def test_processes_of_one_share_are_told_apart() -> None:
    """Four ranks of two shares, as with two-fold tensor parallelism: the first of each share speaks for it."""
    found = [data_rank(rank_of(rank, 4, rank=rank // 2, num_replicas=2)) for rank in range(4)]
    assert found == [DataRank(0, 2, True), DataRank(0, 2, False), DataRank(1, 2, True), DataRank(1, 2, False)]
    assert [data_rank(rank_of(rank, 2)) for rank in range(2)] == [DataRank(0, 2, True), DataRank(1, 2, True)]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_goes_on_from_its_own_random_state(rank: int) -> None:
    states, expected = [], []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states.append(current_state(torch.device("cpu")))
        expected.append(torch.rand(2))
    callback, module = RandomState(), SimpleNamespace(device=torch.device("cpu"))
    callback.on_load_checkpoint(None, module, {"random_state": states})  # type: ignore[arg-type]
    torch.manual_seed(9)
    callback.on_train_batch_start(rank_of(rank, 2), module, None, 0)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(2), expected[rank])
    after = torch.get_rng_state()
    callback.on_train_batch_start(rank_of(rank, 2), module, None, 1)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), after)  # once
    callback.on_load_checkpoint(None, module, {"random_state": states})  # type: ignore[arg-type]
    callback.on_train_batch_start(rank_of(0, 1), module, None, 0)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), after)  # those of two ranks fit no single one


@pytest.mark.parametrize(("ranks", "batches", "ahead"), [(1, 9, 11), (2, 9, 6), (4, 9, 3), (1, 2, 8), (1, 0, 0)])
def test_a_process_counts_the_answers_of_its_own_share(ranks: int, batches: int, ahead: int) -> None:
    data = SFTDataModule.__new__(SFTDataModule)
    vars(data).update(answer_by="generation", generation_batch_size=4, answered=lambda split: range(11))
    trainer = rank_of(0, ranks)
    vars(trainer).update(datamodule=data, sanity_checking=False, num_val_batches=[5, batches])
    assert answers_ahead(trainer) == ahead
