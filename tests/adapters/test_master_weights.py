"""What trains in full beside the adapters is float32, and computes in the base's dtype."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.callback_modules import LanguageModel
from helpers.models import quiet_trainer, tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from milora_lightning import LoRAConfig, MiLoRAInit, export_merged, initialize, inject, load_adapter
from milora_lightning.checkpoint.reading import read_checkpoint

IDS = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(0))


def fit(folder: Path, lm: LanguageModel, kept: list[str], **options: Any) -> dict[str, Tensor]:
    """Train at a rate that half precision would round away; return what trained in full."""
    lm.configure_optimizers = lambda: torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=3e-4)
    lm.configure_model()
    before = {name: p.detach().clone().float() for name, p in lm.named_parameters()}
    callback = MiLoRAInit(r=4, modules_to_save=kept, cache=False)
    quiet_trainer(folder, callbacks=[callback], max_steps=6, **options).fit(lm)
    trained = {n: p for n, p in lm.named_parameters() if p.requires_grad and "lora_" not in n}
    for name, p in trained.items():
        assert p.dtype == torch.float32, name
        moved = p.detach() != before[name]
        assert moved.float().mean() > (0.2 if "wte" in name else 0.99), name
    return trained


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.bfloat16, "32-true"),
        (torch.float32, "bf16-true"),
        (torch.float32, "bf16-mixed"),
    ],
)
def test_small_updates_are_kept_whatever_the_precision(dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    lm = LanguageModel(dtype)
    trained = fit(tmp_path, lm, ["ln_f", "ln_1"], precision=precision)
    assert len(trained) == 6
    half = torch.bfloat16 if precision == "bf16-true" else dtype
    assert lm.lm.transformer.ln_f.weight.dtype == half
    assert lm(IDS).dtype == half


def test_gradients_of_a_half_precision_head_can_be_unscaled() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).half()
    inject(model, LoRAConfig(r=2, modules_to_save=["1"]))
    initialize(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.randn(4, 8).half()).float().square().sum()).backward()
    scaler.unscale_(optimizer)  # refuses gradients in half precision
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_tied_weights_and_embeddings_stay_one_and_are_exported_in_the_bases_dtype(tmp_path: Path) -> None:
    """GPT-2's output embeddings are its input embeddings; both compute in half precision with one float32 weight."""
    lm = LanguageModel(torch.bfloat16)
    trained = fit(tmp_path, lm, ["wte", "ln_f"])
    assert lm.lm.transformer.wte.weight.dtype == lm.lm.lm_head.weight.dtype == torch.bfloat16
    assert set(trained) == {"lm.transformer.wte.weight", "lm.transformer.ln_f.weight", "lm.transformer.ln_f.bias"}
    lm.trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = read_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert all(torch.equal(saved[name], p) for name, p in trained.items())
    fresh = LanguageModel(torch.bfloat16)
    fresh.configure_model()
    load_adapter(fresh, tmp_path / "a.ckpt")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(IDS), lm.eval()(IDS))
    export_merged(lm, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["transformer.wte.weight"], trained["lm.transformer.wte.weight"].bfloat16())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(lm.lm).__name__ == type(merged).__name__
    assert lm.lm.dtype == merged.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, lm(IDS), rtol=0.02, atol=0.02)


class Head(nn.Module):
    """Weights that are read in other ways than by the call of the module that has them."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(8))])
        self.classes = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rnn(x)[0]
        x = self.normed(self.attention(x, x, x)[0]) * self.scales[0]
        return nn.functional.linear(x, nn.functional.normalize(self.classes.weight))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_whole_networks_compute_as_in_half_precision_and_learn_in_full() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = Model().bfloat16()
    for make in (lambda: Model().bfloat16(), Model):
        model = make()
        names = set(model.state_dict())
        inject(model, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
        initialize(model)
        assert inject(model, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
        model = model.to(torch.bfloat16)
        assert {n.replace(".base_layer", "") for n in model.state_dict() if "_A" not in n and "_B" not in n} == names
        assert torch.equal(model(x), plain(x))
        for _ in range(2):
            model(x).float().square().sum().backward()
        kept = [p for n, p in model.named_parameters() if n.startswith("head")]
        assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in kept if p.grad is not None)
        assert sum(p.grad is not None for p in kept) == len(kept) - 1  # the bias of the classes is not used
        with torch.no_grad():
            before = model(x)
            for p in kept:
                p.mul_(1.5)
            assert not torch.equal(model(x), before)
        for clone in (copy.deepcopy(model.head.rnn), pickle.loads(pickle.dumps(model.head.rnn))):
            assert torch.equal(clone(x)[0], model.head.rnn(x)[0])
            assert clone.weight_ih_l0.dtype == torch.bfloat16
        assert (
            torch.equal(model.float()(x.float()), model.double()(x.double()).float()) or model.head.classes.weight.dtype
        )
        assert model.head.classes.weight is model.head.classes._parameters["weight"]  # nothing to cast any more


def test_buffers_of_what_trains_in_full_follow_a_cast_and_its_parameters_do_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with torch.no_grad():
        model(3 * torch.randn(16, 8) + 1)  # statistics that bfloat16 rounds
    plain = copy.deepcopy(model).bfloat16().eval()
    inject(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    initialize(model)
    model = model.to(torch.bfloat16)
    norm, x = model[1], torch.randn(4, 8).bfloat16()
    for name, buffer in plain[1].named_buffers():
        assert norm.get_buffer(name).dtype == buffer.dtype, name
        assert torch.equal(norm.get_buffer(name), buffer)
    assert {p.dtype for p in norm.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain(x))
    model.train()(x).float().sum().backward()
    assert norm.running_mean.dtype == torch.bfloat16
    assert not torch.equal(norm.running_mean, plain[1].running_mean)


@pytest.mark.usefixtures("one_rank")
def test_fsdp2_shards_the_float32_weights() -> None:
    """One rank will do: FSDP2 exchanges the parameters in the same way, and its updates are those without it."""
    config = LoRAConfig(r=4, modules_to_save=["norm", "lm_head", "embed_tokens"])
    losses = []
    for shards in (False, True):
        model = tiny_model("llama", torch.bfloat16)
        inject(model, config)
        if shards:
            for layer in [*model.model.layers, model]:
                fully_shard(layer)
            inject(model, config)
        initialize(model, cache=False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(3):
            loss = model(IDS, labels=IDS).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert losses[:3] == losses[3:]
    assert losses[0] - losses[2] > 0.05


def test_a_kept_head_compiles() -> None:
    model = tiny_model("llama", torch.bfloat16)
    inject(model, LoRAConfig(r=4, modules_to_save=["norm", "lm_head"]))
    initialize(model)
    expected = model(IDS).logits
    compiled = torch.compile(model.model.norm, backend="eager", fullgraph=True)
    x = torch.randn(2, 8, 32).bfloat16()
    assert torch.equal(compiled(x), model.model.norm(x))
    compiled(x).float().sum().backward()
    assert model.model.norm._parameters["weight"].grad.dtype == torch.float32
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), (IDS,)).logits, expected)
