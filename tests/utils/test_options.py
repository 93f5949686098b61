"""Options that are mistyped, patterns of names, and tables."""

from __future__ import annotations

from typing import Any

import pytest

from milora_lightning.utils.markdown import table
from milora_lightning.utils.patterns import check_parts, check_patterns, ends_in, first_match
from milora_lightning.utils.suggestions import ELSEWHERE, MOST, closest, similar, suggest

OPTIONS = [
    *("--config", "--adapter.r", "--adapter.lora_alpha", "--model.optimizer.lr", "--model.name_or_path"),
    *("--data.batch_size", "--data.eval_batch_size", "--data.max_length", "--data.source.train", "--trainer.devices"),
    *("--trainer.max_steps", "--trainer.max_epochs", "--data.train_on", "positional"),
]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--data.batchsize", ["--data.batch_size"]),  # the same letters
        ("--DATA.Batch-Size", ["--data.batch_size"]),
        ("--lr", ["--model.optimizer.lr"]),  # the same last part
        ("--trainer.max_length", ["--data.max_length"]),
        ("--adapter.rank", ["--adapter.r"]),  # its name elsewhere
        ("--gpus", ["--trainer.devices"]),
        ("--model.max_seq_length", ["--data.max_length"]),
        ("--trainer.max_step", ["--trainer.max_steps", "--trainer.max_epochs"]),  # similar as a whole
        ("--other.evalbatchsizes", ["--data.eval_batch_size"]),  # similar in its last part
        ("--nothing.like.it", []),
        ("--positiona", []),  # suggested are options alone
    ],
)
def test_the_option_that_was_meant_is_found(given: str, meant: list[str]) -> None:
    assert suggest(given, OPTIONS) == meant


def test_of_several_options_that_in_the_same_group_comes_and_at_most_three() -> None:
    names = ["--a.size", "--b.size", "--c.size", "--d.size"]
    assert suggest("--x.size", names) == names[:MOST]
    assert suggest("--b.of.size", [*names, "--b.of.sizes", "--b.of.my.size"]) == ["--b.of.my.size"]


def test_each_name_from_elsewhere_leads_to_one_that_there_is() -> None:
    for ours, theirs in ELSEWHERE.items():
        for name in theirs:
            if name not in ELSEWHERE:
                assert f"--group.{ours}" in suggest(f"--{name}", [f"--group.{each}" for each in ELSEWHERE]), name


def test_similar_names_whatever_their_case() -> None:
    known = ["EarlyStopping", "Timer", "ModelCheckpoint", "early_stop"]
    assert closest("earlystoping", known) == "EarlyStopping"
    assert closest("x", known) is None
    assert similar("Early_Stopping", known) == ["EarlyStopping", "early_stop"]
    assert similar("Early_Stopping", known, 1) == ["EarlyStopping"]


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("q_proj", True),
        ("[qk]_proj", True),
        ("k_proj|q_proj", True),
        ("proj", False),  # only after a dot
        ("self_attn", False),  # not the end
        (r"0\.self_attn\.q_proj", True),
        (r"layers\.0.*", True),
        (r"ayers\.0.*", False),
        (".*", True),
    ],
)
def test_patterns_match_whole_parts_at_the_end_of_a_name(pattern: str, matches: bool) -> None:
    assert ends_in("model.layers.0.self_attn.q_proj", pattern) == matches
    assert first_match({"none": 1, pattern: 2, "(.*)": 3}, "model.layers.0.self_attn.q_proj", 4) == (
        2 if matches else 3
    )
    assert first_match({}, "q_proj", 4) == 4


@pytest.mark.parametrize(
    ("patterns", "whole", "message"),
    [
        ({"[": 1}, False, r"option has the key '\[', which is no regular expression: unterminated"),
        ({"a": 1, "b": 0}, False, "option must be positive for each key, not 0 as for 'b'"),
        ({"a": -0.5}, False, "must be positive for each key, not -0.5"),
        ({"a": 0.5}, True, "option must be a whole number of at least 1 for each key, not 0.5 as for 'a'"),
        ({"a": 0}, True, "whole number"),
        ({"a": 0.5}, False, None),
        ({"a": 1, "b": 2.0}, True, None),
    ],
)
def test_values_by_pattern_are_checked(patterns: dict[str, float], whole: bool, message: str | None) -> None:
    if message is None:
        check_patterns("option", patterns, whole)
    else:
        with pytest.raises(ValueError, match=message):
            check_patterns("option", patterns, whole)


@pytest.mark.parametrize("value", [1, 0, True, [8], [8, 0], [8, 4.0], "12", [], 2.0])
def test_parts_of_a_layer_are_at_least_two(value: Any) -> None:
    for right in (2, 3, [8, 4], (1, 1, 1)):
        check_parts("option", {"qkv": right})
    with pytest.raises(ValueError, match=r"option must have a number of equal parts .* as for 'qkv'"):
        check_parts("option", {"other": 2, "qkv": value})
    with pytest.raises(ValueError, match="no regular expression"):
        check_parts("option", {"(": 2})


def test_cells_of_a_table_stay_in_their_row() -> None:
    assert table(["a", "b"], [["1", "2\n|"], ["", "3"]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        r"| 1 | 2<br>\| |",
        "|  | 3 |",
    ]
