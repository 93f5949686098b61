"""The paper's tasks: their data's formats, and runs that answer several test sets, through a Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.data_fixtures import isolate_cache
from helpers.models import quiet_trainer, save_tiny_model
from helpers.tasks import BOOLQ, PIQA, Parrot, commonsense, datamodule, question, write

from milora_lightning import CausalLMModule, MiLoRAInit, PredictionWriter
from milora_lightning.data import Commonsense, Files, Instructions, Math
from milora_lightning.metrics import AnswerAccuracy, right_choice

REAL = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_cache(monkeypatch, tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", "llama")


def test_commonsense_has_named_test_sets_and_a_held_out_part(tmp_path: Path) -> None:
    source = commonsense(tmp_path)
    test = source.load("test")
    assert test["task"][:] == ["boolq"] * 3 + ["piqa"] * 5
    assert test["reference"][:] == [row["answer"] for row in BOOLQ + PIQA]
    assert (len(source.load("train")), len(source.load("validation"))) == (6, 2)
    assert set(source.load("train")["task"]) == {""}
    assert source.load("test")._fingerprint == test._fingerprint
    assert Commonsense().load("test") is None
    with pytest.raises(ValueError, match=r"\{task\} must stand where"):
        Commonsense(test="boolq.json")
    with pytest.raises(FileNotFoundError, match=r"hellaswag.test\.json"):
        commonsense(tmp_path, tasks=["boolq", "hellaswag"]).load("test")


def test_choices_are_those_that_the_question_names() -> None:
    choices = Commonsense().choices(question("ending", 4, 1)["instruction"])
    assert choices == [f"the correct answer is ending{i}" for i in range(1, 5)]
    with pytest.raises(ValueError, match="no line 'Answer format"):
        Commonsense().choices("Is it so?")


@pytest.mark.skipif(not REAL.is_dir(), reason="the benchmark's files are not here")
def test_every_real_question_has_its_answer_among_its_choices() -> None:
    files = sorted((REAL / "commonsense").glob("*_test.json"))
    assert len(files) == 7
    source = Commonsense(test=str(REAL / "commonsense" / "{task}_test.json"), tasks=[f.name[:-10] for f in files])
    test = source.load("test")
    assert len(test) == 12377
    for prompt, response, reference in zip(test["prompt"], test["response"], test["reference"], strict=True):
        choices = source.choices(prompt)
        assert response in choices
        assert [right_choice(choice, reference) for choice in choices].count(True) == 1


@pytest.mark.skipif(not REAL.is_dir(), reason="the benchmark's files are not here")
def test_every_real_solution_is_right_by_its_own_answer() -> None:
    source = Math(train=str(REAL / "gsm8k_train.jsonl"), gsm8k=str(REAL / "gsm8k_test.jsonl"), math=None)
    assert len(source.load("train")) == 7473
    test = source.load("test")
    metric = source.metric()
    metric.update(test["response"][:], test["reference"][:], test["task"][:])
    # The paper's rule reads 1,450,000 as 1450.
    paper = {name: pytest.approx(1318 / 1319) for name in ("accuracy_metamath", "accuracy_metamath/gsm8k")}
    results = {name: value.item() for name, value in metric.compute().items()}
    assert results == {"accuracy": 1, "accuracy/gsm8k": 1, **paper}
    assert metric.total.sum() == 1319
    metric.reset()
    metric.update(test["response"][:], [*test["reference"][1:], test["reference"][0]], test["task"][:])
    assert metric.compute()["accuracy"] < 0.05
    assert not any("<<" in response or "####" in response for response in test["response"])


@pytest.mark.parametrize(
    ("record", "response", "reference"),
    [
        ({"query": "2+3?", "response": "5.\nThe answer is: 5"}, "5.\nThe answer is: 5", "5"),
        ({"question": "2+3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "2+3=5\nThe answer is: 5", "5"),
        ({"question": "2+3?", "answer": "#1 is 2.\n#### 1,005"}, "#1 is 2.\nThe answer is: 1,005", "1,005"),
        (
            {"problem": "2+3?", "solution": "It is $\\boxed{5}$.", "level": "Level 1"},
            "It is $\\boxed{5}$.\nThe answer is: 5",
            "5",
        ),
        ({"instruction": "2+3?", "output": "$\\boxed{\\frac{10}2}$"}, None, "\\frac{10}2"),
        ({"query": "2+3?", "response": "Five."}, "Five.", "Five."),
        # MetaMathQA's own texts are learned as they are.
        ({"query": "2+3?", "response": "5.\n#### 5\nThe answer is: 5"}, "5.\n#### 5\nThe answer is: 5", "5"),
        ({"query": "2+3?", "response": "2+3=<<2+3=5>>5\n#### 5"}, "2+3=<<2+3=5>>5\n#### 5", "5"),
        ({"query": "2+3?", "response": "It is $\\boxed{5}$."}, "It is $\\boxed{5}$.", "5"),
        ({"question": "2+3?", "answer": "5.\n#### 5\nThe answer is: 5"}, "5.\n#### 5\nThe answer is: 5", "5"),
    ],
)
def test_every_format_of_mathematics_comes_into_one_form(
    tmp_path: Path, record: dict[str, str], response: str | None, reference: str
) -> None:
    (row,) = Math(train=write(tmp_path / "a.json", record)).load("train")
    assert row["prompt"] == "2+3?"
    assert row["reference"] == reference
    assert row["response"] == response or response is None


@pytest.mark.parametrize(
    ("source", "record", "message"),
    [
        (Math, {"text": "2"}, r"row 1 .* no question with a solution among the fields \['text'\]: query and response"),
        (Instructions, {"text": "2"}, r"row 1 .* no instruction with an answer among the fields \['text'\]"),
        (
            Instructions,
            {"messages": [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]},
            r"the chat goes \['user', 'assistant', 'user', 'assistant'\], but has to be",
        ),
        (Instructions, {"instruction": "a", "output": None}, "holds None"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, source: Any, record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(train=write(tmp_path / "a.json", record)).load("train")


SYSTEM, USER, ASSISTANT = ({"role": r, "content": r[0]} for r in ("system", "user", "assistant"))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "u", "input": "i", "output": "a"}, ("u", "i", "a", "")),
        ({"instruction": "u", "output": "a", "generator": "g", "dataset": "koala"}, ("u", "", "a", "koala")),
        ({"prompt": "u", "chosen": [USER, ASSISTANT], "rejected": [], "messages": [USER]}, ("u", "", "a", "")),
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, ("u", "", "a", "")),
        ({"messages": [USER, ASSISTANT]}, ("u", "", "a", "")),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, ("s", "u", "a", "")),
    ],
)
def test_formats_of_instructions(tmp_path: Path, record: dict[str, Any], expected: tuple[str, ...]) -> None:
    (row,) = Instructions(train=write(tmp_path / "a.json", record)).load("train")
    assert (row["prompt"], row["input"], row["response"], row["task"]) == expected


def test_one_test_run_scores_each_set_and_the_mean(model: Path, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[MiLoRAInit(r=4)])
    losses, results = trainer.test(Parrot(str(model)), datamodule(commonsense(tmp_path), model), verbose=False)
    results |= losses
    assert results["test_accuracy/boolq"] == pytest.approx(1 / 3)
    assert results["test_accuracy/piqa"] == pytest.approx(3 / 5)
    assert results["test_accuracy"] == pytest.approx((1 / 3 + 3 / 5) / 2)
    (losses, results) = trainer.validate(Parrot(str(model)), datamodule(commonsense(tmp_path), model), verbose=False)
    assert not any("/" in name for name in {**losses, **results})


def test_number_of_answers_is_that_of_each_set(model: Path, tmp_path: Path) -> None:
    data = datamodule(commonsense(tmp_path), model, num_test_generation_examples=2)
    data.setup("test")
    tasks = [task for batch in data.test_dataloader()[1] for task in batch["task"]]
    assert sorted(tasks) == ["boolq", "boolq", "piqa", "piqa"]


def test_metric_follows_the_data_unless_one_is_given(model: Path, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    lm, given = Parrot(str(model)), Parrot(str(model), metric=AnswerAccuracy())
    trainer.test(given, datamodule(commonsense(tmp_path), model), verbose=False)
    assert set(trainer.callback_metrics) == {"test_loss", "test_perplexity", "test_accuracy"}
    for source in (commonsense(tmp_path), Files(test=str(tmp_path / "train.json"))):
        trainer.test(lm, datamodule(source, model), verbose=False)
        assert type(lm.metric) is type(source.metric())
    named = Files(test={"one": str(tmp_path / "train.json")}, reference_field="answer")
    trainer.test(lm, datamodule(named, model), verbose=False)
    assert trainer.callback_metrics["test_accuracy/one"] == trainer.callback_metrics["test_accuracy"]


def test_likelihood_chooses_the_response_of_least_loss(model: Path, tmp_path: Path) -> None:
    data = datamodule(commonsense(tmp_path), model, answer_by="likelihood")
    data.setup("test")
    lm = CausalLMModule(str(model))
    lm.configure_model()
    lm.eval()
    tokenizer = lm.tokenizer
    for batch in data.test_dataloader()[1]:
        for prompt, choices, answer in zip(batch["prompt"], batch["choices"], lm.answer(batch), strict=True):
            likelihoods = []
            for choice in choices:  # one by one, from the whole logits
                start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                end = [*tokenizer(choice, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                ids = torch.tensor([start + end])
                with torch.no_grad():
                    logits = lm.model(ids).logits[0, len(start) - 1 : -1]
                likelihoods.append(-F.cross_entropy(logits, torch.tensor(end), reduction="sum").item())
            assert answer == choices[likelihoods.index(max(likelihoods))]
    with pytest.raises(ValueError, match="needs a source with choices, which Files is not"):
        datamodule(Files(), model, answer_by="likelihood")


def test_learned_answers_are_found_by_generation_and_by_likelihood(model: Path, tmp_path: Path) -> None:
    """Three questions, learned by heart."""
    rows = [
        {**question("option", 2, 1 + i % 2), "instruction": f"{w}\nAnswer format: option1/option2"}
        for i, w in enumerate(["a", "bb", "ccc"])
    ]
    path = write(tmp_path / "winogrande.json", *rows)
    source = Commonsense(path, str(tmp_path / "{task}.json"), ["winogrande"], validation_size=0)
    lm = CausalLMModule(
        str(model), warmup_steps=0, max_new_tokens=24, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3)
    )
    trainer = quiet_trainer(tmp_path, max_epochs=150, callbacks=[MiLoRAInit(init="full")])
    data = datamodule(source, model, batch_size=3)
    before = trainer.test(lm, data, verbose=False)[0] | trainer.test(lm, data, verbose=False)[1]
    assert before["test_accuracy"] < 1
    trainer.fit(lm, data)
    for by in ("generation", "likelihood"):
        trainer.test(lm, datamodule(source, model, answer_by=by), verbose=False)
        assert trainer.callback_metrics["test_accuracy/winogrande"] == 1


def test_instructions_are_answered_for_alpaca_eval(model: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}\u2028.", "output": "x", "generator": "other", "dataset": f"set{i}"} for i in "ab"]
    source = Instructions(
        train=write(tmp_path / "train.json", *rows), test=write(tmp_path / "alpaca_eval.json", *rows), validation_size=1
    )
    output = tmp_path / "deep" / "outputs.json"
    writer = PredictionWriter(str(tmp_path / "predictions.jsonl"), alpaca_eval=str(output), generator="mine")
    trainer = quiet_trainer(tmp_path, callbacks=[writer])
    data = datamodule(source, model, template="alpaca", max_length=256)
    lm = CausalLMModule(str(model), max_new_tokens=4)
    trainer.predict(lm, data)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().split("\n") if line]
    records = json.loads(output.read_text())
    for record, row, line in zip(records, rows, lines, strict=True):
        assert record == {
            "instruction": row["instruction"],
            "output": line["generation"],
            "generator": "mine",
            "dataset": row["dataset"],
        }
    trainer.test(lm, data, verbose=False)
    assert trainer.callback_metrics.keys() == {"test_loss", "test_perplexity"}  # nothing is right or wrong


def test_predictions_of_ranks_are_joined_in_the_order_of_the_data(tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path / "p.jsonl"), alpaca_eval=str(tmp_path / "all.json"))
    ranks = [
        SimpleNamespace(
            world_size=2,
            global_rank=rank,
            is_global_zero=rank == 0,
            strategy=SimpleNamespace(barrier=lambda name: None),
        )
        for rank in (1, 0)
    ]
    for trainer in ranks:
        writer.on_predict_start(trainer, None)
        for index in range(trainer.global_rank, 5, 2):
            record = {"task": "", "instruction": str(index), "generation": ""}
            writer.write_on_batch_end(trainer, None, [record], None, None, 0, 0)
    for trainer in ranks:
        writer.on_predict_end(trainer, None)
    assert [record["instruction"] for record in json.loads((tmp_path / "all.json").read_text())] == list("01234")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "p.0.jsonl", "p.1.jsonl"]
