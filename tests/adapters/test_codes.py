"""Bases whose weights are codes: the start is that of the weight they stand for, or there is a clear refusal."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer, tiny_model
from torch import Tensor, nn
from transformers import FineGrainedFP8Config, PreTrainedModel
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Linear

from milora_lightning import LoRAConfig, MiLoRAInit, adapters_disabled, export_merged, initialize, inject, lora_layers
from milora_lightning.adapters.base_weight import dense_weight
from milora_lightning.adapters.contexts import adapters_merged
from milora_lightning.adapters.linear_layers import holds_its_weight
from milora_lightning.adapters.quantization import decoded
from milora_lightning.checkpoint.fingerprint import fingerprint
from milora_lightning.models.streaming import empty_causal_lm

OUT, IN, R = 20, 12, 3
FP8 = torch.float8_e4m3fn
BIAS = "has_bias" if "has_bias" in inspect.signature(FP8Linear).parameters else "bias"  # as in transformers 5.0


def fp8(layer: nn.Linear, block_size: tuple[int, int] | None) -> FP8Linear:
    """A layer of transformers that computes with about the weight of another, as codes and scales."""
    weight = layer.weight.detach()
    made = FP8Linear(layer.in_features, layer.out_features, block_size=block_size, **{BIAS: layer.bias is not None})
    rows, columns = block_size or weight.shape
    scales = torch.stack(
        [torch.stack([block.abs().max() / 448 for block in part.split(columns, 1)]) for part in weight.split(rows, 0)]
    )
    spread = scales.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    made.weight = nn.Parameter((weight / spread).to(FP8), requires_grad=False)
    made.weight_scale_inv = nn.Parameter(scales if block_size else scales[0, 0], requires_grad=False)
    made.bias = layer.bias
    return made


def code_times_scale(layer: FP8Linear) -> Tensor:
    """Entry by entry, in float64."""
    codes, scales = layer.weight.double(), layer.weight_scale_inv.double()
    if layer.block_size is None:
        return codes * scales
    rows, columns = layer.block_size
    entries = [[codes[i, j] * scales[i // rows, j // columns] for j in range(IN)] for i in range(OUT)]
    return torch.tensor(entries, dtype=torch.float64)


class Halved(Tensor):
    """A kind of tensor as torchao's: says that it is bfloat16, holds int8 and a scale, and can be dequantized."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Halved:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16, requires_grad=False)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Halved:
        return cls(inner["codes"], inner["scale"])

    def dequantize(self) -> Tensor:
        return (self.codes.float() * self.scale).to(torch.bfloat16)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.dequantize().to(x.dtype), *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{function} on codes")


class Unknown(Tensor):
    """Another kind, of which nothing is known."""


def halved(layer: nn.Linear) -> nn.Linear:
    scale = layer.weight.detach().abs().amax() / 127
    codes = (layer.weight.detach() / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(Halved(codes, scale), requires_grad=False)
    return layer


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT)


def adapted(base: nn.Module) -> Any:
    model = nn.Sequential(base)
    (layer,) = inject(model, LoRAConfig(r=R)).values()
    initialize(model, cache=False)
    return layer


def check_start(layer: Any, weight: Tensor, tolerance: float = 1e-5) -> None:
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = U[:, -R:] * S[-R:] @ Vh[-R:]
    got = layer.lora_B.double() @ layer.lora_A.double()
    assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("block_size", [(8, 8), (5, 4), (128, 128), None])
def test_fp8_is_code_times_scale(block_size: tuple[int, int] | None) -> None:
    base = fp8(linear(), block_size)
    weight = code_times_scale(base)
    assert (weight - linear().weight).norm() < 0.05 * weight.norm()
    layer = adapted(base)
    torch.testing.assert_close(dense_weight(layer).double(), weight, rtol=1e-6, atol=0)
    check_start(layer, weight)
    codes = base.weight.double()  # the negative control: the codes' own triplets are thousands of times larger
    assert torch.linalg.svdvals(codes)[-1] > 100 * torch.linalg.svdvals(weight)[-1]


def test_fp8_computes_through_its_own_code_and_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: FP8Linear, x: Tensor) -> Tensor:  # its own needs a GPU
        return nn.functional.linear(x, code_times_scale(self).to(x.dtype), self.bias)

    monkeypatch.setattr(FP8Linear, "forward", forward)
    base = fp8(linear(), (8, 8))
    x = torch.randn(5, IN)
    before = base(x)
    layer = adapted(base)
    torch.testing.assert_close(layer(x), before)
    with torch.no_grad():
        layer.lora_B.add_(0.1)
    delta = layer.delta_weight()
    torch.testing.assert_close(layer(x), before + x @ delta.T)
    with torch.no_grad(), adapters_merged(layer):
        torch.testing.assert_close(layer(x), before + x @ delta.T)
    with adapters_disabled(layer):
        assert torch.equal(layer(x), before)
    assert layer.weight is base.weight
    with pytest.raises(ValueError, match="quantized and cannot be merged"):
        layer.merged_weight()


def test_an_fp8_layer_that_is_not_quantized_is_its_weight() -> None:
    base = FP8Linear(IN, OUT, (8, 8))
    base.weight = nn.Parameter(torch.randn(OUT, IN, dtype=torch.bfloat16), requires_grad=False)
    assert torch.equal(decoded(base, base.weight), base.weight)


def test_scales_of_another_shape_are_refused() -> None:
    base = fp8(linear(), (8, 8))
    base.weight_scale_inv = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    with pytest.raises(ValueError, match=r"layer '0' cannot be decomposed: its scales are \(2, 2\).* 3×2 blocks"):
        adapted(base)


def test_a_layer_that_is_more_than_a_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(finegrained_fp8, "FP8GroupedLinear"):
        pytest.skip("transformers of this version has no FP8GroupedLinear")
    FP8GroupedLinear = finegrained_fp8.FP8GroupedLinear
    monkeypatch.setattr(FP8GroupedLinear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], OUT // 2))
    base = FP8GroupedLinear(IN, OUT, n_groups=2)
    nn.init.zeros_(base.weight)
    base.weight.data[:R].fill_(1)
    with pytest.raises(ValueError, match=r"FP8GroupedLinear turns inputs .* more than a matrix product"):
        adapted(base)(torch.randn(3, 2, IN))


def test_a_kind_of_tensor_that_can_be_dequantized() -> None:
    base = halved(linear())
    assert base.weight.is_floating_point()
    assert not holds_its_weight(base)
    x = torch.randn(5, IN)
    before = base(x)
    layer = adapted(base)
    check_start(layer, base.weight.dequantize())
    torch.testing.assert_close(layer(x), before)
    with torch.no_grad():
        layer.lora_B.add_(0.1)
    torch.testing.assert_close(layer(x), before + x @ layer.delta_weight().T)
    with pytest.raises(ValueError, match="quantized and cannot be merged"):
        layer.merged_weight()


def test_fingerprints_see_the_codes_in_another_kind_of_tensor() -> None:
    prints = [fingerprint(nn.Sequential(halved(linear())), frozen_only=False) for _ in range(2)]
    assert prints[0] == prints[1]
    changed = halved(linear())
    changed.weight.codes[0, 0] += 1
    assert fingerprint(nn.Sequential(changed), frozen_only=False)["0.weight"] != prints[0]["0.weight"]


def scaled(layer: nn.Linear, name: str) -> nn.Linear:
    layer.register_buffer(name, torch.ones(OUT, 1))
    return layer


def of_dtype(dtype: torch.dtype) -> nn.Linear:
    layer = linear()
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


def unknown(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Unknown), requires_grad=False)
    return layer


REFUSED = {
    "an unknown kind of tensor": (lambda: unknown(linear()), "holds a Unknown"),
    "compressed-tensors": (lambda: scaled(linear(), "weight_scale"), "'weight_scale' beside it"),
    "GPTQ": (lambda: scaled(linear(), "qzeros"), "'qzeros' beside it"),
    "raw float8": (lambda: of_dtype(FP8), "has weights of torch.float8_e4m3fn"),
    "int8": (lambda: of_dtype(torch.int8), "has weights of torch.int8"),
    "FP4": (lambda: packed(), r"FP8Linear holds torch.int8 codes and 'weight_scale_inv' beside it"),
}


def packed() -> FP8Linear:
    base = fp8(linear(), None)
    base.weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.int8), requires_grad=False)
    return base


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_is_not_known_is_refused(kind: str) -> None:
    build, message = REFUSED[kind]
    model = nn.Sequential(build())

    def start() -> None:
        inject(model, LoRAConfig(r=R, target_modules=["0"]))
        initialize(model)

    with pytest.raises(ValueError, match=message):
        start()


def test_quantized_layers_do_not_train_in_full() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": fp8(linear(), (8, 8))})
    with pytest.raises(ValueError, match="modules_to_save means a FP8Linear whose weight is quantized"):
        inject(model, LoRAConfig(r=R, target_modules=["body"], modules_to_save=("head",)))
    assert model["body"].weight.requires_grad


class Packed(nn.Module):
    """A linear layer as GPTQ's, AWQ's or HQQ's, which is no nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.register_buffer("qweight", torch.zeros(OUT, IN // 8, dtype=torch.int32))


def test_layers_of_quantizers_that_are_left_without_adapters_are_named() -> None:
    model = nn.ModuleDict({"q_proj": Packed(), "v_proj": Packed(), "extra": linear()})
    with pytest.warns(UserWarning, match=r"reach 33% of the weights.*linear layers whose weights are codes 67%"):
        inject(model, LoRAConfig(r=R))
    with pytest.raises(ValueError, match="matches only modules of type Packed"):
        inject(model, LoRAConfig(r=R, target_modules=["q_proj"]))


def fp8_model() -> PreTrainedModel:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.up_proj = fp8(layer.mlp.up_proj, (16, 16))
    return model


def test_merging_an_fp8_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = fp8_model()
    inject(model, LoRAConfig(r=R, target_modules=["up_proj"]))
    initialize(model, cache=False)
    with pytest.raises(ValueError, match=r"cannot be merged without rounding it again.*load_peft"):
        export_merged(model, tmp_path / "merged")


def test_the_callbacks_summary_does_not_compute_with_codes(tmp_path: Path) -> None:
    from helpers.named import Module

    module = Module(lambda _: fp8_model())
    callback = MiLoRAInit(r=R, target_modules=["up_proj"], cache=False)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.strategy.connect(module)
    callback.setup(trainer, module, "fit")
    callback.on_fit_start(trainer, module)
    layers = lora_layers(module)
    assert len(layers) == 2
    assert all(layer.initialized for layer in layers.values())


def test_quantized_models_are_not_streamed_as_weights(tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_model().config)
    config.quantization_config = FineGrainedFP8Config().to_dict()
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantized, and its codes cannot be read into shards"):
        empty_causal_lm(str(tmp_path))
