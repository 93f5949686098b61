"""What a model still knows of other tasks, against the definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.callback_modules import Regression, adapted_language_model
from helpers.models import quiet_trainer

from milora_lightning import ChoiceMonitor, lora_layers
from milora_lightning.callbacks.choices import named_files
from milora_lightning.data.tasks.questions import read_questions


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, str]:
    files = {}
    for name, size in (("sums", 4), ("more", 2)):
        records = [
            {"question": f"What is {i} plus 1?", "choices": ["3", f"{i} and 1", "none of the above"], "answer": i % 3}
            for i in range(size)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        files[name] = str(tmp_path / f"{name}.json")
    return files


def test_results_are_the_definition_question_by_question(questions: dict[str, str], tmp_path: Path) -> None:
    lm, trainer = adapted_language_model(), quiet_trainer(tmp_path)
    monitor = ChoiceMonitor(questions, batch_size=4)
    monitor.setup(trainer, lm, "validate")
    found = monitor.measure(trainer, lm)
    losses, right = [], []
    for question in [q for file in questions.values() for q in read_questions(file, 100)]:
        each = []
        for choice in question.choices:
            prompt = lm.tokenizer(question.prompt)["input_ids"]
            ids = [*prompt, *lm.tokenizer(choice, add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                logits = lm.lm(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            each.append(
                -sum(logits[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))) / (len(ids) - len(prompt))
            )
        losses.append(each[question.right])
        right.append(float(min(range(3), key=each.__getitem__) == question.right))
    assert monitor.examples["forgetting_choice_loss"].tolist() == pytest.approx(losses, rel=1e-4)
    assert monitor.examples["forgetting_choice_accuracy"].tolist() == right
    assert found["forgetting_choice_loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert found["forgetting_choice_loss/more"] == pytest.approx(sum(losses[4:]) / 2, rel=1e-4)
    assert found["forgetting_choice_accuracy/sums"] == pytest.approx(sum(right[:4]) / 4)


def test_a_changed_model_answers_otherwise(questions: dict[str, str], tmp_path: Path) -> None:
    lm, trainer = adapted_language_model(), quiet_trainer(tmp_path)
    monitor = ChoiceMonitor(questions["sums"])
    monitor.setup(trainer, lm, "validate")
    before = monitor.measure(trainer, lm)
    assert monitor.measure(trainer, lm) == before
    with torch.no_grad():
        for layer in lora_layers(lm).values():
            layer.lora_B.add_(0.1)
    assert monitor.measure(trainer, lm) != before


def test_a_line_of_json_may_hold_a_line_separator(tmp_path: Path) -> None:
    record = {"question": "One\u2028two\x85?", "choices": ["a", "b"], "answer": 1}
    (tmp_path / "q.jsonl").write_text((json.dumps(record, ensure_ascii=False) + "\r\n") * 2, encoding="utf-8")
    assert len(read_questions(str(tmp_path / "q.jsonl"), 5)) == 2


def test_what_is_no_number_is_no_right_answer(questions: dict[str, str], tmp_path: Path) -> None:
    """A model that has diverged would otherwise be right wherever the right choice is the first."""
    lm, trainer = adapted_language_model(), quiet_trainer(tmp_path)
    monitor = ChoiceMonitor(questions["sums"])
    monitor.setup(trainer, lm, "validate")
    with torch.no_grad():
        lm.lm.transformer.ln_f.weight.fill_(torch.nan)
    assert monitor.measure(trainer, lm)["forgetting_choice_accuracy"] == 0


def test_mistakes_are_named(questions: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every must be"):
        ChoiceMonitor("a.json", every="step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be at least 2 and 1"):
        ChoiceMonitor("a.json", number=1)
    with pytest.raises(ValueError, match="same name"):
        named_files(["a/test.json", "b/test.json"])
    monitor = ChoiceMonitor(str(tmp_path / "absent.json"))
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        monitor.setup(quiet_trainer(tmp_path), adapted_language_model(), "validate")
    with pytest.raises(ValueError, match="no Hugging Face model, and ChoiceMonitor measures language models of"):
        ChoiceMonitor(questions).on_fit_start(quiet_trainer(tmp_path), Regression())
    two = [ChoiceMonitor(questions), ChoiceMonitor(questions)]
    with pytest.raises(ValueError, match="two callbacks ChoiceMonitor"):
        two[0].setup(quiet_trainer(tmp_path, callbacks=two), adapted_language_model(), "fit")
