"""A stream gives the examples that the data would give at once, in bounded memory, and goes on where it was."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers.data_fixtures import make_tokenizer
from helpers.models import quiet_trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from milora_lightning.data import Files, Mixture, SFTDataModule, WordProblems

pytestmark = [
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]
SIZE = 53


def prompts(folder: Path, size: int = SIZE, name: str = "rows.jsonl") -> str:
    rows = [{"prompt": f"What is {i}?" + " Well?" * (i * 7 % 5), "completion": f"It is {i}."} for i in range(size)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def conversations(folder: Path) -> str:
    path = folder / "talks.jsonl"
    turns = [
        [("user", f"Is {i} even?"), ("assistant", "Yes." if i % 2 == 0 else "No.")] * (1 + i % 3) for i in range(40)
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(folder: Path) -> str:
    path = folder / "texts.csv"
    path.write_text("text\n" + "".join(f"{'words and ' * (i % 9)}words {i}\n" for i in range(30)))
    return str(path)


class Data(SFTDataModule):
    """The data of one of several ranks."""

    def __init__(self, source: Any, ranks: tuple[int, int] = (1, 0), streaming: bool = True, **options: Any) -> None:
        defaults = {"max_length": 48, "batch_size": 2, "num_generation_examples": 0, "template": "plain"}
        super().__init__(source, make_tokenizer(), streaming=streaming, **{**defaults, **options})
        self.ranks = ranks

    def _rank(self) -> dict[str, int]:
        return {"num_replicas": self.ranks[0], "rank": self.ranks[1]}


def examples(batch: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The token ids and labels of each example, of packed rows too."""
    found: list[tuple[Any, ...]] = []
    for row in range(len(batch["input_ids"])):
        ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        if "position_ids" in batch:
            length = int(batch["lengths"][row])
            starts = [i for i in range(length) if batch["position_ids"][row][i] == 0] + [length]
            spans = list(itertools.pairwise(starts))
        else:
            spans = [(0, int(batch["attention_mask"][row].sum()))]
        found += [(tuple(ids[a:b]), tuple(labels[a + 1 : b])) for a, b in spans]
    return found


def epochs(data: SFTDataModule, number: int) -> list[list[tuple[Any, ...]]]:
    """So many batches."""
    batches = iter(data.train_dataloader())
    return [examples(next(batches)) for _ in range(number)]


def at_once(source: Any, **options: Any) -> Counter[Any]:
    data = Data(source, streaming=False, **options)
    data.setup("fit")
    return Counter(example for batch in data.train_dataloader() for example in examples(batch))


def seen(batches: list[list[Any]]) -> Counter[Any]:
    return Counter(example for batch in batches for example in batch)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("write", [prompts, conversations, texts])
def test_examples_are_those_of_the_data_at_once(write: Any, packing: bool, tmp_path: Path) -> None:
    source = Files(write(tmp_path), validation_size=0)
    options = {"packing": packing, "batch_size": 1, "shuffle_buffer": 10, "template": "auto", "max_length": 96}
    wanted = at_once(source, **options)
    data = Data(source, **options)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    got: Counter[Any] = Counter()
    orders = []
    while got.total() < 2 * wanted.total():  # a batch of one row leaves nothing over, so that an epoch ends with it
        batch = examples(next(batches))
        got.update(batch)
        orders += batch
    assert got == wanted + wanted
    half = wanted.total()
    assert orders[:half] != orders[half:]  # another order in the second epoch
    assert [ids for ids, _ in orders] != sorted((ids for ids, _ in orders), key=len)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["files", "table"])
def test_ranks_and_workers_share_the_records(kind: str, packing: bool, tmp_path: Path) -> None:
    class Table:
        """A data set of ``datasets`` in several shards, which it would divide among workers by itself."""

        def load(self, split: str) -> Any:
            if split == "train":
                rows = datasets.load_dataset("json", data_files=prompts(tmp_path, 64), split="train")
                return rows.rename_column("completion", "response").to_iterable_dataset(num_shards=4)
            return None

    source = Files(prompts(tmp_path, 64), validation_size=0) if kind == "files" else Table()
    options = {
        "packing": packing,
        "shuffle_buffer": 16,
        "num_workers": 2,
        "batch_size": 2,
    }
    wanted = at_once(Files(prompts(tmp_path, 64), validation_size=0))
    ranks = []
    for rank in range(2):
        data = Data(source, (2, rank), **options)
        data.setup("fit")
        ranks.append(epochs(data, 12 if packing else 16))
    got = seen([batch for rank in ranks for batch in rank])
    if not packing:
        assert got == wanted  # 16 batches of 2 ranks with 2 examples: each once
    assert max(got.values()) == 1
    assert not seen(ranks[0]) & seen(ranks[1])


class Recorder(LightningModule):
    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at = fail_at
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(self.batches) == self.fail_at:
            raise ConnectionError("a step that fails")
        self.batches.append(examples(batch))
        return self.weight.sum()

    def configure_optimizers(self) -> Any:
        self.trainer.estimated_stepping_batches  # noqa: B018  has Lightning make the loader before it restores
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder: Path, data: SFTDataModule, *callbacks: Any, ckpt: Any = None, fail: int | None = None, **o: Any) -> Any:
    module = Recorder(fail)
    options = {"max_steps": 40, "num_sanity_val_steps": 0, "enable_checkpointing": bool(callbacks), **o}
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **options)
    with contextlib.suppress(ConnectionError):
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module.batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_resumed_run_sees_the_batches_of_the_uninterrupted_one(workers: int, packing: bool, tmp_path: Path) -> None:
    """In the first epoch of the data, at its end and in later ones, in and between blocks."""
    source = Files(prompts(tmp_path), validation_size=0)

    def data() -> Data:
        return Data(source, packing=packing, num_workers=workers, batch_size=3, shuffle_buffer=14)

    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1 if not workers else 7)
    whole = fit(tmp_path, data(), save)
    assert len(whole) == 40
    assert len({str(batch) for batch in whole}) > 35
    paths = [path for path in tmp_path.glob("*.ckpt") if int(path.stem.partition("=")[2]) % 3 == 1]
    assert len(paths) >= 2
    for path in paths:
        done = torch.load(path, weights_only=True)["global_step"]
        assert fit(tmp_path, data(), ckpt=path) == whole[done:]


TRAINERS: dict[str, dict[str, Any]] = {
    "limit": {"limit_train_batches": 5},
    "accumulate": {"accumulate_grad_batches": 2, "max_steps": 20},
    "reload": {"limit_train_batches": 5, "reload_dataloaders_every_n_epochs": 1},
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_epochs_of_the_trainer_go_on_in_the_stream(trainer: str, tmp_path: Path) -> None:
    source, options = Files(prompts(tmp_path), validation_size=0), TRAINERS[trainer]
    whole = fit(tmp_path, Data(source, shuffle_buffer=14))
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=6)
    assert fit(tmp_path, Data(source, shuffle_buffer=14), save, **options) == whole
    for path in tmp_path.glob("*.ckpt"):
        done = torch.load(path, weights_only=True)["global_step"] * options.get("accumulate_grad_batches", 1)
        assert fit(tmp_path, Data(source, shuffle_buffer=14), ckpt=path, **options) == whole[done:]


def test_ended_run_can_be_prolonged_and_a_failed_step_is_repeated(tmp_path: Path) -> None:
    source = Files(prompts(tmp_path), validation_size=0)
    whole = fit(tmp_path, Data(source, shuffle_buffer=14))
    first = fit(tmp_path, Data(source, shuffle_buffer=14), ModelCheckpoint(tmp_path, "end"), max_steps=13)
    assert first + fit(tmp_path, Data(source, shuffle_buffer=14), ckpt=tmp_path / "end.ckpt") == whole
    save = ModelCheckpoint(tmp_path, "failed", save_on_exception=True, every_n_epochs=9)
    first = fit(tmp_path, Data(source, shuffle_buffer=14), save, fail=11)
    (path,) = tmp_path.glob("failed*.ckpt")
    assert first + fit(tmp_path, Data(source, shuffle_buffer=14), ckpt=path) == whole


def test_other_ranks_and_batches_go_on_where_the_run_was(tmp_path: Path) -> None:
    """What is left of the block is shared out anew: nothing twice, nothing left out."""
    source = Files(prompts(tmp_path, 60), validation_size=0)
    wanted = at_once(source)
    first = fit(tmp_path, Data(source, shuffle_buffer=20), ModelCheckpoint(tmp_path, "a"), max_steps=7)
    ranks = [
        fit(tmp_path, Data(source, (2, rank), batch_size=3, shuffle_buffer=20), ckpt=tmp_path / "a.ckpt", max_steps=14)
        for rank in range(2)
    ]
    got = seen(first) + seen(ranks[0]) + seen(ranks[1])
    assert got.total() == 14 + 7 * 6
    assert not got - wanted  # where each is once


class Counted:
    """Many rows, which are counted as they are read."""

    def __init__(self, size: int, broken: int | None = None) -> None:
        self.size = size
        self.broken = broken
        self.read = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        for i in range(self.size):
            self.read += 1
            yield {"prompt": f"What is {i}?", "response": ["no text"] if i == self.broken else f"It is {i}."}

    def load(self, split: str) -> Any:
        if split != "train":
            return None
        return datasets.IterableDataset.from_generator(self.rows)


class Itself(Counted):
    """The same without ``datasets``, which would count in a copy."""

    def __init__(self, size: int, broken: int | None = None, first: int = 0) -> None:
        super().__init__(size, broken)
        self.first = first
        self.counter = self

    def stream(self, split: str) -> Any:
        return self if split == "train" else None

    def __iter__(self) -> Iterator[Any]:
        for i, row in enumerate(self.rows()):
            if i >= self.first:
                yield row

    def skip(self, n: int) -> Any:
        self.first = n
        return self


def test_no_more_is_read_than_is_needed(tmp_path: Path) -> None:
    source = Itself(10**9)
    data = Data(source, shuffle_buffer=50, batch_size=4)
    data.setup("fit")
    assert source.read == 1000  # the beginning, by which the data are known
    source.read = 0
    batches = epochs(data, 30)
    assert 120 <= source.read <= 150
    assert max(seen(batches).values()) == 1


@pytest.mark.parametrize(("where", "workers"), [("file", 1), ("source", 0), ("template", 0)])
def test_broken_record_far_into_the_stream_is_named(where: str, workers: int, tmp_path: Path) -> None:
    if where == "file":
        path = Path(prompts(tmp_path, 1100))
        lines = path.read_text().splitlines()
        lines[1050] = '{"prompt": "a", "completion": ["b"]}'
        path.write_text("\n".join(lines))
        source: Any = Files(str(path), validation_size=7)
        says = r"^The field 'completion' in row 1051 \(the first is row 1\) of .*rows.jsonl holds .*no text"
    elif where == "source":
        source, says = Itself(1100, broken=1050), r"^The column 'response' in row 1051 .* holds"
    else:
        rows = [
            {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "b"}]}
            for i in range(1500)
        ]
        rows[1050]["messages"][0]["role"] = "narrator"
        (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = Files(str(tmp_path / "talks.jsonl"), validation_size=7)
        says = r"row 1051"
    data = Data(source, shuffle_buffer=64, num_workers=workers, batch_size=16)
    data.setup("fit")
    with pytest.raises(ValueError, match=says) as error:
        epochs(data, 99)
    assert "\n" not in str(error.value)


def test_files_in_a_list_follow_each_other(tmp_path: Path) -> None:
    paths = [prompts(tmp_path, size, f"{size}.jsonl") for size in (7, 3)]
    rows = Files(train=paths, validation_size=0).stream("train")
    assert rows is not None
    assert [row["response"] for row in rows] == [f"It is {i}." for size in (7, 3) for i in range(size)]


def test_first_rows_are_held_out(tmp_path: Path) -> None:
    data = Data(Files(prompts(tmp_path, 60), validation_size=10), shuffle_buffer=25, batch_size=1)
    data.setup("fit")
    assert data.examples("validation")["reference"][:] == [f"It is {i}." for i in range(10)]
    wanted = at_once(Files(prompts(tmp_path, 60), validation_size=0))
    got = seen(epochs(data, 50))
    assert not got - wanted
    assert (wanted - got).total() == 10
    share = Data(Files(prompts(tmp_path), validation_size=0.1))
    with pytest.raises(ValueError, match="a share of a stream"):
        share.setup("fit")


def test_splits_beside_and_test_sets_are_found(tmp_path: Path) -> None:
    for name, size in (("train.jsonl", 30), ("validation.jsonl", 4), ("test.jsonl", 5)):
        prompts(tmp_path, size, name)
    data = Data(Files(str(tmp_path)))
    data.setup()
    assert [len(data.examples(split)) for split in ("train", "validation", "test")] == [30, 4, 5]
    sets = {"one": str(tmp_path / "test.jsonl"), "two": str(tmp_path / "validation.jsonl")}
    data = Data(Files(str(tmp_path / "train.jsonl"), test=sets))
    data.setup("test")
    assert Counter(data.examples("test")["task"][:]) == {"one": 5, "two": 4}


@pytest.mark.parametrize("weights", [None, [3, 1]])
def test_mixture_takes_turns(weights: list[float] | None, tmp_path: Path) -> None:
    sources = [
        Files(prompts(tmp_path, 30), validation_size=0),
        Files(conversations(tmp_path), validation_size=0),
    ]
    options = {"batch_size": 1, "shuffle_buffer": 8}
    parts = [at_once(source, **options) for source in sources]
    data = Data(Mixture(sources, weights), **options)
    data.setup("fit")
    if weights is None:
        assert seen(epochs(data, 70)) == parts[0] + parts[1]
        return
    got = seen(epochs(data, 120))
    first = sum(n for example, n in got.items() if example in parts[0])
    assert first == 90  # three turns of four; each example three times
    assert {n for example, n in got.items() if example in parts[0]} == {3}
    assert fit(tmp_path, data, ModelCheckpoint(tmp_path, "a"), max_steps=70) + fit(
        tmp_path, Data(Mixture(sources, weights), **options), ckpt=tmp_path / "a.ckpt", max_steps=120
    ) == fit(tmp_path, Data(Mixture(sources, weights), **options), max_steps=120)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no end": ({"max_epochs": 3, "max_steps": -1}, "needs trainer.max_steps"),
    "epochs": ({"max_epochs": 3}, "trainer.max_epochs is 3"),
    "overfit": ({"overfit_batches": 2}, "overfit_batches does not work"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_trainers_that_cannot_are_refused(case: str, tmp_path: Path) -> None:
    options, says = REFUSED[case]
    source = Itself(100)
    with pytest.raises(ValueError, match=says):
        fit(tmp_path, Data(source), **options)
    assert source.read == 0


def test_sources_that_cannot_are_refused(tmp_path: Path) -> None:
    class Own(Files):
        def load(self, split: Any) -> Any:
            return [{"prompt": "a", "response": "b"}]

    for source, says in (
        (WordProblems(), "WordProblems loads all its data at once"),
        (Own(prompts(tmp_path)), "Own loads all its data at once"),
        (Mixture([Files(prompts(tmp_path))], [1.0], size=9), "size=9"),
    ):
        with pytest.raises(ValueError, match=says):
            Data(source).setup("fit")


def test_streams_go_on_only_as_they_began(tmp_path: Path) -> None:
    source = Files(prompts(tmp_path), validation_size=0)
    fit(tmp_path, Data(source, shuffle_buffer=14), ModelCheckpoint(tmp_path, "a"), max_steps=3)
    path = tmp_path / "a.ckpt"
    for options, says in (
        ({"shuffle_buffer": 15}, "data.shuffle_buffer=14, but here it is 15"),
        ({"num_workers": 2}, "data.num_workers=1, but here it is 2"),
        ({"streaming": False}, "written with data.streaming"),
        ({"max_length": 20}, "holds other examples"),
    ):
        with pytest.raises(ValueError, match=says):
            fit(tmp_path, Data(source, **{"shuffle_buffer": 14, **options}), ckpt=path)
    fit(tmp_path, Data(source, streaming=False), ModelCheckpoint(tmp_path, "b"), max_steps=3)
    with pytest.raises(ValueError, match=r"written without data\.streaming"):
        fit(tmp_path, Data(source), ckpt=tmp_path / "b.ckpt")


def test_kinds_that_the_beginning_does_not_have_are_refused(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "response": "b"}] * 1001
    rows.append({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})

    class Mixed:
        def load(self, split: str) -> Any:
            return datasets.IterableDataset.from_generator(lambda: iter(rows)) if split == "train" else None

    data = Data(Mixed(), shuffle_buffer=100, template="auto")
    data.setup("fit")
    with pytest.raises(ValueError, match="Row 1002 of the train data is a conversation"):
        epochs(data, 999)


def test_nothing_to_learn_ends_the_run(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": "a", "completion": ""}) + "\n" for _ in range(9))
    (tmp_path / "a.jsonl").write_text(rows)
    with pytest.raises(ValueError, match="response to learn from"):
        Data(Files(str(tmp_path / "a.jsonl"))).setup("fit")
    data = Data(Files(prompts(tmp_path, 1), validation_size=0), num_workers=2)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"as many rows as data\.num_workers"):
        epochs(data, 9)


def test_hub_is_read_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, read = [], []

    def rows(size: int) -> Iterator[dict[str, str]]:
        for i in range(size):
            read.append(i)
            yield {"question": f"What is {i}?", "answer": f"It is {i}."}

    def load(name: str, config: Any = None, split: str = "", streaming: bool = False) -> Any:
        asked.append((name, split, streaming))
        if split != "train":
            raise ValueError(f"Bad split: {split}. Available splits: ['train']")
        return Mapped(10**9)

    class Mapped:
        def __init__(self, size: int) -> None:
            self.size = size

        def __iter__(self) -> Iterator[dict[str, str]]:
            return rows(self.size)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = Data(Files("org/name", validation_size=5), shuffle_buffer=20)
    data.setup("fit")
    assert data.examples("validation")["reference"][:] == [f"It is {i}." for i in range(5)]
    assert max(seen(epochs(data, 20)).values()) == 1
    assert {streaming for *_, streaming in asked} == {True}
    assert max(read) < 1100
    with pytest.raises(ValueError, match="validation_size is -1"):
        Data(Files("org/name", validation_size=-1)).setup("fit")
