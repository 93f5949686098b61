"""Work shared out among ranks, by what it costs."""

from __future__ import annotations

from milora_lightning.parallel.work import partition_by_cost, schedule_rounds


def test_many_matrices_of_a_shape_count_as_many() -> None:
    """A stack of experts goes to one rank, and the others get the rest."""
    owners = partition_by_cost([(8, 8)] * 4, 2, [3, 1, 1, 1])
    assert owners == [0, 1, 1, 1]
    assert sorted(partition_by_cost([(8, 8)] * 4, 2)) == [0, 0, 1, 1]


def test_each_rank_has_the_dearest_first() -> None:
    costs = [1.0, 5.0, 3.0, 4.0]
    assert schedule_rounds([0, 0, 1, 1], costs) == [[1, 3], [0, 2]]
