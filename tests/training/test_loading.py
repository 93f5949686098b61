"""How a module loads its model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import tiny_model

from milora_lightning import CausalLMModule
from milora_lightning.training import loading


@pytest.mark.parametrize(
    ("dtype", "adapters", "quantized", "held"),
    [
        ("fast", True, False, True),
        ("auto", True, False, True),
        ("bfloat16", True, False, False),
        ("fast", False, False, False),
        ("fast", True, True, False),
    ],
)
def test_weights_are_held_in_float32_where_the_dtype_is_ours_to_choose(
    dtype: str, adapters: bool, quantized: bool, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(loading, "hold_in_float32", lambda model, device: done.append(model))
    monkeypatch.setattr(loading, "warn_of_slow_products", lambda dtype: None)
    module: Any = CausalLMModule("embedded", dtype=dtype)
    module.milora_config = object() if adapters else None
    monkeypatch.setattr(type(module), "_is_fitting", True)
    model = tiny_model("llama")
    model.is_quantized = quantized
    module._suit_processor(model, torch.device("cpu"))
    assert done == ([model] if held else [])
