"""The trial of packed rows does not depend on the mode that a model is in."""

from __future__ import annotations

import pytest
import torch
from helpers.models import tiny_model

from milora_lightning.models.packed_rows import check_separation

TOKENS = list(range(5, 36))


def test_models_that_drop_entries_in_training_pass_and_stay_in_their_mode() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    one, other = (model(input_ids=torch.tensor([TOKENS])).logits for _ in range(2))
    assert not torch.allclose(one, other, rtol=1e-3)  # what would be taken for an effect of neighbours
    check_separation(model, TOKENS)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("training", [True, False])
def test_models_that_mix_examples_are_refused_and_stay_in_their_mode(training: bool) -> None:
    model = tiny_model("opt", attention_dropout=0.0, dropout=0.0).train(training)
    with pytest.raises(ValueError, match="for an example in a packed row"):
        check_separation(model, TOKENS)
    assert {module.training for module in model.modules()} == {training}
