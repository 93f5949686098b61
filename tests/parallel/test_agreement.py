"""What the ranks of a tensor-parallel group agree on and exchange, with the other rank imitated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from milora_lightning.parallel.agreement import check_same_batch, same_random_state
from milora_lightning.parallel.collectives import sum_gradients, sum_parts

TWO: Any = SimpleNamespace(size=lambda: 2, get_group=lambda: None)
ALONE: Any = SimpleNamespace(size=lambda: 1)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"ids": torch.arange(6).view(2, 3), "more": [torch.ones(2)]}, True),
        ({"ids": torch.arange(6).view(3, 2), "more": [torch.ones(2)]}, False),
        ({"ids": torch.arange(6).view(2, 3).float(), "more": [torch.ones(2)]}, False),
        ({"ids": torch.arange(6).view(2, 3), "more": [torch.tensor([1.0, 2.0])]}, False),
        ({"ids": torch.arange(6).view(2, 3), "more": []}, False),
    ],
    ids=["same", "shape", "dtype", "last number", "fewer"],
)
def test_batches_that_differ_in_anything_are_refused(other: Any, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes: list[str] = []

    def gather(found: list[Any], own: str, group: object) -> None:
        hashes.append(own)
        found[:] = own, hashes[0]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    check_same_batch(TWO, {"ids": torch.arange(6).view(2, 3), "more": [torch.ones(2)]})
    if same:
        check_same_batch(TWO, other)
    else:
        with pytest.raises(ValueError, match="have different batches"):
            check_same_batch(TWO, other)
    check_same_batch(ALONE, other)


def test_all_ranks_draw_what_the_first_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    first = torch.get_rng_state()
    expected = torch.rand(4)
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: [5, 7])
    group = object()  # not all ranks there are

    def broadcast(state: Tensor, src: int, group: object = None, among: object = group) -> None:
        assert (src, group) == (5, among)
        state.copy_(first)

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    torch.manual_seed(9)
    mesh: Any = SimpleNamespace(size=lambda: 2, get_group=lambda: group)
    same_random_state(mesh, torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected)


def test_parts_are_summed_forward_and_gradients_of_what_is_shared_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with the same numbers: each sum is twice what one has."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: tensor.mul_(2))
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    for function, value, gradient in ((sum_gradients, [1.0, 3.0], 2.0), (sum_parts, [2.0, 6.0], 1.0)):
        x.grad = None
        y = function(x * 1.0, None)  # type: ignore[arg-type]
        assert y.tolist() == value
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [gradient] * 2
    assert x.tolist() == [1.0, 3.0]
