from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers.models import quiet_trainer, save_tiny_model, write_examples
from lightning.pytorch.loggers import CSVLogger

from milora_lightning import CausalLMModule, EvaluationSummary, SFTDataModule
from milora_lightning.callbacks import _patience
from milora_lightning.data import Files
from milora_lightning.screen.samples import log_samples


def fit(folder: Path, number: int = 5, **options: Any) -> None:
    rows = str(write_examples(folder / "rows.jsonl", 6))
    base = str(save_tiny_model(folder / "model", "llama"))
    counts = {"batch_size": 2, "num_generation_examples": number, "template": "plain", "max_length": 64}
    data = SFTDataModule(Files(rows, rows), base, **counts)
    module = CausalLMModule(base, max_new_tokens=3)
    quiet_trainer(folder, max_epochs=1, callbacks=[EvaluationSummary()], **options).fit(module, data)


def test_answers_before_training_are_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, num_sanity_val_steps=-1, max_steps=1)
    told = capsys.readouterr().err
    said = "Before training, 5 held-out prompts are answered, in up to 3 tokens each: data.num_generation_examples"
    assert said in told
    assert "took" not in told
    # the run ended in the middle of its epoch
    assert "no results from after training: it ended at step 1, before its first validation" in told
    # no more batches than the check has
    fit(tmp_path, num_sanity_val_steps=2, max_steps=3)
    told = capsys.readouterr().err
    assert "Before training, 4 held-out prompts are answered" in told
    assert "no results" not in told
    fit(tmp_path, number=0, num_sanity_val_steps=-1, max_steps=1)
    assert "Before training" not in capsys.readouterr().err


def test_answers_that_take_long_are_remarked_on_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_patience, "LONG", 0.0)
    fit(tmp_path, num_sanity_val_steps=0)
    told = capsys.readouterr().err
    assert told.count("2 of 5 answers took 0:00:0") == 1
    assert told.count(_patience.REMEDY) == 1


def test_answers_are_logged_under_the_step_of_the_metrics_beside_them(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    fit(tmp_path, num_sanity_val_steps=0, logger=logger, val_check_interval=1, log_every_n_steps=1)
    rows = [line.split(",") for line in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()]
    step, loss = rows[0].index("step"), rows[0].index("val_loss")
    samples = [json.loads(line) for line in (Path(logger.log_dir) / "samples.jsonl").read_text().splitlines()]
    steps = list(dict.fromkeys(sample["step"] for sample in samples))
    assert steps == [int(row[step]) for row in rows[1:] if row[loss]]
    assert len(steps) == 3


def test_answers_go_where_the_logger_s_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sample = {"instruction": "1 plus 1?", "reference": "2", "answer": "3"}
    for step in (1, 2):
        log_samples(CSVLogger("memory://elsewhere", version=0), [sample], step, "val")
    with fsspec.open("memory://elsewhere/lightning_logs/version_0/samples.jsonl", "r") as file:
        assert [json.loads(line)["step"] for line in file] == [1, 2]
    assert not list(tmp_path.iterdir())
