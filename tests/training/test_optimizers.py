"""Optimizers by short names, from the command line and from YAML."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from milora_lightning.cli.main import MiLoRACLI, command_line
from milora_lightning.training.optimizers import full_path


class Parsed(MiLoRACLI):
    """Parses, and makes nothing."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def optimizer(*options: str) -> Any:
    return command_line(Parsed, ["fit", "--model.name_or_path=x", "--data.source.train=x", *options]).config.fit.model[
        "optimizer"
    ]


@pytest.fixture(params=["with bitsandbytes", "without"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "without":
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name)
        )
        return False
    pytest.importorskip("bitsandbytes")
    return True


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "RMSprop", "NAdam"])
def test_names_of_torch_are_torchs_beside_bitsandbytes(name: str, library: bool) -> None:
    chosen = optimizer(f"--model.optimizer={name}", "--model.optimizer.lr=0.5")
    assert (chosen.class_path, chosen.init_args.lr) == (f"torch.optim.{name}", 0.5)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedAdamW"])
def test_names_of_bitsandbytes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    full = f"bitsandbytes.optim.{name}"
    file = tmp_path / "mine.yaml"
    for text in (f"optimizer: {name}", f"optimizer: {{class_path: {name}, init_args: {{lr: 0.5}}}}"):
        file.write_text(f"model:\n  {text}\n")
        chosen = optimizer("--config", str(file), "--model.optimizer.lr=0.5")
        assert (chosen.class_path, chosen.init_args.lr) == (full, 0.5)
    assert optimizer(f"--model.optimizer={full}", "--model.optimizer.lr=1").class_path == full


@pytest.mark.parametrize("library", ["without"], indirect=True)
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "bitsandbytes.optim.AdamW8bit"])
def test_a_missing_package_is_named(name: str, library: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        optimizer(f"--model.optimizer={name}", "--model.optimizer.lr=1")
    message = capsys.readouterr().err.splitlines()[0]
    short = name.rpartition(".")[2]
    assert message == (
        f"error: --model.optimizer: The optimizer {short} needs the package bitsandbytes: "
        'pip install "milora-lightning[quantization]"'
    )


def test_other_names_are_left_to_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    assert full_path("mine.AdamW8bit") == "mine.AdamW8bit"
    with pytest.raises(SystemExit):
        optimizer("--model.optimizer=AdamW9bit")
    assert "there is no class of that name" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["AdamW4bit", "AdamWFp8", "torchao.optim.AdamW8bit"])
def test_names_of_torchao(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    short = name.rpartition(".")[2]
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(SystemExit):
            optimizer(f"--model.optimizer={name}", "--model.optimizer.lr=1")
        assert f'The optimizer {short} needs the package torchao: pip install "milora-lightning[torchao]"' in (
            capsys.readouterr().err
        )
        stand_in = ModuleType("torchao.optim")
        setattr(stand_in, short, type(short, (torch.optim.AdamW,), {"__module__": "torchao.optim"}))
        monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
        monkeypatch.setitem(sys.modules, "torchao.optim", stand_in)
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "torchao" or find(name, *a))
    assert full_path(name) == f"torchao.optim.{short}"


def test_optimizers_of_libraries_that_are_missing_are_named_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name in ("PagedAdamW", "AdamW8bit"):
        with pytest.raises(ValueError, match=f"{name} needs the package bitsandbytes"):
            full_path(name)
