"""Callbacks that write what a run has made, and bring back where it was, with trainers and ranks that are imitated."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.callback_modules import adapted_language_model
from helpers.models import quiet_trainer, tiny_model
from peft import PeftModel

from milora_lightning import PredictionWriter
from milora_lightning.callbacks import export, predictions
from milora_lightning.callbacks.export import AdapterExport
from milora_lightning.callbacks.random_state import RandomState
from milora_lightning.strategies.base import DataRank


def trainer(rank: int = 0, ranks: int = 1) -> Any:
    """What callbacks of one rank read of a trainer."""
    strategy = SimpleNamespace(barrier=lambda name: None)
    return SimpleNamespace(
        global_rank=rank, world_size=ranks, is_global_zero=rank == 0, strategy=strategy, callback_metrics={}
    )


MODULE: Any = SimpleNamespace(device=torch.device("cpu"), predict_step=lambda batch, batch_idx: None)


def test_a_resumed_run_draws_what_the_saved_one_draws_and_once_alone() -> None:
    saved: dict[str, Any] = {}
    torch.manual_seed(1)
    RandomState().on_save_checkpoint(trainer(), MODULE, saved)
    following = [torch.rand(3) for _ in range(2)]
    resumed = RandomState()
    resumed.on_load_checkpoint(trainer(), MODULE, saved)
    torch.manual_seed(2)
    seen = []
    for step in range(2):
        resumed.on_train_batch_start(trainer(), MODULE, None, step)
        seen.append(torch.rand(3))
    assert all(torch.equal(one, other) for one, other in zip(seen, following, strict=True))


def test_each_rank_gets_its_own_state_and_other_numbers_of_ranks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append({"cpu": torch.get_rng_state()})

    def gather(found: list[Any], own: dict[str, torch.Tensor]) -> None:
        found[:] = states[0], own

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    saved: dict[str, Any] = {}
    RandomState().on_save_checkpoint(trainer(1, 2), MODULE, saved)
    assert [torch.equal(a["cpu"], b["cpu"]) for a, b in zip(saved["random_state"], states, strict=True)] == [True, True]
    for rank, ranks, seed in ((0, 2, 0), (1, 2, 1), (0, 1, 9), (1, 3, 9)):
        callback = RandomState()
        callback.on_load_checkpoint(trainer(), MODULE, saved)
        torch.manual_seed(9)
        callback.on_train_batch_start(trainer(rank, ranks), MODULE, None, 0)
        found = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(found, torch.rand(3)), (rank, ranks)
    callback.on_load_checkpoint(trainer(), MODULE, {})  # of a run without the callback
    callback.on_train_batch_start(trainer(), MODULE, None, 0)


def record(number: int) -> dict[str, str]:
    return {
        "prompt": f"ask {number}\n",
        "instruction": f"do {number}",
        "generation": f"é {number}",
        "reference": "",
        "task": "t",
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_predictions_of_all_shares_are_collected_in_the_order_of_the_data(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of five examples, one share has one more. The second process of a share writes nothing."""
    shares = [DataRank(rank, ranks, first) for rank in reversed(range(ranks)) for first in (False, True)]
    paths = {"output": str(tmp_path / "new" / "p.jsonl"), "alpaca_eval": str(tmp_path / "eval" / "a.json")}
    for share in shares:
        monkeypatch.setattr(predictions, "data_rank", lambda trainer, share=share: share)
        writer = PredictionWriter(**paths, generator="mine", follow_bench=str(tmp_path / "bench"))
        here = trainer(share.number, ranks)
        writer.setup(here, MODULE, "predict")
        writer.on_predict_start(here, MODULE)
        for number in range(share.number, 5, ranks):
            writer.write_on_batch_end(here, MODULE, [record(number)], None, None, number, 0)
    writer.on_predict_end(here, MODULE)
    names = ["p.jsonl"] if ranks == 1 else ["p.0.jsonl", "p.1.jsonl"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    for rank, name in enumerate(names):
        lines = (tmp_path / "new" / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [record(number) for number in range(rank, 5, ranks)]
        assert "é" in lines[0]
    whole = json.loads((tmp_path / "eval" / "a.json").read_text(encoding="utf-8"))
    assert [each["output"] for each in whole] == [f"é {number}" for number in range(5)]
    assert {each["generator"] for each in whole} == {"mine"}
    asked = (tmp_path / "bench" / "t_constraint.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in asked] == [f"do {number}" for number in range(5)]
    printed = capsys.readouterr().out.replace("\n", " ")
    assert [name for name in (*names, "a.json", "bench") if name in printed] == [*names, "a.json", "bench"]


def test_predictions_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    real = quiet_trainer(tmp_path)
    for paths in (
        {"output": str(tmp_path / "file" / "p.jsonl")},
        {"output": str(tmp_path / "p.jsonl"), "alpaca_eval": str(tmp_path)},
        {"output": str(tmp_path / "p.jsonl"), "follow_bench": str(tmp_path / "file" / "bench")},
    ):
        with pytest.raises(ValueError, match="Predictions cannot be written to"):
            PredictionWriter(**paths).setup(real, MODULE, "predict")
        PredictionWriter(**paths).setup(real, MODULE, "fit")  # where it writes nothing


def test_a_run_ends_with_an_adapter_folder_from_the_first_rank(tmp_path: Path) -> None:
    module: Any = adapted_language_model(moved=True)
    callback = AdapterExport(str(tmp_path / "adapter"))
    callback.on_fit_end(trainer(1, 2), module)
    assert not (tmp_path / "adapter").exists()
    first = trainer()
    first.callback_metrics = {name: torch.tensor(0.25) for name in ("train_loss", "val_loss", "test_accuracy")}
    callback.on_fit_end(first, module)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert all((name in card) == (name != "train_loss") for name in first.callback_metrics)
    opened = PeftModel.from_pretrained(tiny_model("gpt2"), str(tmp_path / "adapter")).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, module.lm(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(FileExistsError, match="There is something at"):
        callback.setup(trainer(), module, "fit")
    callback.setup(trainer(), module, "validate")


def test_options_of_the_other_format_are_refused() -> None:
    with pytest.raises(ValueError, match="no rank in the format 'merged'"):
        AdapterExport("x", "merged", rank=2)
    with pytest.raises(ValueError, match="no dtype in the format 'peft'"):
        AdapterExport("x", dtype="float16")
    assert AdapterExport("x", shrink_intruders=0.5).shrink_intruders == export.Intruders(0.5)
    assert AdapterExport("x", rank=2).shrink_intruders is None
