"""Two processes on the CPU train what one process trains."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.ddp_tasks import tasks
from helpers.distributed_runs import ORIGINS, RUNS, STEPS, command_line, fit
from helpers.forked import run_forked, run_ranks
from helpers.models import save_tiny_model, tiny_model, write_examples
from helpers.several_processes import (
    CONFIG,
    TESTS,
    TORCHRUN,
    Runs,
    assert_equal_to_rounding,
    launch,
    losses,
    run_program,
)
from helpers.terminal import run_in_terminal
from safetensors.torch import load_file

from milora_lightning.checkpoint.reading import read_checkpoint
from milora_lightning.cli.main import main
from milora_lightning.parallel.work import cost, partition_by_cost, schedule_rounds


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_two_ranks_train_what_one_process_does(
    name: str, folder: Path, single: dict[str, Any], ranks: tuple[Runs, Runs]
) -> None:
    """The same losses, gradients, adapters and results, though the ranks' seeds differ."""
    _, options = RUNS[name]
    whole = fit(folder, f"{name}-single", **options) if options else single
    assert_equal_to_rounding(ranks, name, whole)
    shares = [run[name]["cost"] / whole["cost"] for run in ranks]
    assert sum(shares) == 1
    assert max(shares) < 0.55
    start = {k: v for k, v in whole["state"].items() if "initial_" in k}
    moved = [(whole["state"][k.replace("initial_", "lora_")] - v).abs().max().item() for k, v in start.items()]
    assert not moved or min(moved) > 1e-2  # what agrees to 1e-6 is not what it was at the start


@pytest.mark.slow
def test_callbacks_refuse_on_all_ranks(ranks: tuple[Runs, Runs]) -> None:
    """Also where one rank alone has met the reason, as the first does when it decomposes for all."""
    for run in ranks:
        assert "no direction besides the r=16" in run["refused"]["strict"]
        assert "'model.norm.weight' trains besides the adapters" in run["refused"]["beside"]
        assert "cannot restore sharded weights" in run["refused"]["beside"]


@pytest.mark.slow
def test_half_precision_base_with_dropout(folder: Path, single: dict[str, Any], ranks: tuple[Runs, Runs]) -> None:
    first, second = (run["fsdp2-half"] for run in ranks)
    assert all(
        value.dtype == torch.float32 and torch.equal(value, second["state"][k]) for k, value in first["state"].items()
    )
    assert {value.split()[-2] for value in first["base"].values()} == {"torch.bfloat16"}
    torch.testing.assert_close(losses(ranks, "fsdp2-half"), torch.tensor(single["losses"]), rtol=1e-2, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("origin", ORIGINS)
def test_resumed_on_another_number_of_ranks_it_goes_on_the_same(
    origin: str, folder: Path, single: dict[str, Any], ranks: tuple[Runs, Runs]
) -> None:
    half = STEPS // 2
    path = folder / origin / f"step={half}.ckpt"
    assert path.is_dir() == (origin == "fsdp2-folder")
    for strategy in ("fsdp1", "fsdp2"):
        assert len(ranks[0][f"{origin} to {strategy}"]["losses"]) == half
        assert_equal_to_rounding(ranks, f"{origin} to {strategy}", single)
    assert ranks[0][f"{origin} to fsdp2"]["cost"] == 0  # the checkpoint brings the factors
    alone = fit(folder, f"{origin}-alone", resume={"ckpt_path": path})
    torch.testing.assert_close(torch.tensor(alone["losses"]), torch.tensor(single["losses"][half:]), rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def gpus(folder: Path) -> tuple[Runs, Runs]:
    done = launch(folder, *TORCHRUN, str(TESTS / "helpers" / "distributed_runs.py"), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(folder / f"gpu-rank{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_fsdp1_resumes_from_its_own_checkpoint(gpus: tuple[Runs, Runs]) -> None:
    """Would catch an optimizer state that is restored to other parameters.

    On the CPU, torch collects one tensor of FSDP1's optimizer state in the place of another.
    """
    first = gpus[0]["gpu"]
    assert {value.dtype for value in first["state"].values()} == {torch.float32}
    later = torch.tensor(first["losses"][STEPS // 2 :])
    torch.testing.assert_close(torch.tensor(gpus[0]["resumed"]["losses"]), later, rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "compiled"])
def test_two_gpus_train_what_one_process_does(name: str, gpus: tuple[Runs, Runs], single: dict[str, Any]) -> None:
    """Would catch NCCL gathering other shards than gloo, and compiled layers that read weights too early."""
    first, second = (run[name] for run in gpus)
    assert all(torch.equal(value, second["state"][key]) for key, value in first["state"].items())
    torch.testing.assert_close(losses(gpus, name), torch.tensor(single["losses"]), rtol=2e-2, atol=0)


@pytest.mark.slow
def test_checkpoints_of_shards_hold_adapters_only_and_export_the_same(folder: Path, ranks: tuple[Runs, Runs]) -> None:
    exported, keys = {}, {}
    for origin in (*ORIGINS, "fsdp1", "tensor"):
        path = folder / origin / f"step={STEPS}.ckpt"
        keys[origin] = read_checkpoint(path)["state_dict"].keys()
        main(["export", f"--ckpt_path={path}", f"--output={folder / f'exported-{origin}'}"])
        exported[origin] = load_file(folder / f"exported-{origin}" / "adapter_model.safetensors")
    assert all(there == keys["single"] for there in keys.values())
    assert not any("base_layer" in key for key in keys["single"])
    for origin in (*ORIGINS, "fsdp1", "tensor"):
        for key, value in exported["single"].items():
            torch.testing.assert_close(exported[origin][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_other_peoples_sharded_modules(tmp_path: Path, folder: Path, ranks: tuple[Runs, Runs]) -> None:
    first, second = (run["own"] for run in ranks)
    assert first["messages"].keys() == second["messages"].keys()
    assert "is sharded already" in first["messages"]["order"]
    assert "before fully_shard" in first["messages"]["order"]
    for run in (first, second):  # whichever has met it
        assert "layers.1.mlp.up_proj' cannot be decomposed: 1 of the weight's" in run["messages"]["nan"]
    assert "tensor_parallel_size is 2" in first["messages"]["tensor parallel"]
    state = first["state"]
    assert all(torch.equal(value, second["state"][key]) for key, value in state.items())
    weights = dict(tiny_model("qwen2").named_parameters())
    name = "model.layers.1.mlp.down_proj"
    _, S, _ = torch.linalg.svd(weights[f"{name}.weight"].double(), full_matrices=False)
    start = state[f"lm.{name}.initial_B"].double() @ state[f"lm.{name}.initial_A"].double()
    torch.testing.assert_close(torch.linalg.svdvals(start)[:4], S[-4:], rtol=1e-5, atol=1e-7)
    assert any((state[key.replace("initial", "lora")] - value).abs().max() > 1e-2 for key, value in state.items())


@pytest.mark.slow
def test_one_yaml_with_an_overlay(folder: Path, ranks: tuple[Runs, Runs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    alone = command_line(folder, None, "--data.batch_size=8")
    for name in ("ddp", "fsdp2"):
        assert ranks[0]["cli"][name] == pytest.approx(alone, rel=1e-4)
        answers = [line for rank in range(2) for line in (folder / f"{name}.{rank}.jsonl").read_text().splitlines()]
        assert sorted(answers) == sorted((folder / "single.jsonl").read_text().splitlines())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("when", ["surgery", "training"])
def test_a_rank_that_dies_ends_the_job_with_a_message_and_a_whole_checkpoint(
    when: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it decomposes, or while it writes its shards of the second checkpoint."""
    saving = {"dirpath": "dying", "every_n_train_steps": 1, "save_last": True}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    sharded = {"init_args": {"save_distributed_checkpoint": True}}
    (folder / "dying.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback], "strategy": sharded}}))
    configs = [f"--config={name}" for name in ("mine.yaml", "strategy/fsdp2.yaml", "dying.yaml")]

    def run() -> None:
        run_program(TESTS / "helpers" / "dying_rank.py", when, "fit", *configs)

    if when == "surgery":
        status, died = run_ranks(run, folder)
        assert died == -signal.SIGKILL
    else:  # Lightning starts the second process
        status = run_forked(run, folder)
    assert status not in (0, -signal.SIGKILL)
    output = (folder / ("output0.txt" if when == "surgery" else "output.txt")).read_text()
    assert any(words in output for words in ("closed by peer", "reset by peer", "Child process with PID"))
    if when == "training":
        monkeypatch.chdir(folder)
        assert read_checkpoint("dying/last.ckpt")["global_step"] == 1
        main(["export", "--ckpt_path=dying/last.ckpt", "--output=survived"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_saves_once_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to both processes; the run that goes on from there ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    save_tiny_model(tmp_path / "llama", "llama")
    write_examples(tmp_path / "examples.jsonl", 16)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.log_every_n_steps=2"]
    options += ["--trainer.enable_progress_bar=true", "--data.template=plain", "--trainer.limit_val_batches=0"]
    program = tmp_path / "slow_end.py"
    # Slow to end, as a machine with much to do is: Lightning then kills the first process because the second is gone.
    program.write_text(
        "import time\nfrom milora_lightning.cli.main import main\ntry:\n    main()\nfinally:\n    time.sleep(7)\n"
    )
    command = ["fit", "--config=mine.yaml", *options]

    pressed: list[str] = []

    def press(screen: str) -> bytes | None:
        if pressed or not re.search(r"Training +\d+ of", screen):
            return None
        pressed.append(screen)
        return b"\x03"

    seen = run_in_terminal(lambda: run_program(program, *command, "--trainer.max_epochs=999"), 200, 50, press, 300)
    assert seen.status == 130, seen.last
    said = re.findall(r"Interrupted at step (\d+). Saved in checkpoints/last.ckpt; resume with: ", seen.last)
    assert len(said) == 1, seen.last
    assert "Traceback" not in seen.raw
    step = int(said[0])
    assert read_checkpoint("checkpoints/last.ckpt")["global_step"] == step
    again = ["--ckpt_path=last", "--trainer.max_epochs=999", f"--trainer.max_steps={step + 2}", "--trainer.devices=1"]
    status = run_forked(lambda: main([*command, *again, "--data.batch_size=8"]), tmp_path)
    said_then = (tmp_path / "output.txt").read_text()
    assert status == 0, said_then[-3000:]
    assert f"Last checkpoint (step {step + 2})" in said_then


def test_work_is_shared_out_by_cost() -> None:
    shapes = [(576, 576)] * 30 + [(192, 576)] * 60 + [(1536, 576)] * 60
    costs = [cost(shape) for shape in shapes]
    owners = partition_by_cost(shapes, 4)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(4)]
    assert max(loads) < 1.05 * min(loads)
    assert partition_by_cost([], 2) == []
    rounds = schedule_rounds(owners, costs)
    assert sorted(index for batch in rounds for index in batch) == list(range(len(shapes)))
    assert all(len({owners[index] for index in batch}) == len(batch) for batch in rounds)
    waiting = sum(max(costs[index] for index in batch) for batch in rounds)
    assert waiting < 1.05 * max(loads)  # what the slowest rank of each round takes


@pytest.mark.slow
def test_two_ranks_score_and_predict_as_one_process_does(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama")
    assert run_ranks(lambda: tasks(tmp_path, 2, 2), tmp_path) == [0, 0], (tmp_path / "output0.txt").read_text()[-3000:]
    tasks(tmp_path, 1, 3)  # three questions and five: uneven shares of each set
    first, second, single = (
        torch.load(tmp_path / f"tasks-{which}.pt", weights_only=True) for which in ("2-0", "2-1", "1-0")
    )
    assert 0 < single[0]["test_accuracy/boolq"] < single[0]["test_accuracy/piqa"] < 1
    for one, other, results in zip(first, second, single, strict=True):  # by generation, then by likelihood
        assert one == other == pytest.approx(results)
    predictions = [json.loads((tmp_path / f"tasks-{devices}.json").read_text()) for devices in (1, 2)]
    assert len(predictions[0]) == 8
    assert predictions[0] == predictions[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_runs_that_start_from_data_begin_at_the_pretrained_model(
    kind: str, single: dict[str, Any], ranks: tuple[Runs, Runs]
) -> None:
    """And train the same factors on both ranks, from the same batches as a run that starts without data."""
    first, second = (run[f"{kind} from data"] for run in ranks)
    whole = losses(ranks, f"{kind} from data")
    assert whole[0] == pytest.approx(single["losses"][0], rel=1e-5)
    assert whole[-1] < whole[0]
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key])
        assert value.any()  # of shards, too, whose last layer a pass over data leaves gathered
