"""Two forked ranks do as one process does, in a second: what the slow tests of two ranks look at closely."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.distributed_runs import STEPS, fit, own_project
from helpers.forked import run_ranks
from helpers.several_processes import assert_equal_to_rounding
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from milora_lightning import MiLoRAFSDPStrategy, MiLoRAModelParallelStrategy
from milora_lightning.strategies.base import check_whole
from milora_lightning.strategies.loading import _read_together
from milora_lightning.utils.errors import InvalidInputError


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2", "replicated", "tensor"])
def test_two_ranks_have_the_gradients_of_one(kind: str, folder: Path, single: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "llama").symlink_to(folder / "llama")  # and a folder of data of its own
    start = {"ckpt_path": folder / "single" / f"step={STEPS - 2}.ckpt"}

    def run() -> None:
        done = fit(tmp_path, kind, kind, devices=2, resume=start)
        torch.save(done, tmp_path / f"{dist.get_rank()}.pt")

    assert run_ranks(run, tmp_path, limit=200) == [0, 0], (tmp_path / "output0.txt").read_text()[-3000:]
    first, second = ({kind: torch.load(tmp_path / f"{rank}.pt", weights_only=True)} for rank in range(2))
    assert len(first[kind]["losses"]) == 2
    assert_equal_to_rounding((first, second), kind, single)


def test_modules_that_shard_in_another_way_are_refused_before_they_train(tmp_path: Path) -> None:
    def run() -> None:
        torch.save(own_project(tmp_path)["messages"], tmp_path / f"messages{dist.get_rank()}.pt")

    assert run_ranks(run, tmp_path, limit=200) == [0, 0], (tmp_path / "output0.txt").read_text()[-3000:]
    first, second = (torch.load(tmp_path / f"messages{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() == {"order", "nan", "tensor parallel", "options", "replicas", "dtype"}
    assert "tensor_parallel_size is 2, and OwnProject has not split its layers" in first["tensor parallel"]
    assert "reshard_after_forward, cpu_offload of MiLoRAModelParallelStrategy had no effect" in first["options"]


def test_a_checkpoint_that_one_rank_cannot_read_is_read_by_none(tmp_path: Path) -> None:
    """As a file on the first machine's own disk."""
    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / "here.ckpt")

    def run() -> None:
        dist.init_process_group("gloo")
        here = tmp_path / "here.ckpt"
        strategy: Any = SimpleNamespace(world_size=2, broadcast=lambda path: path)
        assert _read_together(strategy, here)["global_step"] == 3
        with pytest.raises((InvalidInputError, FileNotFoundError), match=r"there\.ckpt"):
            _read_together(strategy, here if dist.get_rank() == 0 else tmp_path / "there.ckpt")

    assert run_ranks(run, tmp_path, limit=120) == [0, 0], (tmp_path / "output0.txt").read_text()[-3000:]


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, MiLoRAFSDPStrategy, MiLoRAModelParallelStrategy])
def test_what_needs_whole_weights_is_refused_where_they_are_shared(kind: Any) -> None:
    with pytest.raises(InvalidInputError, match=rf"Monitor needs whole weights, and {kind.__name__} shards them"):
        check_whole(kind(), "Monitor")
