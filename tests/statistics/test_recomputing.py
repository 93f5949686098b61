"""Layers that recompute their activations in a pass are afterwards as they were before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import tiny_model

from milora_lightning.statistics.passes import recomputing


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("fails", [False, True])
def test_a_users_own_forward_of_a_layer_is_called_in_a_pass_and_stays(fails: bool) -> None:
    model = tiny_model("llama").eval()
    model.gradient_checkpointing_enable()
    patched, other = model.model.layers
    original, calls = patched.forward, []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        if fails:
            raise ArithmeticError("of the user's own")
        return original(*args, **kwargs)

    patched.forward = own
    ids = torch.arange(5, 15)[None]
    try:
        with recomputing(model):
            model(input_ids=ids, labels=ids).loss.backward()
    except ArithmeticError:
        assert fails
    assert len(calls) == (1 if fails else 2)  # again in the backward pass
    assert patched.forward is own
    assert "forward" not in vars(other)
