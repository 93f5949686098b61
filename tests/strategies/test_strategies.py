"""What can be told of strategies without several processes or GPUs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from torch import nn

from milora_lightning import AdapterExport, LoRAConfig, MiLoRAFSDPStrategy, MiLoRAModelParallelStrategy, inject
from milora_lightning.checkpoint.adapter import AdapterCheckpoint
from milora_lightning.checkpoint.io import ClearCheckpointIO
from milora_lightning.parallel.dtensor import copy_into, gather_to_rank, local_slices, shard_like
from milora_lightning.strategies.base import finish, gradient_norm, needs_early_start, prepare
from milora_lightning.strategies.fsdp import decoder_policy


def trainer_with(strategy: Any) -> Any:
    return SimpleNamespace(strategy=strategy, precision_plugin=getattr(strategy, "precision_plugin", None))


def test_other_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not work under SimpleNamespace: use one device, strategy: ddp"):
        prepare(trainer_with(SimpleNamespace(checkpoint_io=None)))


def test_deepspeed_is_refused_with_the_reason_and_a_remedy() -> None:
    class DeepSpeedStrategy(SimpleNamespace):
        """Lightning's, which cannot be made without the package deepspeed."""

    class Own(DeepSpeedStrategy):
        pass

    with pytest.raises(ValueError, match=r"under Own, which nobody has tried: its engine partitions .* milora_fsdp2"):
        prepare(trainer_with(Own(checkpoint_io=None)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision_plugin": FSDPPrecision("bf16-true")}, "would put the adapters in half precision.*bf16-mixed"),
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
    assert strategy.mixed_precision_config.param_dtype == torch.bfloat16  # as long as there are no adapters
    model = tiny_model("llama")
    inject(model, LoRAConfig(r=4))
    module = LightningModule()
    module.model = model
    AdapterCheckpoint.attach(module, LoRAConfig(r=4))
    strategy.connect(module)
    finish(trainer_with(strategy), module)
    assert strategy.mixed_precision_config.param_dtype is None
    wrapped = decoder_policy(module)._run_policy(model, ignored_modules=set(), root_kwargs={})
    assert set(wrapped) == set(model.model.layers)


class Louder(FSDPStrategy):
    """A user's own strategy."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {**super().lightning_module_state_dict(), "said": "aloud"}


def test_lightning_s_own_classes_and_users_classes_become_ours_and_stay_what_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare, own, ours = FSDPStrategy(), Louder(), MiLoRAFSDPStrategy()
    for strategy in (bare, own, ours):
        prepare(trainer_with(strategy))
        prepare(trainer_with(strategy))  # fit, then test
    assert type(bare) is type(ours) is MiLoRAFSDPStrategy
    assert isinstance(own, Louder)
    assert isinstance(own, MiLoRAFSDPStrategy)
    assert type(own).__name__ == "Louder"
    assert type(Louder()) is Louder
    monkeypatch.setattr(MiLoRAFSDPStrategy, "lightning_module_state_dict", lambda self: {"adapters": 1})
    assert own.lightning_module_state_dict() == {"adapters": 1, "said": "aloud"}


@pytest.mark.parametrize(
    ("name", "ours"), [("milora_fsdp1", MiLoRAFSDPStrategy), ("milora_fsdp2", MiLoRAModelParallelStrategy)]
)
def test_the_trainer_knows_them_by_name(name: str, ours: type) -> None:
    assert name in StrategyRegistry.available_strategies()
    if name == "milora_fsdp1":  # which has no way to CPUs: said as of Lightning's own
        with pytest.raises(ValueError, match="requires a GPU"):
            Trainer(strategy=name, accelerator="cpu", logger=False)
    else:
        assert type(Trainer(strategy=name, accelerator="cpu", devices=2, logger=False).strategy) is ours


def test_fsdp1_refuses_a_half_precision_base() -> None:
    model = tiny_model("llama", torch.bfloat16)
    inject(model, LoRAConfig(r=4))
    trainer = trainer_with(FSDPStrategy())
    prepare(trainer)
    with pytest.raises(ValueError, match=r"torch.bfloat16: set dtype: float32 and precision: bf16-mixed"):
        finish(trainer, model)


def test_export_at_the_end_is_refused_for_shards(tmp_path: Path) -> None:
    trainer = trainer_with(FSDPStrategy())
    with pytest.raises(ValueError, match=r"export the checkpoint afterwards"):
        AdapterExport(str(tmp_path / "exported")).setup(trainer, nn.Module(), "fit")


def test_tensors_that_are_not_sharded_are_what_they_are() -> None:
    tensor = torch.randn(3, 2)
    assert gather_to_rank(tensor, rank=1) is tensor
    assert shard_like(tensor, tensor) is tensor
    target = torch.zeros(3, 2)
    copy_into(target, tensor)
    assert torch.equal(target, tensor)
    assert torch.equal(tensor[local_slices(tensor)], tensor)


def test_the_norm_of_a_gradient_in_flat_shards_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this rank's part of norm 3 and another's of norm 4."""
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([2.0])]
    assert gradient_norm(SingleDeviceStrategy(), gradients) == 3
    strategy = FSDPStrategy()
    monkeypatch.setattr(FSDPStrategy, "root_device", torch.device("cpu"))
    monkeypatch.setattr(strategy, "reduce", lambda square, reduce_op: square + {"sum": 16}[reduce_op])
    assert gradient_norm(strategy, gradients) == 5


def test_factors_are_computed_before_weights_are_sharded_or_quantized() -> None:
    quantizes = BitsandbytesPrecision.__new__(BitsandbytesPrecision)
    for strategy, plugin, early in (
        (SingleDeviceStrategy(), Precision(), False),
        (SingleDeviceStrategy(), quantizes, True),
        (FSDPStrategy(), Precision(), True),
        (ModelParallelStrategy(), Precision(), False),
    ):
        trainer: Any = SimpleNamespace(strategy=strategy, precision_plugin=plugin)
        assert needs_early_start(trainer) is early


def test_checkpoints_are_written_by_what_a_user_has_for_it() -> None:
    """Lightning's own way is replaced by one with clear errors."""

    class Compressed(TorchCheckpointIO):
        pass

    own = Compressed()
    for given, kept in ((own, True), (TorchCheckpointIO(), False), (None, False)):
        strategy = SingleDeviceStrategy(checkpoint_io=given)
        prepare(trainer_with(strategy))
        assert type(strategy.checkpoint_io) is (Compressed if kept else ClearCheckpointIO)
        assert (strategy.checkpoint_io is own) is kept
