"""Experts and convolutions on two processes, beside the runs of test_distributed.py that train experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_runs import EXPERT_KINDS, STEPS
from helpers.expert_runs import EXPERTS, WAYS
from helpers.several_processes import Runs, assert_equal_to_rounding
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from milora_lightning.cli.main import main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_two_ranks_train_the_experts_that_one_process_does(
    kind: str, mixture_alone: dict[str, Any], ranks: tuple[Runs, Runs]
) -> None:
    """The same losses, gradients, adapters and results, from the same starts, which the ranks have shared out."""
    assert_equal_to_rounding(ranks, f"{kind}-experts", mixture_alone)
    assert [run[f"{kind}-experts"]["cost"] / mixture_alone["cost"] for run in ranks] == [0.5, 0.5]
    state = mixture_alone["state"]
    moved = [(state[k.replace("initial_", "lora_")] - v).abs().max() for k, v in state.items() if "initial_" in k]
    assert min(moved) > 1e-2


@pytest.mark.parametrize("way", WAYS)
def test_experts_that_a_rank_sends_no_token_have_the_gradients_of_the_whole(way: str, ranks: tuple[Runs, Runs]) -> None:
    """Zeros where no rank has one, and no gradient is missing, for which the other ranks would wait."""
    for number, run in enumerate(ranks):
        found = run["experts"]["starved"][way]
        assert found["held"] == (3, 2)[number]
        for name, gradient in found["whole"].items():
            for kind in ("ddp", "fsdp2"):
                torch.testing.assert_close(found[kind][name], gradient, rtol=1e-4, atol=1e-8)
            if "experts" in name and name.endswith("lora_B"):
                seen = [bool(matrix.any()) for matrix in gradient]
                assert seen == [True] * (EXPERTS - 1) + [False]


@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="this torch sums what each rank has"
)
def test_layers_that_one_rank_alone_has_called_keep_their_own_gradients(ranks: tuple[Runs, Runs]) -> None:
    """FSDP2 would sum the gradients of one rank's expert and of another's."""
    assert not ranks[1]["experts"]["unused"]["said"]
    (said,) = ranks[0]["experts"]["unused"]["said"]  # of what has zeros on all ranks
    assert "No gradient has reached the adapters of 'experts.2' in" in said
    for run in ranks:
        found = run["experts"]["unused"]
        never = [name for name in found["fsdp2"] if "experts.2" in name]
        assert len(never) == 2
        assert not any(found["fsdp2"].pop(name).any() for name in never)
        assert found["fsdp2"].keys() == found["whole"].keys()
        for name, gradient in found["whole"].items():
            torch.testing.assert_close(found["fsdp2"][name], gradient, rtol=1e-4, atol=1e-8)


def test_shards_read_what_peft_has_trained_on_experts(ranks: tuple[Runs, Runs]) -> None:
    for run in ranks:
        found = run["experts"]["read"]
        torch.testing.assert_close(found["here"], found["there"], rtol=0, atol=1e-5)


def test_convolutions_in_shards_train_as_whole_ones(ranks: tuple[Runs, Runs]) -> None:
    """In groups, too; the ranks share out the decompositions."""
    for run in ranks:
        whole, shards = (run["experts"]["convolutions"][name] for name in ("whole", "shards"))
        assert whole.keys() == shards.keys()
        for name, value in whole.items():
            if name.startswith("start"):
                assert torch.equal(shards[name], value)
            torch.testing.assert_close(shards[name], value, rtol=1e-4, atol=1e-7)


def test_experts_are_resumed_and_exported_from_shards_as_from_one_process(
    folder: Path, mixture_alone: dict[str, Any], ranks: tuple[Runs, Runs]
) -> None:
    assert len(ranks[0]["experts resumed"]["losses"]) == STEPS // 2
    assert_equal_to_rounding(ranks, "experts resumed", mixture_alone)
    exported = {}
    for origin in ("experts-alone", "fsdp2-folder-experts", "fsdp1-experts"):
        path = folder / origin / f"step={STEPS}.ckpt"
        main(["export", f"--ckpt_path={path}", f"--output={folder / f'exported-{origin}'}"])
        exported[origin] = load_file(folder / f"exported-{origin}" / "adapter_model.safetensors")
    for tensors in exported.values():
        assert tensors.keys() == exported["experts-alone"].keys()
        for key, value in exported["experts-alone"].items():
            torch.testing.assert_close(tensors[key], value, rtol=1e-4, atol=1e-6)
