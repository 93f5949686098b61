"""Adapters of experts: each matrix of a stack has factors of its own, in whatever way its module computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import IDS, logits
from helpers.models import quiet_trainer, save_tiny_model, tiny_model
from helpers.modules import data, module
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.func import functional_call

from milora_lightning import (
    LoRAConfig,
    MiLoRAInit,
    adapters_disabled,
    adapters_merged,
    initialize,
    inject,
    load_adapter,
    lora_layers,
)
from milora_lightning.adapters.base_weight import dense_weight
from milora_lightning.adapters.coverage import coverage
from milora_lightning.adapters.experts import LoRAExperts
from milora_lightning.adapters.parts import TargetNotFoundError
from milora_lightning.analysis.spectra import analyze_model
from milora_lightning.analysis.tables import by_type
from milora_lightning.callbacks import PrincipalProjection, SubspaceMonitor
from milora_lightning.utils.errors import InvalidInputError

KINDS = ["qwen3_moe", "gpt_oss", "llama4"]  # (out, in); (in, out) with biases; (in, out), all experts in one product
WAYS = [("qwen3_moe", "eager"), ("qwen3_moe", "batched_mm"), ("qwen3_moe", "grouped_mm"), ("gpt_oss", "grouped_mm")]
WAYS += [("gpt_oss", "eager"), ("gpt_oss", "batched_mm"), ("llama4", "eager")]


def adapted(kind: str, way: str = "eager", dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    model = tiny_model(kind, dtype)
    if kind != "llama4":
        model.set_experts_implementation(way)
    inject(model, LoRAConfig(**{"r": 3, "lora_alpha": 6, **config}))
    initialize(model, cache=False)
    return model


def moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A.add_(torch.randn_like(layer.lora_A), alpha=0.1)
            layer.lora_B.add_(torch.randn_like(layer.lora_B), alpha=0.1)
    return model


def stacks(model: nn.Module) -> dict[str, LoRAExperts]:
    return {name: layer for name, layer in lora_layers(model).items() if isinstance(layer, LoRAExperts)}


@pytest.mark.parametrize(("kind", "way"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_at_the_pretrained_model_bit_for_bit(kind: str, way: str, dtype: torch.dtype) -> None:
    plain = tiny_model(kind, dtype)
    if kind != "llama4":
        plain.set_experts_implementation(way)
    want = plain.eval()(IDS).logits
    model = adapted(kind, way, dtype, lora_dropout=0.2)
    for layer in lora_layers(model).values():
        layer.train()
    assert torch.equal(model(IDS).logits, want)
    moved(model)
    assert not torch.equal(model(IDS).logits, want)
    with adapters_disabled(model):
        assert torch.equal(model(IDS).logits, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["milora", "pissa"])
def test_each_matrix_has_the_slice_of_its_own_spectrum(kind: str, init: str) -> None:
    layers = stacks(adapted(kind, init=init))
    assert len(layers) == 4
    for layer in layers.values():
        for matrix, A, B in zip(dense_weight(layer), layer.lora_A, layer.lora_B, strict=True):
            U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
            chosen = slice(-3, None) if init == "milora" else slice(3)
            want = U[:, chosen] * S[chosen] @ Vh[chosen]
            torch.testing.assert_close(layer.scaling * B.double() @ A.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_outputs_and_gradients_are_those_of_the_plain_formula(kind: str, way: str) -> None:
    """Of the module's own code with W + s (B A − B₀A₀), formed by autograd, in the place of each stack."""
    model = moved(adapted(kind, way, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]))
    plain = tiny_model(kind)
    exact = way != "grouped_mm"  # of which torch has none in float64
    model, plain = (model.double(), plain.double()) if exact else (model, plain)
    factors = [p for p in model.parameters() if p.requires_grad]
    if kind != "llama4":
        plain.set_experts_implementation(way)
    weights = {}
    for name, layer in stacks(model).items():
        delta = layer.scaling * (layer.lora_B @ layer.lora_A - layer.initial_B @ layer.initial_A)
        weights[name] = layer.base_layer.weight + (delta.mT if layer.transposed else delta)
    want = functional_call(plain.eval(), weights, (IDS,)).logits
    got = model.eval()(IDS).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10 if exact else 1e-6)
    scale = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(3))
    a, b = (torch.autograd.grad((y * scale).sum(), factors) for y in (got, want))
    for one, other in zip(a, b, strict=True):
        assert (one - other).norm() <= (1e-9 if exact else 1e-4) * other.norm()


def test_checkpointed_layers_have_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        model = moved(adapted("qwen3_moe", "grouped_mm", lora_dropout=0.3)).train()
        if again:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        model(IDS).logits.square().sum().backward()
        gradients.append([layer.lora_A.grad for layer in stacks(model).values()])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_includes_experts_and_leaves_routers_out(kind: str) -> None:
    model = tiny_model(kind)
    size = {n: p.numel() for n, p in model.named_parameters() if "experts" in n and p.ndim == 3}
    inject(model, LoRAConfig(r=2))
    assert {name for name, _ in stacks(model).items()} == size.keys()
    assert not any("router" in name or name.endswith(".gate") for name in lora_layers(model))
    assert sum(layer.matrices * layer.out_features * layer.in_features for layer in stacks(model).values()) == sum(
        size.values()
    )
    share = float(coverage(model, LoRAConfig(r=2)).partition("%")[0])
    assert share > 90
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n] == []
    before = list(model.state_dict())
    inject(model, LoRAConfig(r=2))  # a second time
    assert list(model.state_dict()) == before


def test_what_is_named_gets_adapters() -> None:
    def names(**config: Any) -> set[str]:
        return {name.partition("layers.")[2] for name in lora_layers(adapted("qwen3_moe", **config))}

    one = {"target_modules": [], "target_parameters": ["0.mlp.experts.down_proj"]}
    assert names(**one) == {"0.mlp.experts.down_proj"}
    both = names(target_modules=["q_proj"], target_parameters=["gate_up_proj"])
    assert both == {f"{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.experts.gate_up_proj")}
    assert names(target_modules=[], target_parameters=["q_proj.weight"]) == {f"{i}.self_attn.q_proj" for i in (0, 1)}
    assert not any("experts" in name for name in names(exclude_modules=["experts"]))
    assert not any("down_proj" in name for name in names(exclude_modules=["experts.down_proj"]))
    ranks = adapted("qwen3_moe", rank_pattern={"experts.down_proj": 5})
    assert {tuple(layer.lora_A.shape) for layer in stacks(ranks).values()} == {(4, 3, 32), (4, 5, 24)}
    with pytest.raises(TargetNotFoundError, match=r"names none.*There are: experts.down_proj, experts.gate_up_proj"):
        adapted("qwen3_moe", target_parameters=["w1"])
    with pytest.raises(InvalidInputError, match=r"r=25 is larger than layer .*experts.* allows"):
        adapted("qwen3_moe", r=25, target_modules=[], target_parameters=["down_proj"])
    with pytest.raises(InvalidInputError, match="takes a list of names"):
        LoRAConfig(target_parameters="down_proj")


def test_what_cannot_have_adapters_is_refused_if_named_and_left_out_otherwise() -> None:
    def quantize(model: nn.Module) -> None:
        for layer in model.model.layers:
            layer.mlp.experts.down_proj = nn.Parameter(
                layer.mlp.experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False
            )

    def compute_otherwise(model: nn.Module) -> None:
        model.config._experts_implementation = "sonicmoe"

    def share_out(model: nn.Module) -> None:
        for layer in model.model.layers:
            layer.mlp.experts._is_expert_parallel = True

    for change, reason in (
        (share_out, "is shared out among ranks"),
        (quantize, "holds quantized codes"),
        (compute_otherwise, "experts_implementation='sonicmoe'"),
    ):
        change(model := tiny_model("qwen3_moe"))
        with pytest.raises(InvalidInputError, match=reason):
            inject(model, LoRAConfig(r=2, target_parameters=["down_proj"]))
        assert not lora_layers(model)
        with pytest.warns(UserWarning, match=reason):
            inject(model, LoRAConfig(r=2))
        assert "model.layers.0.mlp.experts.down_proj" not in lora_layers(model)
    with pytest.raises(InvalidInputError, match="dropout_on='product' is not possible"):
        adapted("qwen3_moe", lora_dropout=0.1, dropout_on="product")


def test_a_copy_is_a_model_of_its_own() -> None:
    model = adapted("qwen3_moe")
    other = moved(copy.deepcopy(model))
    with adapters_disabled(model):
        assert torch.equal(logits(model), start := logits(adapted("qwen3_moe")))
    assert torch.equal(logits(model), start)
    assert not torch.equal(logits(other), start)
    assert (
        other.model.layers[0].mlp.experts.gate_up_proj.base_layer.experts
        is other.model.layers[0].mlp.experts.base_layer
    )


def test_compiled_models_compute_the_same() -> None:
    block = moved(adapted("qwen3_moe", "grouped_mm")).eval().model.layers[0].mlp
    x = torch.randn(2, 6, 32)
    got, want = torch.compile(block, backend="eager")(x), block(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_stacked_once_for_generation_and_again_when_they_change(dtype: torch.dtype) -> None:
    model = moved(adapted("qwen3_moe", "grouped_mm", dtype)).eval()
    factor = next(iter(stacks(model).values())).lora_B
    with torch.no_grad():
        before = model(IDS).logits
        with adapters_merged(model):
            assert all(layer.merged for layer in stacks(model).values())
            for layer in lora_layers(model).values():
                if not isinstance(layer, LoRAExperts):
                    layer.unmerge()  # whose float32 sums round otherwise
            assert torch.equal(model(IDS).logits, before)
            factor.add_(1)
            changed = model(IDS).logits
        assert not any(layer.merged for layer in stacks(model).values())
        assert torch.equal(model(IDS).logits, changed)
        assert not torch.equal(changed, before)
    with adapters_merged(model):
        model(IDS).logits.sum().backward()
    assert factor.grad is not None


def test_experts_in_2d_parameters_are_said_to_get_none() -> None:
    """As DBRX keeps them, all experts one below the other."""
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "experts": Experts()})
    model["experts"].down_proj = nn.Parameter(torch.randn(24, 8))
    with pytest.warns(UserWarning, match=r"reach 25% .* experts in 2-D parameters 75% stay frozen without adapters"):
        inject(model, LoRAConfig(r=2))
    assert list(lora_layers(model)) == ["q"]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(3, 128, 130))


def test_each_expert_is_cached_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second model of which one expert is another finds the others, and starts as if it had found none."""
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))

    def started(changed: bool, cache: bool = True) -> LoRAExperts:
        torch.manual_seed(0)
        model = nn.ModuleDict({"experts": Experts()})
        if changed:
            model["experts"].down_proj.data[1].mul_(2)
        inject(model, LoRAConfig(r=2))
        initialize(model, cache=cache)
        return next(iter(stacks(model).values()))

    started(False)
    files = set((tmp_path / "factors").iterdir())
    assert len(files) == 3
    found = started(True)
    assert len(set((tmp_path / "factors").iterdir()) - files) == 1
    assert torch.equal(found.lora_A, started(True, cache=False).lora_A)


def test_each_expert_is_analyzed() -> None:
    model = moved(adapted("gpt_oss"))
    groups = by_type(analyze_model(model))
    assert {name: len(groups[name]) for name in ("gate_up_proj", "down_proj", "q_proj")} == {
        "gate_up_proj": 8,
        "down_proj": 8,
        "q_proj": 2,
    }
    first = next(m for m in groups["down_proj"] if m.layer == "model.layers.0.mlp.experts.down_proj[2]")
    layer = stacks(model)["model.layers.0.mlp.experts.down_proj"]
    want = torch.linalg.svdvals(layer.base_layer.weight[2].double())
    torch.testing.assert_close(first.singular_values.double(), want, rtol=1e-5, atol=1e-7)
    delta = layer.delta_weight()[2]
    torch.testing.assert_close(first.relative_norm, (delta.norm() / want.norm()).item(), rtol=1e-4, atol=0)


def run(model: Path, folder: Path, callbacks: Any = (), ckpt: Path | None = None) -> tuple[nn.Module, Path]:
    folder.mkdir(exist_ok=True)
    keep = ModelCheckpoint(folder / "saved", "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = quiet_trainer(
        folder,
        max_steps=3,
        enable_checkpointing=True,
        callbacks=[MiLoRAInit(r=2, seed=0), keep, *callbacks],
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    torch.manual_seed(0)
    lit = module(model, dtype="float32")
    trainer.fit(lit, data(folder, model), ckpt_path=ckpt)
    return lit, folder / "saved"


@pytest.mark.filterwarnings("ignore")
def test_a_run_is_resumed_and_loaded_from_its_checkpoint(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "model", "qwen3_moe")
    callbacks = [PrincipalProjection(p=2), SubspaceMonitor(every_n_steps=1)]
    whole, saved = run(base, tmp_path / "run", callbacks)
    resumed, _ = run(base, tmp_path / "resumed", callbacks, saved / "step=2.ckpt")
    other = module(base, dtype="float32")
    other.configure_model()
    load_adapter(other, saved / "step=3.ckpt")
    trained = stacks(whole)
    assert len(trained) == 4
    for name, layer in trained.items():
        assert not torch.equal(layer.lora_B, layer.initial_B)
        for model in (resumed, other):
            assert torch.equal(layer.lora_B, stacks(model)[name].lora_B)
            assert torch.equal(layer.initial_A, stacks(model)[name].initial_A)
    # What is protected stays: the update of each expert has no part in its own largest singular directions.
    layer = next(iter(trained.values()))
    for matrix, delta in zip(dense_weight(layer), layer.delta_weight(), strict=True):
        assert (torch.linalg.svd(matrix)[0][:, :2].T @ delta).norm() < 1e-4 * delta.norm()
