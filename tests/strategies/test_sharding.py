"""FSDP2 and tensor parallelism on two processes: what is gathered when, what is kept, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.distributed_runs import STEPS
from helpers.several_processes import Runs, assert_equal_to_rounding

from milora_lightning import MiLoRAModelParallelStrategy


@pytest.mark.slow
def test_a_generation_gathers_each_weight_once(ranks: tuple[Runs, Runs]) -> None:
    """And training goes on as before it: the weights are in shards again, and gathered as often in a step."""
    for run in ranks:
        found = run["sharding"]["generation"]
        assert torch.equal(found["once"], found["each call"])
        assert torch.equal(found["once"], found["alone"])
        assert found["gathers once"] == 3  # two layers, and what is outside of them
        assert found["gathers each call"] == 18  # the first layer 16 times
        assert found["sharded again"]
        assert found["step before"] == found["step after"] == 4  # the first layer twice, the last one and the rest once


@pytest.mark.slow
def test_no_gathered_weight_is_kept_for_backward_but_the_last_layer_s(ranks: tuple[Runs, Runs]) -> None:
    for run in ranks:
        found = run["sharding"]["memory"]
        assert found["layers"] == 14
        assert found["others"] == found["copies"] == 0
        assert found["last"] > 0
        assert found["after"] == 0


@pytest.mark.slow
def test_sharded_layers_are_compiled_and_recomputed(ranks: tuple[Runs, Runs]) -> None:
    """Also together: the class that FSDP2 gives a layer is a third one that wraps its forward."""
    for run in ranks:
        found = run["sharding"]["compiled"]
        torch.testing.assert_close(found["compiled"], found["plain"], rtol=1e-4, atol=1e-7)
        assert found["compiled saves"] == found["plain saves"] < 20  # 175 if nothing is recomputed


@pytest.mark.slow
@pytest.mark.parametrize("init", ["eva", "lora_one"])
@pytest.mark.parametrize("way", ["shared", "sharded"])
def test_statistics_of_two_ranks_are_those_of_one(way: str, init: str, ranks: tuple[Runs, Runs]) -> None:
    """Three batches for two ranks, with whole weights and in shards; factors are then the same on both, and train."""
    for run in ranks:
        found = run["sharding"]["statistics"]
        for ours, alone in zip(found[f"{init} {way}"][:2], found[f"{init} alone"][:2], strict=True):
            assert (ours - alone).norm() <= 1e-4 * alone.norm()
        assert found[f"{init} {way}"][2].any()
    first, second = (run["sharding"]["statistics"][f"{init} {way}"] for run in ranks)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.slow
def test_parts_of_fused_projections_train_in_shards(ranks: tuple[Runs, Runs]) -> None:
    """Where a shard's rows belong to several parts; tensor parallelism is refused."""
    for run in ranks:
        found = run["sharding"]["fused"]
        for shards, whole in zip(found["shards"], found["whole"], strict=True):
            torch.testing.assert_close(shards, whole, rtol=1e-4, atol=1e-6)
        assert "qkv_proj' has factors for each of its parts, which tensor parallelism does not split" in found["split"]


@pytest.mark.slow
@pytest.mark.parametrize("style", ["colwise", "rowwise", "replicate"])
def test_a_split_layer_is_the_whole_one(style: str, ranks: tuple[Runs, Runs]) -> None:
    """Its output and gradients, with a bias and the same dropout."""
    for run in ranks:
        assert max(run["sharding"]["split"][style].values()) < 1e-6


@pytest.mark.slow
def test_a_split_model_starts_and_trains_like_the_whole_one(ranks: tuple[Runs, Runs]) -> None:
    """The same factors bit for bit, from weights that were gathered along rows and columns; with dropout."""
    for run in ranks:
        whole, split = (run["sharding"]["split model"][name] for name in ("whole", "split"))
        assert torch.equal(whole["starts"], split["starts"])
        assert (whole["gradients"] - split["gradients"]).norm() < 1e-5 * whole["gradients"].norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single to tensor", "tensor to fsdp2"])
def test_checkpoints_fit_with_and_without_tensor_parallelism(
    name: str, single: dict[str, Any], ranks: tuple[Runs, Runs]
) -> None:
    assert len(ranks[0][name]["losses"]) == STEPS // 2
    assert_equal_to_rounding(ranks, name, single)


@pytest.mark.slow
def test_options_that_cannot_be_are_refused_on_all_ranks(ranks: tuple[Runs, Runs]) -> None:
    for run in ranks:
        messages = run["own"]["messages"]
        assert "reshard_after_forward, cpu_offload of MiLoRAModelParallelStrategy had no effect" in messages["options"]
        assert "call self.trainer.strategy.shard(model)" in messages["options"]
        assert "data_parallel_replicate_size is 3, which does not divide the 2 ranks" in messages["replicas"]
        assert "param_dtype: bfloat16 would gather the adapters' factors in that dtype" in messages["dtype"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reshard_after_forward": 1}, "reshard_after_forward is 1: false keeps the weights"),
        ({"activation_checkpointing": 0}, "activation_checkpointing is 0: leave it out for none"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiLoRAModelParallelStrategy(**options)
