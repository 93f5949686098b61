"""What ranks measure together is what one process measures alone: each batch counts once, whoever runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.callback_modules import LanguageModel, adapted_language_model
from helpers.models import quiet_trainer
from torch import Tensor

from milora_lightning import ChoiceMonitor, ForgettingMonitor
from milora_lightning.callbacks import choices, forgetting
from milora_lightning.strategies.base import DataRank


@pytest.fixture
def model() -> LanguageModel:
    return adapted_language_model(moved=True)


def test_blocks_of_text_are_shared_out(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five batches for two ranks: one runs another's at the end, and does not count it."""
    (tmp_path / "text.txt").write_text(" ".join(f"What is {i} plus {2 * i}?" for i in range(60)))
    trainer = quiet_trainer(tmp_path)

    def measured(rank: int, size: int) -> list[float]:
        monkeypatch.setattr(forgetting, "data_rank", lambda _: DataRank(rank, size, True))
        monitor = ForgettingMonitor(str(tmp_path / "text.txt"), block_length=8, max_tokens=80, batch_size=2)
        monitor.setup(trainer, model, "validate")
        monitor.measure(trainer, model)
        return [round(value, 6) for value in monitor.examples["forgetting_kl"].tolist()]

    alone = measured(0, 1)
    assert len(alone) == 10
    assert measured(0, 2) == [*alone[:2], *alone[4:6], *alone[8:]]
    assert measured(1, 2) == [*alone[2:4], *alone[6:8]]


def test_questions_are_shared_out(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks of two shares, the second of which is two processes': its part is added once."""
    asked = [{"question": f"What is {i} plus 1?", "choices": ["3", f"{i} and 1"], "answer": i % 2} for i in range(5)]
    (tmp_path / "sums.json").write_text(json.dumps(asked))
    trainer, parts = quiet_trainer(tmp_path), list[Tensor]()
    monkeypatch.setattr(trainer.strategy, "reduce", lambda tensor, reduce_op: (parts.append(tensor), tensor)[1])

    def measured(*share: int) -> Tensor:
        monkeypatch.setattr(choices, "data_rank", lambda _: DataRank(share[0], share[1], bool(share[2])))
        monitor = ChoiceMonitor(str(tmp_path / "sums.json"), batch_size=2)
        monitor.setup(trainer, model, "validate")
        kept = []
        monkeypatch.setattr(monitor, "_keep", kept.append)
        monitor.measure(trainer, model)
        return kept[0]

    alone = measured(0, 1, 1)
    assert alone.all()
    for share in ((0, 2, 1), (1, 2, 1), (1, 2, 0)):
        measured(*share)
    torch.testing.assert_close(sum(parts), alone)
    assert len(parts) == 3
