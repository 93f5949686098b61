"""Multiple-choice questions as plain text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milora_lightning.data.tasks.questions import Question, read_question, read_questions

REAL = Path(__file__).parents[3] / "shared" / "data" / "commonsense"


def question(text: str, answer: str) -> dict[str, Any]:
    return {"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            question("Please answer the following question with true or false, question: is it?\n\nAnswer format: "
                     "true/false", "false"),
            Question("Question: is it?\nAnswer:", (" true", " false"), 1),
        ),
        (
            question("Please choose the correct solution to the question: Open it\n\nSolution1: Pull.\n\nSolution2: "
                     "Push.\n\nAnswer format: solution1/solution2", "solution2"),
            Question("Question: Open it\nAnswer:", (" Pull.", " Push."), 1),
        ),
        (
            question("Please choose the correct answer to fill in the blank to complete the given sentence: Ann met "
                     "Bo, and _ left.\n\nOption1: Ann Option2: Bo Answer format: option1/option2", "option2"),
            Question("Ann met Bo, and", (" Ann left.", " Bo left."), 1),
        ),
        (
            question("Please choose the correct ending to complete the given sentence: He runs\n\nEnding1: home. "
                     "Ending2: a cat.\n\nAnswer format: ending1/ending2", "ending1"),
            Question("He runs", (" home.", " a cat."), 0),
        ),
        (
            {"question": "2 + 2?", "choices": [3, 4], "answer": 1},
            Question("Question: 2 + 2?\nAnswer:", (" 3", " 4"), 1),
        ),
    ],
    ids=["boolq", "piqa", "winogrande", "hellaswag", "plain"],
)  # fmt: skip
def test_each_kind_is_asked_as_plain_text(record: dict[str, Any], expected: Question) -> None:
    assert read_question(record) == expected


def test_questions_are_drawn_by_seed(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([{"question": f"{i}?", "choices": ["a", "b"], "answer": "b"} for i in range(50)]))
    drawn = read_questions(str(path), 10)
    assert len(set(drawn)) == 10
    assert drawn == read_questions(str(path), 10) != read_questions(str(path), 10, seed=1)
    assert len(read_questions(str(path), 1000)) == 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"question": "a?", "choices": ["b"], "answer": 0}]', "Record 1 of .* is no multiple-choice question"),
        ('{"question": "a?", "choices": ["b", "c"], "answer": 2}', "Record 1"),
        ('{"question": "a?", "choices": ["b", "c"], "answer": "d"}', "Record 1"),
        ('{"text": "a"}', "needs the fields question, choices and answer"),
        ("[]", "There are no questions"),
        ("a?", "neither a list in JSON nor JSON lines"),
    ],
)
def test_what_is_no_question_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_questions(str(tmp_path / "questions.jsonl"), 10)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the files of LLM-Adapters")
def test_every_record_of_the_real_files_is_a_question() -> None:
    for path in REAL.glob("*_test.json"):
        records = json.loads(path.read_text(encoding="utf-8"))
        kinds = {len(read_question(record).choices) for record in records}
        assert kinds <= {2, 3, 4, 5}, path
