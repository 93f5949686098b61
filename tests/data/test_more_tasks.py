"""Code and FollowBench, from their files through a Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.data_fixtures import isolate_cache
from helpers.models import quiet_trainer, save_tiny_model
from helpers.tasks import datamodule, write

from milora_lightning import CausalLMModule, PredictionWriter
from milora_lightning.data import Code, FollowBench


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_cache(monkeypatch, tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", "llama")


def problem(number: int) -> dict[str, str]:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def add{number}(x):\n    '''Add {number}.'''\n",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"METADATA = {{}}\n\n\ndef check(candidate):\n    assert candidate(1) == {number + 1}\n",
        "entry_point": f"add{number}",
    }


class Adder(CausalLMModule):
    """Writes the same body for each function."""

    def generate(self, batch: Any) -> list[str]:
        return ["```python\n    return x + 2\n```"] * len(batch["prompt"])


def code(folder: Path, **options: Any) -> Code:
    test = write(folder / "HumanEval.json", *map(problem, (1, 2, 3, 2)))
    train = write(folder / "train.json", *[{"query": f"Add {i}.", "answer": f"```\nx + {i}\n```"} for i in range(6)])
    return Code(train, test, **options)


def test_generated_code_is_run_only_if_that_is_allowed(model: Path, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"runs programs that the model writes.*run_generated_code: true"):
        trainer.test(Adder(str(model)), datamodule(code(tmp_path), model, max_length=512), verbose=False)
    allowed = datamodule(code(tmp_path, run_generated_code=True), model, max_length=512)
    with pytest.warns(UserWarning, match="Programs that the model writes are run on this machine"):
        trainer.test(Adder(str(model)), allowed, verbose=False)
    assert trainer.callback_metrics["test_pass@1"] == pytest.approx(0.5)
    assert trainer.callback_metrics["test_loss"] > 0  # of the benchmark's own solutions


def test_code_is_trained_on_and_answered_without_running_anything(model: Path, tmp_path: Path) -> None:
    source = code(tmp_path, validation_size=2)
    assert all(response.startswith("```\nx + ") for response in source.load("validation")["response"])
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[PredictionWriter(str(tmp_path / "p.jsonl"))])
    data = datamodule(source, model, max_length=512)
    trainer.fit(Adder(str(model)), data)
    assert "val_loss" in trainer.callback_metrics
    assert not [name for name in trainer.callback_metrics if "pass" in name]
    trainer.predict(Adder(str(model)), data)
    first = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert "def add1(x):" in first["instruction"]
    with pytest.raises(ValueError, match=r"no programming task among the fields \['text'\]"):
        Code(write(tmp_path / "other.json", {"text": "x"}), None).load("train")


def test_follow_bench_is_answered_in_its_own_format(model: Path, tmp_path: Path) -> None:
    rows = [{"example_id": 1, "category": "c", "level": i, "instruction": f"Do {i}.", "target": ""} for i in range(3)]
    rows[0]["instruction"] = ""  # as some without constraints
    for name in ("content", "mixed"):
        write(tmp_path / "data" / f"{name}_constraints.json", *rows)
    source = FollowBench(str(tmp_path / "data" / "{task}_constraints.json"), ["content", "mixed"])
    folder = tmp_path / "api_output_vllm" / "milora"
    writer = PredictionWriter(str(tmp_path / "p.jsonl"), follow_bench=str(folder))
    quiet_trainer(tmp_path, callbacks=[writer]).predict(Adder(str(model)), datamodule(source, model))
    assert sorted(path.name for path in folder.iterdir()) == ["content_constraint.jsonl", "mixed_constraint.jsonl"]
    for path in folder.iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["prompt"] for line in lines] == ["Do 1.", "Do 2."]
        assert lines[0]["choices"] == [{"message": {"content": "```python\n    return x + 2\n```"}}]
    assert set(source.load("test")["response"]) == {""}  # its judges know no answer
    with pytest.raises(ValueError, match=r"\{task\} must stand where"):
        FollowBench("content_constraints.json")
    write(tmp_path / "data" / "mixed_constraints.json", {"instruction": "a"})
    with pytest.raises(ValueError, match="there is no level among the fields"):
        source.load("test")
