"""``nn.MultiheadAttention`` in PEFT's folders, where its two projections are one layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import move
from helpers.models import quiet_trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import MultiheadAttention as Attention
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

from milora_lightning import (
    LoRAConfig,
    MiLoRAInit,
    export_merged,
    export_peft,
    initialize,
    inject,
    load_adapter,
    load_peft,
    lora_layers,
)
from milora_lightning.export.peft_attention import counts_twice

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BOTH = {"head.attention.in_proj", "head.attention.out_proj"}


def siglip() -> SiglipVisionModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(image_size=8, patch_size=4, **sizes)).eval()


def pooled(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X).pooler_output


def trained(**config: Any) -> SiglipVisionModel:
    net = siglip()
    inject(net, LoRAConfig(**{"r": 2, "lora_alpha": 3, **config}))
    initialize(net, cache=False)
    move(net)
    return net


def attention_of(model: nn.Module) -> set[str]:
    return {name[name.index("head") :] for name in lora_layers(model) if "head.attention" in name}


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PEFT as it will be when it adds the update of ``out_proj`` once."""

    def merge(self: Attention, safe_merge: bool = False, adapter_names: Any = None) -> None:
        self.merged_adapters += adapter_names
        base = self.get_base_layer()
        self.before = base.in_proj_weight
        del base.in_proj_weight
        base.in_proj_weight = self.before + self.get_delta_weight("default")
        base.out_proj.merge(adapter_names=adapter_names)

    def unmerge(self: Attention) -> None:
        self.merged_adapters.clear()
        base = self.get_base_layer()
        del base.in_proj_weight
        base.register_parameter("in_proj_weight", self.before)
        del self.before
        base.out_proj.unmerge()

    if counts_twice():
        monkeypatch.setattr(Attention, "merge", merge)
        monkeypatch.setattr(Attention, "unmerge", unmerge)
    counts_twice.cache_clear()
    assert not counts_twice()
    yield
    counts_twice.cache_clear()


def test_an_update_that_peft_would_add_twice_is_refused(tmp_path: Path) -> None:
    if not counts_twice():
        pytest.skip("this version of PEFT adds it once")
    with pytest.raises(ValueError, match=r"adds the update of out_proj .* twice .*exclude_modules: \[out_proj\]"):
        export_peft(trained(), tmp_path / "peft")
    export_peft(trained(exclude_modules=["attention.out_proj"]), tmp_path / "peft")
    theirs = get_peft_model(siglip(), LoraConfig(target_modules=["attention"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="twice"):
        load_peft(siglip(), tmp_path / "theirs")


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, BOTH),
        ({"init": "lora", "target_modules": ["in_proj", "out_proj", "fc1"]}, BOTH),
        ({"target_modules": ["in_proj", "out_proj"], "rank_pattern": {"in_proj": 3}, "lora_alpha": 6}, BOTH),
        ({"target_modules": ["in_proj", "fc2"], "use_rslora": True}, {"head.attention.in_proj"}),
        ({"target_modules": ["head.attention.out_proj"]}, {"head.attention.out_proj"}),
    ],
)
def test_peft_opens_what_is_exported_and_it_is_read_again(
    config: dict[str, Any], names: set[str], tmp_path: Path
) -> None:
    ours = trained(**config)
    assert attention_of(ours) == names
    want = pooled(ours)
    assert (want - pooled(siglip())).abs().max() > 1e-3
    export_peft(ours, tmp_path / "peft")
    torch.testing.assert_close(pooled(PeftModel.from_pretrained(siglip(), tmp_path / "peft")), want, rtol=0, atol=1e-5)
    again = siglip()
    load_peft(again, tmp_path / "peft")
    torch.testing.assert_close(pooled(again), want, rtol=0, atol=1e-5)
    export_merged(ours, tmp_path / "merged")
    merged = SiglipVisionModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(pooled(merged), want, rtol=0, atol=1e-5)
    export_peft(ours, tmp_path / "small", rank=1)
    PeftModel.from_pretrained(siglip(), tmp_path / "small")


@pytest.mark.usefixtures("mended")
def test_what_peft_has_trained_is_read(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["attention", "fc1"], rank_pattern={"attention": 3})
    theirs = get_peft_model(siglip(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = siglip()
    load_peft(ours, tmp_path)
    assert attention_of(ours) == BOTH
    torch.testing.assert_close(pooled(ours), pooled(theirs), rtol=0, atol=1e-5)


class Separate(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6)
        self.post_init()


def test_separate_projections_are_refused(tmp_path: Path) -> None:
    net = Separate(PretrainedConfig())
    inject(net, LoRAConfig(r=2))
    initialize(net, cache=False)
    with pytest.raises(ValueError, match="only if one weight holds query, key and value"):
        export_peft(net, tmp_path / "peft")


class Pooling(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = siglip()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(X).pooler_output.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(3))


@pytest.mark.filterwarnings("ignore")
def test_a_run_is_resumed_and_loaded_from_its_checkpoint(tmp_path: Path) -> None:
    def fit(ckpt: Path | None = None) -> Pooling:
        module = Pooling()
        keep = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=1)
        options = {"max_steps": 3, "enable_checkpointing": True}
        trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=2, seed=0), keep], **options)
        trainer.fit(module, ckpt_path=ckpt)
        return module

    whole = fit()
    want, before = pooled(whole.model), dict(siglip().named_parameters())
    assert (want - pooled(siglip())).abs().max() > 1e-3
    now = {n.replace(".base_layer", ""): p for n, p in whole.model.named_parameters()}
    assert all(torch.equal(p, now[n]) for n, p in before.items())
    loaded = Pooling()
    load_adapter(loaded, tmp_path / "saved/step=3.ckpt")
    for other in (fit(tmp_path / "saved/step=2.ckpt"), loaded):
        assert torch.equal(pooled(other.model), want)
