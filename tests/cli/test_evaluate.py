"""`evaluate` scores the live model as the harness scores its export, and the base beside it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.local_tasks import local_task
from helpers.models import quiet_trainer, save_tiny_model

from milora_lightning import CausalLMModule, MiLoRAInit
from milora_lightning.cli.commands.evaluate import evaluate, find_tasks
from milora_lightning.cli.main import main

lm_eval = pytest.importorskip("lm_eval")


def perplexity_task(folder: Path) -> str:
    """A task whose score tells any two models apart."""
    name = local_task(folder)
    task = yaml.safe_load((folder / f"{name}.yaml").read_text())
    del task["doc_to_choice"]
    task |= {
        "task": "texts",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
    }
    task["metric_list"] = [{"metric": "bits_per_byte"}]
    (folder / "texts.yaml").write_text(yaml.safe_dump(task))
    return "texts"


@pytest.mark.slow
def test_scores_are_those_of_the_merged_model_and_of_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(save_tiny_model(tmp_path / "base", "llama"))
    lm = CausalLMModule(base, warmup_steps=0, lr_scheduler="constant", learning_rate=0.3)
    ids = torch.arange(4, 60)[None]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    trainer = quiet_trainer(tmp_path, max_steps=20, callbacks=[MiLoRAInit(r=4)])
    trainer.fit(lm, torch.utils.data.DataLoader([batch] * 20, batch_size=None))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "tasks").mkdir()
    task = perplexity_task(tmp_path / "tasks")
    options = ["--tasks", task, "--include_path", str(tmp_path / "tasks"), "--limit", "16", "--device", "cpu"]

    def results(name: str, *more: str) -> dict[str, float]:
        output = tmp_path / f"{name}.json"
        main(["evaluate", *options, *more, "--output", str(output)])
        return {
            key: value["results"][task]["bits_per_byte,none"] for key, value in json.loads(output.read_text()).items()
        }

    tuned = results("tuned", "--ckpt_path", str(tmp_path / "last.ckpt"), "--base", "true")
    printed = capsys.readouterr().out
    assert f"{tuned['model']:.4f}" in printed
    assert f"{tuned['base']:.4f}" in printed
    main(["export", "--ckpt_path", str(tmp_path / "last.ckpt"), "--output", str(tmp_path / "m"), "--format", "merged"])
    assert results("merged", "--model", str(tmp_path / "m"))["model"] == pytest.approx(tuned["model"])
    assert results("base", "--model", base)["model"] == tuned["base"]
    assert abs(tuned["base"] - tuned["model"]) > 0.01


def test_what_cannot_be_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    local_task(tmp_path / "tasks")
    assert find_tasks("sums", str(tmp_path / "tasks"))[1] == ["sums"]
    assert find_tasks(f"{tmp_path}/tasks/sums.yaml, sums", None)[1] == ["sums"]
    with pytest.raises(FileNotFoundError, match=r"no file 'nothing.yaml'"):
        find_tasks("nothing.yaml", None)
    with pytest.raises(ValueError, match="Give either --ckpt_path"):
        evaluate("sums")
    with pytest.raises(FileExistsError, match="choose another output"):
        evaluate("sums", model="nowhere", output=str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "milora-lightning\[eval\]"'):
        evaluate("sums", model="nowhere")


def made_once(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Give back what was made before for the same arguments: reading the harness's tasks takes ten seconds."""
    made: dict[str, Any] = {}

    def make(**options: Any) -> Any:
        key = repr(options)
        if key not in made:
            made[key] = kind(**options)
        return made[key]

    return make


@pytest.mark.slow  # reads the harness's own tasks
def test_tasks_are_found_by_patterns_and_those_that_are_not_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_task(tmp_path)
    harness = importlib.import_module("lm_eval.tasks")
    monkeypatch.setattr(harness, "TaskManager", made_once(harness.TaskManager))
    with pytest.raises(ValueError, match="has no task 'sums_'; 'sums' is one"):
        find_tasks("arc_eas?, sums, sums_", str(tmp_path))
    with pytest.raises(ValueError, match="has no task 'sum'; 'sums' is one, 'xsum'"):  # the user's own first
        find_tasks("sum", str(tmp_path))
