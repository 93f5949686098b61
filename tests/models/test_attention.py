"""Block-wise causal attention against torch's own."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.models import TINY_CONFIGS, tiny_model
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, PreTrainedModel

from milora_lightning.models.attention import BLOCK, NAME, causal_attention, causal_blocks_forward


def with_blocks(kind: str) -> PreTrainedModel:
    config = copy.deepcopy(TINY_CONFIGS[kind])  # which from_config changes
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()


def inputs_of(batch: int, tokens: int, heads: tuple[int, int], tokens_first: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves, and the queries, keys and values that they are in one order of the axes or the other."""
    torch.manual_seed(0)
    shapes = [(batch, tokens, n, 8) if tokens_first else (batch, n, tokens, 8) for n in (heads[0], heads[1], heads[1])]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return leaves, [x.transpose(1, 2) if tokens_first else x for x in leaves]


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """Outputs and gradients."""
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    for got, want in zip(
        torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(theirs, leaves, direction), strict=True
    ):
        torch.testing.assert_close(got, want)


LENGTHS = [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 5]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_output_and_gradients_equal_torchs(length: int, heads: tuple[int, int], tokens_first: bool) -> None:
    """Whichever way the tensors lie in memory."""
    leaves, (q, k, v) = inputs_of(2, length, heads, tokens_first)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert_same(causal_attention(q, k, v, 0.3), theirs, leaves)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("before", [3, BLOCK])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_queries_of_the_last_positions(length: int, before: int, heads: tuple[int, int]) -> None:
    leaves, (q, k, v) = inputs_of(2, before + length, heads, tokens_first=True)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert_same(causal_attention(q[:, :, before:], k, v, 0.3), theirs[:, :, before:], leaves)


def test_what_is_not_finite_stays_in_its_row() -> None:
    """Although tokens of one row could fill up the others to whole blocks."""
    leaves, qkv = inputs_of(2, 70, (6, 2), tokens_first=True)
    broken = [x.detach().clone() for x in leaves]
    for x in broken:
        x[0] = torch.nan
        x.requires_grad_()
    results = []
    for tensors, inputs in ((leaves, qkv), (broken, [x.transpose(1, 2) for x in broken])):
        output = causal_attention(*inputs, 0.3)
        results.append([output, *torch.autograd.grad(output, tensors, torch.ones_like(output))])
    for whole, partly in zip(*results, strict=True):
        torch.testing.assert_close(partly[1], whole[1])


@pytest.mark.parametrize("queries", [5, 3])
def test_second_derivatives_equal_torchs(queries: int) -> None:
    leaves, (q, k, v) = inputs_of(2, 5, (4, 2), tokens_first=True)
    with sdpa_kernel(SDPBackend.MATH):  # its other kernels have none
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)[:, :, -queries:]
    products = []
    for output in (causal_attention(q[:, :, -queries:], k, v, 0.3), theirs):
        firsts = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        products.append(torch.autograd.grad(sum(first.sin().sum() for first in firsts), leaves))
    for got, want in zip(*products, strict=True):
        torch.testing.assert_close(got, want)
        assert want.abs().sum() > 0


@pytest.mark.parametrize("queries", [70, 30])
def test_operator_is_sound(queries: int) -> None:
    """Shapes without data, gradients and aliases, as torch.compile relies on them."""
    q, k, v = (torch.randn(2, n, 70, 4, requires_grad=True) for n in (6, 3, 3))
    inputs = q[:, :, -queries:].detach().requires_grad_(), k, v, 0.5
    torch.library.opcheck(torch.ops.milora_lightning.causal_attention.default, inputs)


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


@pytest.mark.parametrize("use_cache", [False, True])
def test_layers_that_are_computed_again_have_the_same_gradients(use_cache: bool) -> None:
    """By torch's own wrapper, also where a cache gets the keys of the second time behind those of the first."""
    gradients = []
    for wrap in (lambda layer: layer, checkpoint_wrapper):
        torch.manual_seed(0)
        model = with_blocks("llama").train()
        model.model.layers = torch.nn.ModuleList(wrap(layer) for layer in model.model.layers)
        ids = torch.randint(5, 120, (2, BLOCK + 6))
        model(input_ids=ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(("dropout", "differ"), [(0.5, True), (0.0, False)])
def test_dropout_of_attention_is_applied_in_training_alone(dropout: float, differ: bool) -> None:
    model = tiny_model("llama", attention_dropout=dropout)
    model.set_attn_implementation(NAME)
    ids = torch.randint(5, 120, (2, 20))
    for training, changes in ((True, differ), (False, False)):
        model.train(training)
        one, other = (model(input_ids=ids).logits for _ in range(2))
        assert torch.equal(one, other) != changes


def test_models_that_cap_their_scores_are_refused() -> None:
    model = with_blocks("gemma2")
    with pytest.raises(ValueError, match="does not cap attention scores"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))


def test_models_with_sinks_are_refused() -> None:
    module, x = torch.nn.Module(), torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="does not add attention sinks as this model does: use 'eager'"):
        causal_blocks_forward(module, x, x, x, None, s_aux=torch.zeros(2))


def test_biases_of_positions_are_added() -> None:
    module, x, bias = torch.nn.Module(), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 4)
    options = {"scaling": 1.0, "is_causal": True, "position_bias": bias}
    with_bias = causal_blocks_forward(module, x, x, x, None, **options)[0].transpose(1, 2)
    hidden = torch.ones(4, 4).triu(1).bool()
    torch.testing.assert_close(with_bias, (x @ x.mT + bias).masked_fill(hidden, -torch.inf).softmax(-1) @ x)


def test_name_stays_out_of_saved_models(tmp_path: Path) -> None:
    with_blocks("llama").save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_who_loads_a_model_can_name_it() -> None:
    """In a process that has imported nothing else, as the command line's is."""
    program = (
        "import milora_lightning.models.pretrained\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        f"assert {NAME!r} in AttentionInterface().valid_keys()\n"
        f"assert {NAME!r} in AttentionMaskInterface().valid_keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
