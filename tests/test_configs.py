"""Every shipped YAML says its command, parses and instantiates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from milora_lightning import MiLoRAInit
from milora_lightning.cli import CONFIGS, MiLoRACLI
from milora_lightning.data import SFTDataModule
from milora_lightning.module import CausalLMModule

SHIPPED = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[str(p.relative_to(CONFIGS)) for p in SHIPPED])
def test_header_gives_the_command(path: Path) -> None:
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("#")
    assert "python main.py" in path.read_text()
    assert str(path.relative_to(CONFIGS)) in path.read_text()


@pytest.mark.parametrize("path", SHIPPED, ids=[str(p.relative_to(CONFIGS)) for p in SHIPPED])
def test_parses_and_instantiates_from_any_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = [] if path.name == "milora.yaml" else ["--config", str(CONFIGS / "milora.yaml")]  # the others are overlays
    args = [*base, "--config", str(path)]
    if path.name == "fsdp.yaml" and not torch.cuda.is_available():
        with pytest.raises(ValueError, match="requires a GPU"):
            MiLoRACLI(CausalLMModule, SFTDataModule, args=args, run=False, save_config_callback=None)
        return
    cli = MiLoRACLI(CausalLMModule, SFTDataModule, args=args, run=False, save_config_callback=None)
    assert isinstance(cli.model, CausalLMModule)
    assert cli.datamodule.tokenizer == cli.model.name_or_path
    assert any(isinstance(callback, MiLoRAInit) for callback in cli.trainer.callbacks)
