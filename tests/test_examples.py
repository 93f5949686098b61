"""The examples run."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
import yaml
from helpers.models import quiet_trainer, save_tiny_model, write_examples

from milora_lightning import lora_layers
from milora_lightning.checkpoint.reading import read_checkpoint
from milora_lightning.cli.main import main
from milora_lightning.parallel.dtensor import full_tensor

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun tells a process that is alone."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ["minimal_callback", "image_classifier", "own_fully_shard"])
def test_modules_train_their_adapters(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def trainer(**options: Any) -> lightning.pytorch.Trainer:
        made = quiet_trainer(tmp_path, **options)
        fit = made.fit
        made.fit = lambda module, data: (fit(module, data), trained.append(module))  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(lightning.pytorch, "Trainer", trainer)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    layers = lora_layers(trained[0])
    assert layers
    assert all(not full_tensor(layer.lora_A - layer.initial_A).eq(0).all() for layer in layers.values())
    if name == "image_classifier":
        assert trained[0].model.classifier.weight.requires_grad
        assert not any("classifier" in layer for layer in layers)


def test_functions_work_without_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "without_lightning.py"), run_name="__main__")  # its assertions are the point
    assert "loss" in capsys.readouterr().out


def test_a_start_of_ones_own_is_known_to_the_command_line_and_its_result_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.name_or_path", str(save_tiny_model(tmp_path / "model", "llama")), "--adapter.r", "4"]
    options += ["--data.source.train", str(write_examples(tmp_path / "train.jsonl", 4)), "--data.template", "plain"]
    options += ["--data.source.validation_size", "0", "--trainer.max_steps", "1", "--adapter.init", "columns"]
    monkeypatch.setattr(sys, "argv", ["own_start.py", "fit", *options, "--logger", "none"])
    runpy.run_path(str(EXAMPLES / "own_start.py"), run_name="__main__")
    state = read_checkpoint(tmp_path / "checkpoints/last.ckpt")["state_dict"]
    initial = [value for name, value in state.items() if name.endswith("initial_A")]
    assert initial
    assert all(torch.equal(A.sum(dim=1), torch.ones(4)) and A.count_nonzero() == 4 for A in initial)
    export, serve = called_by(EXAMPLES / "export_and_serve.sh", "checkpoints/last.ckpt", tmp_path / "bin")
    assert export[:2] == ["python", "main.py"]
    main(export[2:])
    assert serve[:3] == ["transformers", "serve", "exported"]
    assert (tmp_path / "exported" / "config.json").is_file()


def called_by(script: Path, argument: str, folder: Path) -> list[list[str]]:
    """The commands that a script of a shell calls."""
    folder.mkdir()
    for name in ("python", "transformers"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/called\n')
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(script), argument], env=environment, check=True)
    return [line.split() for line in (folder / "called").read_text().splitlines()]


def test_every_example_is_tested() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.iterdir() if path.is_file() and path.stem not in tests] == []


@pytest.mark.parametrize("name", ["first_steps", "spectra"])
def test_notebooks_run_and_are_kept_without_outputs(name: str) -> None:
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    names: dict[str, Any] = {}
    for cell in code:  # their assertions are the point
        exec("".join(cell["source"]), names)


@pytest.mark.parametrize("name", ["conversations", "qlora"])
def test_configs_are_understood(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    (tmp_path / "chats.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    options = ["--model.name_or_path", str(model), "--data.source.train", "chats.jsonl", "--print_config"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(EXAMPLES / f"{name}.yaml"), *options])
    assert ended.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    assert shown["adapter"]["r"] == given["adapter"]["r"]
    assert shown["trainer"]["default_root_dir"] == f"runs/{name}"
    assert shown["model"]["optimizer"]["class_path"].endswith(given["model"]["optimizer"]["class_path"])
