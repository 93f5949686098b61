"""The state of torchao's optimizers in checkpoints, with a stand-in for the package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from milora_lightning.checkpoint.io import CheckpointError, read, read_without_weights

STAND_IN = """
import torch

class OptimState8bit:
    pass

torch.serialization.add_safe_globals([OptimState8bit])
"""


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One with such a state, in a process that has not imported the package yet."""
    if importlib.util.find_spec("torchao") is not None:
        pytest.skip("torchao itself is installed")
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("")
    (tmp_path / "torchao" / "optim.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    state = importlib.import_module("torchao.optim").OptimState8bit()
    state.codes = torch.ones(2)
    torch.save({"state_dict": {}, "optimizer_states": [state]}, tmp_path / "a.ckpt")
    forget()
    yield tmp_path / "a.ckpt"
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        del sys.modules[name]
    torch.serialization.clear_safe_globals()


def test_it_is_read_with_the_package_imported_for_it(checkpoint: Path) -> None:
    assert read(checkpoint)["optimizer_states"][0].codes.tolist() == [1, 1]
    forget()
    assert "optimizer_states" in read_without_weights(checkpoint)


def test_a_missing_package_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r'an optimizer of torchao: pip install "milora-lightning\[torchao\]"'):
        read(checkpoint)
