"""Sharding by the one rank of this process: all that a strategy does but to share, in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_runs import STEPS, OwnProject, fit
from helpers.models import quiet_trainer, tiny_model
from helpers.modules import data, module
from helpers.several_processes import assert_equal_to_rounding
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from milora_lightning import MiLoRAInit, MiLoRAModelParallelStrategy
from milora_lightning.checkpoint.io import KEY
from milora_lightning.parallel.dtensor import full_tensor
from milora_lightning.strategies.base import shard_model


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2-folder", "fsdp1", "offloaded"])
def test_one_rank_trains_what_no_strategy_does(kind: str, folder: Path, single: dict[str, Any]) -> None:
    """Also from a checkpoint without shards; and without shards from one of its own."""
    name, half = f"{kind}-of-one", STEPS // 2
    whole = fit(folder, name, kind, devices=1)
    from_single = {"ckpt_path": folder / "single" / f"step={half}.ckpt"}
    resumed = fit(folder, f"{name}-resumed", kind, devices=1, resume=from_single)
    own = folder / name / f"step={half}.ckpt"
    alone = fit(folder, f"{name}-alone", resume={"ckpt_path": own})
    for run, steps in ((whole, STEPS), (resumed, half), (alone, half)):
        assert len(run["losses"]) == steps
        assert_equal_to_rounding(({name: run}, {name: run}), name, single)
    assert alone["cost"] == 0  # the checkpoint brings the factors
    assert resumed["cost"] == (whole["cost"] if kind == "fsdp1" else 0)  # which decomposes before it shards
    assert own.is_dir() == (kind == "fsdp2-folder")
    assert not list(own.parent.glob(".*"))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("folders", [False, True])
def test_validation_takes_adapters_from_a_checkpoint_and_leaves_its_optimizer(
    folders: bool, folder: Path, single: dict[str, Any], tmp_path: Path
) -> None:
    """Which may be of any kind. A checkpoint that is written again replaces the one before, and describes adapters."""
    strategy = MiLoRAModelParallelStrategy(1, 1, save_distributed_checkpoint=folders)
    trainer = quiet_trainer(tmp_path, strategy=strategy, callbacks=[MiLoRAInit(r=4, seed=5)], max_steps=2)
    lm, examples = module(folder / "llama"), data(tmp_path, folder / "llama", eval_batch_size=3)
    found = trainer.validate(lm, examples, verbose=False, ckpt_path=folder / "single" / f"step={STEPS}.ckpt")
    for ours, theirs in zip(found, single["results"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert all(isinstance(parameter, DTensor) for parameter in lm.parameters())
    for path in (tmp_path / "kept", tmp_path / "kept"):
        trainer.save_checkpoint(path)
        (path / "of-before" if folders else tmp_path / "beside").touch()
    trainer.save_checkpoint(path)
    assert path.is_dir() == folders
    assert not (path / "of-before").exists()
    assert strategy.load_checkpoint(path)["state_dict"][KEY] == lm._adapter_checkpoint.description(lm)


class Sharded(OwnProject):
    """A user's module without adapters that is sharded by what the strategy offers."""

    def configure_model(self) -> None:
        if self.lm is None:
            self.lm = tiny_model("qwen2")
            shard_model(self.trainer.strategy, self.lm)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", [ModelParallelStrategy, MiLoRAModelParallelStrategy])
def test_without_adapters_shards_are_lightning_s(kind: type[ModelParallelStrategy], tmp_path: Path) -> None:
    """Its checkpoints as well, which have all weights."""
    trainer = quiet_trainer(tmp_path, strategy=kind(1, 1, save_distributed_checkpoint=False), max_steps=1)
    trainer.fit(Sharded())
    lm = trainer.lightning_module.lm
    assert type(trainer.strategy) is kind
    assert all(isinstance(parameter, DTensor) for parameter in lm.parameters())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    saved = torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"lm.{name}" for name in lm.state_dict()}
    trained = {name: full_tensor(value).clone() for name, value in lm.state_dict().items()}
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.zero_()
    trainer.strategy.load_checkpoint(tmp_path / "whole.ckpt")
    assert all(torch.equal(full_tensor(value), trained[name]) for name, value in lm.state_dict().items())


@pytest.mark.usefixtures("one_rank")
def test_options_that_a_module_passes_over_are_refused(tmp_path: Path) -> None:
    strategy = MiLoRAModelParallelStrategy(1, 1, cpu_offload=True, reshard_after_forward=False)
    trainer = quiet_trainer(tmp_path, strategy=strategy, max_steps=1, callbacks=[MiLoRAInit(r=4)])
    with pytest.raises(
        ValueError, match=r"^reshard_after_forward, cpu_offload of MiLoRAModel.*: OwnProject shards its"
    ):
        trainer.fit(OwnProject())
