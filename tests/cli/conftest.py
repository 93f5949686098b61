from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.models import save_tiny_model, write_examples


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, data and a config of the user's own."""
    save_tiny_model(tmp_path / "model", "llama")
    write_examples(tmp_path / "train.jsonl", 24)
    write_examples(tmp_path / "held_out.jsonl", 6)
    files = {"train": "train.jsonl", "validation": "held_out.jsonl", "test": "held_out.jsonl"}
    config = {
        "model": {"name_or_path": "model", "max_new_tokens": 4, "warmup_steps": 2},
        "adapter": {"r": 4, "target_modules": ["q_proj", "up_proj"]},
        "data": {"source": {"class_path": "milora_lightning.data.Files", "init_args": files}, "batch_size": 4},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "num_sanity_val_steps": -1,
            "default_root_dir": str(tmp_path / "out"),
        },
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path
