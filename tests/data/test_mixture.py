"""Mixtures: exact shares, every example as often as any other of its source, and the same at each load."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.data_fixtures import InMemory, isolate_cache, make_tokenizer, rows

from milora_lightning.data import Commonsense, Files, Mixture, SFTDataModule, tokenize_dataset
from milora_lightning.data.mixture import exact_shares
from milora_lightning.metrics import AnswerAccuracy


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_cache(monkeypatch, tmp_path)


def source(name: str, count: int) -> InMemory:
    return InMemory(train=[(f"{name}{i}", "a") for i in range(count)], test=[(f"{name} test", "a")])


def prompts(mixture: Mixture, split: Any = "train") -> list[str]:
    dataset = mixture.load(split)
    assert dataset is not None
    return dataset["prompt"][:]


def test_without_weights_all_examples_come_once() -> None:
    mixture = Mixture([source("a", 3), source("b", 2)])
    assert prompts(mixture) == ["a0", "a1", "a2", "b0", "b1"]
    assert prompts(mixture, "test") == ["a test", "b test"]
    assert mixture.load("validation") is None


@pytest.mark.parametrize(("weights", "size", "shares"), [([3, 1], None, (30, 10)), ([0.5, 0.5], 7, (4, 3))])
def test_weights_are_shares_of_an_epoch(weights: list[float], size: int | None, shares: tuple[int, int]) -> None:
    mixture = Mixture([source("a", 8), source("b", 32)], weights, size)
    read = prompts(mixture)
    assert Counter(text[0] for text in read) == dict(zip("ab", shares, strict=True))
    for name, count in (("a", 8), ("b", 32)):
        times = Counter(text for text in read if text[0] == name)
        often = [times.get(f"{name}{i}", 0) for i in range(count)]
        assert max(often) - min(often) <= 1
    assert prompts(mixture) == read
    assert mixture.load("train")._fingerprint == mixture.load("train")._fingerprint  # type: ignore[union-attr]
    assert prompts(Mixture(mixture.sources, weights, size, seed=1)) != read
    assert prompts(mixture, "test") == ["a test", "b test"]  # evaluations are of all examples


@pytest.mark.parametrize("size", [1, 2, 3, 10, 999])
def test_shares_sum_up_and_are_exact_to_one(size: int) -> None:
    weights = [0.1, 0.2, 0.3, 0.7]
    shares = exact_shares(weights, size)
    assert sum(shares) == size
    assert all(abs(share - weight / 1.3 * size) < 1 for share, weight in zip(shares, weights, strict=True))


def test_kinds_of_rows_can_be_mixed(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    (tmp_path / "b.txt").write_text("Once")
    files = [Files(train=str(tmp_path / name)) for name in ("a.jsonl", "b.txt")]
    dataset = Mixture([*files, source("c", 1)], [1, 1, 2]).load("train")
    assert [sorted(key for key, text in row.items() if text) for row in dataset] == [  # type: ignore[union-attr]
        ["messages"],
        ["text"],
        ["prompt", "response"],
    ]


def test_prompts_of_a_mixture_are_tokenized_as_by_themselves() -> None:
    tokenizer, parts = make_tokenizer(), [InMemory(train=rows(4)), InMemory(train=rows(6)[4:])]
    mixed = tokenize_dataset(Mixture(parts).load("train"), tokenizer, "plain")
    assert (
        mixed["input_ids"][:]
        == tokenize_dataset(InMemory(train=rows(6)).load("train"), tokenizer, "plain")["input_ids"][:]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": []}, "has no sources"),
        ({"weights": [1.0]}, r"one positive number for each of the 2 sources"),
        ({"weights": [1.0, 0.0]}, r"one positive number"),
        ({"weights": [1.0, float("nan")]}, r"one positive number"),
        ({"size": 3}, r"size=3 must be at least 1 and needs weights"),
        ({"weights": [1.0, 1.0], "size": 0}, r"size=0 must be at least 1 and needs weights"),
    ],
)
def test_impossible_mixtures_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(**{"sources": [source("a", 1), source("b", 1)], **arguments})


def test_source_without_training_data_is_named() -> None:
    with pytest.raises(ValueError, match=r"A source of the mixture has no train data: Files"):
        Mixture([source("a", 1), Files()]).load("train")


def test_answers_are_scored_only_if_all_sources_score_alike() -> None:
    assert isinstance(Mixture([source("a", 1), Files()]).metric(), AnswerAccuracy)
    assert Mixture([Files(), Commonsense()]).metric() is None


def test_data_module_reads_mixtures() -> None:
    data = SFTDataModule(Mixture([source("a", 4), source("b", 4)], [1, 3], 8), make_tokenizer(), "plain", batch_size=4)
    data.setup("fit")
    assert Counter(text[0] for text in data.examples("train")["instruction"]) == {"a": 2, "b": 6}
