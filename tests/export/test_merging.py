"""The numbers of merged weights: their dtypes, ties and limits."""

from __future__ import annotations

import pytest
import torch
from helpers.models import tiny_model

from milora_lightning import LoRAConfig, initialize, inject, lora_layers
from milora_lightning.export.merging import merge_adapters, merged_state


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_tied_weights_stay_tied_in_any_dtype(dtype: torch.dtype | None) -> None:
    state, _ = merged_state(tiny_model("qwen2"), dtype)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    apart, _ = merged_state(tiny_model("llama"), dtype)
    assert apart["lm_head.weight"].data_ptr() != apart["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_tensors_that_begin_at_one_place_keep_their_own_shapes(dtype: torch.dtype | None) -> None:
    model, table = tiny_model("llama"), torch.arange(12.0)
    for name, value in (("table", table), ("row", table[:3]), ("none", table[:0]), ("square", table.view(3, 4).T)):
        model.register_buffer(name, value)
    state, _ = merged_state(model, dtype)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value.to(dtype or value.dtype), rtol=0, atol=0)


def test_what_trained_in_full_returns_to_the_dtype_of_the_model() -> None:
    model = tiny_model("llama", torch.bfloat16)
    inject(model, LoRAConfig(r=2, modules_to_save=("lm_head",)))
    initialize(model)
    held = model.state_dict()["lm_head.weight"]
    assert held.dtype == torch.float32
    own, _ = merged_state(model, None)
    assert {value.dtype for name, value in own.items() if name.endswith("weight")} == {torch.bfloat16}
    whole, _ = merged_state(model, torch.float32)
    assert torch.equal(whole["lm_head.weight"], held)


def test_numbers_beyond_a_dtype_are_refused_but_not_those_that_are_infinite_already() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[0, 0] = -torch.inf
    state, _ = merged_state(model, torch.float16)
    assert state["lm_head.weight"].isinf().sum() == 1
    model.lm_head.weight.data[0, 1] = 1e6
    with pytest.raises(ValueError, match=r"'lm_head\.weight' has values up to .* largest of torch\.float16"):
        merged_state(model, torch.float16)
    merged_state(model, torch.bfloat16)


def test_corrections_are_added_to_the_updates() -> None:
    model = tiny_model("llama")
    inject(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    initialize(model)
    name, layer = next(iter(lora_layers(model).items()))
    left, right = torch.randn(layer.lora_B.shape[0], 1), torch.randn(1, layer.lora_A.shape[1])
    (plain, lost), (corrected, _) = (
        merged_state(model, None),
        merged_state(model, None, corrections={layer: (left, right)}),
    )
    torch.testing.assert_close(corrected[f"{name}.weight"] - plain[f"{name}.weight"], left @ right, rtol=0, atol=1e-5)
    assert lost == 0  # nothing has moved yet


def test_of_a_model_that_is_quantized_in_part_nothing_is_merged() -> None:
    model = tiny_model("llama")
    inject(model, LoRAConfig(r=2, init="lora"))
    initialize(model)
    layers = lora_layers(model)
    for layer in layers.values():
        torch.nn.init.ones_(layer.lora_B)
    *_, last = layers.values()
    last.base_layer.register_buffer("weight_scale", torch.ones(()))  # as quantizers keep it beside their codes
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="leave merge out"):
        merge_adapters(model)
    assert lora_layers(model) == layers
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
