"""Convolutions in PEFT's folders: what is exported computes there what it does here, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import move
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from milora_lightning import (
    CheckpointError,
    LoRAConfig,
    export_merged,
    export_peft,
    initialize,
    inject,
    load_peft,
    lora_layers,
)
from milora_lightning.export.peft_trial import objection

NAMES = ["one", "two", "three", "grouped", "point", "head"]
X = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))


class Settings(PretrainedConfig):
    model_type = "convolutions"


class Convolutions(PreTrainedModel):
    config_class = Settings
    base_model_prefix = ""

    def __init__(self, config: Settings, **options: Any) -> None:
        super().__init__(config)
        torch.manual_seed(0)
        self.one = nn.Conv1d(4, 8, 3, padding=1, stride=2, **options)
        self.two = nn.Conv2d(1, 6, (3, 2), bias=False)
        self.three = nn.Conv3d(1, 4, 2)
        self.grouped = nn.Conv2d(4, 8, 2, groups=2)
        self.point = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x)[:, None])
        x = self.three(x[:, None]).flatten(2, 3)
        return self.head(self.point(self.grouped(x)).mean((-1, -2)))


def model(**options: Any) -> Convolutions:
    return Convolutions(Settings(), **options).eval()


def trained(init: str = "milora", names: list[str] = NAMES, **options: Any) -> Convolutions:
    net = model(**options)
    inject(net, LoRAConfig(r=4, lora_alpha=6, target_modules=names, init=init))
    initialize(net)
    move(net)
    return net


def within(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(X), ours.eval()(X), rtol=0, atol=1e-5)
        assert (ours(X) - model()(X)).abs().max() > 1e-3


@pytest.mark.parametrize("init", ["milora", "lora"])
def test_peft_opens_what_is_exported_and_it_is_read_again(init: str, tmp_path: Path) -> None:
    ours = trained(init)
    export_peft(ours, tmp_path / "peft")
    within(ours, PeftModel.from_pretrained(model(), tmp_path / "peft"))
    again = model()
    load_peft(again, tmp_path / "peft")
    within(ours, again)
    export_merged(ours, tmp_path / "merged")
    within(ours, Convolutions.from_pretrained(tmp_path / "merged"))


def test_a_lower_rank_is_shared_among_groups(tmp_path: Path) -> None:
    ours = trained()
    lost = export_peft(ours, tmp_path / "peft", rank=6)
    assert 0 < lost < 0.2
    small = PeftModel.from_pretrained(model(), tmp_path / "peft")
    assert {m.r["default"] for m in small.modules() if hasattr(m, "lora_A")} == {6}
    theirs = dict(small.get_base_model().named_modules())
    deltas = {name: layer.as_weight(layer.delta_weight()) for name, layer in lora_layers(ours).items()}
    whole = sum(delta.square().sum() for delta in deltas.values())
    del deltas["grouped"]  # whose product PEFT does not form
    apart = sum((theirs[n].get_delta_weight("default") - delta).square().sum() for n, delta in deltas.items())
    assert 0 < apart / whole <= lost * 1.001
    with pytest.raises(ValueError, match="rank=5 cannot be shared among the 2 groups"):
        export_peft(trained(), tmp_path / "uneven", rank=5)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding_mode": "circular"}])
def test_what_pefts_convolutions_cannot_do_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    ours = trained(**options)
    assert objection(ours) is not None  # as is said before training
    with pytest.raises(ValueError, match=r"PEFT cannot represent these adapters: its adapters of convolutions"):
        export_peft(ours, tmp_path / "peft")
    export_merged(ours, tmp_path / "merged")
    merged = model(**options)
    merged.load_state_dict(Convolutions.from_pretrained(tmp_path / "merged").state_dict())
    within(ours, merged)


@pytest.mark.filterwarnings("ignore")
def test_pefts_own_adapters_are_read_if_they_change_the_kernel_alone(tmp_path: Path) -> None:
    plain = [name for name in NAMES if name != "grouped"]
    theirs = get_peft_model(model(), LoraConfig(r=4, lora_alpha=6, target_modules=plain)).eval()
    move(theirs)
    theirs.save_pretrained(tmp_path / "plain")
    ours = model()
    load_peft(ours, tmp_path / "plain")
    within(ours, theirs)
    grouped = get_peft_model(model(), LoraConfig(r=4, target_modules=["grouped"]))
    move(grouped)
    grouped.save_pretrained(tmp_path / "grouped")
    with pytest.raises(CheckpointError, match="'grouped', it adapts a convolution of 2 groups by filters that"):
        load_peft(model(), tmp_path / "grouped")
