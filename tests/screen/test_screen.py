"""What a person sees of a run: on terminals of several widths, in a pipe, and when it is interrupted."""

from __future__ import annotations

import json
import logging
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
import yaml
from helpers.models import quiet_trainer, save_tiny_model
from helpers.terminal import run_in_terminal
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from milora_lightning import CausalLMModule
from milora_lightning.cli.ending import ending
from milora_lightning.cli.loggers import make_logger
from milora_lightning.cli.main import main
from milora_lightning.screen.state import RunState, Work
from milora_lightning.screen.views import LiveView

NOTICES = (
    "Tip:",
    "available:",
    "litlogger",
    "tensorboardX",
    "LeafSpec",
    "to estimate",
    "not empty",
    "kernels",
    "FLOPs",
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, data and a config, for runs of a few seconds."""
    save_tiny_model(tmp_path / "model", "llama")
    for name, number in (("train", 12), ("held_out", 6)):
        rows = [{"instruction": f"{i}+{i}?", "output": f"{2 * i}"} for i in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": "train.jsonl", "validation": "held_out.jsonl", "test": "held_out.jsonl"}
    config = {
        "model": {"name_or_path": "model", "max_new_tokens": 8, "warmup_steps": 2},
        "adapter": {"r": 4, "target_modules": ["q_proj", "up_proj"]},
        "data": {
            "source": {"class_path": "milora_lightning.data.Files", "init_args": files},
            "template": "plain",
            "batch_size": 4,
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": -1},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    return tmp_path


def fit(*args: str) -> Any:
    return main(["fit", "--config", "mine.yaml", *args])


def test_lines_in_a_pipe_have_no_control_characters(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit()
    said = capfd.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said.out + said.err)
    assert "Trained 3 of 3 steps" in said.out
    assert "Last checkpoint (step 3): checkpoints/last.ckpt" in said.out
    assert not [notice for notice in NOTICES if notice in said.out + said.err]


@pytest.mark.parametrize("columns", [80, 220])
def test_the_last_screen_shows_before_and_after_and_what_comes_next(project: Path, columns: int) -> None:
    answer = CausalLMModule.answer

    def slow(self: CausalLMModule, batch: Any) -> list[str]:
        time.sleep(1.7)
        return answer(self, batch)

    def run() -> None:
        CausalLMModule.answer = slow  # in a process of its own
        fit()

    recording = run_in_terminal(run, columns)
    assert recording.status == 0, recording.last
    for part in ("validation", "before", "after", "accuracy", "loss", "perplexity"):
        assert part in recording.last
    assert "Last checkpoint (step 3): checkpoints/last.ckpt" in recording.last
    assert "Talk to it: python main.py chat --ckpt_path checkpoints/last.ckpt" in recording.last
    assert not [notice for notice in NOTICES if notice in recording.raw]
    everything = ["\n".join(lines) for _, lines in recording.screens]
    assert any("Evaluating before training" in screen for screen in everything)
    assert any(re.search(r"loss \d.*lr (0|\S+e-4) .*tokens/s.*peak .* GB", screen) for screen in everything)
    answering = [
        (at, screen) for (at, _), screen in zip(recording.screens, everything, strict=True) if "answering" in screen
    ]
    assert len(answering) > 10
    for at, screen in answering:
        assert all(screen != other for then, other in answering if 1.2 <= then - at < 5)


def test_ctrl_c_saves_and_says_how_to_go_on(project: Path) -> None:
    pressed: list[bool] = []

    def keys(screen: str) -> bytes | None:
        if re.search(r"Training +[2-9]\d* of", screen) and not pressed:
            pressed.append(True)
            return b"\x03"
        return None

    recording = run_in_terminal(lambda: fit("--trainer.max_epochs=2000"), 120, keys=keys)
    assert recording.status == 130, recording.last
    said = re.search(r"Interrupted at step (\d+)\. Saved in checkpoints/last.ckpt; resume with: (.*)", recording.last)
    assert said, recording.last
    assert "Training" not in recording.last
    whole = recording.last.replace("\n", "")
    assert "python main.py fit --config mine.yaml --trainer.max_epochs=2000 --ckpt_path last" in whole
    step = int(said[1])
    resumed = fit("--ckpt_path=last", "--trainer.max_epochs=2000", f"--trainer.max_steps={step + 1}")
    assert resumed.trainer.global_step == step + 1


def test_a_second_ctrl_c_ends_at_once(project: Path) -> None:
    def run() -> None:
        CausalLMModule.training_step = lambda *_: time.sleep(60)  # in a process of its own
        fit()

    def keys(screen: str) -> bytes | None:
        if "Ctrl-C: finishing this step" in screen:
            return b"\x03"
        return b"\x03" if re.search(r"Training +0 of 3", screen) else None

    started = time.monotonic()
    recording = run_in_terminal(run, 80, keys=keys)
    assert recording.status == -signal.SIGINT, recording.last
    assert time.monotonic() - started < 50
    assert recording.raw.rfind("\x1b[?25h") > recording.raw.rfind("\x1b[?25l")  # the cursor is there again
    assert not list(project.rglob("*.ckpt"))


def test_lines_of_loggers_go_above_what_moves() -> None:
    def run() -> None:
        logger = logging.getLogger("others")
        logger.addHandler(logging.StreamHandler())  # which keeps the stream of now
        view = LiveView(rich.get_console(), RunState(work=Work("Validating")))
        view.start()
        time.sleep(0.4)
        logger.warning("a line")
        time.sleep(0.4)
        view.stop()
        logger.warning("another")

    recording = run_in_terminal(run, 80)
    assert recording.last.split() == ["a", "line", "another"]
    assert any(re.search(r"a line\s+\S\s+Validating", "\n".join(lines)) for _, lines in recording.screens)


def test_nothing_of_what_moves_is_left_behind() -> None:
    """Lines are printed in one thread and drawn in another, while there is more or less to draw."""

    def run() -> None:
        state = RunState()
        view = LiveView(rich.get_console(), state, per_second=1000)
        view.start()
        for line in range(400):
            state.training = None if line % 2 else Work("Training", 9, "steps")
            state.work = None if line % 3 else Work("Validating")
            print(f"line {line}")
            time.sleep(0.001)
        view.stop()

    recording = run_in_terminal(run, 80, rows=500)
    assert recording.last.split("\n")[:400] == [f"line {line}".ljust(80) for line in range(400)]
    assert not recording.last[81 * 400 :].strip()


@pytest.mark.parametrize("columns", [40, 80, 220])
def test_times_are_seen_however_long_the_words_are(columns: int) -> None:
    state = RunState(Work("Training", 12345, "steps", 67), end=time.monotonic() + 4000)
    state.work = Work("Initializing adapters", 150, "matrices", 12, "model.model.layers.29.self_attn.v_proj" * 3)
    console = rich.console.Console(width=columns)
    with console.capture() as capture:
        console.print(LiveView(console, state).draw())
    rows = capture.get().splitlines()
    assert len(rows) == 3
    assert all(len(row) <= columns - len("^C^C") for row in rows)
    assert re.search(r"0:00:00, 1:06:\d\d left *$", rows[0])
    assert re.search(r"0:00:00 *$", rows[2])
    assert "Training 67 of" in rows[0] or columns == 40
    assert "Initializing adapters 12" in rows[2]


@pytest.mark.parametrize(
    ("saving", "said"),
    [
        (
            [{"save_last": True}],
            "Last checkpoint (step 6; the last 2 steps of the run are in no checkpoint): last.ckpt",
        ),
        ([{"save_last": True}, {"filename": "end", "every_n_train_steps": None}], "Last checkpoint (step 8): end.ckpt"),
    ],
    ids=["ends between two checkpoints", "another one keeps the end"],
)
def test_the_last_line_names_the_step_of_the_checkpoint_and_not_of_the_run(
    saving: list[dict[str, Any]], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saves: Any = [ModelCheckpoint(tmp_path, **{"every_n_train_steps": 3, **options}) for options in saving]
    limits = {"limit_train_batches": 8, "limit_val_batches": 0, "max_epochs": 1, "enable_checkpointing": True}
    trainer = quiet_trainer(tmp_path, callbacks=saves, **limits)
    trainer.fit(BoringModel())
    line, *_ = ending(trainer)
    assert line == said
    step, _, path = line.removeprefix("Last checkpoint (step ").partition("): ")
    assert torch.load(path, weights_only=False)["global_step"] == int(step.partition(";")[0])


@pytest.mark.parametrize(("batches", "epoch"), [(1, 2), (4, 1)])
def test_early_stopping_says_why(tmp_path: Path, batches: int, epoch: int) -> None:
    stop = EarlyStopping("x", patience=1, check_on_train_epoch_end=False)
    limits = {"limit_train_batches": batches, "limit_val_batches": 1, "val_check_interval": 1}
    trainer = quiet_trainer(tmp_path, callbacks=[stop], max_epochs=9, num_sanity_val_steps=0, **limits)

    class Flat(BoringModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", 1.0)

    trainer.fit(Flat())
    line, *_ = ending(trainer)
    assert re.search(rf"Stopped early at step 2, in epoch {epoch}: .*x.* did not improve", line)


def test_answers_are_shown_and_logged(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = fit("--logger=csv", "--summary.samples=2", "--trainer.default_root_dir=out")
    said = capsys.readouterr().out
    assert "answers before and after training" in said
    log = Path(cli.trainer.logger.log_dir)
    assert log.is_relative_to("out")
    lines = [json.loads(line) for line in (log / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert {line["step"] for line in lines} == {2}  # as the metrics, which Lightning counts from 0
    shown = (
        cli.trainer.checkpoint_callback
        and next(c for c in cli.trainer.callbacks if type(c).__name__ == "EvaluationSummary").state_dict()["samples"]
    )
    assert all({"before", "after"} <= sample.keys() for sample in shown)
    options = yaml.safe_load((log / "hparams.yaml").read_text())
    assert options["adapter.r"] == 4
    assert options["data.batch_size"] == 4
    main(["test", "--config=mine.yaml", "--ckpt_path=out/checkpoints/last.ckpt", "--logger=none"])
    said = capsys.readouterr().out
    assert len(re.findall("perplexity", said)) == 1
    assert "DataLoader" not in said


def test_a_logger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"--logger wandb needs the package wandb.*pip install wandb"):
        make_logger("wandb", True, None)
    assert make_logger("none", True, None) is False
