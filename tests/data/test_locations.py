"""Whatever the data are kept in, they give the same rows; splits are found by their names."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers.data_fixtures import isolate_cache

from milora_lightning.data import Files
from milora_lightning.data.reading.opening import COMPRESSED

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"How many are {i} and 1,\n“exactly”?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": i}}}]},
            {"role": "tool", "content": str(i + 1), "name": "add"},
            {"role": "assistant", "content": f"{i + 1}; ä\t"},
        ]
    }
    for i in range(48)
]
PAIRS = [{"prompt": f"How many are {i}, and 1?\nSay.", "completion": f'"{i + 1}"; ä\t'} for i in range(48)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_cache(monkeypatch, tmp_path)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    *_, kind = [end.lower() for end in path.suffixes if end.lower() not in COMPRESSED] or [""]
    if kind == "":
        datasets.Dataset.from_list(rows).save_to_disk(path)
        return str(path)
    table = pa.Table.from_pylist(rows)
    if kind == ".parquet":
        pa.parquet.write_table(table, path, row_group_size=7)
        return str(path)
    if kind == ".arrow":
        new = pa.ipc.new_file if "file" in path.name else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        return str(path)
    if kind in (".csv", ".tsv"):
        raw = path.parent / "raw"
        delimiter = "\t" if kind == ".tsv" else ";" if "excel" in path.name else ","
        with open(raw, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter=delimiter)
            cells = [[c if isinstance(c, str) else json.dumps(c) for c in row.values()] for row in rows]
            writer.writerows([list(rows[0]), *cells])
        content = raw.read_bytes()
        raw.unlink()
    elif kind == ".json":
        content = json.dumps(rows, indent=1, ensure_ascii=False).encode()
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(packed(content, path.suffix.lower()))
    return str(path)


def packed(content: bytes, suffix: str) -> bytes:
    modules = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
    if suffix == ".zst":
        return pa.compress(content, codec="zstd", asbytes=True)
    return modules[suffix].compress(content) if suffix in modules else content


def rows_of(location: Any, split: str = "train", **options: Any) -> list[dict[str, str]]:
    dataset = Files(train=location, validation_size=0, **options).load(split)  # type: ignore[arg-type]
    assert dataset is not None
    return [{key: text for key, text in row.items() if text} for row in dataset]


NAMES = ["a.json", "a.JSONL", "a.ndjson", "a.csv", "excel.csv", "a.TSV", "a.parquet", "file.arrow", "stream.arrow"]
NAMES += [f"a.jsonl{end}" for end in COMPRESSED] + ["a.json.GZ", "a.csv.xz", "saved"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, CHATS)
    read = rows_of(path)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    turns = CHATS[3]["messages"]
    assert [json.loads(row["messages"]) for row in read][3] == [
        turns[0],
        {**turns[1], "tool_calls": [call]},
        *turns[2:],
    ]
    assert read == rows_of(write(tmp_path / "same.jsonl", CHATS))
    (tmp_path / "pairs").mkdir()
    pairs = rows_of(write(tmp_path / "pairs" / name, PAIRS))
    assert [(row["prompt"], row["response"]) for row in pairs] == [tuple(row.values()) for row in PAIRS]


def test_plain_text_is_one_text_and_a_large_one_is_cut_between_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Once\n\nupon a time.\n")
    assert rows_of(str(path)) == [{"text": "Once\n\nupon a time.\n"}]
    line = "a" * 999 + "\n"
    path.write_text(line * 2500)
    texts = [row["text"] for row in rows_of(str(path))]
    assert [len(text) for text in texts] == [1_000_000, 1_000_000, 500_000]
    assert "".join(texts) == line * 2500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,completion\na,b,c\n", r"Row 1 .* has 3 cells for the 2 fields .* in quotation marks"),
        ("a.csv", 'prompt,completion\na,"b\n', r"a\.csv is not valid CSV in line 2 \(unexpected end of data\)"),
        ("a.csv", "prompt,prompt\na,b\n", r"The first row of .*a\.csv names the field 'prompt' twice"),
        ("a.csv", "prompt,completion\n", r"There are no rows in .*a\.csv"),
        ("a.csv", "", r"There are no rows in .*a\.csv"),
        ("a.csv", "a,b\n1,2\n", r"In row 1 .*a\.csv there are the fields \['a', 'b'\], and none is known"),
        ("a.csv", b"\xff\xfe", r"a\.csv is not text in UTF-8"),
        ("a.csv", gzip.compress(b"a", mtime=0), r"is compressed with gzip: unpack it, or let its name end in \.gz"),
        ("a.arrow", "", r"a\.arrow is not a valid Arrow file"),
        ("a.arrow", "ARROW1 and more", r"a\.arrow is not a valid Arrow file"),
        ("a.txt", " \n", r"There are no rows in .*a\.txt"),
        ("a.txt", b"\xff", r"a\.txt is not text in UTF-8"),
        ("a.jsonl.gz", "{}", r"a\.jsonl\.gz cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], r"a\.jsonl\.gz cannot be unpacked"),
        ("a.jsonl.bz2", "{}", r"a\.jsonl\.bz2 cannot be unpacked"),
        ("a.jsonl.xz", lzma.compress(b"{}" * 99)[:-9], r"a\.jsonl\.xz cannot be unpacked"),
        ("a.jsonl.zst", "{}", r"a\.jsonl\.zst cannot be unpacked"),
        ("a.jsonl.zst", packed(b"{}" * 99, ".zst")[:-3], r"a\.jsonl\.zst"),
        ("a.parquet.gz", "", r"a\.parquet\.gz is not a data file"),
    ],
)
def test_damaged_files_are_named(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        rows_of(str(tmp_path / name))


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "validation.csv", "test.parquet"),
        ("train-00000-of-00001.parquet", "data_val.jsonl", "my.test.json"),
        ("train/a.jsonl", "dev/a.jsonl", "eval/deep/a.csv.gz"),
    ],
)
def test_splits_of_a_folder_are_told_by_names(names: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for i, name in enumerate(names):
        write(folder / name, PAIRS[i : i + 20 + i])
    (folder / "README.md").write_text("Data")
    (folder / ".hidden.jsonl").write_text("{")
    source = Files(train=str(folder))
    loaded = {split: source.load(split) for split in ("train", "validation", "test")}  # type: ignore[arg-type]
    assert [(len(part), part["prompt"][0]) for part in loaded.values()] == [
        (20 + i, PAIRS[i]["prompt"]) for i in range(3)
    ]
    assert Files(validation=str(folder)).load("validation")["prompt"][:] == loaded["validation"]["prompt"][:]


def test_splits_of_a_saved_data_set_are_told_by_names(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list(PAIRS[i : i + 20]) for i, name in enumerate(("train", "val", "test"))}
    path = str(tmp_path / "saved")
    datasets.DatasetDict(parts).save_to_disk(path)
    source = Files(train=path)
    for i, split in enumerate(("train", "validation", "test")):
        assert source.load(split)["prompt"][:] == [row["prompt"] for row in PAIRS[i : i + 20]]  # type: ignore[arg-type,index]
    assert len(rows_of(path, train_split="val")) == 20
    with pytest.raises(
        ValueError, match=r"saved has the splits \['train', 'val', 'test'\], but no 'none': set train_split"
    ):
        rows_of(path, train_split="none")
    (tmp_path / "saved" / "train" / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match=r"saved cannot be opened as a saved data set"):
        rows_of(path)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl.gz", "saved", "splits"])
def test_a_slice_takes_as_much_of_local_data_as_of_the_hubs(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    if name == "splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)}).save_to_disk(path)
    else:
        write(tmp_path / name, PAIRS)
    prompts = [row["prompt"] for row in PAIRS]
    for slice_, expected in (("[:10]", prompts[:10]), ("[-25%:]", prompts[-12:]), ("[40:1_000]", prompts[40:])):
        source = Files(train=path, train_split=f"train{slice_}", validation_size=0)
        assert source.load("train")["prompt"][:] == expected  # type: ignore[index]
    held = Files(train=path, train_split="train[:10]", validation_size=4)
    parts = [held.load(split)["prompt"][:] for split in ("train", "validation")]  # type: ignore[arg-type,index]
    assert (len(parts[0]), sorted(parts[0] + parts[1])) == (6, sorted(prompts[:10]))
    with pytest.raises(ValueError, match=r"one slice of rows or percentages"):
        Files(train=path, train_split="train[:ten]").load("train")
    with pytest.raises(ValueError, match=r"of 48 rows holds none"):
        Files(train=path, train_split="train[48:]").load("train")
    with pytest.raises(ValueError, match=r"A stream has no slices.*train_split"):
        Files(train=path, train_split="train[:10]").stream("train")


def test_saved_data_sets_are_read_whatever_format_they_were_saved_in(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{**PAIRS[0], "n": 1}]).with_format("torch").save_to_disk(tmp_path / "saved")
    assert rows_of(str(tmp_path / "saved"))[0]["prompt"] == PAIRS[0]["prompt"]


def test_folders_and_lists_join_files_of_different_formats(tmp_path: Path, said: list[str]) -> None:
    folder = tmp_path / "folder"
    first, second = write(folder / "a.csv", PAIRS[:2]), write(folder / "b.jsonl", CHATS[:1])
    for location in (str(folder), [first, second], f"{folder}/*"):
        read = rows_of(location)
        assert [sorted(row) for row in read] == [["prompt", "reference", "response"]] * 2 + [["messages"]]
    assert said[0] == (
        f"{folder}: 2 rows, prompt from 'prompt', response from 'completion'; 1 conversation, messages from 'messages'."
    )


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (
            ("train.jsonl", "more.jsonl"),
            "train",
            r"more\.jsonl tells no split, but that of .*train\.jsonl does",
        ),
        (("train_test.jsonl",), "train", r"The name of train_test\.jsonl tells train and test"),
        (("val.jsonl", "test.jsonl"), "train", r"No file in the folder .* is named as the train split"),
        (("a.md",), "train", r"There is no data file in the folder"),
    ],
)
def test_folders_that_leave_open_what_is_meant_are_refused(
    names: tuple[str, ...], split: str, message: str, tmp_path: Path
) -> None:
    for name in names:
        write(tmp_path / "folder" / name, PAIRS)
    with pytest.raises(ValueError, match=message):
        rows_of(str(tmp_path / "folder"), split)


@pytest.mark.parametrize(("size", "held_out"), [(19, 0), (20, 1), (48, 3), (10_001, 500)])
def test_a_share_is_held_out_where_there_is_no_validation(
    size: int, held_out: int, tmp_path: Path, said: list[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": str(i), "completion": "a"} for i in range(size)])
    source = Files(train=path)
    train, validation = (source.load(split) for split in ("train", "validation"))  # type: ignore[arg-type]
    parts = [*train["prompt"][:], *(validation["prompt"][:] if validation is not None else [])]  # type: ignore[index]
    assert sorted(map(int, parts)) == list(range(size))
    assert len(train) == size - held_out  # type: ignore[arg-type]
    line = f"{path}: {held_out} of {size} rows are held out for validation. Set validation_size: 0 to train on all."
    few = f"{path}: none of so few rows ({size}) is held out, so there is no validation loss."
    assert said[1:] == [line if held_out else f"{few} Set validation_size: 2 for two of them."]
    assert len(rows_of(path)) == size
    given = Files(train=path, validation=write(tmp_path / "b.jsonl", PAIRS))
    assert len(given.load("train")) == size  # type: ignore[arg-type]


def test_validation_split_of_the_hub_goes_before_holding_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        if name == "org/none" and split != "train":
            raise ValueError(f"Unknown split {split!r}. Should be one of ['train'].")
        return datasets.Dataset.from_list(PAIRS if split == "train" else PAIRS[:7])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name, sizes in {"org/name": (48, 7, 7), "org/none": (45, 3, None)}.items():
        source = Files(train=name)
        loaded = [source.load(split) for split in ("train", "validation", "test")]  # type: ignore[arg-type]
        assert tuple(part and len(part) for part in loaded) == sizes
    with pytest.raises(ValueError, match=r"'org/none' cannot be loaded with split='validation': Unknown split"):
        Files(validation="org/none").load("validation")


@pytest.mark.parametrize(("size", "held_out"), [(5, 5), (0.25, 12), (0, None), ("auto", 7)])
def test_a_given_validation_size_goes_before_a_file_beside(size: Any, held_out: int | None, tmp_path: Path) -> None:
    beside = [{"prompt": f"Beside {i}", "completion": "a"} for i in range(7)]
    for name, rows in (("train", PAIRS), ("validation", beside)):
        write(tmp_path / "folder" / f"{name}.jsonl", rows)
    source = Files(train=str(tmp_path / "folder"), validation_size=size)
    train, validation = (source.load(split) for split in ("train", "validation"))  # type: ignore[arg-type]
    assert (validation and len(validation)) == held_out
    prompts = [*train["prompt"][:], *(validation["prompt"][:] if validation else [])]  # type: ignore[index]
    assert sorted(prompts) == sorted(row["prompt"] for row in [*PAIRS, *(beside if size == "auto" else [])])
