"""Work shared out among ranks, by what it costs."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from milora_lightning.parallel.work import cost, in_step, partition_by_cost, raise_on_all_ranks, schedule_rounds


def test_many_matrices_of_a_shape_count_as_many() -> None:
    """A stack of experts goes to one rank, and the others get the rest."""
    owners = partition_by_cost([(8, 8)] * 4, 2, [3, 1, 1, 1])
    assert owners == [0, 1, 1, 1]
    assert sorted(partition_by_cost([(8, 8)] * 4, 2)) == [0, 0, 1, 1]


def test_each_rank_has_the_dearest_first() -> None:
    costs = [1.0, 5.0, 3.0, 4.0]
    assert schedule_rounds([0, 0, 1, 1], costs) == [[1, 3], [0, 2]]


def test_batches_are_taken_in_step_and_each_counts_on_one_rank() -> None:
    for number, size in product(range(6), range(1, 5)):
        shares = [list(in_step(range(number), rank, size)) for rank in range(size)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(batch for share in shares for batch, counts in share if counts) == list(range(number))


def test_an_error_of_any_rank_is_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that went on alone would wait for the others forever."""

    def gathered(of_others: str | None) -> None:
        def gather(messages: list[str | None], own: str | None) -> None:
            messages[:] = own, of_others

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)

    gathered("ValueError: no data")
    with pytest.raises(ValueError, match="no data"):
        raise_on_all_ranks(None, 2)
    with pytest.raises(ZeroDivisionError):
        raise_on_all_ranks(ZeroDivisionError("its own"), 2)
    raise_on_all_ranks(None, 1)  # where there is nobody to ask
    gathered(None)
    raise_on_all_ranks(None, 2)
    with pytest.raises(ZeroDivisionError):
        raise_on_all_ranks(ZeroDivisionError(), 1)


def test_ranks_with_fewer_matrices_are_done_earlier() -> None:
    rounds = schedule_rounds([0, 0, 0, 1], [1.0, 3.0, 2.0, 5.0])
    assert rounds == [[3, 1], [2], [0]] or rounds == [[1, 3], [2], [0]]


def test_the_dearest_matrices_are_dealt_out_first_and_evenly() -> None:
    shapes = [(4, 4), (64, 64), (4, 64), (64, 64), (4, 4), (32, 64)]
    owners = partition_by_cost(shapes, 2)
    load = [sum(cost(s) for s, owner in zip(shapes, owners, strict=True) if owner == rank) for rank in (0, 1)]
    assert owners[1] != owners[3]
    assert max(load) - min(load) <= cost((32, 64))
    assert cost((4, 64)) == 16 * 68
