"""What a user hears of a dtype that the processor does not multiply."""

from __future__ import annotations

import platform
import warnings

import pytest
import torch

from milora_lightning.models.processor import warn_of_slow_products
from milora_lightning.utils.compat import PRODUCTS_ON_X86


@pytest.mark.parametrize("has", [False, True])
def test_slow_products_are_told_and_fast_ones_are_not(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in PRODUCTS_ON_X86[torch.bfloat16]:
        monkeypatch.setattr(torch.cpu, name, lambda: has, raising=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_slow_products(torch.bfloat16)
        warn_of_slow_products(torch.float32)
    assert [("bfloat16" in str(w.message), "--model.dtype float32" in str(w.message)) for w in said] == (
        [] if has else [(True, True)]
    )


def test_other_processors_are_not_judged(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    warn_of_slow_products(torch.bfloat16)
    assert not recwarn
