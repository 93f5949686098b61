"""Sequences of tasks as a user runs them, on a tiny model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from milora_lightning import CausalLMModule, LoRAConfig, initialize, inject
from milora_lightning.checkpoint.reading import read_checkpoint
from milora_lightning.cli.continual import TaskCLI, TaskSequence
from milora_lightning.cli.main import main
from milora_lightning.inference import load_module
from milora_lightning.metrics.continual import continual as summary

FIT = ["--config", "mine.yaml", "--trainer.max_steps", "3", "--model.optimizer.lr", "0.02"]
"""Without a seed, which is then 0."""


def write(path: Path, question: str, count: int) -> None:
    rows = [{"instruction": question.format(i), "output": f"{7 * i} {question[:3]}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def tasks(project: Path) -> list[str]:
    for name, question in (("plus", "What is {} plus 2?"), ("write", "Write {} in words.")):
        write(project / f"{name}.jsonl", question, 12)
        write(project / f"{name}_held_out.jsonl", question, 3)
        source = {"train": f"{name}.jsonl", "validation": f"{name}_held_out.jsonl"}
        overlay = {"data": {"source": {"init_args": source}, "num_generation_examples": 0}}
        (project / f"{name}.yaml").write_text(yaml.safe_dump(overlay))
    return ["plus.yaml", "write.yaml"]


def test_a_sequence_is_learned_measured_and_continued(
    project: Path, tasks: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["continual", *FIT, "--output", "learned", "--tasks", f"[{','.join(tasks)}]"]
    main(command)
    printed = capsys.readouterr().out
    assert "after write" in printed
    rows = list(csv.DictReader((project / "learned/results.csv").open()))
    assert [(row["after"], row["task"]) for row in rows] == [
        (after, task) for after in ("before training", "after plus", "after write") for task in ("plus", "write")
    ]
    losses = {(row["after"], row["task"]): float(row["val_loss"]) for row in rows}

    # The matrix is what separate evaluations of the folded models give.
    for task in ("plus", "write"):
        options = [
            *FIT,
            "--config",
            f"{task}.yaml",
            "--adapter.init=full",
            "--model.name_or_path=learned/2-write/model",
        ]
        found = TaskCLI(options, evaluates=True)
        found.begin()
        (results,) = found.trainer.validate(found.model, found.datamodule, verbose=False)
        assert losses["after write", task] == pytest.approx(results["val_loss"], rel=1e-6)
    assert losses["after plus", "plus"] < losses["before training", "plus"] - 0.003

    # Folded, each model is what its adapters made of the one before, and adapters on it start there exactly.
    ids = torch.arange(4, 16)[None]
    for number, name in enumerate(("plus", "write"), 1):
        folder = project / f"learned/{number}-{name}"
        live, _ = load_module(str(folder / "last.ckpt"))
        folded = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert folded.dtype == torch.float32
        with torch.no_grad():
            logits = folded(ids).logits
            torch.testing.assert_close(live.eval().model(ids).logits, logits, rtol=0, atol=1e-5)
            inject(folded, LoRAConfig(r=4))
            initialize(folded)
            assert torch.equal(folded.eval()(ids).logits, logits)
    base = read_checkpoint(str(project / "learned/2-write/last.ckpt"))["hyper_parameters"]["name_or_path"]
    assert Path(base) == Path("learned/1-plus/model")

    def nothing(*_: object) -> None:
        raise AssertionError("a finished task is run again")

    report = (project / "learned/report.md").read_text()
    assert "backward transfer" in report
    (project / "learned/report.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(CausalLMModule, "configure_model", nothing)
        main(command)
    assert (project / "learned/report.md").read_text() == report
    with pytest.raises(SystemExit, match="other settings"):
        main([*command, "--adapter.r", "2"])

    # Of a sequence that is changed, what is the same is used again, and what is new is measured.
    evaluated = []
    validate = TaskSequence._validate
    monkeypatch.setattr(TaskSequence, "_validate", lambda *args: evaluated.append(args[1]) or validate(*args))
    main([*command[:-1], "[plus.yaml]"])
    assert not evaluated
    (project / "third.yaml").write_text((project / "write.yaml").read_text())
    monkeypatch.setattr(TaskSequence, "learn", nothing)
    with pytest.raises(AssertionError, match="run again"):
        main([*command[:-1], "[plus.yaml,write.yaml,third.yaml]"])
    assert evaluated == ["third"] * 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapter.init", "full"], "only adapters are folded"),
        (["--model.quantization", "nf4"], "quantized model"),
        (["--tasks", "[plus.yaml,absent.yaml]"], r"no config 'absent\.yaml'"),
        (["--tasks", "[plus.yaml,plus.yaml]"], "different names"),
    ],
)
def test_what_cannot_be_a_sequence_is_refused_at_once(tasks: list[str], options: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main(["continual", *FIT, "--output", "learned", "--tasks", f"[{','.join(tasks)}]", *options])
    assert not Path("learned").exists()


def test_summary_of_losses_turns_the_signs() -> None:
    accuracies = [[0.0, 0.1, 0.2], [0.9, 0.2, 0.2], [0.95, 0.8, 0.3], [0.5, 0.7, 0.9]]
    one = summary(accuracies, higher_is_better=True)
    other = summary([[-x for x in row] for row in accuracies], higher_is_better=False)
    assert one[1:] == other[1:]
    assert one.average == -other.average == pytest.approx(0.7)
    assert one.backward_transfer == pytest.approx((0.5 - 0.9 + 0.7 - 0.8) / 2)
    assert one.forgetting == pytest.approx((0.95 - 0.5 + 0.8 - 0.7) / 2)
    assert one.forward_transfer == pytest.approx((0.2 - 0.1 + 0.3 - 0.2) / 2)
    assert summary([[1.0], [0.5]], higher_is_better=False) == (0.5, None, None, None)
