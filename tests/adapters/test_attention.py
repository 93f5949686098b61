"""Adapters of ``nn.MultiheadAttention``: exact where torch's code calls no layer, with all of its options."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from helpers.exports import move
from torch import Tensor, nn
from torch.func import functional_call

from milora_lightning import LoRAConfig, adapters_disabled, initialize, inject, lora_layers
from milora_lightning.adapters.base_weight import dense_weight
from milora_lightning.adapters.coverage import coverage
from milora_lightning.adapters.packed import LoRAPacked
from milora_lightning.export.merging import merge_adapters

ALL = {key: [True, False] for key in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(**{"embed_dim": 8, "num_heads": 2, **options})
    for bias in (module.in_proj_bias, module.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return module


def adapted(module: nn.Module, **config: Any) -> nn.Module:
    other = copy.deepcopy(module)
    inject(other, LoRAConfig(**{"r": 2, "lora_alpha": 3, **config}))
    initialize(other, cache=False)
    return other


def inputs(module: nn.MultiheadAttention, same: str = "qkv", batched: bool = True, **options: Any) -> list[Tensor]:
    torch.manual_seed(1)
    made: dict[str, Tensor] = {}
    for name, size in zip("qkv", (8, module.kdim, module.vdim), strict=True):
        shape = ((3, 5, size) if module.batch_first else (5, 3, size)) if batched else (5, size)
        made[name] = torch.randn(shape, **options).requires_grad_(True)
    return [made[name] for name in same]


def masks(batched: bool = True) -> list[dict[str, Any]]:
    later, padded = torch.ones(5, 5).triu(1).bool(), torch.zeros((3, 5) if batched else (5,)).bool()
    padded[..., -2:] = True
    return [
        {},
        {"attn_mask": later},
        {"attn_mask": torch.randn(5, 5), "need_weights": False},
        {"key_padding_mask": padded, "average_attn_weights": False},
        {"attn_mask": later, "key_padding_mask": padded, "need_weights": False},
        {"attn_mask": later, "is_causal": True, "need_weights": False},
        {"attn_mask": later, "is_causal": True, "key_padding_mask": padded},
        *([{"attn_mask": torch.randn(6, 5, 5), "need_weights": n} for n in (True, False)] if batched else []),
    ]


@pytest.mark.parametrize("separate", [False, True])
def test_the_start_is_torchs_own_result_bit_for_bit_with_every_option(separate: bool) -> None:
    kinds = itertools.cycle(itertools.product(["qkv"] if separate else ["qkv", "qkk", "qqq"], [True, True, False]))
    for values in itertools.product(*ALL.values()):
        options = dict(zip(ALL, values, strict=True))
        plain = attention(**options, dropout=0.3, **({"kdim": 6, "vdim": 4} if separate else {})).requires_grad_(False)
        ours = adapted(plain, lora_dropout=0.2)
        for number in range(9):
            same, batched = next(kinds)
            x, possible = inputs(plain, same, batched), masks(batched)
            arguments = possible[number % len(possible)]
            for module in (plain, ours):
                module.train(number % 2 == 0)
            for layer in lora_layers(ours).values():
                layer.train(not plain.training)  # one draws at a time: theirs would take numbers from attention's
            torch.manual_seed(2)
            want = plain(*x, **arguments)
            torch.manual_seed(2)
            got = ours(*x, **arguments)
            assert torch.equal(got[0], want[0])
            assert (got[1] is None) == (want[1] is None)
            assert got[1] is None or torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_an_encoder_starts_at_the_pretrained_one_also_on_fast_paths(grad: bool, dtype: torch.dtype) -> None:
    """Without gradients, torch's fast path reads the weights of a whole layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, dtype=dtype)
    plain = nn.TransformerEncoder(layer, 2).requires_grad_(False).eval()
    ours = adapted(plain)
    assert {name.rpartition(".")[2] for name in lora_layers(ours)} == {"in_proj", "out_proj", "linear1", "linear2"}
    padded = torch.zeros(3, 5).bool()
    padded[:, 3:] = True
    x = torch.randn(3, 5, 8, dtype=dtype, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        for arguments in ({}, {"src_key_padding_mask": padded}):
            want = plain(x, **arguments)
            assert torch.equal(ours(x, **arguments), want)
            move(moved := copy.deepcopy(ours))
            got = moved(x, **arguments)
            assert (got - want).abs().max() > 1e-2
            with adapters_disabled(moved):
                assert torch.equal(moved(x, **arguments), want)
            with torch.set_grad_enabled(not grad):
                other = moved(x, **arguments)
            assert (got - other)[:, :3].abs().max() < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}, {"bias": False, "add_bias_kv": True}])
@pytest.mark.parametrize("init", ["milora", "lora"])
def test_outputs_and_gradients_are_those_of_the_plain_formula(options: dict[str, Any], init: str) -> None:
    """Of torch's own code with W + s (B A − B₀A₀), formed by autograd, in the place of each weight."""
    plain = attention(**options)
    ours = adapted(plain, init=init)
    move(ours)
    plain, ours = plain.double(), ours.double()
    weights = {}
    for name, layer in lora_layers(ours).items():
        start = 0 if layer.initial_A is None else layer.initial_B @ layer.initial_A
        delta = layer.scaling * (layer.lora_B @ layer.lora_A - start)
        key = f"{name}_weight" if isinstance(layer, LoRAPacked) else f"{name}.weight"
        weights[key] = layer.base_layer.weight + delta
    factors = [p for p in ours.parameters() if p.requires_grad]
    for same in ["qkv"] if "kdim" in options else ["qkv", "qkk", "qqq"]:
        x = inputs(plain, same, dtype=torch.float64)
        want, got = functional_call(plain, weights, tuple(x))[0], ours(*x)[0]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        a, b = (
            torch.autograd.grad(y.square().sum(), [*factors, *dict.fromkeys(x)], retain_graph=True) for y in (got, want)
        )
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("init", ["milora", "pissa"])
def test_factors_are_the_slice_of_the_whole_weight(init: str) -> None:
    for options in ({}, {"kdim": 6, "vdim": 4}):
        for layer in lora_layers(adapted(attention(**options), init=init)).values():
            U, S, Vh = torch.linalg.svd(dense_weight(layer).double(), full_matrices=False)
            chosen = slice(-2, None) if init == "milora" else slice(2)
            want = U[:, chosen] * S[chosen] @ Vh[chosen]
            got = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_small_updates_and_dropout_count_in_half_precision() -> None:
    """Where W + ΔW loses what is smaller than W's last digit."""
    plain = attention(dtype=torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        plain.in_proj_weight.fill_(1.0)
    ours = adapted(plain, init="lora", lora_dropout=0.5)
    layer = lora_layers(ours)["in_proj"]
    with torch.no_grad():
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1e-4)
    assert torch.equal(layer.weight, plain.in_proj_weight)
    x = torch.full((5, 3, 8), 2.0**-10, dtype=torch.bfloat16)
    want = 3e-4 * x.float().sum(-1, keepdim=True)
    torch.testing.assert_close(layer.eval().update(x).float(), want.expand(5, 3, 24), rtol=0.01, atol=0)
    q = inputs(plain, "qqq", dtype=torch.bfloat16)
    layer.train()
    one, other = ours(*q)[0], ours(*q)[0]
    assert not torch.equal(one, other)
    layer.eval()
    with torch.no_grad():
        layer.lora_B.fill_(1e-3)  # too small for W + ΔW
        got, without = ours.eval()(*q)[0], plain.eval()(*q)[0]
    assert torch.equal(got, ours(*q)[0])
    assert not torch.equal(got, without)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moving = adapted(attention(batch_first=True)).eval()
        move(moving)
        x = inputs(moving, "qqq")
        with torch.no_grad():
            got = moving(*x, need_weights=False)[0]
        assert torch.equal(got, moving(*x, need_weights=False)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = adapted(attention())
        y = whole(*inputs(whole, "qkk"))[0]
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in whole.parameters() if p.requires_grad)


def test_what_is_named_and_what_is_counted() -> None:
    plain = nn.Sequential(attention(), nn.Linear(8, 8))
    assert set(lora_layers(adapted(plain))) == {"0.in_proj", "0.out_proj", "1"}
    assert coverage(adapted(plain), LoRAConfig(r=2)).startswith("100.0% of the weights")
    assert set(lora_layers(adapted(plain, target_modules=["in_proj"]))) == {"0.in_proj"}
    assert set(lora_layers(adapted(plain, target_modules=r".*\.in_proj"))) == {"0.in_proj"}
    by_parameter = {"target_modules": [], "target_parameters": ["in_proj_weight"]}
    assert set(lora_layers(adapted(plain, **by_parameter))) == {"0.in_proj"}
    assert set(lora_layers(adapted(plain, exclude_modules=["0"]))) == {"1"}
    ours = adapted(plain, rank_pattern={"in_proj": 3})
    assert {name: layer.r for name, layer in lora_layers(ours).items()} == {"0.in_proj": 3, "0.out_proj": 2, "1": 2}
    trains = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.lora_{f}" for name in ("0.in_proj", "0.out_proj", "1") for f in "AB"}
    inject(ours, LoRAConfig(r=2, lora_alpha=3, rank_pattern={"in_proj": 3}))
    assert len(lora_layers(ours)) == 3
    assert {n.replace(".base_layer", "") for n in ours.state_dict() if "lora" not in n and "initial" not in n} == set(
        plain.state_dict()
    )

    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    own = nn.Sequential(Own(8, 2), nn.Linear(8, 8))
    assert "0.in_proj" not in lora_layers(adapted(own))


def test_merging_copying_and_loading() -> None:
    ours = adapted(attention())
    move(ours)
    x = inputs(ours, "qkk")
    want = ours(*x)[0]
    assert torch.equal(copy.deepcopy(ours)(*x)[0], want)
    other = adapted(attention())
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(*x)[0], want)
    merge_adapters(other)
    assert not lora_layers(other)
    assert other.state_dict().keys() == attention().state_dict().keys()
    torch.testing.assert_close(other(*x)[0], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}])
@pytest.mark.parametrize("batch_first", [False, True])
def test_biases_and_weights_that_train_get_their_gradients(options: dict[str, Any], batch_first: bool) -> None:
    plain = attention(batch_first=batch_first, **options)
    names = [name for name in plain.state_dict() if "in_proj_bias" in name or name.endswith("proj_weight")]
    ours = adapted(plain)
    for name in names:
        ours._parameters[name].requires_grad_(True)
    for same in ["qkv"] if options else ["qkv", "qkk", "qqq"]:
        for module in (plain, ours):
            module.zero_grad()
            module(*inputs(plain, same))[0].square().sum().backward()
        for name in names:
            torch.testing.assert_close(ours._parameters[name].grad, plain._parameters[name].grad)
    assert len(names) > 1


def test_masks_that_torch_refuses_are_refused_with_gradients_too() -> None:
    ours = adapted(attention())
    x = inputs(ours, "qkv")
    for wrong in ({"attn_mask": torch.zeros(1, 5)}, {"key_padding_mask": torch.zeros(1, 15)}):
        for mode in (True, False):
            with torch.set_grad_enabled(mode), pytest.raises((RuntimeError, AssertionError), match="shape"):
                ours.train(mode)(*x, **wrong)
