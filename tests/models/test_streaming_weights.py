"""Weights that are read shard by shard are those of the files, on two ranks, from files of any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.forked import run_ranks
from helpers.models import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from milora_lightning.models.pretrained import load_causal_lm
from milora_lightning.models.segments import skips_other_examples
from milora_lightning.models.streaming import empty_causal_lm, stream_weights


def save(folder: Path) -> None:
    """One model with its own names, and one whose files name the weights as its inner model does."""
    for kind, part in (("llama", ""), ("qwen2", "model")):
        model = tiny_model(kind)
        model.config.save_pretrained(folder / f"{kind}{part}")
        model.get_submodule(part).save_pretrained(folder / f"{kind}{part}")


def streamed() -> None:
    dist.init_process_group("gloo")
    mesh, cpu = init_device_mesh("cpu", (2,)), torch.device("cpu")
    for name in ("llama", "qwen2model"):
        whole = load_causal_lm(name).state_dict()
        for offloads in (False, True):
            model = empty_causal_lm(name)
            policy = CPUOffloadPolicy(pin_memory=False) if offloads else OffloadPolicy()
            for part in (*model.model.layers, model):
                fully_shard(part, mesh=mesh, offload_policy=policy)
            assert all(parameter.is_meta for parameter in model.parameters())
            stream_weights(model, name, cpu, offloads)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            found = model.state_dict()
            assert found.keys() == whole.keys()
            for key, value in whole.items():
                assert torch.equal(found[key].full_tensor(), value), key
            ids = torch.arange(8).view(2, 4)
            assert model(ids).logits.isfinite().all()


def test_shards_are_those_of_the_whole_model(tmp_path: Path) -> None:
    save(tmp_path)
    statuses = run_ranks(streamed, tmp_path, limit=120)
    assert statuses == [0, 0], (tmp_path / "output0.txt").read_text()[-3000:]


@pytest.mark.parametrize(
    ("attention", "skips"), [("sdpa", False), ("eager", False), ("flex_attention", True), ("flash_attention_2", True)]
)
def test_attention_that_computes_no_pair_of_different_examples(attention: str, skips: bool) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = attention
    assert skips_other_examples(model) == skips
