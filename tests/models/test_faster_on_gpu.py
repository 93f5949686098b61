"""What makes training faster on a GPU computes what the plain model does; each of these needs a CUDA device."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from helpers.models import TINY_CONFIGS
from transformers import AutoModelForCausalLM, PreTrainedModel

from milora_lightning import LoRAConfig, initialize, inject
from milora_lightning.data import Collator
from milora_lightning.data.batches.packing import PackingCollator
from milora_lightning.models.compile import compile_layers
from milora_lightning.models.kernels import apply_liger
from milora_lightning.models.loss import causal_lm_loss
from milora_lightning.models.segments import positions_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def installed(name: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def model_of(attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    config = TINY_CONFIGS["llama"].__class__(**{**TINY_CONFIGS["llama"].to_dict(), "head_dim": 16})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    inject(model, LoRAConfig(r=4))
    initialize(model)
    return model.to(CUDA).train()


def loss_and_gradient(model: PreTrainedModel, one_row: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = (9, 30, 17)
    rows = [{"input_ids": list(range(5, 5 + length)), "spans": [3, length]} for length in lengths]
    batch = (PackingCollator(0, one_row=True) if one_row else Collator(0))(rows)
    moved = {key: value.to(CUDA) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    total = causal_lm_loss(model, moved["input_ids"], moved["labels"], positions_of(moved))
    trained = [p for p in model.parameters() if p.requires_grad]
    return total.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(total, trained)])


def check_same(found: tuple[torch.Tensor, torch.Tensor]) -> None:
    loss, gradient = loss_and_gradient(model_of())
    torch.testing.assert_close(found[0], loss, rtol=1e-2, atol=0)
    assert (found[1] - gradient).norm() < 0.05 * gradient.norm()


@installed("flash_attn")
def test_flash_attention_in_one_row_is_the_padded_batch() -> None:
    """Would show boundaries that the kernel does not get, or gets in another dtype."""
    check_same(loss_and_gradient(model_of("flash_attention_2"), one_row=True))


def test_flex_attention_in_one_row_is_the_padded_batch() -> None:
    """Would show a block mask that lets examples see each other."""
    check_same(loss_and_gradient(model_of("flex_attention"), one_row=True))


def test_compiled_layers_compute_the_same() -> None:
    """Would show code that Triton gets wrong, or that a GPU build cannot compile at all."""
    model = model_of()
    compile_layers(model, CUDA)
    check_same(loss_and_gradient(model))


@installed("liger_kernel")
def test_ligers_kernels_compute_the_same() -> None:
    """Would show a change of Liger's interface, or adapters that its layers do not call. The last, as it patches."""
    expected = loss_and_gradient(model_of())
    model = model_of()
    apply_liger(model, CUDA)
    found = loss_and_gradient(model)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-2, atol=0)
    assert (found[1] - expected[1]).norm() < 0.05 * expected[1].norm()
