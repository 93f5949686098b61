"""Sample answers on the screen and in loggers, and where the parts of a line of progress stand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.clock import Clock
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.spinner import SPINNERS

from milora_lightning.screen.samples import LABELS, choose, log_samples, shorten, table
from milora_lightning.screen.state import RunState, Work
from milora_lightning.screen.views import LiveView, open_view

SAMPLES = [
    {"prompt": "p1", "instruction": "1 + 1?", "reference": "2", "before": "11", "answer": "two"},
    {"prompt": "p2", "instruction": "1 + 2?", "reference": "3", "before": "12", "answer": "[red]3"},
]
ROWS = [["1 + 1?", "2", "two"], ["1 + 2?", "3", "[red]3"]]


class Tables:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logged: list[Any] = []

    run_id = "run"

    @property
    def experiment(self) -> Any:
        return self

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        self.logged.append((args, kwargs))

    def add_text(self, *args: Any) -> None:
        self.logged.append(args)


class Wandb(Tables, WandbLogger):
    pass


class MLFlow(Tables, MLFlowLogger):
    pass


class TensorBoard(Tables, TensorBoardLogger):
    pass


def logged_by(logger: Any) -> Any:
    log_samples(logger, SAMPLES, 7, "val")
    (found,) = logger.logged
    return found


def test_loggers_get_answers_as_their_tables() -> None:
    options = {"columns": ["instruction", "reference", "answer"], "data": ROWS, "step": 7}
    assert logged_by(Wandb()) == (("val_samples",), options)
    columns = {"instruction": ["1 + 1?", "1 + 2?"], "reference": ["2", "3"], "answer": ["two", "[red]3"]}
    assert logged_by(MLFlow()) == (("run", {"step": [7, 7], **columns}, "val_samples.json"), {})
    name, text, step = logged_by(TensorBoard())
    assert (name, step) == ("val_samples", 7)
    assert "| 1 + 1? | 2 | two |" in text


def test_a_folder_of_csv_files_gets_them_as_lines_of_json(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "", "")
    for step, stage in ((7, "val"), (9, "test")):
        log_samples(logger, [{**SAMPLES[0], "answer": "zwölf"}, SAMPLES[1]], step, stage)
    text = (Path(logger.log_dir) / "samples.jsonl").read_text(encoding="utf-8")
    assert "zwölf" in text  # for people to read
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": step, "stage": stage, "instruction": question, "reference": right, "answer": answer}
        for step, stage in ((7, "val"), (9, "test"))
        for question, right, answer in (("1 + 1?", "2", "zwölf"), ("1 + 2?", "3", "[red]3"))
    ]


def test_what_is_no_terminal_gets_lines_now_and_then(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.get_console", lambda: Console(file=io.StringIO()))
    state = RunState(training=Work("Training", 10, "steps", 3), loss=1.5)
    view = open_view(state)
    for seconds, printed in ((9.0, 0), (10.0, 1), (19.0, 0), (20.0, 1)):
        clock(seconds)
        view.tick()
        assert capsys.readouterr().out == f"{state.line()}\n" * printed
    view.stop()


def test_a_logger_without_tables_gets_nothing() -> None:
    class Plain(Tables, Logger):  # type: ignore[misc]
        name = version = None  # type: ignore[assignment]
        log_metrics = log_hyperparams = None  # type: ignore[assignment]

    logger = Plain()
    log_samples(logger, SAMPLES, 7, "val")
    assert logger.logged == []


@pytest.mark.parametrize(
    ("text", "length", "short"),
    [
        ("one\n  two", 7, "one two"),
        ("one two", 6, "one t…"),
        (" \n", 5, "(nothing)"),
        ("x" * 300, 240, "x" * 239 + "…"),
    ],
)
def test_a_text_is_on_one_line_of_at_most_its_length(text: str, length: int, short: str) -> None:
    assert shorten(text, length) == short
    assert len(shorten("word " * 100)) == 240


def test_the_last_answer_is_what_the_eye_falls_on() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system="standard", legacy_windows=False)
    console.print(table(SAMPLES, ["before", "answer"], "answers, step 7"))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for bold in ("answers, step 7", "two", "[red]3"):
        assert f"\x1b[1m{bold}" in shown
    for plain in ("11", "12", "1 + 1?", *LABELS.values()):
        assert plain in shown
        assert f"\x1b[1m{plain}" not in shown


def lines(state: RunState, width: int = 60) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    console.print(LiveView(console, state).draw())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_line_has_a_sign_of_life_words_a_bar_and_times_at_the_right(clock: Clock) -> None:
    frames = SPINNERS["dots"]["frames"]
    work = Work("Validating", 8, "batches", 4)
    clock(10.0)
    *_, line = lines(RunState(work=work))
    assert line[0] in frames
    assert line[1:28] == " Validating 4 of 8 batches "
    assert line[28:48].rstrip() == "━" * 10  # half of the room that is left
    assert line[48:].rstrip() == " 0:00:10"


def test_what_goes_on_beside_training_alone_shows_that_it_is_alive(clock: Clock) -> None:
    frames = SPINNERS["dots"]["frames"]
    training = Work("Training", 10, "steps", 3)
    clock(10.0)
    alone = lines(RunState(training=training, loss=1.5))
    assert alone[-2][0] in frames
    assert alone[-1].rstrip() == "loss 1.5"
    both = lines(RunState(training=training, loss=1.5, work=Work("Validating")))
    assert both[-3].startswith("  Training 3 of 10 steps ")
    assert both[-1][0] in frames
    assert both[-1].rstrip().endswith(" 0:00:00")
    assert len(both[-1].rstrip()) == 56  # times stand at the right without a bar, too
    assert len(alone) == len(both)


def test_samples_are_chosen_across_the_alphabet() -> None:
    """Prompts that begin alike are often of one kind."""
    samples = [{"prompt": f"{kind} {number}"} for kind in ("Add", "Divide") for number in range(50)]
    assert {sample["prompt"].split()[0] for sample in choose(samples, 10)} == {"Add", "Divide"}
