"""The evaluation harness runs on both exports and scores them alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import tuned
from helpers.local_tasks import local_task
from helpers.models import tiny_tokenizer

from milora_lightning import export_merged, export_peft

lm_eval = pytest.importorskip("lm_eval")


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
