"""Small parts that all rooms rest on: folders, filters, classes made at run time, what autograd keeps."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import _typehints
from torch import nn

from milora_lightning.utils import notices, process_memory
from milora_lightning.utils.compat.jsonargparse import try_int_before_float
from milora_lightning.utils.compat.lightning import placed_for_training
from milora_lightning.utils.compat.torch import kept_factors
from milora_lightning.utils.derived_class import Derived, derive
from milora_lightning.utils.folders import cache_folder


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, Path("~/.cache/milora_lightning").expanduser()),
        ({"XDG_CACHE_HOME": "/elsewhere"}, Path("/elsewhere/milora_lightning")),
        ({"XDG_CACHE_HOME": "/elsewhere", "MILORA_CACHE": "/own"}, Path("/own")),
        ({"MILORA_CACHE": "~/own"}, Path("~/own").expanduser()),
    ],
)
def test_what_is_kept_goes_where_the_user_says(
    variables: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MILORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == folder


def test_warnings_of_others_keep_their_place_and_ours_have_none() -> None:
    formatted = notices._WithoutPlace(warnings.formatwarning)
    theirs = (UserWarning("a"), UserWarning, "/elsewhere/file.py", 12, "call()")
    assert formatted(*theirs) == warnings.formatwarning(*theirs) == "/elsewhere/file.py:12: UserWarning: a\n  call()\n"
    assert formatted(UserWarning("b"), UserWarning, notices.__file__, 12) == "warning: b\n"


def test_listed_notices_are_left_out_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tests.notices")
    for _ in range(2):
        notices._filter(logger.name, ["Failed to load", "Tip"])
    assert len(logger.filters) == 1
    for message in ("Tip: use more", "A tip", "Failed to load a kernel", "Failed"):
        logger.warning(message)
    assert [record.getMessage() for record in caplog.records] == ["A tip", "Failed"]


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has is read from Linux's /proc")
def test_memory_is_that_of_the_machine_and_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    total, available, peak = process_memory.total(), process_memory.available(), process_memory.peak_resident()
    assert total is not None
    assert available is not None
    assert peak is not None
    assert 2**28 < peak < available + peak <= 1.1 * total
    monkeypatch.setattr(process_memory, "_STATUS", Path("/absent"))  # as on macOS, where it is in bytes
    resource = pytest.importorskip("resource")
    reported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert process_memory.peak_resident() == pytest.approx(1024 * reported, rel=0.01)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert process_memory.peak_resident() == pytest.approx(reported, rel=0.01)
    monkeypatch.setattr(process_memory, "resource", None)
    assert process_memory.peak_resident() is None


class Doubled(Derived):
    """Doubles what a module computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)  # type: ignore[misc,no-any-return]


def test_a_module_with_a_class_of_its_own_is_copied_and_pickled() -> None:
    module, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(module.state_dict())
    derive(module, Doubled)
    derive(module, Doubled)  # once
    x = torch.ones(3)
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(each) is type(module)
        assert type(each).__name__ == "Linear"
        assert torch.equal(each(x), 2 * plain(x))
    assert type(plain) is nn.Linear


def test_factors_of_a_product_are_found_while_autograd_keeps_them() -> None:
    one, other = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    product = one * other
    found = kept_factors(product)
    assert found is not None
    assert found[0] is one
    assert found[1] is other
    assert kept_factors(one * torch.rand(())) is None  # of another shape
    assert kept_factors(one * torch.rand(3)) is None  # only what the one gradient needs is kept
    assert kept_factors(one + other) is None
    product.sum().backward()
    assert kept_factors(product) is None


def test_a_batch_is_converted_and_moved_as_before_a_step() -> None:
    trainer: Any = SimpleNamespace(
        precision_plugin=SimpleNamespace(convert_input=lambda batch: [*batch, "converted"]),
        lightning_module=SimpleNamespace(_on_before_batch_transfer=lambda batch, dataloader_idx: [*batch, "changed"]),
        strategy=SimpleNamespace(batch_to_device=lambda batch, dataloader_idx: [*batch, f"moved {dataloader_idx}"]),
    )
    assert placed_for_training(trainer, ["rows"]) == ["rows", "converted", "changed", "moved 0"]


def test_floats_come_behind_whole_numbers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank(subtype: Any) -> float:
        return {bool: 0.0, str: 1.0}.get(subtype, 0.25)

    rank.__module__ = _typehints.__name__
    monkeypatch.setattr(_typehints, "union_subtype_sort_key", rank)
    try_int_before_float()
    ours = _typehints.union_subtype_sort_key
    assert sorted([str, float, int, bool], key=ours) == [bool, int, float, str]
    try_int_before_float()
    assert _typehints.union_subtype_sort_key is ours
