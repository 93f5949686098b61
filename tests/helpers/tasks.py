"""What the tests of tasks share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from milora_lightning import CausalLMModule, SFTDataModule
from milora_lightning.data import Commonsense


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows)))
    return str(path)


def question(kind: str, choices: int, right: int) -> dict[str, str]:
    """A record as the benchmark's files have it."""
    names = [f"{kind}{i}" for i in range(1, choices + 1)] if kind != "true" else ["true", "false"]
    answer = names[right - 1]
    prompt = f"Is it so?\n\nAnswer format: {'/'.join(names)}"
    return {"instruction": prompt, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


BOOLQ = [question("true", 2, right) for right in (1, 2, 1)]


PIQA = [question("solution", 2, right) for right in (2, 1, 2, 2, 1)]


def commonsense(folder: Path, **options: Any) -> Commonsense:
    for name, rows in [("boolq", BOOLQ), ("piqa", PIQA)]:
        write(folder / name / "test.json", *rows)
    train = write(folder / "train.json", *BOOLQ, *PIQA)
    defaults = {"test": str(folder / "{task}" / "test.json"), "tasks": ["boolq", "piqa"], "validation_size": 2}
    return Commonsense(train, **{**defaults, **options})


def datamodule(source: Any, model: Path, **options: Any) -> SFTDataModule:
    defaults = {"template": "plain", "max_length": 64, "generation_batch_size": 3}
    return SFTDataModule(source, str(model), **{**defaults, **options})


class Parrot(CausalLMModule):
    """Answers every question with its last choice."""

    def generate(self, batch: dict[str, Any]) -> list[str]:
        return [prompt.strip().split("/")[-1] for prompt in batch["prompt"]]
