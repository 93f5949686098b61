"""Fused projections whose parts have factors of their own: each part is what a layer of its own would be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.fused import IDS, PARTS, adapted, by_projection, phi3, separate, trained
from helpers.starting import token_batches
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM, GPTNeoXConfig
from transformers.pytorch_utils import Conv1D

from milora_lightning import LoRAConfig, LoRALinear, adapters_merged, collect_statistics, initialize, inject
from milora_lightning.adapters.autograd import lora_linear
from milora_lightning.adapters.fused import block_diagonal
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.analysis.spectra import updates_of, weights_of
from milora_lightning.linalg.singular import singular_slice

ROWS, IN, R = (12, 6, 7), 16, 3


def layer(
    init: str = "milora", dtype: torch.dtype = torch.float32, conv: bool = False, moved: bool = True, **options: Any
) -> LoRALinear:
    torch.manual_seed(0)
    base = Conv1D(sum(ROWS), IN) if conv else nn.Linear(IN, sum(ROWS))
    model = nn.ModuleDict({"qkv": base.to(dtype)})
    config = LoRAConfig(r=R, lora_alpha=5, init=init, fused_parts={"qkv": ROWS}, **options)
    (found,) = inject(model, config).values()
    initialize(model)
    if moved:
        with torch.no_grad():
            for factor in (found.lora_A, found.lora_B):
                factor.add_(torch.randn_like(factor), alpha=0.1)
    return found


def plain_delta(found: LoRALinear) -> Tensor:
    """s (B A − B₀A₀), part by part."""
    A, B, A0, B0 = found.held_factors
    pairs = zip(B.split(ROWS), A.chunk(3), strict=True)
    delta = torch.cat([own_B @ own_A for own_B, own_A in pairs])
    if A0 is not None and B0 is not None:
        delta = delta - torch.cat([b @ a for b, a in zip(B0.split(ROWS), A0.chunk(3), strict=True)])
    return found.scaling * delta


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize(("init", "which"), [("milora", "minor"), ("pissa", "principal"), ("middle", "middle")])
def test_each_part_starts_at_the_slice_of_its_own_matrix(init: str, which: Any, conv: bool) -> None:
    found = layer(init, conv=conv, moved=False)
    assert found.lora_A.shape == (3 * R, IN)
    assert found.lora_B.shape == (sum(ROWS), R)
    weight = found.as_matrix(found.base_layer.weight).double()
    for part, A, B in zip(
        weight.split(ROWS), found.lora_A.double().chunk(3), found.lora_B.double().split(ROWS), strict=True
    ):
        U, S, Vh = singular_slice(part, R, which)
        torch.testing.assert_close(found.scaling * B @ A, (U * S @ Vh).double(), rtol=1e-6, atol=1e-7)
    whole = singular_slice(weight, R, which)  # a negative control: the layer's own slice is another
    started = found.scaling * (found.factors[1] @ found.factors[0]).double()
    assert (started - whole.U * whole.S @ whole.Vh).norm() > 0.1 * whole.S.norm()


@pytest.mark.parametrize("init", ["lora", "mica", "random", "olora"])
def test_other_starts_treat_each_part_by_itself(init: str) -> None:
    """As a layer that holds this part alone does, but for the random draws."""
    found = layer(init, moved=False)
    if init == "lora":
        assert not found.lora_B.any()
        return
    for number, part in enumerate(found.base_layer.weight.split(ROWS)):
        model = nn.ModuleDict({"qkv": nn.Linear(IN, len(part))})
        model["qkv"].weight.data.copy_(part)
        (own,) = inject(model, LoRAConfig(r=R, lora_alpha=5, init=init)).values()
        initialize(model)
        if init == "random" and number:
            assert found.lora_B.split(ROWS)[number].any()
            continue
        torch.testing.assert_close(found.lora_B.split(ROWS)[number], own.lora_B)
        if init != "mica":
            torch.testing.assert_close(found.lora_A.chunk(3)[number], own.lora_A)
    assert found.lora_B.requires_grad == (init != "mica")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("init", ["milora", "lora"])
def test_the_start_is_exact_bit_for_bit(init: str, conv: bool, dtype: torch.dtype) -> None:
    found, x = layer(init, dtype, conv, moved=False, lora_dropout=0.3), torch.randn(5, IN).to(dtype)
    assert torch.equal(found.train()(x), found.base_layer(x))


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("init", ["milora", "lora", "mica"])
def test_outputs_and_gradients_are_those_of_the_plain_formula(init: str, conv: bool) -> None:
    found = layer(init, conv=conv).double()
    found.lora_A.data, found.lora_B.data = found.lora_A.double(), found.lora_B.double()
    if found.initial_A is not None and found.initial_B is not None:
        found.initial_A.data, found.initial_B.data = found.initial_A.double(), found.initial_B.double()
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    trains = [x, *(f for f in (found.lora_A, found.lora_B) if f.requires_grad)]
    expected = found.base_layer(x) + x @ plain_delta(found).T
    y = found.train()(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, trains, g), torch.autograd.grad(expected, trains, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_gradients_can_be_differentiated_again() -> None:
    found, x = layer(), torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    tensors = [x, *(t.detach().double().requires_grad_() for t in (found.lora_A, found.lora_B))]
    weight, bias = (t.detach().double() for t in (found.base_layer.weight, found.base_layer.bias))
    initial = [t.detach().double() for t in (found.initial_A, found.initial_B) if t is not None]

    def output(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, weight, bias, A, B, *initial, 1.5, parts=ROWS)

    assert torch.autograd.gradcheck(output, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, tensors, fast_mode=True)


def test_backward_keeps_no_factor_of_the_whole_layer_in_full_precision() -> None:
    found, kept = layer(dtype=torch.bfloat16).train(), []
    with saved_tensors_hooks(lambda t: kept.append((t.dtype, tuple(t.shape))) or t, lambda t: t):
        found(torch.randn(5, IN).bfloat16().requires_grad_())
    assert (torch.bfloat16, (sum(ROWS), 2 * 3 * R)) in kept
    assert (torch.float32, (sum(ROWS), 3 * R)) not in kept


def test_compiled_and_transformed_layers_compute_the_same() -> None:
    found, x = layer(), torch.randn(5, IN)
    y = found(x)
    torch.testing.assert_close(torch.compile(found, backend="eager")(x), y)
    torch.testing.assert_close(torch.func.vmap(found)(x), y)
    each = torch.func.vmap(lambda B: torch.func.functional_call(found, {"lora_B": B}, (x,)))(found.lora_B[None])
    torch.testing.assert_close(each[0], y)


def test_layers_with_code_of_their_own_compute_the_same() -> None:
    """As quantized ones: their own output, with the update added."""

    class Own(nn.Linear):
        pass

    found, x = layer(), torch.randn(5, IN)
    y = found(x)
    found.base_layer.__class__ = Own
    torch.testing.assert_close(found(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("conv", [False, True])
def test_merged_weights_compute_what_forward_does(conv: bool) -> None:
    found, x = layer(conv=conv).eval(), torch.randn(5, IN)
    y = found(x)
    weight = found.as_matrix(found.merged_weight())
    torch.testing.assert_close(x @ weight.T + found.bias, y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.delta_weight(), plain_delta(found))
    with torch.no_grad(), adapters_merged(found):
        assert found.merged
        before = found._merged
        torch.testing.assert_close(found(x), y, rtol=1e-5, atol=1e-6)
        assert found._merged is before  # not formed again at each call
        found.lora_B.mul_(2)
        torch.testing.assert_close(found(x), found.base_layer(x) + x @ plain_delta(found).T, rtol=1e-5, atol=1e-6)


def test_dropout_on_the_product_is_that_of_the_parts() -> None:
    found, x = layer(lora_dropout=0.5, dropout_on="product").train(), torch.randn(5, IN)
    torch.manual_seed(1)
    y = found(x)
    y.sum().backward()
    assert y.shape == (5, sum(ROWS))
    assert found.lora_B.grad is not None


def test_analyses_see_each_part_with_its_own_weight() -> None:
    found = layer()
    deltas, names = plain_delta(found).split(ROWS), []
    for (name, weight), update, own in zip(weights_of("qkv", found), updates_of(found), deltas, strict=True):
        names.append(name)
        assert len(weight) == len(own)
        torch.testing.assert_close((update.U * update.S @ update.Vh).to(own), own, rtol=1e-4, atol=1e-5)
    assert names == ["qkv:0", "qkv:1", "qkv:2"]


@pytest.mark.parametrize("init", ["milora", "pissa"])
def test_training_parts_is_training_separate_projections(init: str) -> None:
    """Phi-3 with q, k, v and gate, up as parts, against the same model with a layer for each."""
    fused = phi3()
    apart = separate(fused)
    torch.testing.assert_close(apart(IDS).logits, fused(IDS).logits, rtol=1e-5, atol=1e-6)
    whole = copy.deepcopy(fused)
    ones, others = (trained(adapted(model, parts, init=init)) for model, parts in ((fused, PARTS), (apart, None)))
    pairs = by_projection(ones)
    assert pairs.keys() == by_projection(others).keys()
    for name, expected in by_projection(others).items():
        for ours, theirs in zip(pairs[name], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    logits = others(IDS).logits
    torch.testing.assert_close(ones(IDS).logits, logits, rtol=1e-3, atol=1e-4)
    as_one_matrix = trained(adapted(whole, init=init))(IDS).logits  # a negative control
    assert (as_one_matrix - logits).abs().max() > 1e-2


@pytest.mark.parametrize("init", ["eva", "lora_one"])
def test_data_tell_each_part_what_they_would_tell_a_layer_of_its_own(init: str) -> None:
    fused = phi3()
    found = []
    for model, parts in ((separate(fused), {}), (fused, PARTS)):
        inject(model, LoRAConfig(r=3, init=init, fused_parts=parts))
        initialize(model, statistics=collect_statistics(model, token_batches(2)), cache=False)
        found.append(by_projection(model))
    for name, (A, B) in found[0].items():
        product = found[1][name][1] @ found[1][name][0]
        torch.testing.assert_close(product, B @ A, rtol=1e-3, atol=1e-5)


def test_packed_projections_have_three_parts() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).requires_grad_(False)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    start = model["attn"](x, memory, memory)[0]
    found = lora_layers(adapted(model, {"in_proj": 3}))["attn.in_proj"]
    assert found.lora_A.shape == (9, 8)
    assert torch.equal(model["attn"](x, memory, memory)[0], start)
    U, S, Vh = singular_slice(found.base_layer.weight[8:16], 3, "minor")
    torch.testing.assert_close(found.scaling * found.lora_B[8:16] @ found.lora_A[3:6], (U * S @ Vh).float())
    with torch.no_grad():
        found.lora_B.add_(0.1)
    trained_output = model["attn"].train()(x, memory, memory)[0]
    with torch.no_grad():
        torch.testing.assert_close(model["attn"].eval()(x, memory, memory)[0], trained_output, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(trained_output, start)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"qkv_proj": [16, 8, 9]}, "whose weight is 32×16: it has not 33 rows"),
        ({"qkv_proj": 3}, "whose weight is 32×16: it cannot be split into 3 equal parts"),
        ({"qkv_proj": [29, 1, 2]}, "smallest part .* which is 1×16: choose r of at most 1"),
        ({"qkv": 2}, "The key 'qkv' of fused_parts matches the name of no layer"),
        ({"q(": 2}, "fused_parts has the key 'q\\(', which is no regular expression"),
        *(({"qkv_proj": wrong}, "number of equal parts or the rows") for wrong in (1, 0, [32], [40, -8], "2", True)),
    ],
)
def test_wrong_parts_are_refused_before_anything_changes(parts: Any, words: str) -> None:
    model = phi3()
    with pytest.raises(ValueError, match=words):
        inject(model, LoRAConfig(r=3, fused_parts=parts))
    assert not lora_layers(model)


def test_layers_without_parts_are_refused() -> None:
    for layers, name in (({"conv": nn.Conv1d(4, 8, 1)}, "conv"), ({"emb": nn.Embedding(8, 8)}, "emb")):
        with pytest.raises(ValueError, match=f"fused_parts means '{name}', which is of type .* and is no linear layer"):
            inject(nn.ModuleDict(layers), LoRAConfig(r=2, target_modules=[name], fused_parts={name: 2}))


def test_rows_that_alternate_by_head_are_refused() -> None:
    from transformers import GPTNeoXForCausalLM

    tiny = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    falcon = {"multi_query": True, "new_decoder_architecture": False}
    for model in (
        GPTNeoXForCausalLM(GPTNeoXConfig(**tiny, intermediate_size=16)),
        BloomForCausalLM(BloomConfig(**tiny)),
        FalconForCausalLM(FalconConfig(**tiny, **{**falcon, "multi_query": False})),
        FalconForCausalLM(FalconConfig(**tiny, **{**falcon, "new_decoder_architecture": True}, num_kv_heads=2)),
    ):
        whole = nn.ModuleDict({"lm": model})
        rows = next(m.out_features for n, m in model.named_modules() if n.endswith("query_key_value"))
        with pytest.raises(ValueError, match=f"models of type '{model.config.model_type}' mix those of query, key"):
            inject(whole, LoRAConfig(r=2, fused_parts={"query_key_value": [rows - 8, 8]}))
    multi_query = FalconForCausalLM(FalconConfig(**tiny, **falcon))  # queries, one key, one value
    assert inject(multi_query, LoRAConfig(r=2, fused_parts={"query_key_value": [16, 4, 4]}))


@pytest.mark.usefixtures("one_rank")
def test_rows_of_shards_move_to_the_columns_of_their_part() -> None:
    B = torch.randn(sum(ROWS), R)
    mesh = init_device_mesh("cpu", (1,))
    shared = block_diagonal(distribute_tensor(B, mesh, [Shard(0)]), ROWS)
    assert isinstance(shared, DTensor)
    assert shared.placements == (Shard(0),)
    assert torch.equal(shared.full_tensor(), block_diagonal(B, ROWS))
