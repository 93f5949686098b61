"""Liger's kernels, of which only what is around them can be tried without a GPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.models import tiny_model

from milora_lightning.models.kernels import apply_liger
from milora_lightning.models.loss import causal_lm_loss

GPU = torch.device("cuda")
IDS = torch.arange(5, 25)[None]


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that halves what the norms give, and would break the loss if it were asked for cross-entropies."""

    def patch(cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, model: Any = None) -> None:
        for layer in model.model.layers:
            layer.input_layernorm.register_forward_hook(lambda _, args, output: output / 2)
        if cross_entropy or fused_linear_cross_entropy:
            model.forward = None

    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    package.__spec__ = transformers.__spec__ = None  # type: ignore[assignment]
    transformers.apply_liger_kernel_to_llama = patch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


def test_the_kernels_are_used_and_the_loss_stays_ours(liger: None) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    apply_liger(model, GPU)
    losses = [causal_lm_loss(m, IDS, IDS) for m in (model, plain)]
    assert losses[0].isfinite()
    assert not torch.allclose(*losses)


def test_a_model_without_kernels_is_refused(liger: None) -> None:
    with pytest.raises(ValueError, match="Liger has no kernels for models of type gpt2"):
        apply_liger(tiny_model("gpt2"), GPU)


def test_a_cpu_and_a_missing_package_are_named() -> None:
    with pytest.raises(ValueError, match="needs a GPU, for which its kernels are written, not cpu"):
        apply_liger(tiny_model("llama"), torch.device("cpu"))
    pytest.importorskip("torch")
    if "liger_kernel" not in sys.modules:
        with pytest.raises(ModuleNotFoundError, match=r'pip install "milora-lightning\[liger\]"'):
            apply_liger(tiny_model("llama"), GPU)
