"""The evaluation harness runs on both exports and scores them alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_tokenizer
from test_export import tuned

from milora_lightning import export_merged, export_peft

lm_eval = pytest.importorskip("lm_eval")


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


@pytest.mark.slow
def test_peft_folder_and_merged_folder_score_alike(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    model = tuned(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    export_peft(model, tmp_path / "peft", tokenizer=tokenizer)
    export_merged(model, tmp_path / "merged", tokenizer=tokenizer)
    name = local_task(tmp_path)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def evaluate(arguments: str) -> tuple[float, list[list[float]]]:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"{arguments},dtype=float32",
            tasks=[name],
            task_manager=tasks,
            device="cpu",
            batch_size=4,
            bootstrap_iters=0,
        )
        likelihoods = [[answer[0] for answer in sample["filtered_resps"]] for sample in results["samples"][name]]
        return results["results"][name]["acc,none"], likelihoods

    _, base_likelihoods = evaluate(f"pretrained={tmp_path / 'base'}")
    peft, peft_likelihoods = evaluate(f"pretrained={tmp_path / 'base'},peft={tmp_path / 'peft'}")
    merged, merged_likelihoods = evaluate(f"pretrained={tmp_path / 'merged'}")
    assert peft == merged
    torch.testing.assert_close(torch.tensor(peft_likelihoods), torch.tensor(merged_likelihoods), rtol=0, atol=1e-4)
    difference = (torch.tensor(base_likelihoods) - torch.tensor(merged_likelihoods)).abs().max()
    assert difference > 0.1  # the base model alone is something else
