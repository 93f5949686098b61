"""The same conversations, however a file holds them, give the same rows."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.data_fixtures import isolate_cache

from milora_lightning.data import Files
from milora_lightning.data.columns import as_dataset
from milora_lightning.data.reading.formats import PROMPTS
from milora_lightning.data.reading.rows import checked_rows


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_cache(monkeypatch, tmp_path)


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, **options: Any) -> list[dict[str, Any]]:
    dataset = Files(train=path, **options).load("train")
    assert dataset is not None
    return [
        {key: json.loads(text) if key in ("messages", "tools") else text for key, text in row.items() if text}
        for row in dataset
    ]


SYSTEM = {"role": "system", "content": "Be brief."}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
AGAIN, LAST = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you."}
TURNS = [USER, ANSWER, AGAIN, LAST]


def sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [SYSTEM, *TURNS]}, [SYSTEM, *TURNS]),
        ({"Messages": TURNS, "id": 3}, TURNS),
        ({"messages": json.dumps(TURNS)}, TURNS),
        ({"messages": TURNS, "prompt": "Hi"}, TURNS),
        ({"messages": TURNS, "system": "Be brief."}, [SYSTEM, *TURNS]),
        ({"messages": [SYSTEM, *TURNS], "system": "Be brief."}, [SYSTEM, *TURNS]),
        ({"conversations": sharegpt([SYSTEM, *TURNS])}, [SYSTEM, *TURNS]),
        ({"conversations": sharegpt(TURNS), "system_prompt": "Be brief."}, [SYSTEM, *TURNS]),
        ({"conversation": TURNS}, TURNS),
        ({"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello!"]}}, [USER, ANSWER]),
        ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "model", "value": "Hello!"}]}, [USER, ANSWER]),
        ({"instruction": "Bye", "output": "See you.", "history": [["Hi", "Hello!"]]}, TURNS),
        ({"instruction": "Hi", "input": "", "output": "Hello!", "system": "Be brief."}, [SYSTEM, USER, ANSWER]),
        (
            {"instruction": "Hi", "input": "you", "output": "Hello!", "history": [["Hi", "Hello!"]]},
            [USER, ANSWER, {"role": "user", "content": "Hi\n\nyou"}, ANSWER],
        ),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [LAST]}, [USER, ANSWER]),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, LAST]}, [USER, ANSWER]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, LAST]}, [USER, ANSWER]),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "Hi"}]}, ANSWER]}, [USER, ANSWER]),
        ({"messages": [USER, {**ANSWER, "weight": 0}, AGAIN, LAST]}, [USER, {**ANSWER, "weight": 0}, AGAIN, LAST]),
    ],
)
def test_conversations_are_recognised(record: Any, messages: Any, tmp_path: Path) -> None:
    assert load(lines(tmp_path / "a.jsonl", [record] * 2)) == [{"messages": messages}] * 2


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Hi", "output": "Hello!"},
        {"instruction": "Hi", "input": "", "output": "Hello!", "system": "", "history": []},
        {"instruction": "Hi", "output": "Hello!", "text": "Below is an instruction"},
        {"prompt": "Hi", "completion": "Hello!"},
        {"prompt": "Hi", "response": "Hello!"},
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go!"},
        {"Question": "Hi", "Answer": "Hello!"},
        {"query": "Hi", "response": "Hello!", "messages": []},
        {"problem": "Hi", "solution": "Hello!"},
        {"input": "Hi", "output": "Hello!"},
    ],
)
def test_prompts_are_recognised(record: Any, tmp_path: Path) -> None:
    assert load(lines(tmp_path / "a.jsonl", [record])) == [
        {"prompt": "Hi", "response": "Hello!", "reference": "Hello!"}
    ]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_alone_can_be_answered(name: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{name.title(): "Hi"}, {name.title(): "Bye"}])
    assert Files(test=path).load("test")["prompt"][:] == ["Hi", "Bye"]
    with pytest.raises(ValueError, match="There is no field"):
        load(path)


def test_texts_are_recognised(tmp_path: Path, said: list[str]) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "Once", "url": "a"}, {"text": "upon"}])
    assert load(path) == [{"text": "Once"}, {"text": "upon"}]
    assert said == [f"{path}: 2 texts from 'text', every token to be learned. Fields not read: 'url'."]


def test_context_is_read_with_the_question(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"instruction": "Hi", "context": "you", "response": "Hello!"}])
    assert load(path)[0]["input"] == "you"


CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "function_call": {**CALL, "arguments": '{"city": "Oslo"}'}},
        {"from": "function_call", "value": json.dumps(CALL)},
    ],
)
@pytest.mark.parametrize(
    ("field", "tools"), [("tools", [TOOL]), ("tools", json.dumps([TOOL])), ("functions", [TOOL["function"]])]
)
def test_calls_of_tools_have_one_form(call: Any, field: str, tools: Any, tmp_path: Path) -> None:
    result = {"from": "observation", "value": "Rain."} if "from" in call else {"role": "tool", "content": "Rain."}
    record = {"messages": [USER, call, result, ANSWER], field: tools}
    (row,) = load(lines(tmp_path / "a.jsonl", [record]))
    assert row["messages"] == [USER, CALLED, {"role": "tool", "content": "Rain."}, ANSWER]
    assert row["tools"] == [TOOL]


def test_what_is_recognised_is_said(tmp_path: Path, said: list[str]) -> None:
    path = lines(tmp_path / "a.jsonl", [{"conversations": sharegpt(TURNS), "id": 1}] * 3)
    for _ in range(2):
        load(path)
    assert said == [f"{path}: 3 conversations, messages from 'conversations'. Fields not read: 'id'."]


@pytest.mark.parametrize(
    ("record", "options", "row"),
    [
        ({"dialog": TURNS, "messages": [USER]}, {"messages_field": "dialog"}, {"messages": TURNS}),
        ({"body": "Once", "messages": TURNS}, {"text_field": "body"}, {"text": "Once"}),
        ({"q": "Hi", "answer": "Hello!"}, {"prompt_field": "q"}, {"prompt": "Hi", "response": "Hello!"}),
        ({"question": "Hi", "a": "Hello!"}, {"response_field": "a"}, {"prompt": "Hi", "response": "Hello!"}),
        ({"messages": TURNS, "system": "Be brief."}, {"system_field": None}, {"messages": TURNS}),
        ({"question": "Hi", "answer": "Hello!", "messages": TURNS}, {"messages_field": None}, {"prompt": "Hi"}),
        ({"question": "Hi", "answer": "Hello!", "messages": TURNS}, {"prompt_field": "question"}, {"prompt": "Hi"}),
    ],
)
def test_what_is_named_goes_before(record: Any, options: Any, row: Any, tmp_path: Path) -> None:
    read = load(lines(tmp_path / "a.jsonl", [record]), **options)[0]
    assert {key: read[key] for key in row} == row
    assert ("messages" in row, "text" in row) == ("messages" in read, "text" in read)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"messages": TURNS, "question": "a", "answer": "b"}],
            r"In row 1 .* several fields that may hold the example\. Set messages_field: messages, or prompt_field: "
            r"question and response_field: answer",
        ),
        ([{"messages": TURNS, "conversations": TURNS}], r"messages_field: messages, or messages_field: conversations"),
        ([{"question": "a", "answer": "b", "solution": "c"}], r"response_field: answer, or prompt_field: question and"),
        ([{"prompt": "a", "Prompt": "b", "answer": "c"}], r"prompt_field: prompt and .*, or prompt_field: Prompt and"),
        (
            [{"text": "a", "answer": "b"}],
            r"'text' may be a text to learn or a question\. Set text_field: text, or prompt",
        ),
        ([{"question": "a"}], r"There is no field 'answer' in row 1 .* set response_field to the right one"),
        (
            [{"a": "a", "b": "b"}],
            r"In row 1 .* the fields \['a', 'b'\], and none is known .* Name yours: set prompt_field",
        ),
        (
            [{"messages": TURNS}, {"prompt": "a", "completion": "b"}],
            r"In row 2 .* there is a prompt and a response in 'prompt' and 'completion', but in the first row a "
            r"conversation in 'messages': a file holds one format",
        ),
        (
            [{"text": "a"}, {"messages": TURNS}],
            r"In row 2 .* a conversation in 'messages', but in the first row a text",
        ),
        ([{"messages": []}], r"In row 1 .*: 'messages' holds \[\] \(list\), but has to be a list of messages"),
        ([{"messages": "Hi"}], r"In row 1 .*: 'messages' holds 'Hi', which is not valid JSON"),
        (
            [{"conversations": ["Hi", "Hello!"]}],
            r"message 1 of 'conversations' is 'Hi' \(str\), but has to have role and",
        ),
        ([{"messages": TURNS}, {"messages": []}], r"In row 2 .*: 'messages' holds \[\] \(list\), but has to be a list"),
        (
            [{"messages": [USER, {"role": "bard", "content": "a"}]}],
            r"role of message 2 .* 'bard', but has to be one of",
        ),
        ([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}], r"has the part .*, which is no text"),
        (
            [{"messages": [{"role": "user", "content": {"a": 1}}]}],
            r"the content of message 1 of 'messages' holds \{'a'",
        ),
        ([{"messages": [SYSTEM, USER], "system": "Be long."}], r"there are two system messages, one in 'system'"),
        ([{"messages": TURNS, "tools": "["}], r"'tools' holds '\[', which is not valid JSON"),
        ([{"messages": TURNS, "tools": {"a": 1}}], r"'tools' holds .* has to be a list of tools"),
        (
            [{"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}],
            r"a call in message 2 .* has to have a name",
        ),
        (
            [{"instruction": "a", "output": "b", "history": [["a"]]}],
            r"'history' holds \[\['a'\]\], but has to be a list of",
        ),
        (
            [{"instruction": "a", "output": "b"}] * 1000 + [{"instruction": "a", "output": "b", "system": "c"}],
            r"something in 'system' in row 1001 .* none of the first 1000 rows\. Set system_field: system, or null",
        ),
    ],
)
def test_what_is_ambiguous_or_mixed_is_refused(records: Any, message: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match=message) as error:
        Files(train=path).load("train")
    assert path in str(error.value)


def test_fields_of_different_kinds_are_not_named_together() -> None:
    with pytest.raises(ValueError, match=r"messages_field='chat', text_field='body' name more than one place"):
        Files(messages_field="chat", text_field="body")


def test_own_sources_give_conversations_as_lists_or_json() -> None:
    rows = [{"messages": TURNS, "tools": [TOOL]}, {"text": "Once"}, {"prompt": "Hi", "response": "Hello!"}]
    data = as_dataset(rows, "train")
    assert [json.loads(text) if text else "" for text in data["messages"]] == [TURNS, "", ""]
    assert data["tools"][:] == [json.dumps([TOOL]), "", ""]
    assert data["response"][:] == ["", "", "Hello!"]
    table = as_dataset(datasets.Dataset.from_list([{"messages": TURNS}]), "train")
    assert json.loads(table["messages"][0]) == TURNS
    assert as_dataset(table, "train")._fingerprint == table._fingerprint
    with pytest.raises(ValueError, match=r"'messages' in row 1 .* of the train data is not a conversation: message 1"):
        as_dataset([{"messages": [{"role": "user"}]}], "train")
    with pytest.raises(ValueError, match=r"'response' in row 2 .* holds None"):
        as_dataset([{"messages": TURNS}, {"prompt": "a", "response": None}], "train")


KEYS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "output",
    "text",
    "system",
    "history",
    "tools",
)
PARTS = ("role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text")
VALUES: tuple[Any, ...] = (
    "",
    "a",
    "user",
    "assistant",
    "human",
    "gpt",
    "system",
    "tool",
    "function_call",
    "{}",
    "[1]",
    "[",
)
VALUES += ("\ud800", "\0", None, 0, -1.5, True, float("nan"), 10**400, [], {})


def anything(generator: random.Random, keys: tuple[str, ...], depth: int = 4) -> Any:
    kind = generator.random()
    if depth == 0 or kind < 0.35:
        return generator.choice(VALUES)
    if kind < 0.65:
        return [anything(generator, PARTS, depth - 1) for _ in range(generator.randrange(4))]
    return {generator.choice(keys): anything(generator, PARTS, depth - 1) for _ in range(generator.randrange(5))}


def damaged(generator: random.Random, value: Any) -> Any:
    """Put anything in some place of a value."""
    if generator.random() < 0.15 or not value or not isinstance(value, list | dict):
        return anything(generator, PARTS)
    copy: Any = value.copy()
    place = generator.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    copy[place] = damaged(generator, copy[place])
    return copy


GOOD: list[dict[str, Any]] = [
    {"messages": [SYSTEM, USER, CALLED, {"role": "tool", "content": "Rain."}, ANSWER], "tools": [TOOL]},
    {"conversations": sharegpt([SYSTEM, *TURNS]), "system": "Be brief."},
    {"instruction": "Hi", "input": "you", "output": "Hello!", "history": [["Hi", "Hello!"]], "system": ""},
    {"prompt": [USER], "completion": [ANSWER]},
    {"text": "Once"},
]


@pytest.mark.parametrize("seed", range(4))
def test_anything_in_the_fields_of_a_format_gives_rows_or_a_sentence(seed: int) -> None:
    generator, outcomes = random.Random(seed), Counter[str]()
    for _ in range(1500):
        good = generator.choice(GOOD)
        records = [anything(generator, KEYS) if generator.random() < 0.2 else damaged(generator, good)]
        records = [good, *records] if generator.random() < 0.5 else records
        try:
            rows = list(checked_rows(enumerate(records, 1), "file.jsonl", Files().fields, Files.convert, ""))
        except ValueError as error:
            sentence = str(error)
            sentence.encode()  # can be printed
            outcomes["refused" if re.search("row .*file.jsonl", sentence, re.DOTALL) else sentence] += 1
            continue
        for row in rows:
            assert all(isinstance(text, str) and text.encode() is not None for text in row.values())
            kinds = [key for key in ("messages", "text", "response") if row.get(key)]
            assert len(kinds) <= 1
            for message in json.loads(row.get("messages") or "[]"):
                assert message["role"] in {"system", "developer", "user", "assistant", "tool", "ipython"}
                assert isinstance(message["content"], str)
        outcomes["read"] += 1
    assert set(outcomes) == {"read", "refused"}
    assert min(outcomes.values()) > 150
