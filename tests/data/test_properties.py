"""What holds of any data: lengths, borders, masks and shares, for inputs that hypothesis makes up."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data_fixtures import InMemory, isolate_cache, make_tokenizer, rows
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from milora_lightning.data import (
    Collator,
    EvaluationSampler,
    Files,
    LengthGroupedSampler,
    PromptCollator,
    SFTDataModule,
)
from milora_lightning.data.batches.batching import learned_spans
from milora_lightning.data.batches.budget import TokenBudgetSampler
from milora_lightning.data.batches.packing import PackingCollator, pack
from milora_lightning.data.batches.resuming import Resumption, _digest, _warn_of_other_data
from milora_lightning.data.batches.sampling import Position
from milora_lightning.data.encoding.examples import encode
from milora_lightning.data.encoding.truncation import join
from milora_lightning.data.mixture import draw_indices, exact_shares
from milora_lightning.data.reading.records import read_records
from milora_lightning.data.reading.rows import checked_rows
from milora_lightning.data.slices import sliced
from milora_lightning.data.validation_size import held_out_examples
from milora_lightning.utils.errors import MiLoRAError

few = settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
ids = st.lists(st.integers(5, 60), max_size=12)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)
# Letters of several scripts, marks, controls, pairs of surrogates as one character; no lone ones, which are refused.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
TOKENIZER = make_tokenizer()


@few
@given(ids, ids, st.integers(2, 20), st.sampled_from([None, 1]), st.integers(0, 6))
@example([5, 6, 7, 8], [9], 3, None, 2)  # a head that would leave no room
@example([5, 6, 7, 8], [9], 3, 1, 0)  # none, beside a BOS token
@example([5, 6, 7, 8], [9], 4, 1, 2)
def test_what_is_joined_keeps_the_response_and_the_ends_of_the_prompt(
    prompt: list[int], response: list[int], most: int, bos: int | None, head: int
) -> None:
    prompt = [*([bos] if bos is not None else []), *prompt]
    head = min(head, len(prompt))
    joined, length = join(prompt, response, most, bos, head)
    assert len(joined) == min(most, len(prompt) + min(len(response), most - 1))
    assert joined[length:] == response[: most - 1]
    kept = joined[:length]
    if len(kept) < len(prompt):
        first = head if 0 < head < length else int(bos is not None)  # the head, if it leaves room for one token more
        assert kept == [*prompt[:first], *prompt[len(prompt) - length + first :]]
    else:
        assert kept == prompt


@few
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4), st.integers(2, 60), st.booleans())
@example([("Add", "1 2", "3")], 60, False)
def test_any_text_is_encoded_with_its_border_and_decoded_again(
    rows: list[tuple[str, str, str]], most: int, whole: bool
) -> None:
    batch = {name: [row[i] for row in rows] for i, name in enumerate(("prompt", "input", "response"))}
    columns = encode(batch, range(len(rows)), TOKENIZER, "plain", "", most, train_on_inputs=whole)
    examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    answered = [row for row in rows if row[2].strip()]
    assert [each["reference"] for each in examples] == [response for _, _, response in answered]
    for each, (prompt, more, response) in zip(examples, answered, strict=True):
        tokens, border = each["input_ids"], each["prompt_length"]
        assert len(tokens) == each["length"] <= most
        assert learned_spans(each) == [(0 if whole else border, len(tokens))]
        assert prompt in each["instruction"] + "\n"
        assert more in each["instruction"] + "\n"
        if not each["truncated"]:
            assert TOKENIZER.decode(tokens[border:]) == response + TOKENIZER.eos_token
            assert TOKENIZER.decode(tokens[:border]) == TOKENIZER.bos_token + each["prompt"]


def test_references_and_tasks_are_those_of_their_rows() -> None:
    """A reference that is given is what answers are compared with, not the response that is learned."""
    batch = {
        "prompt": ["a", "b", "c"],
        "response": ["1", " ", "3"],
        "reference": ["x", "y", ""],
        "task": ["s", "t", "u"],
    }
    columns = encode(batch, range(3), TOKENIZER, "plain", "", 50)
    assert [columns[name] for name in ("instruction", "reference", "task")] == [["a", "c"], ["x", "3"], ["s", "u"]]


@pytest.mark.parametrize(("number", "answered"), [(None, [0, 1, 2, 3, 4]), (0, []), (2, [0, 1]), (9, [0, 1, 2, 3, 4])])
def test_none_answers_all_and_zero_none(
    number: int | None, answered: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate_cache(monkeypatch, tmp_path)
    module = SFTDataModule(
        InMemory(validation=rows(5), test=rows(5)),
        TOKENIZER,
        template="plain",
        num_generation_examples=number,
        num_test_generation_examples=number,
    )
    for stage, split in (("validate", "validation"), ("test", "test")):
        module.setup(stage)
        assert list(module.answered(split)) == answered


@few
@given(st.text("ab ", min_size=1, max_size=60), st.integers(3, 20))
def test_long_texts_are_cut_without_losing_a_token_or_leaving_one_alone(text: str, most: int) -> None:
    columns = encode({"text": [text]}, [0], TOKENIZER, "plain", "", most)
    whole = encode({"text": [text]}, [0], TOKENIZER, "plain", "", 1000)["input_ids"][0]
    assert [token for piece in columns["input_ids"] for token in piece] == whole
    bare = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert whole == [TOKENIZER.bos_token_id, *bare, TOKENIZER.eos_token_id]
    assert all(2 <= len(piece) <= most for piece in columns["input_ids"])
    assert columns["piece"] == list(range(len(columns["piece"])))
    assert columns["spans"] == [[0, len(piece)] for piece in columns["input_ids"]]


@few
@given(
    st.lists(st.tuples(ids, ids.filter(bool)), min_size=1, max_size=5), st.integers(1, 9), st.booleans(), st.booleans()
)
def test_collated_are_the_tokens_once_with_their_masks(
    rows: list[tuple[list[int], list[int]]], multiple: int, one_row: bool, whole: bool
) -> None:
    """With ``whole``, all tokens are learned; the first of an example has nothing before it in a packed row."""
    rows = [([1, *prompt], response) for prompt, response in rows]
    examples: list[dict[str, Any]] = [
        {
            "input_ids": prompt + response,
            "prompt_length": len(prompt),
            "spans": [0 if whole else len(prompt), len(prompt + response)],
        }
        for prompt, response in rows
    ]
    batch = Collator(0, multiple)(examples)
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0
    assert width - max(map(len, (e["input_ids"] for e in examples))) < multiple
    for row, (prompt, response) in enumerate(rows):
        mask, padding = batch["attention_mask"][row].bool(), width - len(prompt + response)
        assert batch["input_ids"][row].tolist() == prompt + response + [0] * padding
        assert mask.tolist() == [True] * len(prompt + response) + [False] * padding
        unlearned = prompt if whole else [-100] * len(prompt)
        assert batch["labels"][row].tolist() == unlearned + response + [-100] * padding
    texts = dict.fromkeys(("prompt", "instruction", "reference", "task"), "")
    prompts = PromptCollator(0, multiple)([{**each, **texts} for each in examples])
    for tokens, mask, (prompt, _) in zip(prompts["input_ids"], prompts["attention_mask"], rows, strict=True):
        assert tokens.tolist() == [0] * (len(tokens) - len(prompt)) + prompt
        assert mask.tolist() == [0] * (len(tokens) - len(prompt)) + [1] * len(prompt)

    packed = PackingCollator(0, multiple, one_row)([examples, examples[:1]])
    starts = (packed["position_ids"] == 0).nonzero().tolist()
    assert packed["lengths"].sum() == sum(len(e["input_ids"]) for e in [*examples, *examples[:1]])
    found = []
    for k, (row, start) in enumerate(starts):
        after = starts[k + 1][1] if k + 1 < len(starts) and starts[k + 1][0] == row else packed["input_ids"].shape[1]
        assert packed["position_ids"][row, start:after].tolist() == list(range(after - start))
        tokens, labels = (packed[name][row, start:after].tolist() for name in ("input_ids", "labels"))
        if any(tokens):
            found.append((tokens, labels))
        else:  # the padding of a row, all of it together
            assert set(labels) == {-100}
            assert after == packed["input_ids"].shape[1]
            assert start == 0 or packed["input_ids"][row, start - 1] != 0
    learned = [[-100, *prompt[1:]] if whole else [-100] * len(prompt) for prompt, _ in rows]
    expected = [(prompt + response, first + response) for (prompt, response), first in zip(rows, learned, strict=True)]
    assert found == [*expected, *expected[:1]]


@few
@given(lengths, st.integers(0, 9), st.integers(40, 90))
def test_packed_rows_hold_each_example_once_and_no_two_of_them_fit_into_one(
    sizes: list[int], seed: int, capacity: int
) -> None:
    rows = pack(sizes, capacity, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    filled = sorted(sum(sizes[i] for i in row) for row in rows)
    assert filled[-1] <= capacity
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


class Alone:
    trainer = None


@few
@example([3, 1, 2, 5, 4, 1, 7], 2, 1, 0, 0, False, True)
@example([3, 1, 2, 5, 4, 1, 7], 3, 2, 1, 2, False, False)
@example([*range(1, 30)], 4, 2, 1, 1, True, True)
@given(
    lengths, st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 60), st.booleans(), st.booleans()
)
def test_every_example_comes_once_on_any_ranks_from_any_point_on(
    sizes: list[int], ranks: int, batch: int, epoch: int, consumed: int, budgeted: bool, grouped: bool
) -> None:
    """Those before the point never, those after it once, but for what makes the ranks' shares equal."""

    def sampler(rank: int, ranks: int) -> LengthGroupedSampler:
        options = {"seed": 3, "num_replicas": ranks, "rank": rank, "group_by_length": grouped}
        if budgeted:
            return TokenBudgetSampler(Resumption(Alone()), sizes, 44, **options)
        return LengthGroupedSampler(sizes, batch, **options)

    def examples(shares: list[list[Any]]) -> list[list[int]]:
        return [[i for batch in share for i in batch] if budgeted else share for share in shares]

    group = ranks if budgeted else batch * ranks
    begin = Position(epoch, 3, group, group_by_length=grouped)
    (order,) = [list(sampler(0, 1).share(begin))]
    consumed %= len(order) + 1
    start = Position(epoch, 3, group, consumed, group_by_length=grouped)
    shares = [list(sampler(rank, ranks).share(start)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    rest = Counter(i for share in examples([order[consumed:]]) for i in share)
    found = Counter(i for share in examples(shares) for i in share)
    assert rest <= found
    assert (found - rest).total() < ranks
    assert Counter(i for share in examples([order]) for i in share) == Counter(range(len(sizes)))


@pytest.mark.parametrize("end", [None, 7, 11, 20])
@pytest.mark.parametrize("consumed", [0, 3, 7, 11])
def test_an_epoch_that_ends_early_has_what_comes_before_its_end(consumed: int, end: int | None) -> None:
    sizes = [5, 1, 9, 3, 3, 8, 2, 7, 4, 6, 1]
    samplers = [LengthGroupedSampler(sizes, 2, seed=3, num_replicas=3, rank=rank) for rank in range(3)]
    start = Position(1, 3, 6, consumed, end)
    rest = samplers[0].order(start)[consumed:end].tolist()
    shares = [list(sampler.share(start)) for sampler in samplers]
    assert start.remaining(len(sizes)) == len(rest)
    assert [share[: len(rest[rank::3])] for rank, share in enumerate(shares)] == [rest[rank::3] for rank in range(3)]
    assert {len(share) for share in shares} == {math.ceil(len(rest) / 3)}
    other = Position(1, 3, 6, consumed, end, group_by_length=False)  # as the run began
    assert samplers[0].order(other).tolist() != samplers[0].order(start).tolist()


@few
@given(lengths, lengths)
def test_a_resumed_run_says_that_its_data_are_others_wherever_their_lengths_are(
    one: list[int], other: list[int]
) -> None:
    """Also where there are as many examples, and as many tokens, in another order."""
    for now in (other, one, one[::-1]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _warn_of_other_data(_digest(one), np.asarray(now), epoch=3)
        assert bool(caught) == (now != one)
        assert all("epoch 3 continues in another order" in str(each.message) for each in caught)


@few
@given(st.integers(1, 30), st.integers(1, 6))
def test_evaluation_has_each_example_once_and_equal_shares(size: int, ranks: int) -> None:
    shares = [list(EvaluationSampler(list(range(size)), ranks, rank)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for i in share if i >= 0) == list(range(size))


@few
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 9)), min_size=1, max_size=5), st.integers(0, 90))
def test_mixtures_have_exact_shares_drawn_evenly(parts: list[tuple[int, float]], size: int) -> None:
    counts, weights = zip(*parts, strict=True)
    shares = exact_shares(weights, size)
    assert sum(shares) == size
    assert all(
        abs(share - weight / math.fsum(weights) * size) < 1.001 for share, weight in zip(shares, weights, strict=True)
    )
    drawn = Counter(draw_indices(counts, shares, seed=1))
    start = 0
    for count, share in zip(counts, shares, strict=True):
        often = [drawn[i] for i in range(start, start + count)]
        assert sum(often) == share
        assert max(often) - min(often) <= 1
        start += count
    assert drawn.total() == size


def test_equal_sources_of_a_mixture_are_not_drawn_alike() -> None:
    one, other = draw_indices([50], [20], 0), draw_indices([50, 50], [20, 20], 0)
    assert other[:20] == one
    assert [i - 50 for i in other[20:]] != one
    assert draw_indices([50], [20], 1) != one


@few
@given(st.integers(1, 400), st.integers(-120, 120), st.integers(-120, 120))
def test_slices_by_percentages_meet_without_gap_or_overlap(rows: int, edge: int, number: int) -> None:
    share = abs(edge) % 101
    nearest = round(share * rows / 100)
    before, after = f"train[:{share}%]", f"train[{share}%:]"
    parts = []
    for name in (before, after):
        try:
            parts += sliced(name, rows)
            assert len(parts) in (nearest, rows)
        except MiLoRAError:
            assert nearest in (0, rows)
    assert parts == list(range(rows))
    if wanted := list(range(rows))[number:]:
        assert list(sliced(f"train[{number}:]", rows)) == wanted


@few
@given(st.integers(1, 2000), st.floats(0.001, 0.99))
def test_a_share_that_is_held_out_is_rounded_up(size: int, share: float) -> None:
    assume(math.ceil(share * size) < size)
    held_out = held_out_examples(share, size)
    assert 0 <= held_out - share * size < 1
    assert held_out >= 1


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(["instruction", "input", "output", "messages", "text", "role", "content", "x"]) | texts
FIELDS = {"prompt": "instruction", "input": "input", "response": "output", "reference": "output", "task": None}


@settings(few, max_examples=120)
@given(st.lists(st.dictionaries(fields, values, max_size=4) | values, max_size=4), st.booleans())
def test_json_of_any_content_gives_rows_or_one_sentence_with_the_file(records: list[Any], lines: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        written = [json.dumps(record) for record in records]
        path.write_text("\n".join(written) if lines else f"[{', '.join(written)}]", encoding="utf-8")
        sentence, rows = str(path), []
        try:
            rows = list(checked_rows(read_records(str(path)), str(path), FIELDS, Files.convert, ""))
        except MiLoRAError as error:
            sentence = str(error)
        assert str(path) in sentence
        assert all(isinstance(value, str) for row in rows for value in row.values())


@settings(few, max_examples=40)
@given(st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=5))
def test_texts_in_json_are_read_as_they_were_written(pairs: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        records = [{"instruction": prompt, "output": response} for prompt, response in pairs]
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        rows = list(checked_rows(read_records(str(path)), str(path), FIELDS, Files.convert, ""))
        assert [(row["prompt"], row["response"]) for row in rows] == pairs


def test_tokenizing_is_not_read_from_the_cache_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each setting that changes tokens or spans, one after the other on the same data."""
    from milora_lightning.data import tokenize_dataset

    isolate_cache(monkeypatch, tmp_path)
    row = {"instruction": "Add the numbers 1 and 2.", "output": "The sum is 3."}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    data = Files(str(tmp_path / "train.jsonl")).load("train")
    assert data.cache_files  # on disk, where what is made of it is kept as well
    plain = make_tokenizer()
    other = make_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    options: list[dict[str, Any]] = [
        {},
        {"max_length": 6},
        {"prompt_suffix": " A:"},
        {"train_on_inputs": True},
        {"template": "alpaca"},
        {"template": "chat"},
        {"template": "chat", "tokenizer": other},
        {"tokenizer": make_tokenizer(adds_specials=False)},
    ]
    found = [
        str([row["input_ids"], row["spans"]])
        for each in options
        for row in tokenize_dataset(data, **{"tokenizer": plain, "template": "plain", **each})
    ]
    assert len(set(found)) == len(options)
