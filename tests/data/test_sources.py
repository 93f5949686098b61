from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import datasets
import pytest
from helpers.data_fixtures import isolate_cache

from milora_lightning.data import Files, WordProblems
from milora_lightning.metrics import AnswerAccuracy

ROWS = [{"instruction": f"Question {i}", "output": f"Answer {i}"} for i in range(6)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    isolate_cache(monkeypatch, tmp_path)


def write(path: Path, rows: list) -> str:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


def prompts(source: Files | WordProblems, split: str = "train") -> list[str]:
    dataset = source.load(split)
    assert dataset is not None
    return dataset["prompt"][:]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    dataset = Files(train=write(tmp_path / name, ROWS)).load("train")
    assert dataset.column_names == ["prompt", "input", "response", "reference", "task"]
    assert dataset["prompt"][:] == [row["instruction"] for row in ROWS]
    assert dataset["response"][:] == dataset["reference"][:] == [row["output"] for row in ROWS]
    assert set(dataset["input"]) == {""}


def test_json_file_may_hold_lines_and_blank_ones(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\n".join(map(json.dumps, ROWS[:2])) + "\n\n" + json.dumps(ROWS[2]))
    assert len(prompts(Files(train=str(path)))) == 3


def test_fields_go_where_they_are_named(tmp_path):
    row = {"q": "Add.", "extra": None, "a": "1+2=3", "result": 3}
    source = Files(
        train=write(tmp_path / "a.jsonl", [row, {**row, "extra": "1, 2"}]),
        prompt_field="q",
        response_field="a",
        input_field="extra",
        reference_field="result",
    )
    assert source.load("train")[:] == {
        "prompt": ["Add."] * 2,
        "input": ["", "1, 2"],
        "response": ["1+2=3"] * 2,
        "reference": ["3"] * 2,
        "task": [""] * 2,
    }


def test_lists_and_globs_join_files(tmp_path):
    first, second = (write(tmp_path / name, rows) for name, rows in [("b.jsonl", ROWS[:2]), ("a.json", ROWS[2:])])
    assert prompts(Files(train=[first, second])) == [row["instruction"] for row in ROWS]
    assert prompts(Files(train=str(tmp_path / "*.json*"))) == [row["instruction"] for row in ROWS[2:] + ROWS[:2]]


def test_splits_that_are_not_configured_are_none(tmp_path):
    source = Files(validation=write(tmp_path / "a.jsonl", ROWS))
    assert source.load("train") is None
    assert source.load("test") is None
    assert len(prompts(source, "validation")) == 6


@pytest.mark.parametrize("size", [2, 1 / 3])
def test_held_out_validation_is_apart_from_train(tmp_path, size):
    path = write(tmp_path / "a.jsonl", ROWS)
    parts = {split: prompts(Files(train=path, validation_size=size), split) for split in ("train", "validation")}
    assert len(parts["validation"]) == 2
    assert sorted(parts["train"] + parts["validation"]) == sorted(row["instruction"] for row in ROWS)
    others = [prompts(Files(train=path, validation_size=size, seed=seed), "validation") for seed in range(5)]
    assert others[0] == parts["validation"]
    assert len(set(map(tuple, others))) > 1


def test_copies_of_what_is_held_out_are_told(tmp_path, recwarn):
    """Beside rows that share a prompt alone, or an answer."""
    alike = [{"instruction": "Question 0", "output": "Another"}, {"instruction": "Another", "output": "Answer 0"}]
    path = write(tmp_path / "a.jsonl", [*ROWS, *alike])
    Files(train=path, validation_size=7).load("validation")
    assert not [str(w.message) for w in recwarn if "copies" in str(w.message)]
    path = write(tmp_path / "b.jsonl", [*ROWS, *ROWS])
    source = Files(train=path, validation_size=3)
    trained = [*prompts(source)]
    copies = sum(prompt in trained for prompt in prompts(source, "validation"))
    assert copies > 1
    (said,) = (str(w.message) for w in recwarn if "copies" in str(w.message))
    assert said.startswith(f"{path}: {copies} of the 3 rows held out are trained on, too")


@pytest.mark.parametrize("size", [6, 2.5, -1])
def test_impossible_validation_size_is_refused(tmp_path, size):
    source = Files(train=write(tmp_path / "a.jsonl", ROWS), validation_size=size)
    with pytest.raises(ValueError, match="must be a whole number below the 6 examples of train, or a fraction"):
        source.load("validation")


def test_edited_file_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    source = Files(train=write(path, ROWS))
    assert prompts(source)[0] == "Question 0"
    unchanged = source.load("train")
    assert unchanged._fingerprint == source.load("train")._fingerprint
    path.write_text(path.read_text().replace("Question 0", "Question 9"))
    os.utime(path, (1, 1))  # the sizes are equal, so the time has to tell
    assert prompts(source)[0] == "Question 9"


@pytest.mark.parametrize("name", ["no.jsonl", "*.parquet"])
def test_missing_file_is_named_with_its_absolute_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        Files(train=name).load("train")
    assert f"There is no data file {tmp_path / name}. Check the path; a relative one starts at" in str(error.value)


def test_hub_name_out_of_reach_is_named(monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError) as error:
        Files(train="org/name:config").load("train")
    assert "the Hugging Face Hub does not have the data set 'org/name:config' or cannot be reached" in str(error.value)
    assert "Check the name and the network" in str(error.value)


def test_hub_data_is_checked_and_renamed(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Files(train="org/name:config", test="org/name", test_split="train[:6]")
    assert prompts(source) == prompts(source, "test") == [row["instruction"] for row in ROWS]
    assert asked == [("org/name", "config", "train"), ("org/name", None, "train[:6]")]
    with pytest.raises(ValueError, match=r"no field 'q' in row 1 \(the first is row 1\) of org/name:config"):
        Files(train="org/name:config", prompt_field="q").load("train")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_missing_field_is_named_with_its_row(tmp_path, name):
    path = write(tmp_path / name, [{"instruction": "a", "text": "b"}])
    with pytest.raises(ValueError, match="no field 'output'") as error:
        Files(train=path).load("train")
    assert f"in row 1 (the first is row 1) of {path}; it has ['instruction', 'text']" in str(error.value)
    assert "set response_field to the right one" in str(error.value)


@pytest.mark.parametrize("value", [None, ["a"], True, float("nan"), {"a": 1}])
def test_value_that_is_no_text_is_named_with_its_row(tmp_path, value):
    path = write(tmp_path / "a.jsonl", [*ROWS[:2], {"instruction": value, "output": "b"}])
    with pytest.raises(ValueError, match=r"which is no text\. Correct or remove the row") as error:
        Files(train=path).load("train")
    assert f"The field 'instruction' in row 3 (the first is row 1) of {path} holds {value!r}" in str(error.value)


def test_row_that_is_no_object_is_refused(tmp_path):
    path = write(tmp_path / "a.json", [ROWS[0], "text"])
    with pytest.raises(ValueError, match=r"In row 2 .* there is no object with fields but str: 'text'"):
        Files(train=path).load("train")


@pytest.mark.parametrize(
    ("name", "text", "line"), [("a.jsonl", '{"a": 1}\n{"a": \n', 2), ("a.json", '[{"a": 1},\n\n{"a" 1}]', 3)]
)
def test_malformed_json_is_named_with_its_line(tmp_path, name, text, line):
    path = tmp_path / name
    path.write_text(text)
    fields = {"prompt_field": "a", "response_field": "a"}
    with pytest.raises(ValueError, match=f"{name} is not valid JSON in line {line}, column"):
        Files(train=str(path), **fields).load("train")


@pytest.mark.parametrize(
    ("name", "message"), [("a.parquet", "is not a valid Parquet"), ("a.json", "is not text in UTF")]
)
def test_files_of_other_bytes_are_refused(tmp_path, name, message):
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=message):
        Files(train=str(path)).load("train")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n"), ("b.json", "[]"), ("c.json", "")])
def test_empty_data_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    write(tmp_path / "full.jsonl", ROWS)
    with pytest.raises(ValueError, match=f"There are no rows in .*{name}"):
        Files(test=[str(tmp_path / "full.jsonl"), str(tmp_path / name)]).load("test")


@pytest.mark.parametrize(("name", "what"), [("a.xlsx", "a.xlsx is not a data file"), ("folder", "no data file in the")])
def test_files_of_other_kinds_are_refused(tmp_path, name, what):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.xlsx").write_text("a,b")
    (tmp_path / "a.xlsx").write_text("a,b")
    with pytest.raises(ValueError, match=rf"{what}.*its name must end in .json, .jsonl, .ndjson, .csv, .*\.arrow, or"):
        Files(train=str(tmp_path / name)).load("train")


def test_word_problems_are_all_different():
    source = WordProblems(train_size=1500, validation_size=300, test_size=300)
    splits = {split: prompts(source, split) for split in ("train", "validation", "test")}
    assert [len(texts) for texts in splits.values()] == [1500, 300, 300]
    assert len(set().union(*splits.values())) == 2100


def test_splits_would_share_problems_if_nothing_were_done():
    # What the test above guards against does happen: reasoning-gym itself repeats questions.
    import reasoning_gym

    questions = [p["question"] for p in reasoning_gym.create_dataset("gsm_symbolic", size=2100, seed=0)]
    assert len(set(questions)) < 2100


def test_word_problems_end_in_their_answer():
    dataset = WordProblems(50, 0, 0).load("train")
    metric = AnswerAccuracy(strict=True)
    metric.update(dataset["response"][:], dataset["reference"][:])
    assert metric.compute() == 1
    for row in dataset:
        assert row["response"].splitlines()[-1] == f"The answer is: {row['reference']}"
        assert "####" not in row["response"]
        assert not row["prompt"].endswith("units.")


def test_word_problems_depend_on_the_seed_alone(monkeypatch, tmp_path):
    first = prompts(WordProblems(20, 5, 5, seed=1))
    isolate_cache(monkeypatch, tmp_path / "other")
    assert prompts(WordProblems(20, 5, 5, seed=1)) == first
    assert not set(prompts(WordProblems(20, 5, 5, seed=2))) & set(first)


def test_size_of_train_leaves_the_other_splits_alone():
    small, large = WordProblems(10, 20, 30), WordProblems(100, 20, 30)
    assert prompts(small, "test") == prompts(large, "test")
    assert prompts(small, "validation") == prompts(large, "validation")
    assert prompts(large)[:10] == prompts(small)


def test_short_word_problems_can_be_chosen():
    dataset = WordProblems(100, 0, 0, max_chars=350).load("train")
    lengths = [len(row["prompt"]) + len(row["response"]) for row in dataset]
    assert len(lengths) == 100
    assert max(lengths) <= 350
    assert WordProblems(100, 0, 0).load("test") is None


def test_too_short_word_problems_do_not_exist():
    with pytest.raises(ValueError, match=r"Only 0 of 5 .* at most 50 characters .* Raise max_chars, or ask for fewer"):
        WordProblems(5, 0, 0, max_chars=50).load("train")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "milora-lightning\[embedded\]"'):
        WordProblems().load("train")
