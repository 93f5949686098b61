"""Finding, injecting and initializing adapters on any module."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import TINY_CONFIGS, embedded_model, tiny_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from milora_lightning import LoRAConfig, adapters_disabled, initialize, inject, lora_layers
from milora_lightning.adapters.factors import initial_factors
from milora_lightning.adapters.parts import TargetNotFoundError
from milora_lightning.adapters.targets import find_targets
from milora_lightning.adapters.tied import parameter_owners, tied_to
from milora_lightning.models.processor import has_fast_products

PAPER_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", list(TINY_CONFIGS))
def test_only_factors_train_and_the_output_stays(kind: str) -> None:
    model = tiny_model(kind, torch.bfloat16).train()
    ids = torch.randint(0, 128, (2, 12))
    with torch.no_grad():
        before = model.eval()(ids).logits
        adapters = inject(model, LoRAConfig(r=4, lora_dropout=0.1))
        assert initialize(model) == len(adapters) > 0
        assert torch.equal(model.eval()(ids).logits, before)
    expected = {f"{name}.{factor}" for name in adapters for factor in ("lora_A", "lora_B")}
    assert trainable(model) == expected
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in adapters)


@pytest.mark.parametrize("kind", list(TINY_CONFIGS))
def test_training_changes_factors_and_nothing_else_and_can_be_switched_off(kind: str) -> None:
    model = tiny_model(kind).train()
    ids = torch.randint(0, 128, (2, 12))
    pretrained = copy.deepcopy(model)
    adapters = inject(model, LoRAConfig(r=4))
    initialize(model)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(model.get_parameter(name), before) for name, before in frozen.items())
    assert not any(torch.equal(model.get_parameter(name), before) for name, before in start.items())
    with torch.no_grad():
        tuned = model.eval()(ids).logits
        with adapters_disabled(model):
            off = model(ids).logits
    assert torch.equal(off, pretrained.eval()(ids).logits)
    assert not torch.equal(off, tuned)
    assert all(layer.enabled for layer in adapters.values())


def test_injecting_and_initializing_twice_is_doing_it_once() -> None:
    model = tiny_model()
    config = LoRAConfig(r=4, target_modules=PAPER_TARGETS)
    first = inject(model, config)
    initialize(model)
    state = {name: p.clone() for name, p in model.named_parameters()}
    assert inject(model, config) == first
    assert initialize(model) == 0
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_another_configuration_on_top_is_refused() -> None:
    model = tiny_model()
    inject(model, LoRAConfig(r=4))
    with pytest.raises(ValueError, match=r"has an adapter with r=4 already, and r=8"):
        inject(model, LoRAConfig(r=8))


def test_fake_tensors_with_which_tools_estimate_memory_get_adapters() -> None:
    with FakeTensorMode(), torch.device("cpu"):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        inject(model, LoRAConfig(r=2, target_modules=["0"]))
        assert model.eval()(torch.ones(3, 6)).shape == (3, 6)
        tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        tied[1].weight = tied[0].weight
        assert tied_to(tied[0], tied[0].weight, parameter_owners(tied)) == ["1.weight"]


def test_injection_works_on_meta_and_is_initialized_later() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    inject(model, LoRAConfig(r=2))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    weight = model[0].base_layer.weight.clone()
    assert initialize(model) == 2
    assert torch.equal(model[0].base_layer.weight, weight)
    assert model[0].lora_A.dtype == torch.float32


def test_random_starts_depend_on_seed_and_name_only() -> None:
    def factors(seed: int, init: str) -> dict[str, Tensor]:
        torch.rand(seed)  # disturbs the default generator
        model = tiny_model()
        inject(model, LoRAConfig(r=4, init=init))
        initialize(model, seed)
        return {name: layer.lora_A.detach() for name, layer in lora_layers(model).items()}

    for init in ("random", "lora"):
        one, same, other = factors(1, init), factors(1, init), factors(2, init)
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_factors_on_every_kind_of_target_of_the_embedded_model() -> None:
    """Each s·BA equals its part of a float64 full SVD to 1e-6; the other end fails the same comparison."""
    model = embedded_model("float32")
    targets = find_targets(model, PAPER_TARGETS)
    assert len(targets) == 150
    blocks = [f"layers.{number}." for number in (0, 7, 14, 22, 29)]
    for layer in (layer for name, layer in targets.items() if any(block in name for block in blocks)):
        U, S, Vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        parts = {"milora": U[:, -32:] * S[-32:] @ Vh[-32:], "pissa": U[:, :32] * S[:32] @ Vh[:32]}
        for init, other in (("milora", "pissa"), ("pissa", "milora")):
            A, B = initial_factors(layer.weight, 32, scaling=1.5, init=init)
            product = 1.5 * (B.double() @ A.double())
            assert (product - parts[init]).norm() <= 1e-6 * parts[init].norm()
            assert (product - parts[other]).norm() > 0.5 * parts[other].norm()


@pytest.mark.slow
def test_embedded_model_in_bfloat16_starts_exactly_and_keeps_its_weights() -> None:
    """Bit for bit at the start, dropout on or off; first updates survive the rounding; 20 steps spare the base."""
    model = embedded_model("bfloat16").train()
    del model.model.layers[5:]  # a part of it shows the same
    ids = torch.randint(0, 49152, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
    layers = inject(model, LoRAConfig(r=32, lora_dropout=0.05, target_modules=PAPER_TARGETS))
    initialize(model)
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, before)
        assert torch.equal(model.eval()(ids).logits, before)
    start = {name: p.clone() for name, p in model.train().named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    for step in range(20 if has_fast_products(torch.bfloat16) else 3):  # some 50 s each without such instructions
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            for layer in layers.values():
                x = torch.randn(16, layer.in_features).bfloat16()
                exact = x.double() @ copy.deepcopy(layer).double().delta_weight().T
                with torch.no_grad():
                    assert (layer.eval().update(x).double() - exact).norm() < 0.01 * exact.norm()
                layer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert changed == {f"{name}.{factor}" for name in layers for factor in ("lora_A", "lora_B")}


class ReadsWeight(nn.Module):
    """A module that has_fast_products with a layer's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0),
        lambda: nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, dropout=0.0),
        ReadsWeight,
    ],
    ids=["encoder", "decoder", "custom"],
)
def test_layers_whose_weight_is_read_without_a_call_are_trained(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    x = torch.randn(2, 5, 16)
    arguments = (x, x) if isinstance(model, nn.TransformerDecoderLayer) else (x,)
    with torch.no_grad():
        before_eval, before_train = model.eval()(*arguments), model.train()(*arguments)
    adapters = inject(model, LoRAConfig(r=4))
    initialize(model)
    with torch.no_grad():  # without gradients the encoder layer takes its fast path
        torch.testing.assert_close(model.eval()(*arguments), before_eval)
        torch.testing.assert_close(model.train()(*arguments), before_train)
    model.train()(*arguments).square().sum().backward()
    for layer in adapters.values():
        assert layer.lora_A.grad.abs().sum() > 0
        assert layer.lora_B.grad.abs().sum() > 0
        with torch.no_grad():
            layer.lora_B.add_(0.1)
    with torch.no_grad():  # training's path and the fast path agree about the changed function
        changed = model.train()(*arguments)
        torch.testing.assert_close(model.eval()(*arguments), changed, rtol=1e-4, atol=1e-5)
        assert (changed - before_train).abs().max() > 1e-3


def test_layers_that_compute_their_weight_are_skipped_with_a_note() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="'0' computes its weight"):
        adapters = inject(model, LoRAConfig(r=2))
    assert list(adapters) == ["1"]
    initialize(model)
    model(torch.randn(3, 8)).sum().backward()
    assert not model[0].bias.requires_grad


def test_a_layer_in_two_places_gets_one_adapter_in_both() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": nn.Sequential(shared, shared), "two": shared})
    adapters = inject(model, LoRAConfig(r=2))
    assert list(adapters) == ["one.0"]
    assert model["one"][0] is model["one"][1] is model["two"] is adapters["one.0"]


def test_modules_to_save_train_in_full_and_get_no_adapter() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    inject(model, LoRAConfig(r=4, modules_to_save=("head",)))
    assert trainable(model) == {"body.lora_A", "body.lora_B", "head.weight", "head.bias"}
    with pytest.raises(ValueError, match="nothing is left to adapt"):
        inject(nn.ModuleDict({"head": nn.Linear(8, 8)}), LoRAConfig(r=4, modules_to_save=("head",)))
    with pytest.raises(ValueError, match="modules_to_save names 'tail'"):
        inject(model, LoRAConfig(r=4, modules_to_save=("tail",)))


def test_targets_by_regular_expression() -> None:
    assert set(find_targets(tiny_model(), r".*layers\.1\..*(q|v)_proj")) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"'q_prj' matches no linear layer of LlamaForCausalLM.*down_proj.*mean 'q_proj'",
        ),
        ({"target_modules": r"nothing.*"}, r"regular expression target_modules='nothing\.\*' matches no linear layer"),
        ({"target_modules": ["input_layernorm"]}, r"only modules of type LlamaRMSNorm"),
        (
            {"r": 17, "target_modules": ["k_proj"]},
            r"r=17 is larger than layer 'model.layers.0.self_attn.k_proj'.*16×32",
        ),
    ],
)
def test_bad_targets_are_refused_and_nothing_is_changed(config: dict[str, object], message: str) -> None:
    model = tiny_model()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        inject(model, LoRAConfig(**config))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_no_linear_layer_at_all() -> None:
    with pytest.raises(TargetNotFoundError, match="no linear layers at all"):
        inject(nn.Sequential(nn.Conv2d(1, 1, 1)), LoRAConfig(r=1))


def test_tied_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'lm_head' is tied to model.embed_tokens.weight"):
        inject(tiny_model("qwen2"), LoRAConfig(r=4, target_modules=["lm_head"]))
    untied = inject(tiny_model("llama"), LoRAConfig(r=4, target_modules=["lm_head"]))
    assert list(untied) == ["lm_head"]


def test_non_finite_weight_names_the_layer() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    inject(model, LoRAConfig(r=4))
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp.up_proj' cannot be decomposed.*finite"):
        initialize(model)


def test_vanishing_singular_values_start_as_in_lora() -> None:
    """A component that is zero would stay zero for ever; it starts with its direction in A and zeros in B."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[0].weight[3:] = 0
    (layer,) = inject(model, LoRAConfig(r=4)).values()
    initialize(model)
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(4), rtol=0, atol=1e-6)
    assert layer.lora_B.abs().max() < 1e-6
    model(torch.randn(5, 8)).square().sum().backward()
    assert (layer.lora_B.grad.norm(dim=0) > 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"lora_alpha": 0}, "lora_alpha must be positive"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"init": "micah"}, "init='micah' is no start: take one of milora, pissa"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_bad_configurations(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**values)
