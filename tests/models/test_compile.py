"""Decoder layers compiled for training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.models import TINY_CONFIGS, quiet_trainer, save_tiny_model
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, PreTrainedModel

from milora_lightning import CausalLMModule, LoRAConfig, initialize, inject
from milora_lightning.models import compile as compilation
from milora_lightning.models.attention import NAME
from milora_lightning.models.loss import causal_lm_loss

LENGTHS = (30, 70, 140, 90, 200)  # of one block of attention, and of several


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(lora_dropout: float = 0.0, layers: int = 2) -> PreTrainedModel:
    """A model with adapters in attention and MLP; each more makes the graphs larger, and compiling slower."""
    torch.manual_seed(0)
    config = TINY_CONFIGS["qwen3"]
    config.num_hidden_layers, config.max_position_embeddings = layers, 256
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    inject(model, LoRAConfig(r=4, lora_dropout=lora_dropout, target_modules=["q_proj", "down_proj"]))
    initialize(model)
    return model.train()


def loss_of(model: PreTrainedModel, length: int) -> Tensor:
    input_ids = torch.randint(5, 120, (3, length), generator=torch.Generator().manual_seed(length))
    labels = input_ids.clone()
    labels[:, :5] = -100
    return causal_lm_loss(model, input_ids, labels)


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: object) -> None:
    """One that captures and differentiates as the default does, and leaves out the machine code, which takes long."""
    original = torch.compile
    monkeypatch.setattr(compilation.torch, "compile", lambda forward, options: original(forward, backend=backend))


def test_few_variants_serve_all_layers_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    use_backend(monkeypatch, counter)
    model, plain = adapted(), adapted()
    compilation.compile_layers(model)
    for length in LENGTHS:
        torch.testing.assert_close(loss_of(model, length), loss_of(plain, length))
    # With and without a gradient of the input, of one length and of any.
    assert 2 <= counter.frame_count <= 4


def test_gradients_are_those_of_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, "aot_eager")
    model, plain = adapted(), adapted()
    compilation.compile_layers(model)
    for length in LENGTHS:
        gradients = [
            torch.autograd.grad(loss_of(m, length), [p for p in m.parameters() if p.requires_grad])
            for m in (model, plain)
        ]
        for a, b in zip(*gradients, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.slow
def test_dropout_draws_what_the_plain_model_draws() -> None:
    """With the default backend, whose machine code takes torch's random numbers and leaves the masks to torch."""
    model, plain = adapted(0.3, layers=1), adapted(0.3, layers=1)
    compilation.compile_layers(model)
    gradients = []
    for m, seed in ((model, 0), (plain, 0), (plain, 1)):
        torch.manual_seed(seed)
        parameters = [p for p in m.parameters() if p.requires_grad]
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(m, LENGTHS[0]), parameters)]))
    got, want, other = gradients
    assert (got - want).norm() <= 1e-4 * want.norm()
    assert (other - want).norm() > 0.01 * want.norm()


def test_evaluation_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation.torch, "compile", lambda *_, **__: None)  # a call would fail
    model, plain = adapted(), adapted()
    compilation.compile_layers(model)
    with torch.no_grad():
        assert torch.equal(loss_of(model, 20), loss_of(plain, 20))
    with pytest.raises(TypeError):
        loss_of(model, 20)


def test_the_module_compiles_what_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(compilation.torch, "compile", lambda f, options: compiled.append(f) or f)
    CausalLMModule(str(save_tiny_model(tmp_path / "llama", "llama")), compile=True).configure_model()
    assert len(compiled) == 2


def test_a_copy_computes_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the averages of weights need it, which are copies of the model."""
    use_backend(monkeypatch, "eager")
    model, plain = adapted(), adapted()
    compilation.compile_layers(model)
    before = loss_of(model, 30).detach()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for changed in (copied, plain):
            for name, parameter in changed.named_parameters():
                if "lora_B" in name:
                    parameter.add_(1)
    torch.testing.assert_close(loss_of(copied, 30), loss_of(plain, 30))
    torch.testing.assert_close(loss_of(model, 30).detach(), before)
    assert abs(loss_of(copied, 30) - before) > 0.05


def test_fsdp1_is_refused(tmp_path: Path) -> None:
    lm = CausalLMModule(str(save_tiny_model(tmp_path / "llama", "llama")), compile=True)
    strategy = FSDPStrategy(parallel_devices=[torch.device("cpu")], cluster_environment=LightningEnvironment())
    trainer = quiet_trainer(tmp_path)
    trainer._accelerator_connector.strategy = strategy
    lm.trainer = trainer
    with pytest.raises(ValueError, match=r"compile: true does not work under FSDPStrategy \(FSDP1\): leave it out"):
        lm.configure_model()
