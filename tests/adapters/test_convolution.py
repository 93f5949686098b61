"""The adapter of a convolution against the convolution with its kernel changed, in every setting of torch's layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from milora_lightning import LoRAConfig, adapters_disabled, initialize, inject, lora_layers
from milora_lightning.adapters.convolution import LoRAConv
from milora_lightning.adapters.dropout import draw_mask
from milora_lightning.adapters.parts import TargetNotFoundError
from milora_lightning.analysis.spectra import update_of

R = 4
KINDS: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "1d, strided": (nn.Conv1d, (6, 8, 3), {"stride": 2, "padding": 1}),
    "2d, dilated": (nn.Conv2d, (6, 8, (3, 2)), {"dilation": (2, 1), "bias": False}),
    "3d": (nn.Conv3d, (4, 6, (2, 3, 3)), {"stride": (1, 2, 2)}),
    "pointwise": (nn.Conv2d, (6, 8, 1), {}),
    "same": (nn.Conv2d, (6, 8, 4), {"padding": "same"}),
    "circular": (nn.Conv1d, (6, 8, 3), {"padding": 2, "padding_mode": "circular"}),
    "groups": (nn.Conv2d, (6, 8, 3), {"groups": 2, "padding": 1}),
    "depthwise": (nn.Conv2d, (4, 8, 3), {"groups": 4}),
}


def convolution(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    cls, sizes, options = KINDS[kind]
    base = cls(*sizes, **options).to(dtype)
    spatial = {nn.Conv1d: (9,), nn.Conv2d: (8, 7), nn.Conv3d: (4, 7, 6)}[cls]
    return base, torch.randn(2, sizes[0], *spatial, dtype=dtype)


def adapted(
    kind: str, trained: bool = True, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[LoRAConv, Tensor]:
    base, x = convolution(kind, dtype)
    model = nn.ModuleDict({"conv": base})
    (layer,) = inject(model, LoRAConfig(**{"r": R, "lora_alpha": 6, "target_modules": ["conv"], **options})).values()
    initialize(model)
    assert isinstance(layer, LoRAConv)
    if trained:
        with torch.no_grad():
            for factor in (layer.lora_A, layer.lora_B):
                factor.add_(torch.randn_like(factor), alpha=0.1)
    return layer, x


def changed(layer: LoRAConv) -> nn.Module:
    """The convolution with the kernel W + s (B A − B₀A₀), group by group."""
    base: Any = copy.deepcopy(layer.base_layer)
    parts = zip(*(f.double().chunk(base.groups) for f in layer.factors if f is not None), strict=True)
    own = [p[1] @ p[0] - (p[3] @ p[2] if len(p) > 2 else 0) for p in parts]
    kernel = base.weight.double() + layer.scaling * torch.cat(own).view(base.weight.shape)
    del base.weight
    base.weight = kernel  # differentiable in the factors
    if base.bias is not None:
        base.bias = nn.Parameter(base.bias.double())
    return base


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_the_base_layer_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    layer, x = adapted(kind, trained=False, dtype=dtype, lora_dropout=0.4)
    before = layer.base_layer(x)
    assert torch.equal(layer.train()(x), before)
    assert before.dtype == dtype
    assert layer.lora_A.any()
    assert layer.lora_B.any()


@pytest.mark.parametrize("init", ["pissa", "middle", "random", "lora", "mica", "olora", "orthogonal"])
def test_every_start_begins_at_the_base_layer_in_each_group(init: str) -> None:
    layer, x = adapted("groups", trained=False, init=init)
    assert torch.equal(layer.train()(x), layer.base_layer(x))
    assert layer.lora_A.requires_grad or layer.lora_B.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["milora", "lora"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_equal_the_plain_formula(
    kind: str, init: str, dtype: torch.dtype, tolerance: float
) -> None:
    layer, x = adapted(kind, dtype=dtype, init=init)
    x.requires_grad_()
    y = layer(x)
    direction = torch.randn(y.shape)
    got = torch.autograd.grad((y * direction).sum(), (x, layer.lora_A, layer.lora_B))
    double = x.detach().double().requires_grad_()
    reference = changed(layer)(double)
    want = torch.autograd.grad((reference * direction).sum(), (double, layer.lora_A, layer.lora_B))
    assert (y.double() - reference).norm() <= tolerance * reference.norm()
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()
    assert got[1].dtype == got[2].dtype == torch.float32
    with adapters_disabled(layer):
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_the_smallest_triplets_of_each_group(kind: str) -> None:
    layer, _ = adapted(kind, trained=False)
    groups = layer.groups
    matrices = layer.base_layer.weight.double().flatten(1).chunk(groups)
    parts = zip(matrices, layer.lora_A.double().chunk(groups), layer.lora_B.double().chunk(groups), strict=True)
    for matrix, A, B in parts:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        r = R // groups
        torch.testing.assert_close(layer.scaling * B @ A, U[:, -r:] * S[-r:] @ Vh[-r:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_kernel_computes_what_the_layer_does(kind: str) -> None:
    layer, x = adapted(kind)
    merged: Any = copy.deepcopy(layer.base_layer)
    merged.weight = nn.Parameter(layer.merged_weight())
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight, merged.weight)
    matrix = layer.delta_weight()
    torch.testing.assert_close(update_of(layer).S.square().sum(), matrix.double().square().sum(), rtol=1e-4, atol=0)


def test_dropout_acts_on_the_input_and_on_the_product_alone() -> None:
    layer, x = adapted("groups", lora_dropout=0.4)
    torch.manual_seed(3)
    dropped = layer.train()(x)
    torch.manual_seed(3)
    mask, keep = draw_mask(x, 0.4)
    assert 0 < mask.sum() < mask.numel()
    seen, base = (x * mask / keep).double(), copy.deepcopy(layer.base_layer).double()
    expected = base(x.double()) + changed(layer)(seen) - base(seen)
    torch.testing.assert_close(dropped.double(), expected, rtol=1e-5, atol=1e-5)
    product, x = adapted("groups", trained=False, lora_dropout=0.4, dropout_on="product")
    assert not torch.equal(product.train()(x), product.base_layer(x))  # as PEFT's, whose frozen part has the slice out
    assert torch.equal(product.eval()(x), product.base_layer(x))


@pytest.mark.parametrize("kind", ["1d, strided", "groups"])
def test_dropout_on_the_product_spares_the_part_of_the_weight_that_the_factors_start_from(kind: str) -> None:
    """(W − s B₀A₀) x + s B A drop(x)."""
    layer, x = adapted(kind, lora_dropout=0.4, dropout_on="product")
    torch.manual_seed(3)
    got = layer.train()(x)
    torch.manual_seed(3)
    mask, keep = draw_mask(x, 0.4)
    dropped = (x * mask / keep).double()
    whole, base = changed(layer), copy.deepcopy(layer.base_layer).double()
    with torch.no_grad():
        layer.initial_A.zero_()
    with_product = changed(layer)  # W + s B A
    frozen = base(x.double()) + whole(x.double()) - with_product(x.double())
    torch.testing.assert_close(got.double(), frozen + with_product(dropped) - base(dropped), rtol=1e-5, atol=1e-5)


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 3)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.depthwise(self.stem(x))).mean((-1, -2)))


def targets(**config: Any) -> set[str]:
    return set(inject(Vision(), LoRAConfig(**{"r": R, **config})))


def test_convolutions_are_adapted_where_their_names_are_asked_for() -> None:
    assert targets() == {"head"}  # all-linear means linear layers, as PEFT's
    assert targets(target_modules=["stem", "head"]) == {"stem", "head"}
    with pytest.warns(UserWarning, match="'depthwise' has more groups than r"):
        assert targets(target_modules=".*") == {"stem", "head"}
    assert targets(target_modules=["depthwise"], rank_pattern={"depthwise": 8}) == {"depthwise"}
    with pytest.raises(ValueError, match=r"r=4 cannot be shared among the 8 groups of the convolution 'depthwise'"):
        targets(target_modules=["depthwise"])
    with pytest.raises(ValueError, match=r"matches only modules of type ConvTranspose2d"):
        targets(target_modules=["up"])
    with pytest.raises(ValueError, match=r"r=16 is larger than layer 'stem' allows.* of at most 8"):
        targets(target_modules=["stem"], r=16)
    with pytest.raises(TargetNotFoundError, match=r"end in: head. Convolutions get adapters if named: depthwise, stem"):
        targets(target_modules=["sten"])


def test_a_convolution_with_code_of_its_own_is_left_alone() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight / self.weight.norm(), self.bias)

    with pytest.raises(ValueError, match="matches only modules of type Standardized"):
        inject(nn.ModuleDict({"conv": Standardized(3, 8, 3)}), LoRAConfig(r=2, target_modules=["conv"]))
    with pytest.raises(TypeError, match=r"LoRAConv adapts nn.Conv1d, nn.Conv2d or nn.Conv3d layers, not Standardized"):
        LoRAConv(Standardized(3, 8, 3), 2)


def test_triplets_of_a_kernel_are_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))

    def factors() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"conv": nn.Conv1d(256, 256, 3, groups=2)})
        inject(model, LoRAConfig(r=4, target_modules=["conv"]))
        initialize(model)
        return list(lora_layers(model)["conv"].factors)  # type: ignore[arg-type]

    first = factors()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2  # one for each group
    assert all(torch.equal(a, b) for a, b in zip(first, factors(), strict=True))


def test_models_read_a_layers_settings_and_its_weight() -> None:
    layer, _ = adapted("1d, strided")
    assert (layer.stride, layer.kernel_size, layer.out_channels) == ((2,), (3,), 8)
    layer.weight.sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.any()


def test_state_dict_continues_where_it_was_saved() -> None:
    layer, x = adapted("groups")
    fresh, _ = adapted("groups", trained=False)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
