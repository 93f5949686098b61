"""IFEval is scored by its own rules, through `evaluate`, on the adapters and on the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.models import save_tiny_model

from milora_lightning.cli.main import main

lm_eval = pytest.importorskip("lm_eval")
for package in ("langdetect", "immutabledict", "nltk"):  # which the extra eval brings
    pytest.importorskip(package)

RULES: list[tuple[str, dict[str, Any], bool]] = [
    ("punctuation:no_comma", {}, True),
    ("change_case:english_lowercase", {}, True),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, True),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 300}, False),
    ("detectable_format:json_format", {}, False),
    ("keywords:existence", {"keywords": ["answer"]}, True),
]


@pytest.mark.slow
def test_answers_are_scored_by_the_benchmarks_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"key": i, "prompt": f"Write {i}.", "instruction_id_list": [name], "kwargs": [kwargs]}
        for i, (name, kwargs, _) in enumerate(RULES)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / "ifeval" / "ifeval.yaml"),
        "task": "ifeval_here",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(tmp_path / "rows.jsonl")}},
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ifeval_here.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setattr(
        "lm_eval.models.huggingface.HFLM.generate_until",
        lambda self, requests, **options: ["this is the answer"] * len(requests),
    )
    model, output = str(save_tiny_model(tmp_path / "model", "llama")), tmp_path / "scores.json"
    main(
        ["evaluate", "--model", model, "--tasks", str(tmp_path / "tasks" / "ifeval_here.yaml"), "--output", str(output)]
    )
    scores = json.loads(output.read_text())["model"]["results"]["ifeval_here"]
    followed = sum(right for *_, right in RULES) / len(RULES)
    for level in ("prompt", "inst"):
        assert scores[f"{level}_level_strict_acc,none"] == pytest.approx(followed)
        assert scores[f"{level}_level_loose_acc,none"] == pytest.approx(followed)
