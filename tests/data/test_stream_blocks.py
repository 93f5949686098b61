"""What a run reads of a stream in which it goes on, and where a row is that cannot be encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import pytest
from helpers.data_fixtures import make_tokenizer

from milora_lightning.data.streaming.encoding import StreamEncoder
from milora_lightning.data.streaming.loading import StreamedBatches
from milora_lightning.data.streaming.places import Place
from milora_lightning.data.streaming.rows import RowStream

SIZE = 6


def numbers(skip: int) -> Iterator[Any]:
    return (None if number < skip else {"number": number} for number in range(SIZE))


def encode(rows: Sequence[dict[str, Any]], indices: Sequence[int]) -> list[dict[str, Any]]:
    """The last two rows have nothing to learn."""
    return [{"input_ids": [row["number"]], "spans": [0, 1]} for row in rows if row["number"] < SIZE - 2]


@pytest.mark.parametrize("record", [0, SIZE - 2, SIZE])
def test_a_run_may_go_on_where_nothing_of_the_epoch_is_left_to_learn(record: int) -> None:
    batches = StreamedBatches(
        RowStream([numbers]), encode, lambda rows: [row["input_ids"][0] for row in rows], buffer=SIZE, batch_size=2
    )
    groups = islice(batches.batches(Place(0, record=record, block=int(record > 0))), 2)
    read = [batch for group in groups for batch, _ in group]
    assert [len(batch) for batch in read] == [2, 2]
    assert set(chain.from_iterable(read)) <= set(range(SIZE - 2))


def test_rows_are_counted_from_the_beginning_of_the_data_even_if_the_first_are_held_out() -> None:
    encoder = StreamEncoder(make_tokenizer(), "plain", "", 32, "assistant", False, False, only_texts=True, passed=5)
    with pytest.raises(ValueError, match="Row 8 of the train data is a prompt"):
        encoder([{"text": "A text."}, {"prompt": "Ask.", "response": "Answer."}], [1, 2])
