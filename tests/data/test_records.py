"""Whatever a file holds, it gives rows or one sentence that names the file and the place."""

from __future__ import annotations

import datetime
import gzip
import json
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers.data_fixtures import isolate_cache, make_tokenizer

from milora_lightning.data import Commonsense, Files, Instructions, Math, tokenize_dataset
from milora_lightning.data.columns import as_dataset
from milora_lightning.data.files import _say
from milora_lightning.data.held_out import read_texts
from milora_lightning.data.reading.records import read_records
from milora_lightning.data.reading.rows import Row, checked_rows
from milora_lightning.data.tasks.instructions import instruction
from milora_lightning.data.tasks.mathematics import worked_solution

FIELDS = {"prompt": "instruction", "input": "input", "response": "output", "reference": "output", "task": None}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_cache(monkeypatch, tmp_path)


def rows_of(path: Path, convert: Any = Files.convert) -> list[Row]:
    return list(checked_rows(read_records(str(path)), str(path), FIELDS, convert, ""))


def outcome(path: Path, convert: Any = Files.convert) -> list[Row] | str:
    """Return the rows, or the sentence; whatever else is raised is a failure."""
    try:
        return rows_of(path, convert)
    except ValueError as error:
        return str(error)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("1" * 400, "1" * 400),
        ("1" * 5000, "1" * 5000),
        ("-" + "9" * 5000, "-" + "9" * 5000),
        ("0.5", "0.5"),
        (r'"a\u0000b"', "a\0b"),
        (r'"\ud83d\ude00"', "😀"),  # a pair of surrogates is one character
    ],
)
def test_texts_and_numbers_are_kept(value: str, text: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", f'{{"instruction": {value}, "output": "b"}}\n')
    assert rows_of(path)[0]["prompt"] == text
    assert Files(train=str(path)).load("train")["prompt"][:] == [text]  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (r'{"instruction": "a\ud800", "output": "b"}', r"'instruction' in row 1 .* holds half a character at position"),
        ('{"instruction": 1e999, "output": "b"}', r"in row 1 .* holds inf \(float\), which is no text"),
        ('{"instruction": NaN, "output": "b"}', r"in row 1 .* holds nan \(float\), which is no text"),
        ('{"instruction": -Infinity, "output": "b"}', r"holds -inf \(float\), which is no text"),
        ('{"instruction": true, "output": "b"}', r"holds True \(bool\), which is no text"),
        (
            f'{{"instruction": {DEEP}, "output": "b"}}',
            r"In line 1 of .*a\.jsonl there are lists or .* nested too deeply",
        ),
        (f'{{"instruction": {"[" * 400 + "]" * 400}, "output": "b"}}', r"\(list\), which is no text"),
        ('{"instruction": "a", "output": "b", "output": "c"}', r"field 'output' comes twice in row 1 .* Remove one"),
        ('{"instruction": "a", "input": ["b"], "output": "c"}', r"leave the field out with input_field: null"),
        ("\0\0\0", r"is not valid JSON in line 1, column 1"),
        ('{"instruction": "a\0", "output": "b"}', r"is not valid JSON in line 1, column 19 \(Invalid control char"),
        ("[1, 2]", r"In row 1 .* there is no object with fields but int: 1"),
        ("[[]]", r"In row 1 .* there is no object with fields but list: \[\]"),
        ("null", r"In row 1 .* there is no object with fields but NoneType"),
        (
            '{\n "instruction": "a",\n "output": "b"\n}',
            r"a\.jsonl is a single object with the fields \['instruction', 'ou",
        ),
        (
            '\n{\n "data": [{"instruction": "a"}],\n "v": 1\n}\n',
            r"line 2\. Write the array in its field 'data' to a file",
        ),
        (
            '{\n"a": 1\n}\n{\n"a": 2\n}',
            r"holds objects that are spread over several lines, from line 1\. Write each on",
        ),
        ('{"instruction": "a", "output": "b"}\n{\n"a": 2\n}', r"spread over several lines, from line 2"),
        ('[{"instruction": "a"}]\n[{"instruction": "a"}]', r"is not valid JSON in line 2, column 1 \(Extra data\)"),
        ('{"instruction": "a", "output": "b"},\n', r"is not valid JSON in line 1"),
        (
            gzip.compress(b'{"instruction": "a", "output": "b"}\n', mtime=0),
            r"a\.jsonl is compressed with gzip: unpack it",
        ),
        ('{"instruction": "ä"}'.encode("utf-16"), r"a\.jsonl is not text in UTF-8"),
        ('{"instruction": "ä"}'.encode("latin-1"), r"a\.jsonl is not text in UTF-8"),
        (b"PAR1\x15\x04", r"a\.jsonl is a Parquet file: let its name end in \.parquet"),
        ("", r"There are no rows in .*a\.jsonl"),
        ("\ufeff\r\n \r\n", r"There are no rows in .*a\.jsonl"),
    ],
)
def test_what_is_no_row_is_named(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", content)
    with pytest.raises(ValueError, match=message) as error:
        Files(train=str(path)).load("train")
    assert str(path) in str(error.value)
    str(error.value).encode()  # can be printed


def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path: Path) -> None:
    line = '{"instruction": "a\u2028b", "output": "c"}'
    path = written(tmp_path / "a.jsonl", f"\ufeff{line}\r\n\r\n{line}\r{line}")
    assert [row["prompt"] for row in rows_of(path)] == ["a\u2028b"] * 3


def test_white_space_before_an_array_does_not_matter(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", " \n" * 40_000 + '[{"instruction": "a", "output": "c"}]')
    assert [row["prompt"] for row in rows_of(path)] == ["a"]


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.jsonl", "{}")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read \(PermissionError: .*Permission denied"):
        list(read_records(str(path)))


def parquet(path: Path, **columns: Any) -> Path:
    pa.parquet.write_table(pa.table(columns), path, compression="NONE", row_group_size=4)
    return path


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([b"bytes"], r"b'bytes' \(bytes\)"),
        ([datetime.datetime(2024, 1, 2)], r"datetime\.datetime\(2024, 1, 2, 0, 0\) \(datetime\)"),
        ([["a", "b"]], r"\['a', 'b'\] \(list\)"),
        ([{"a": 1}], r"\{'a': 1\} \(dict\)"),
        ([None], r"None \(NoneType\)"),
        ([float("nan")], r"nan \(float\)"),
        (pa.array([True]), r"True \(bool\)"),
    ],
)
def test_parquet_values_that_are_no_text_are_named(values: Any, shown: str, tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", instruction=values, output=["b"])
    with pytest.raises(ValueError, match=rf"'instruction' in row 1 .* of {path} holds {shown}, which is no text"):
        Files(train=str(path)).load("train")


def test_decimals_are_numbers(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", instruction=[Decimal("1.50")], output=pa.array(["b"]).dictionary_encode())
    assert [(row["prompt"], row["response"]) for row in rows_of(path)] == [("1.50", "b")]


def test_times_that_python_does_not_know_are_named(tmp_path: Path) -> None:
    far = pa.array([2**62], pa.timestamp("us"))
    path = parquet(tmp_path / "a.parquet", instruction=["a"], output=["b"], when=far)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read after row 0 \(OverflowError: "):
        rows_of(path)


def test_damaged_parquet_is_named_wherever_it_is_damaged(tmp_path: Path) -> None:
    texts = [f"text {i} " * 50 for i in range(12)]
    whole = parquet(tmp_path / "whole.parquet", instruction=texts, output=texts).read_bytes()
    generator, path, damaged = random.Random(0), tmp_path / "a.parquet", 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(generator.choice([1, 20, 400])):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content[: generator.choice([len(content), generator.randrange(len(content))])])
        result = outcome(path)
        damaged += isinstance(result, str)
        assert not isinstance(result, str) or str(path) in result
    assert damaged > 100


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [{"from": "human", "value": "Hi"}]},
            r"message 1 of 'messages' has no role and no content.*Rename",
        ),
        ({"messages": "Hi"}, r"'messages' holds 'Hi' \(str\), but has to be a list of messages"),
        ({"messages": {"role": "user"}}, r"'messages' holds \{'role': 'user'\} \(dict\), but has to be a list"),
        ({"messages": ["Hi", "Hello!"]}, r"message 1 of 'messages' is 'Hi' \(str\), but has to have role and content"),
        ({"messages": [CHAT[0], {"role": "assistant"}]}, r"message 2 of 'messages' has no content, only \['role'\]"),
        ({"messages": [CHAT[0], {**CHAT[1], "content": None}]}, r"the content of message 2 .* is None \(NoneType\)"),
        ({"messages": [CHAT[0], {**CHAT[1], "content": [{"type": "text"}]}]}, r"the content of message 2 .*\(list\)"),
        ({"messages": [{**CHAT[0], "role": 1}, CHAT[1]]}, r"the role of message 1 .* is 1 \(int\), which is no text"),
        ({"messages": [None]}, r"message 1 of 'messages' is None"),
        ({"messages": []}, r"there is no instruction with an answer among the fields \['messages'\]"),
        ({"chosen": "a"}, r"the field 'prompt' is None \(NoneType\), which is no text"),
        ({"chosen": 3}, r"'chosen' holds 3 \(int\), but has to be a list of messages"),
    ],
)
def test_chats_of_other_shapes_are_named(record: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", json.dumps({"messages": CHAT}) + "\n" + json.dumps(record))
    with pytest.raises(ValueError, match=rf"In row 2 \(the first is row 1\) of {path}: {message}"):
        Instructions(train=str(path)).load("train")


class Failing(Files):
    @staticmethod
    def convert(record: dict[str, Any]) -> Any:
        return record["how"] and {"instruction": record["q"]["text"], "output": "b"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"how": 1, "q": {}}, r"Failing\.convert fails with KeyError: 'text'"),
        ({"how": 1, "q": "a"}, r"Failing\.convert fails with TypeError: string indices"),
        ({"how": 0}, r"the converter returns int, but has to return a dict"),
    ],
)
def test_failing_converter_is_named_with_the_row(record: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", json.dumps(record))
    with pytest.raises(ValueError, match=rf"In row 1 .* of {path}: {message}"):
        Failing(train=str(path)).load("train")


KEYS = ("instruction", "input", "output", "messages", "chosen", "prompt", "role", "content", "question", "answer", "q")
TEXTS = ("", "a", " ", "\ud800", "\0", "user", "assistant", "system", "#### 3", "\\boxed{", "The answer is: ", "\u2028")
NUMBERS = (0, -1, 10**30, 1.5, float("inf"), float("nan"), True, False, None, 10**400)


def anything(generator: random.Random, depth: int = 4) -> Any:
    kind = generator.random()
    if depth == 0 or kind < 0.5:
        return generator.choice([*TEXTS, *NUMBERS])
    if kind < 0.65:
        return [anything(generator, depth - 1) for _ in range(generator.randrange(4))]
    return {generator.choice(KEYS): anything(generator, depth - 1) for _ in range(generator.randrange(6))}


@pytest.mark.parametrize("convert", [Files.convert, instruction, worked_solution])
@pytest.mark.parametrize("seed", range(3))
def test_anything_gives_rows_or_a_sentence(convert: Any, seed: int, tmp_path: Path) -> None:
    generator, accepted = random.Random(seed), 0
    for i in range(400):
        values = [anything(generator) for _ in range(generator.randint(1, 3))]
        if generator.random() < 0.5:  # often rows that can be read
            values[0] = {"instruction": "a", "output": generator.choice(TEXTS), "input": anything(generator, 1)}
        content = "\n".join(map(json.dumps, values)) if generator.random() < 0.7 else json.dumps(values, indent=1)
        if generator.random() < 0.2:
            position = generator.randrange(len(content))
            content = content[:position] + generator.choice(["", "{", '"', "\0", "[", "}"]) + content[position + 1 :]
        path = written(tmp_path / f"{i % 2}.json", content)
        result = outcome(path, convert)
        if isinstance(result, str):
            assert str(path) in result
            assert "row" in result or "line" in result
            result.encode()  # can be printed
        else:
            accepted += 1
            assert all(isinstance(text, str) and text.encode() is not None for row in result for text in row.values())
    assert accepted > 10


@pytest.mark.parametrize("seed", range(2))
def test_any_bytes_give_rows_or_a_sentence(seed: int, tmp_path: Path) -> None:
    generator, path = random.Random(seed), tmp_path / "a.json"
    line = b'{"instruction": "a", "output": "b"}\n'
    for _ in range(300):
        content = bytearray(line * 3)
        for _ in range(generator.randint(1, 9)):
            content[generator.randrange(len(content))] = generator.choice([*range(256), *b'{}[]",:\\\n'])
        path.write_bytes(content)
        result = outcome(path)
        assert not isinstance(result, str) or str(path) in result


ROW = {"prompt": "Add.", "response": "3"}


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ([{"prompt": 1, "response": 2.5, "input": None}], ("1", "2.5", "")),
        (datasets.Dataset.from_list([{"prompt": 1, "response": "b", "input": None}]), ("1", "b", "")),
        (datasets.Dataset.from_list([{**ROW, "extra": [1]}]).with_format("numpy"), ("Add.", "3", None)),
        ([{**ROW, "response": np.int64(7)}], ("Add.", "7", None)),
        ([ROW], ("Add.", "3", None)),
    ],
)
def test_sources_return_lists_and_numbers_as_well(data: Any, texts: tuple[str, ...]) -> None:
    row = as_dataset(data, "train")[0]
    assert (row["prompt"], row["response"], row.get("input")) == texts
    assert len(tokenize_dataset(data, make_tokenizer(), "plain")) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            datasets.Dataset.from_list([ROW]).to_iterable_dataset(),
            r"type IterableDataset for train; .*all rows at hand",
        ),
        (datasets.DatasetDict(train=datasets.Dataset.from_list([ROW])), r"DatasetDict of \['train'\].*data\['train'\]"),
        ({"prompt": ["a"]}, r"returns dict of \['prompt'\] for train; it must return a datasets.Dataset or a list"),
        (["a"], r"an object of type list for train"),
        (3, r"an object of type int for train"),
        ([], r"The train data has no rows"),
        ([{"prompt": "a"}], r"no column 'response', only \['prompt'\]"),
        ([ROW, {"prompt": "a"}], r"'response' in row 2 \(the first is row 1\) of the train data holds None"),
        ([{**ROW, "prompt": ["a"]}], r"'prompt' in row 1 .* holds \['a'\] \(list\), which is no text"),
        (datasets.Dataset.from_list([{**ROW, "response": None}, ROW]), r"'response' in row 1 .* holds None"),
        (datasets.Dataset.from_list([{**ROW, "prompt": True}]), r"'prompt' in row 1 .* holds True \(bool\)"),
        (datasets.Dataset.from_list([{**ROW, "reference": ["a"]}]), r"'reference' in row 1 .* holds \['a'\]"),
    ],
)
def test_what_sources_cannot_return_is_named(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(data, make_tokenizer(), "plain")


ALPACA = {"instruction": "Add.", "input": "1, 2", "output": "3"}


def test_input_of_alpaca_is_read_unless_switched_off(tmp_path: Path, said: list[str]) -> None:
    path = str(written(tmp_path / "a.jsonl", json.dumps(ALPACA)))
    assert Files(train=path).load("train")["input"][:] == ["1, 2"]  # type: ignore[index]
    read = f"{path}: 1 row, prompt from 'instruction', "
    assert said == [f"{read}input from 'input', response from 'output'."]
    said.clear()
    assert Files(train=path, input_field=None).load("train")["input"][:] == [""]  # type: ignore[index]
    assert said == [
        f"{read}response from 'output'. Fields not read: 'input' (input_field=input would use it, for one)."
    ]
    assert Commonsense(train=path).fields["input"] is None
    assert Math(train=path).fields["input"] is None
    assert Files(train=path, prompt_field="output", response_field="output").fields["input"] is None


def test_fields_that_nobody_reads_are_named_once(tmp_path: Path, said: list[str]) -> None:
    rows = [{**ALPACA, "source": "web", "empty": "", "none": None}, {**ALPACA, "id": 7}]
    path = str(written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    for _ in range(2):  # from the file, and from the cache
        _say.cache_clear()
        source = Files(train=path, validation_size=1)
        source.load("train"), source.load("validation")
        assert len(said) == 1
        assert "Fields not read: 'source', 'id'" in said.pop()


def test_what_converters_read_is_not_named(tmp_path: Path, said: list[str]) -> None:
    record = {"messages": CHAT, "source": "web"}
    path = str(written(tmp_path / "a.jsonl", json.dumps(record)))
    Instructions(train=path).load("train")
    assert [re.findall("not read: (.*)", line) for line in said] == [["'source'."]]


@pytest.mark.parametrize(
    "read",
    [
        dict,
        lambda r: {**r},
        lambda r: r.copy(),
        lambda r: r | {},
        lambda r: {k: r[k] for k in r},
        lambda r: {**r.copy()},
    ],
)
def test_copies_of_records_read_all_of_them(read: Any) -> None:
    def convert(record: dict[str, Any]) -> dict[str, Any]:
        copied = read(record)
        return {"instruction": copied["q"], "output": copied["a"]}

    (row,) = checked_rows([(1, {"q": "1", "a": "2", "more": "3"})], "a", FIELDS, convert, "")
    assert row == {"prompt": "1", "input": "", "response": "2", "reference": "2", "task": "", "unread": "[]"}


def test_texts_to_measure_on_leave_their_other_fields_unsaid(tmp_path: Path, said: list[str]) -> None:
    path = str(written(tmp_path / "a.jsonl", json.dumps({"text": "a", "url": "b"})))
    assert read_texts(path) == ["a"]
    assert said == []
