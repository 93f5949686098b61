"""Budgets of what adapters ask of a GPU, counted on the meta device."""

from __future__ import annotations

import pytest
from helpers.benchmarks import benchmark
from helpers.budgets import GIGABYTES, HOST_WAITS, KEPT_GIGABYTES, LAUNCHES

launches = benchmark("launches")


@pytest.mark.parametrize(("init", "dropout"), list(LAUNCHES))
def test_a_layer_launches_few_operations_and_moves_few_bytes(init: str, dropout: float) -> None:
    cost = launches.cost_of_layer(launches.ours if init == "milora" else launches.ours_lora, dropout)
    assert cost.launches <= LAUNCHES[init, dropout], cost.operations
    assert cost.bytes / 1e9 <= GIGABYTES[dropout]
    assert not cost.waits


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_bytes_are_fewer_than_those_of_the_peer(dropout: float) -> None:
    ours, peer = (launches.cost_of_layer(adapt, dropout) for adapt in (launches.ours, launches.peft_half))
    assert ours.bytes < 0.9 * peer.bytes


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_model_keeps_few_bytes_for_backward(dropout: float) -> None:
    assert launches.kept_by_model(launches.ours, dropout) / 1e9 <= KEPT_GIGABYTES


def test_the_host_hardly_waits() -> None:
    waits = launches.waits_of_step().waits
    assert waits.total() <= HOST_WAITS, waits


def test_counting_sees_what_is_launched() -> None:
    """A frozen layer is two products: its input, weight and output in forward, their gradients in backward."""
    cost = launches.cost_of_layer(launches.frozen, 0.0)
    tokens = launches.ROWS * launches.LENGTH
    entries = tokens * (launches.IN + launches.OUT) + launches.IN * launches.OUT
    assert (cost.launches, cost.bytes) == (2, 2 * 2 * entries)
