"""Block-wise causal attention against torch's own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIGS, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from milora_lightning.attention import NAME, causal_attention
from milora_lightning.block_attention import BLOCK, attend


def with_blocks(kind: str) -> PreTrainedModel:
    config = copy.deepcopy(TINY_CONFIGS[kind])  # which from_config changes
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()


def reference(query: Tensor, key: Tensor, value: Tensor, prefix: int, rows: int) -> Tensor:
    """Torch's own attention; rows that share a prefix are first written out."""

    def written_out(x: Tensor) -> Tensor:
        if not prefix:
            return x
        own = x[0, :, prefix:].unflatten(1, (rows, -1)).transpose(0, 1)
        return torch.cat([x[:, :, :prefix].expand(rows, -1, -1, -1), own], 2)

    q, k, v = (written_out(x) for x in (query, key, value))
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    if not prefix:
        return output
    return torch.cat([output[:1, :prefix], output[:, prefix:].flatten(0, 1)[None]], 1)


@pytest.mark.parametrize("length", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("prefix", [0, 3, BLOCK, BLOCK + 9])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_output_and_gradients_equal_torchs(
    length: int, prefix: int, heads: tuple[int, int], tokens_first: bool
) -> None:
    """For whole sequences, and for rows that share a prefix; whichever way the tensors lie in memory."""
    torch.manual_seed(0)
    batch, tokens = (1, prefix + 2 * length) if prefix else (2, length)
    inputs, options = [], {"dtype": torch.float64, "requires_grad": True}
    for n in (heads[0], heads[1], heads[1]):
        shape = (batch, tokens, n, 8) if tokens_first else (batch, n, tokens, 8)
        inputs.append(torch.randn(shape, **options))
    query, key, value = (x.transpose(1, 2) if tokens_first else x for x in inputs)
    ours = attend(query, key, value, 0.3, prefix, rows=2)
    theirs = reference(query, key, value, prefix, rows=2)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    for got, want in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("length", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("before", [3, BLOCK])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_queries_of_the_last_positions(length: int, before: int, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    shapes = [(2, before + length, n, 8) for n in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    query, key, value = (x.transpose(1, 2) for x in inputs)
    direction = torch.randn(2, heads[0], length, 8, dtype=torch.float64)
    ours = causal_attention(query[:, :, before:], key, value, 0.3)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    theirs = theirs[:, :, before:]
    torch.testing.assert_close(ours, theirs)
    for got, want in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("prefix", "rows"), [(0, 1), (10, 3)])
def test_operator_is_sound(prefix: int, rows: int) -> None:
    """Shapes without data, gradients and aliases, as torch.compile relies on them."""
    q, k, v = (torch.randn(2 if prefix == 0 else 1, n, 70, 4, requires_grad=True) for n in (6, 3, 3))
    torch.library.opcheck(torch.ops.milora_lightning.causal_attention.default, (q, k, v, 0.5, prefix, rows))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma", "opt"])
def test_models_compute_the_same_with_it(kind: str) -> None:
    """Padding on the left and a cache take torch's own attention."""
    model = tiny_model(kind).eval()
    other = with_blocks(kind)
    other.load_state_dict(model.state_dict())
    model.set_attn_implementation("eager")
    input_ids = torch.randint(5, 120, (2, 20))
    mask = torch.ones_like(input_ids)
    mask[0, :6] = 0
    for inputs in ({}, {"attention_mask": mask}):
        ours, theirs = (m(input_ids=input_ids, **inputs).logits for m in (other, model))
        kept = inputs.get("attention_mask", torch.ones_like(mask)).bool()
        torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-4, atol=1e-6)
    texts = [m.generate(input_ids, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in (other, model)]
    assert torch.equal(*texts)


def test_models_that_cap_their_scores_are_refused() -> None:
    model = with_blocks("gemma2")
    with pytest.raises(ValueError, match="does not cap attention scores"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))


def test_name_stays_out_of_saved_models(tmp_path: Path) -> None:
    with_blocks("llama").save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
