from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from helpers.clock import Clock
from helpers.models import quiet_trainer, save_tiny_model, write_examples
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn

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


def test_what_one_validation_was_remarked_on_the_next_is_not(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_patience, "answers_ahead", lambda trainer: 5)
    patience, trainer = _patience.Patience(), SimpleNamespace(sanity_checking=False)
    for start in (0, 1000):
        clock(start)
        patience.begin(trainer, nn.Module())  # type: ignore[arg-type]
        for number, seconds in ((2, 20), (3, 40), (4, 50)):
            clock(start + seconds)
            patience.answered(number)
    told = capsys.readouterr().err
    assert "3 of 5 answers took 0:00:40" in told
    assert told.count(_patience.REMEDY) == 1


def test_a_resumed_run_knows_what_was_answered_before_training() -> None:
    trained, resumed = EvaluationSummary(), EvaluationSummary()
    trained.before, trained.after = {"val_loss": 2.0}, {"val_loss": 1.0}
    trained.shown = [{"prompt": "1 + 1?\n", "instruction": "1 + 1?", "reference": "2", "before": "3"}]
    resumed.load_state_dict(trained.state_dict())
    assert (resumed.before, resumed.after, resumed.shown) == (trained.before, trained.after, trained.shown)


def test_each_test_shows_its_own_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """Of several with one callback, such as before and after training."""
    run: dict[str, Any] = {"is_global_zero": True, "callback_metrics": {}, "loggers": []}
    loop = SimpleNamespace(verbose=True)
    trainer: Any = SimpleNamespace(**run, state=SimpleNamespace(fn="test"), test_loop=loop, validate_loop=loop)
    summary, module = EvaluationSummary(samples=9), LightningModule()
    for answer, other in (("three", "two"), ("two", "three")):
        record = {"prompt": f"1 + 1? {answer}", "instruction": "1 + 1?", "reference": "2", "generation": answer}
        summary.on_test_start(trainer, module)
        summary.on_test_batch_end(trainer, module, {"answers": [record]}, None, 0)
        summary.on_test_end(trainer, module)
        shown = capsys.readouterr().out
        assert answer in shown
        assert other not in shown


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
