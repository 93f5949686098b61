"""Commands that are written down, in recipes and pages about benchmarks, can be given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from milora_lightning.cli.commands import COMMANDS
from milora_lightning.cli.main import CONFIGS, MiLoRACLI
from milora_lightning.data import Code, FollowBench, SFTDataModule, VisualInstructions
from milora_lightning.module import CausalLMModule

DOCS = Path(__file__).parents[2] / "docs"
WRITTEN = [*(CONFIGS / "recipe" / f"{name}.yaml" for name in ("code", "visual", "followbench"))]
WRITTEN += [DOCS / "evaluate.md", DOCS / "visual.md"]


def commands(path: Path) -> list[list[str]]:
    text = re.sub(r"\\\n#?\s*", "", path.read_text(encoding="utf-8"))
    found = [shlex.split(line) for line in re.findall(r"^(?:#\s*)?python main\.py (.*)$", text, re.MULTILINE)]
    return [words for words in found if words[0] not in COMMANDS]


GIVEN = list({tuple(words): (path.name, words) for path in WRITTEN for words in commands(path)}.values())


def parsed(words: list[str]) -> Any:
    """Parse a command but for the checkpoint, which is not there."""
    if "--ckpt_path" in words:
        place = words.index("--ckpt_path")
        words = words[:place] + words[place + 2 :]
    return MiLoRACLI(
        CausalLMModule,
        SFTDataModule,
        args=words[1:],
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
    )


@pytest.mark.parametrize(("page", "words"), GIVEN, ids=[f"{page}-{i}" for i, (page, _) in enumerate(GIVEN)])
def test_a_written_command_can_be_given(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli = parsed(words)
    kinds = {"code": Code, "visual": VisualInstructions, "followbench": FollowBench}
    named = [kind for name, kind in kinds.items() if f"recipe/{name}.yaml" in words]
    assert all(isinstance(cli.datamodule.source, kind) for kind in named)


def test_every_page_has_commands() -> None:
    assert all(commands(path) for path in WRITTEN)


def test_settings_of_the_new_recipes() -> None:
    code = parsed(
        ["fit", "--config", "recipe/paper.yaml", "--config", "recipe/code.yaml", "--config", "model/llama2-7b.yaml"]
    )
    assert not code.datamodule.source.run_generated_code
    assert code.datamodule.source.hub_splits["train"] == "train[:100000]"
    visual = parsed(["fit", "--config", "recipe/visual.yaml"])
    (adapter,) = (c.config for c in visual.trainer.callbacks if getattr(c, "config", None) is not None)
    assert (adapter.r, adapter.target_modules, adapter.lora_dropout) == (128, "all-linear", 0.05)
    assert set(adapter.exclude_modules) == {"vision_tower", "multi_modal_projector"}
    assert visual.datamodule.step_batch().total == 128
    assert (visual.model.lr_scheduler, visual.datamodule.template) == ("cosine", "vicuna")
