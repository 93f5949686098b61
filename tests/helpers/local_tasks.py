"""What the tests of local tasks share."""

from __future__ import annotations

import json
from pathlib import Path

import yaml


def local_task(folder: Path) -> str:
    """A multiple-choice task read from a file, answers drawn at random."""
    rows = [
        {"question": f"What is {i} plus {i % 7}?", "choices": [str(i), str(i + i % 7), "1", "22"], "gold": i % 4}
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(task))
    return "sums"
