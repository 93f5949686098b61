"""The supervised positions that are found before a batch moves are those of the labels that the loss sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer, save_tiny_model, tiny_model
from helpers.modules import data, module

from milora_lightning import MiLoRAInit
from milora_lightning.models import positions
from milora_lightning.models.loss import causal_lm_loss
from milora_lightning.models.positions import (
    at_positions,
    found_before_transfer,
    known_after_transfer,
    next_labels,
    supervised_count,
    supervised_positions,
)


def labels() -> torch.Tensor:
    drawn = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    drawn[:, :4], drawn[1, 7:], drawn[2, 6] = -100, -100, -100
    return drawn


def test_indices_choose_what_the_mask_chooses() -> None:
    found = labels()
    mask = torch.zeros_like(found, dtype=torch.bool)
    mask[:, :-1] = found[:, 1:] != -100
    values = torch.randn(3, 12, 5)
    indices = supervised_positions(found)
    assert torch.equal(at_positions(values, indices), values[mask])
    assert torch.equal(next_labels(found, indices), found[:, 1:][mask[:, :-1]])
    assert supervised_count(found) == mask.sum()


def test_known_positions_are_used_until_the_labels_change(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"input_ids": torch.zeros(3, 12), "labels": labels()}
    moved = found_before_transfer(batch)
    assert batch.keys() == {"input_ids", "labels"}  # the loader's own batch is left as it is
    moved = {key: value.clone() for key, value in moved.items()}
    arrived = known_after_transfer(moved)
    assert arrived.keys() == batch.keys()
    with monkeypatch.context() as patched:  # nothing has to be looked for
        patched.setattr(torch.Tensor, "nonzero", None)
        assert len(supervised_positions(arrived["labels"])) == supervised_count(arrived["labels"])
    arrived["labels"][:, -1] = -100
    assert torch.equal(supervised_positions(arrived["labels"]), supervised_positions(arrived["labels"].clone()))
    assert supervised_count(arrived["labels"]) == len(supervised_positions(arrived["labels"].clone()))


@pytest.mark.parametrize("batch", [[torch.zeros(2)], torch.zeros(2), {"labels": torch.zeros(2)}, {"labels": [1]}])
def test_other_batches_are_left_alone(batch: Any) -> None:
    assert found_before_transfer(batch) is batch
    assert known_after_transfer(batch) is batch


def test_inference_tensors_which_do_not_count_writes_are_looked_at_each_time() -> None:
    with torch.inference_mode():
        moved = known_after_transfer({k: v.clone() for k, v in found_before_transfer({"labels": labels()}).items()})
        moved["labels"][:, -1] = -100
        assert torch.equal(supervised_positions(moved["labels"]), supervised_positions(moved["labels"].clone()))


def test_loss_is_the_same_whether_they_are_known() -> None:
    model, found = tiny_model(), labels()
    ids = found.clamp(min=0)
    expected = causal_lm_loss(model, ids, found)
    (known,) = (known_after_transfer(found_before_transfer({"labels": found.clone()}))["labels"],)
    assert hasattr(known, positions._KNOWN)
    assert torch.equal(causal_lm_loss(model, ids, known), expected)


def test_a_run_knows_them(tmp_path: Path) -> None:
    base, known = save_tiny_model(tmp_path / "llama", "llama"), []

    class Looks(type(module(base))):  # type: ignore[misc]
        def loss(self, batch: Any) -> Any:
            known.append(hasattr(batch["labels"], positions._KNOWN))
            return super().loss(batch)

    trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4)], max_steps=2, limit_val_batches=0)
    trainer.fit(Looks(str(base), warmup_steps=0), data(tmp_path, base))
    assert known == [True, True]
