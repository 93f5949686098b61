"""Loggers by one word, each of which runs for real where its package is installed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import save_tiny_model, write_examples
from lightning.pytorch.loggers import MLFlowLogger

from milora_lightning.cli.loggers import start
from milora_lightning.cli.main import main

PATTERN = r"layers\.[01]\.mlp\.(up|down)_proj"  # a key that is no name
Figures = dict[str, list[tuple[int, float]]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which a run of two evaluations takes a second."""
    save_tiny_model(tmp_path / "model", "llama")
    write_examples(tmp_path / "rows.jsonl", 8)
    files = {"train": "rows.jsonl", "validation": "rows.jsonl"}
    config: dict[str, Any] = {
        "model": {"name_or_path": "model", "max_new_tokens": 2},
        "adapter": {"r": 4, "rank_pattern": {PATTERN: 2}},
        "data": {
            "source": {"class_path": "milora_lightning.data.Files", "init_args": files},
            "template": "plain",
            "batch_size": 4,
            "num_generation_examples": 2,
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "num_sanity_val_steps": 0, "log_every_n_steps": 1},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    return tmp_path


def fit(logger: str) -> Any:
    options = [f"--logger={logger}", f"--trainer.default_root_dir={logger}", "--summary.samples=1"]
    return main(["fit", "--config=mine.yaml", *options]).trainer.logger


def csv_figures() -> Figures:
    """What the same run logs with csv."""
    figures: Figures = {}
    for row in csv.DictReader((Path(fit("csv").log_dir) / "metrics.csv").open()):
        for name, value in row.items():
            if name not in ("step", "epoch") and value:
                figures.setdefault(name, []).append((int(row["step"]), float(value)))
    return figures


def assert_same(logged: Figures, expected: Figures) -> None:
    assert {"train_loss", "val_loss", "lr", "grad_norm"} <= expected.keys() <= logged.keys()
    for name, figures in expected.items():
        if name not in ("tokens_per_second", "peak_memory_gb"):  # of these two runs
            torch.testing.assert_close(torch.tensor(logged[name]), torch.tensor(figures), msg=name)


def test_tensorboard_gets_the_figures_the_options_and_the_answers(project: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    logger = fit("tensorboard")
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    figures = csv_figures()
    assert_same({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, figures)
    texts = events.Tensors("val_samples/text_summary")
    assert [event.step for event in texts] == [step for step, _ in figures["val_loss"]]
    assert b"What is" in texts[0].tensor_proto.string_val[0]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    options = HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["adapter.r"].number_value == 4
    assert json.loads(options["adapter.rank_pattern"].string_value) == {PATTERN: 2}
    assert (Path(logger.log_dir) / "config.yaml").is_file()


def test_wandb_gets_the_figures_the_options_and_the_answers(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: Figures = {}
    tables = []
    log = wandb.Run.log

    def record(self: Any, data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in data.items():
            if isinstance(value, wandb.Table):
                tables.append(value)
            else:
                logged.setdefault(name, []).append((data["trainer/global_step"], value))
        log(self, data, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", record)
    run = fit("wandb").experiment
    options = dict(run.config)
    run.finish()
    assert_same(logged, csv_figures())
    assert [table.columns for table in tables] == [["instruction", "reference", "answer"]] * 2
    assert options["adapter.r"] == 4
    assert json.loads(options["adapter.rank_pattern"]) == {PATTERN: 2}
    assert list((project / "wandb").rglob("*.wandb"))


def test_mlflow_gets_the_figures_the_options_and_the_answers(project: Path) -> None:
    pytest.importorskip("mlflow")
    logger = fit("mlflow")
    client, run_id = logger.experiment, logger.run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    histories = {name: client.get_metric_history(run_id, name) for name in run.data.metrics}
    assert_same({name: [(m.step, m.value) for m in history] for name, history in histories.items()}, csv_figures())
    assert run.data.params["adapter.r"] == "4"
    assert json.loads(run.data.params["adapter.rank_pattern"]) == {PATTERN: 2}
    assert {file.path for file in client.list_artifacts(run_id)} == {"config.yaml", "val_samples.json"}
    answers = json.loads((next((project / "mlflow" / "mlartifacts").rglob("val_samples.json"))).read_text())
    steps = [row[answers["columns"].index("step")] for row in answers["data"]]
    assert steps == [measured.step for measured in histories["val_loss"]]


def test_a_logger_without_a_name_of_ours_is_refused(project: Path) -> None:
    with pytest.raises(SystemExit):
        fit("tensorbored")


def test_a_run_that_cannot_begin_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(MLFlowLogger):
        def __init__(self) -> None: ...

        @property
        def experiment(self) -> Any:
            raise ConnectionError("nobody is there.\nDetails")

    with pytest.raises(ValueError, match=r"MLflow cannot log the run: nobody is there\. To continue, .*--logger csv"):
        start(Unreachable())


def test_a_logger_without_a_folder_leaves_the_config_in_the_runs(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that logs to a server."""
    monkeypatch.setattr("lightning.pytorch.Trainer.log_dir", None)
    fit("none")
    assert yaml.safe_load((project / "none" / "config.yaml").read_text())["adapter"]["r"] == 4
