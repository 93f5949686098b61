"""Uploads of exports: what arrives, what gives way to it, and what is refused before any work."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import quiet_trainer, save_tiny_model
from huggingface_hub import RepoUrl
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from milora_lightning import CausalLMModule, MiLoRAInit
from milora_lightning.cli.commands.export import export
from milora_lightning.export import hub


def answer(status: int) -> Any:
    """As much of a response as errors look at, whichever library has made it."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


class FakeHub:
    """Repositories in memory, for one user; `fails` is the status that every write is answered with."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, int]] = {}
        self.fails: int | None = None

    def __call__(self) -> FakeHub:
        return self

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}

    def model_info(self, name: str) -> Any:
        if name not in self.private:
            raise RepositoryNotFoundError("404", response=answer(404))
        return SimpleNamespace(id=name, private=self.private[name])

    def create_repo(self, name: str, private: bool | None, exist_ok: bool) -> RepoUrl:
        if self.fails is not None:
            raise HfHubHTTPError("no\nmore", response=answer(self.fails))
        name = name if "/" in name else f"me/{name}"
        self.private.setdefault(name, bool(private))
        self.files.setdefault(name, {})
        return RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str, delete_patterns: list[str]) -> None:
        files = self.files[repo_id]
        for name in [n for n in files if any(fnmatch(n, pattern) for pattern in delete_patterns)]:
            del files[name]
        files.update({path.name: path.stat().st_size for path in Path(folder_path).iterdir()})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return fake


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    lm = CausalLMModule(str(save_tiny_model(folder / "base", "llama")), warmup_steps=0)
    ids = torch.arange(12)[None]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    trainer = quiet_trainer(folder, max_steps=1, callbacks=[MiLoRAInit(r=4)])
    trainer.fit(lm, torch.utils.data.DataLoader([batch], batch_size=None))
    trainer.save_checkpoint(folder / "last.ckpt")
    return str(folder / "last.ckpt")


def test_a_merged_model_takes_the_place_of_adapters(
    fake: FakeHub, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint, str(tmp_path / "peft"), push_to_hub="tuned", private=True)
    said = capsys.readouterr()
    assert "Uploaded to https://huggingface.co/me/tuned" in said.out
    assert "name the local folder" in said.err
    assert fake.private == {"me/tuned": True}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= fake.files["me/tuned"].keys()
    export(checkpoint, str(tmp_path / "merged"), "merged", push_to_hub="me/tuned", private=True)
    assert "model.safetensors" in fake.files["me/tuned"]
    assert not any("adapter" in name for name in fake.files["me/tuned"])
    for path in (tmp_path / "merged").iterdir():
        assert fake.files["me/tuned"][path.name] == path.stat().st_size


def test_what_would_fail_or_be_public_is_refused_before_the_export(
    fake: FakeHub, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    fake.private["me/open"] = False
    with pytest.raises(ValueError, match="'me/open' already exists and is public"):
        export(checkpoint, str(output), push_to_hub="open", private=True)
    with pytest.raises(ValueError, match="add --push_to_hub with its name"):
        export(checkpoint, str(output), private=True)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="without a Hub token: run hf auth login"):
        export(checkpoint, str(output), push_to_hub="open")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        export(checkpoint, str(output), push_to_hub="open")
    assert not output.exists()


def test_a_failed_upload_leaves_the_export_and_says_how_to_go_on(
    fake: FakeHub, checkpoint: str, tmp_path: Path
) -> None:
    fake.fails = 403
    with pytest.raises(ValueError, match=r"has no write access.* is complete; upload it with: hf upload you/x "):
        export(checkpoint, str(tmp_path / "out"), push_to_hub="you/x")
    assert (tmp_path / "out" / "adapter_config.json").is_file()
