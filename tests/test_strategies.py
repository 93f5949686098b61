"""What can be told of strategies without several processes or GPUs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from milora_lightning import AdapterExport, LoRAConfig, inject
from milora_lightning.sharding import fill, gather_to, local_slices, shard_like
from milora_lightning.strategies import finish, prepare


def trainer_with(strategy: Any) -> Any:
    return SimpleNamespace(strategy=strategy, precision_plugin=getattr(strategy, "precision_plugin", None))


def test_other_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not work under SimpleNamespace: use one device, strategy: ddp"):
        prepare(trainer_with(SimpleNamespace(checkpoint_io=None)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision_plugin": FSDPPrecision("bf16-true")}, "would make the adapters half precision.*bf16-mixed"),
        ({"use_orig_params": False}, "use_orig_params: false"),
        ({"state_dict_type": "sharded"}, "leave out state_dict_type: sharded"),
    ],
)
def test_fsdp1_that_cannot_hold_adapters_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(trainer_with(FSDPStrategy(**options)))


def test_fsdp1_wraps_decoder_layers_and_casts_no_factors() -> None:
    strategy = FSDPStrategy(precision_plugin=FSDPPrecision("bf16-mixed"))
    assert strategy.mixed_precision_config.param_dtype == torch.bfloat16  # Lightning's own choice
    prepare(trainer_with(strategy))
    assert strategy.mixed_precision_config.param_dtype is None
    model = tiny_model("llama")
    inject(model, LoRAConfig(r=4))
    finish(trainer_with(strategy), nn.ModuleDict({"model": model}))
    policy = strategy.kwargs["auto_wrap_policy"]
    wrapped = policy._run_policy(model, ignored_modules=set(), root_kwargs={})
    assert set(wrapped) == set(model.model.layers)


def test_fsdp1_refuses_a_half_precision_base() -> None:
    model = tiny_model("llama", torch.bfloat16)
    inject(model, LoRAConfig(r=4))
    with pytest.raises(ValueError, match=r"torch.bfloat16: set dtype: float32 and precision: bf16-mixed"):
        finish(trainer_with(FSDPStrategy()), model)


def test_export_at_the_end_is_refused_for_shards(tmp_path: Path) -> None:
    trainer = trainer_with(FSDPStrategy())
    with pytest.raises(ValueError, match=r"export the checkpoint afterwards"):
        AdapterExport(str(tmp_path / "exported")).setup(trainer, nn.Module(), "fit")


def test_tensors_that_are_not_sharded_are_what_they_are() -> None:
    tensor = torch.randn(3, 2)
    assert gather_to(tensor, rank=1) is tensor
    assert shard_like(tensor, tensor) is tensor
    target = torch.zeros(3, 2)
    fill(target, tensor)
    assert torch.equal(target, tensor)
    assert torch.equal(tensor[local_slices(tensor)], tensor)
