"""Streams without their first rows are the rest of them, and places in data are those after the last step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from types import SimpleNamespace
from typing import Any

import pytest

from milora_lightning.data.batches.resuming import ResumableSampler, Resumption
from milora_lightning.data.streaming.places import Place, StreamPlaces
from milora_lightning.data.streaming.rows import MixedStream, RowStream, weighted_turns


def part(name: str, size: int, makes_none: bool = True) -> Any:
    """A part that yields None for rows it need not make, or makes all rows."""

    def open_(skip: int) -> Iterator[Any]:
        for i in range(size):
            yield None if makes_none and i < skip else f"{name}{i}"

    return open_


def streams(*sizes: int) -> list[RowStream]:
    return [RowStream([part("abc"[i], size)]) for i, size in enumerate(sizes)]


def test_rows_that_are_skipped_are_the_first_of_all_parts() -> None:
    stream = RowStream([part("a", 3), part("b", 0), part("c", 4)])
    rows = list(stream)
    assert rows == ["a0", "a1", "a2", "c0", "c1", "c2", "c3"]
    for first, second in product(range(5), range(5)):
        assert list(stream.skip(first).skip(second)) == rows[first + second :]
        assert list(stream.skip(first).take(second)) == rows[first : first + second]
        assert list(stream.take(6).skip(first)) == rows[first:6]


@pytest.mark.parametrize("sizes", [(3, 5), (2, 5, 5), (1, 4)])
def test_streams_in_turn_end_with_the_longest(sizes: Sequence[int]) -> None:
    mixed = MixedStream(streams(*sizes))
    rows = list(mixed)
    assert rows == [f"{'abc'[stream]}{i}" for i in range(max(sizes)) for stream, size in enumerate(sizes) if i < size]
    for first, second in product(range(4), range(4)):
        assert list(mixed.skip(first).skip(second)) == rows[first + second :]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [0.2, 0.7]])
def test_weighted_streams_begin_again_and_go_on_where_they_were(weights: list[float]) -> None:
    mixed = MixedStream(streams(2, 5), weights)
    rows = list(islice(mixed, 60))
    for name, size in (("a", 2), ("b", 5)):
        own = [row for row in rows if row[0] == name]
        assert own == [f"{name}{i % size}" for i in range(len(own))]
    for skipped in (0, 1, 7, 23, 31):
        assert list(islice(mixed.skip(skipped), 20)) == rows[skipped : skipped + 20]
        assert list(islice(mixed.skip(3).skip(skipped), 20)) == rows[skipped + 3 : skipped + 23]
    with pytest.raises(ValueError, match="has no rows"):
        list(islice(MixedStream(streams(2, 0), weights), 20))


@pytest.mark.parametrize("weights", [[3, 1], [1, 1, 1], [0.2, 0.3, 0.5, 7]])
def test_weights_are_exact_to_one_row_at_any_time(weights: list[float]) -> None:
    turns = list(islice(weighted_turns(weights), 200))
    for number in range(1, 201):
        for stream, weight in enumerate(weights):
            assert abs(turns[:number].count(stream) - number * weight / sum(weights)) < 1 + 1e-9


SETTINGS = {"num_workers": 2, "seed": 0, "group_by_length": True}


def places(trainer: Any = None, **settings: Any) -> StreamPlaces:
    return StreamPlaces(SimpleNamespace(trainer=trainer), {**SETTINGS, **settings})


def test_workers_take_turns_and_a_run_goes_on_with_the_one_that_is_next() -> None:
    kept = places()
    assert [place.worker for place in kept.begin()] == [0, 1]
    kept.note(Place(0, record=4), is_last=False)  # a batch of several marks
    kept.note(3)  # rows of the same block
    between = [(place["worker"], place["record"], place["consumed"]) for place in kept.state_dict()["places"]]
    assert between == [(1, 0, 0), (0, 4, 3)]
    kept.note(Place(1, record=9))
    kept.note(Place(0, record=8))
    state = kept.state_dict()
    assert [(p["worker"], p["record"], p["consumed"]) for p in state["places"]] == [(1, 9, 0), (0, 8, 0)]
    again = places()
    again.load_state_dict(state)
    assert again.begin() == (Place(1, record=9), Place(0, record=8))
    again.note(5)
    assert again.state_dict()["places"][1] == {**state["places"][0], "consumed": 5}
    carried = replace(Place(0), carried=({"input_ids": (1, 2)},))  # type: ignore[arg-type]
    again.note(carried)
    third = places()
    third.load_state_dict(again.state_dict())
    assert third.begin()[1].carried == ({"input_ids": [1, 2]},)


def test_what_was_fetched_ahead_or_accumulated_is_not_past() -> None:
    """Six batches are noted, four trained on, of which one is accumulated for a step to come."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=0), current=SimpleNamespace(processed=0))
    progress.is_last_batch = False
    loop = SimpleNamespace(batch_progress=progress)
    fit = SimpleNamespace(epoch_loop=loop)
    kept = places(SimpleNamespace(fit_loop=fit, num_training_batches=99, accumulate_grad_batches=3), num_workers=1)
    kept.begin()
    for batch in range(1, 7):
        kept.note(10 * batch)
        progress.total.processed = progress.current.processed = max(0, batch - 2)
    assert kept.state_dict()["places"][0]["consumed"] == 30
    assert kept.begin()[0].consumed == 40


def test_only_settings_that_the_order_depends_on_have_to_be_the_same() -> None:
    state = places().state_dict()
    del state["settings"]["group_by_length"]  # as older checkpoints
    places().load_state_dict(state)
    for changed in ({"seed": 1}, {"num_workers": 3}, {"group_by_length": False}):
        (name,) = changed
        with pytest.raises(ValueError, match=f"written with data.{name}="):
            places(**changed).load_state_dict(state)


@pytest.mark.parametrize(
    ("before", "batches", "consumed", "end"), [(0, 10, 12, None), (0, 8, 12, 16), (2, 12, 8, None), (2, 10, 8, 16)]
)
def test_a_position_is_that_after_the_last_step_and_knows_where_its_epoch_ends(
    before: int, batches: int, consumed: int, end: int | None
) -> None:
    """Of twenty examples in batches of two: nine batches are fetched, seven processed, one since the last step.

    Batches that Lightning has counted before the iteration began are not of it.
    """
    progress = SimpleNamespace(current=SimpleNamespace(ready=before, processed=before), is_last_batch=False)
    trainer: Any = SimpleNamespace(accumulate_grad_batches=3, num_training_batches=batches)
    trainer.fit_loop = SimpleNamespace(
        epoch_loop=SimpleNamespace(batch_progress=progress, trainer=trainer, restarting=False)
    )
    resumption = Resumption(SimpleNamespace(trainer=trainer))
    assert resumption.state_dict() is None
    sampler = ResumableSampler(resumption, range(1, 21), 2, seed=3)
    order = list(sampler)
    progress.current.ready, progress.current.processed = 9, 7
    state = resumption.state_dict()
    assert state is not None
    assert {name: state[name] for name in ("consumed", "end", "undone", "run_batch", "size")} == {
        "consumed": consumed, "end": end, "undone": 1, "run_batch": 2, "size": 20
    }  # fmt: skip
    again = Resumption(SimpleNamespace(trainer=None))
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert sorted(order) == list(range(20))
