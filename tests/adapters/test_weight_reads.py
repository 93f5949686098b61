"""Layers whose weights a model reads in place of calling them: which they are, and that no adapter is idle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers.exports import move
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from milora_lightning import LoRAConfig, export_merged, export_peft, initialize, inject, lora_layers
from milora_lightning.adapters.weight_reads import read_weights
from milora_lightning.utils.errors import InvalidInputError

IDS = torch.arange(24).view(2, 12) + 5


class Reading(nn.Module):
    """Reads the weights of all layers whose names begin with ``read``, and no other's."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.factor = False, 2.0
        for name in ("read", "read_within", "read_later", "read_local", "read_unknown", "read_otherwise"):
            setattr(self, name, nn.Linear(4, 4))
        for name in ("called", "asked", "skipped", "trained", "optional", "set_up"):
            setattr(self, name, nn.Linear(4, 4))
        self.read_blocks = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.reset()

    def reset(self) -> None:
        nn.init.zeros_(self.set_up.weight)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if isinstance(self.asked.weight, Tensor) and x.dtype != self.asked.weight.dtype:
            x = x.to(self.asked.weight.dtype)
        x = self.asked(self.called(x)) + F.linear(x, self.read.weight, self.called.bias)
        if self.fast and self.factor > 1:
            x = x @ self.skipped.weight
        if self.training and other is None:
            x = x @ self.trained.weight
        if other is not None:
            x = x + other @ self.optional.weight
        if len(x) > 1:
            x = x @ self.read_unknown.weight.T
        y = x if self.fast else self.read_otherwise.weight @ x.T
        layer = self.read_local
        return self.later(y @ layer.weight + torch.cat([b.weight for b in [self.read_within]]).sum())

    def later(self, x: Tensor) -> Tensor:
        return x @ self.read_later.weight + self.read_blocks[0].weight.sum()


def test_exactly_what_is_read_is_found() -> None:
    model = nn.ModuleDict({"inner": Reading()})
    inject(model, LoRAConfig(r=2))
    found = set(read_weights(model))
    # A local name inside of a comprehension is not followed.
    assert found == {name for name in lora_layers(model) if "read" in name} - {"inner.read_within"}


class Asking(nn.Module):
    """Leaves the method before some reads, asks about weights, and has attributes that no one can evaluate yet."""

    def __init__(self, fast: bool, limit: float | None = None) -> None:
        super().__init__()
        self.fast, self.limit = fast, limit
        for name in ("fast_one", "slow_one", "never", "asked", "local", "read", "late", "maybe", "cached"):
            setattr(self, name, nn.Linear(4, 4))

    @property
    def step(self) -> int:
        raise RuntimeError("attached to no trainer")

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        for part in x:
            if cache is not None:
                x = cache @ self.cached.weight
            x, cache = part, x
        w = self.local.weight
        if w is not None and w.dtype != x.dtype:
            x = x.to(w).to(self.asked.weight).to(self.asked.weight, non_blocking=True)
        v = self.read.weight
        x = x @ v
        if self.limit > 0 or self.step > 2:
            return x @ self.maybe.weight
        with torch.no_grad():
            for part in x:
                if self.fast:
                    continue
                x = part @ self.late.weight
        if self.fast:
            return x @ self.fast_one.weight
        x = x @ self.slow_one.weight
        if x.ndim > 1:
            return x
        elif self.fast:  # noqa: RET505
            x = x @ self.never.weight
        else:
            raise ValueError
        return x @ self.never.weight


@pytest.mark.parametrize(("fast", "names"), [(True, {"fast_one"}), (False, {"slow_one", "late"})])
def test_what_is_not_reached_or_only_asked_about_is_not_read(fast: bool, names: set[str]) -> None:
    model = Asking(fast)
    inject(model, LoRAConfig(r=2))
    assert set(read_weights(model)) == {"read", "maybe", "cached", *names}


def mamba() -> hf.PreTrainedModel:
    return hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4)
    )


def jamba() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    mixers = {"mamba_dt_rank": 4, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    experts = {"num_experts": 2, "expert_layer_period": 2}
    return hf.JambaForCausalLM(hf.JambaConfig(vocab_size=64, num_hidden_layers=2, **sizes, **mixers, **experts))


def mobilebert() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 16, "embedding_size": 8, "intra_bottleneck_size": 8, "intermediate_size": 16}
    return hf.MobileBertForMaskedLM(
        hf.MobileBertConfig(vocab_size=64, num_hidden_layers=1, num_attention_heads=2, **sizes)
    )


READ = {
    "dt_proj": (mamba, "dt_proj"),
    "dt_proj of a hybrid": (jamba, "dt_proj"),
    "head": (mobilebert, "predictions.dense"),
}


@pytest.mark.parametrize("case", READ)
@pytest.mark.filterwarnings("ignore")
def test_such_layers_start_exact_train_and_are_exported_merged_alone(case: str, tmp_path: Path) -> None:
    build, target = READ[case]
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # a new model's are so small that dt_proj changes next to nothing
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "base")
    start = model(IDS).logits.detach()
    inject(model, LoRAConfig(r=2, target_modules=[target]))
    initialize(model)
    assert torch.equal(model(IDS).logits, start)
    assert read_weights(model).keys() == lora_layers(model).keys()
    move(model)
    model(IDS).logits.square().sum().backward()
    assert all(layer.lora_A.grad.abs().max() > 0 for layer in lora_layers(model).values())
    with pytest.raises(InvalidInputError, match=rf"the model reads the weight of '.*{target}' in place of a call"):
        export_peft(model, tmp_path / "peft")
    export_merged(model, tmp_path / "merged")
    with torch.no_grad():
        merged = type(model).from_pretrained(tmp_path / "merged")(IDS).logits
        tuned = model(IDS).logits
        torch.testing.assert_close(merged, tuned, rtol=1e-5, atol=1e-4)
        assert (tuned - start).abs().max() > 1e-3

        theirs = get_peft_model(
            type(model).from_pretrained(tmp_path / "base"), LoraConfig(r=2, target_modules=[target])
        )
        move(theirs)
        assert torch.equal(theirs.eval()(IDS).logits, start)  # why: an adapter there is without any effect


@pytest.mark.filterwarnings("ignore:Adapters reach")
@pytest.mark.parametrize(
    ("dtype", "options", "said"),
    [
        (torch.float32, {"lora_dropout": 0.1}, "lora_dropout has no effect there"),
        (torch.bfloat16, {}, "each update is rounded together with the weight"),
    ],
)
def test_what_adapters_lack_there_is_said(dtype: torch.dtype, options: dict[str, Any], said: str) -> None:
    model = nn.ModuleDict({"inner": Reading()}).to(dtype)
    with pytest.warns(UserWarning, match=rf"reads the weight of 'inner.read'.*{said}"):
        inject(model, LoRAConfig(r=2, target_modules=["read", "called"], **options))
