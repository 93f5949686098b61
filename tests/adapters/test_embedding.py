"""The adapter of an embedding against an embedding with its rows changed, here and in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import IDS, logits, move
from helpers.models import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from milora_lightning import (
    LoRAConfig,
    adapters_disabled,
    export_merged,
    export_peft,
    initialize,
    inject,
    load_peft,
    lora_layers,
)
from milora_lightning.adapters.embedding import LoRAEmbedding

TOKENS = torch.tensor([[3, 0, 3], [7, 1, 8]])


def adapted(dtype: torch.dtype = torch.float32, trained: bool = True, **options: Any) -> LoRAEmbedding:
    torch.manual_seed(0)
    model = nn.ModuleDict({"tokens": nn.Embedding(12, 6, padding_idx=1).to(dtype)})
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["tokens"], **options}
    (layer,) = inject(model, LoRAConfig(**config)).values()
    initialize(model)
    if trained:
        with torch.no_grad():
            layer.lora_A.add_(torch.randn_like(layer.lora_A), alpha=0.1)
            layer.lora_B.add_(torch.randn_like(layer.lora_B), alpha=0.1)
    assert isinstance(layer, LoRAEmbedding)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_the_base_bit_for_bit_and_from_the_smallest_triplets(dtype: torch.dtype) -> None:
    layer = adapted(dtype, trained=False, lora_dropout=0.3).train()
    assert torch.equal(layer(TOKENS), layer.base_layer(TOKENS))
    U, S, Vh = torch.linalg.svd(layer.base_layer.weight.double().T, full_matrices=False)
    product = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(product, U[:, -3:] * S[-3:] @ Vh[-3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["milora", "lora"])
def test_what_stands_for_padding_is_not_learned(init: str) -> None:
    """As in the embedding itself, and in PEFT's adapter of it."""
    layer = adapted(init=init).train()
    layer(TOKENS).square().sum().backward()
    learned = layer.lora_A.grad.any(dim=0)
    assert learned.nonzero().flatten().tolist() == sorted({*TOKENS.flatten().tolist()} - {layer.padding_idx})


@pytest.mark.parametrize("init", ["milora", "lora"])
def test_output_gradients_and_merged_rows_are_those_of_the_plain_formula(init: str) -> None:
    layer = adapted(init=init)
    factors = [f.detach().double().requires_grad_() for f in layer.factors[:2]]
    delta = factors[1] @ factors[0]
    if layer.initial_A is not None and layer.initial_B is not None:
        delta = delta - layer.initial_B.double() @ layer.initial_A.double()
    rows = layer.base_layer.weight.double() + layer.scaling * delta.T
    want = rows[TOKENS]
    got = layer(TOKENS)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.merged_weight().double(), rows, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(want)
    direction[TOKENS == 1] = 0  # padding has no gradient, as in torch's embeddings
    torch.autograd.backward([(got * direction).sum(), (want * direction).sum()])
    for ours, theirs in zip((layer.lora_A, layer.lora_B), factors, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    with adapters_disabled(layer):
        assert torch.equal(layer(TOKENS), layer.base_layer(TOKENS))


def test_embeddings_are_adapted_if_named_alone() -> None:
    def targets(**config: Any) -> set[str]:
        return {name.rpartition(".")[2] for name in inject(tiny_model(), LoRAConfig(r=4, **config))}

    assert "embed_tokens" not in targets() | targets(target_modules=".*")
    assert targets(target_modules=["q_proj", "embed_tokens"]) == {"q_proj", "embed_tokens"}
    assert targets(target_modules=r".*embed_tokens") == {"embed_tokens"}
    with pytest.raises(ValueError, match=r"embed_tokens' is tied to lm_head"):
        inject(tiny_model("qwen2"), LoRAConfig(r=4, target_modules=["embed_tokens"]))
    bounded = nn.ModuleDict({"tokens": nn.Embedding(12, 6, max_norm=1.0)})
    with pytest.raises(ValueError, match="matches only modules of type Embedding"):
        inject(bounded, LoRAConfig(r=2, target_modules=["tokens"]))


@pytest.mark.filterwarnings("ignore")
def test_peft_opens_the_export_and_its_own_is_read(tmp_path: Path) -> None:
    def within(ours: PreTrainedModel, theirs: nn.Module) -> Tensor:
        torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)
        return (logits(ours) - logits(tiny_model())).abs().max()

    names = ["embed_tokens", "q_proj"]
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    inject(model, LoRAConfig(r=4, lora_alpha=6, target_modules=names))
    initialize(model)
    move(model)
    export_peft(model, tmp_path / "ours")
    assert within(model, PeftModel.from_pretrained(tiny_model(), tmp_path / "ours")) > 1e-3
    again = tiny_model()
    load_peft(again, tmp_path / "ours")
    within(model, again)
    export_merged(model, tmp_path / "merged")
    within(model, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    theirs = get_peft_model(tiny_model(), LoraConfig(r=4, lora_alpha=6, target_modules=names)).eval()
    move(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    read = tiny_model()
    load_peft(read, tmp_path / "theirs")
    within(read, theirs)
    assert lora_layers(read)["model.embed_tokens"](IDS).shape == (*IDS.shape, 32)
