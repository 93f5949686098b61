"""Help that is read, and mistakes that are answered with what was meant."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from argparse import ArgumentError
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import run

from milora_lightning.cli.commands import COMMANDS, LIGHTNING
from milora_lightning.cli.commands.running import FIT
from milora_lightning.cli.help import EXAMPLES, help_text
from milora_lightning.cli.typed_text import CommandParser


@pytest.fixture(scope="module")
def helped() -> dict[str, Any]:
    """The help of each command and which libraries were there then, from a process that has imported nothing else."""
    code = """
import json, sys
from milora_lightning.cli.help import help_text
for command in sys.argv[1:]:
    text = help_text([*command.split(), "--help"])
    heavy = {"torch", "lightning", "transformers", "jsonargparse"} & set(sys.modules)
    print(json.dumps([command, [text, sorted(heavy)]]))
"""
    command = [sys.executable, "-c", code, "", *LIGHTNING, *COMMANDS]
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("command", ["", *LIGHTNING, *COMMANDS])
def test_help_needs_neither_torch_nor_lightning(command: str, helped: dict[str, Any]) -> None:
    text, heavy = helped[command]
    assert heavy == []
    assert f" {command or 'COMMAND'} [" in text.splitlines()[0]
    assert len(text.splitlines()) < 170
    for name in [*LIGHTNING, *COMMANDS] if not command else []:
        assert re.search(rf"^  {name} +\w", text, re.MULTILINE)


def test_help_tells_of_options_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--help_all")
    everything = set(re.findall(r"--[\w.]+\+?", capsys.readouterr().out))
    with pytest.raises(SystemExit):
        run("fit", "--data.source.help", "Files")
    everything |= set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    text = help_text(["fit", "--help"]) or ""
    shown = re.findall(r"^  (--[\w.]+\+?)", text, re.MULTILINE)
    assert {"--data.source.train", "--adapter.r", "--trainer.max_epochs", "--model.optimizer.lr"} <= set(shown)
    assert [name for name in shown if name not in everything and not name.startswith("--model.optimizer.")] == []


def shown_options(command: str) -> list[tuple[str, str]]:
    """The options in a command's help, with what they take."""
    text = help_text([command, "--help"]) or ""
    return re.findall(r"^  --([\w.]+\+?) ?((?:[^ ]| (?! ))*)", text, re.MULTILINE)


def parses(parser: CommandParser, name: str, kind: str) -> bool:
    for value in (*kind.split(" | "), "1", "text", "true", "[1]", "[text]"):
        try:
            parser.parse_args([f"--{name}", value])
        except ArgumentError:
            continue
        return True
    return False


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_in_a_command_s_help_can_be_given(command: str) -> None:
    module, _, name = COMMANDS[command].partition(":")
    function = getattr(import_module(module), name)
    takes_fit = next(iter(inspect.signature(function).parameters)) == FIT
    parser = CommandParser(exit_on_error=False)
    parser.add_function_arguments(function, as_group=False, skip={FIT} if takes_fit else set())
    for action in parser._actions:  # each option by itself, also beside those that have to be given
        action.required = False
    shown = shown_options(command)
    assert len(shown) > 1
    assert [name for name, kind in shown if not parses(parser, name, kind)] == []
    assert not parses(parser, "no_such_option", "text")


@pytest.mark.parametrize(
    ("command", "example"), [(command, line) for command in COMMANDS for line in EXAMPLES.get(command, ())]
)
def test_examples_in_help_name_options_that_there_are(command: str, example: str) -> None:
    own = {name for name, _ in shown_options(command)}
    module, _, name = COMMANDS[command].partition(":")
    if next(iter(inspect.signature(getattr(import_module(module), name)).parameters)) == FIT:
        own |= {name for name, _ in shown_options("fit")}
    assert set(re.findall(r"--([\w.]+)", example)) <= own


def test_all_help_names_classes_by_their_short_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--help_all")
    text = " ".join(capsys.readouterr().out.split())
    (metrics,) = re.findall(r"--model\.metric METRIC .*?known subclasses: (.*?)\)", text)
    assert 20 < len(metrics.split(", ")) < 60
    assert "." not in metrics.removesuffix(" ...")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data.batchsize=2"], "--data.batchsize: there is no such option. Did you mean --data.batch_size?"),
        (["--lr", "1"], "--lr: there is no such option. Did you mean --model.optimizer.lr?"),
        (["--adapter.rank", "8"], "--adapter.rank: there is no such option. Did you mean --adapter.r?"),
        (["--num_train_epochs=2"], "Did you mean --trainer.max_epochs?"),
        (["--max_seq_length=2"], "Did you mean --data.max_length?"),
        (["--model.optimizer.lr=fast"], "--model.optimizer.lr=fast: expected a number."),
        (["--model.dtype=bfloat"], "expected auto or fast or float32 or bfloat16 or float16. Did you mean bfloat16?"),
        (["--data.source=File"], "--data.source=File: there is no class of that name. Did you mean Files?"),
        (["--data.source.trains=x"], "--data.source.trains: Files has no such option. Did you mean train?"),
        (["--trainer.callbacks+=EarlyStoping"], "Did you mean EarlyStopping?"),
        (
            ["--trainer.callbacks+=ForgettingMonitor"],
            "ForgettingMonitor needs more options: give --trainer.callbacks.text.",
        ),
        (["--adapter.r"], "--adapter.r: a value is missing"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    project: Path,
    change: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--config", "mine.yaml", *change)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert message in lines[0]


def test_an_unknown_command_is_answered_with_the_one_that_was_meant() -> None:
    with pytest.raises(SystemExit, match=r"no command 'exprot'. Did you mean export\?"):
        run("exprot", "--ckpt_path", "x")
    with pytest.raises(SystemExit, match=r"no command 'xyz'. There are fit, validate"):
        run("xyz")


def test_classes_go_by_their_short_names(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run("fit", "--config", "mine.yaml", "--data.source", "WordProblems", "--print_config")
    assert done.value.code == 0
    assert "class_path: milora_lightning.data.WordProblems" in capsys.readouterr().out


def test_preview_shows_what_would_be_learned(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("preview", "--config", "mine.yaml", "--examples", "2", "--data.template", "plain")
    text = capsys.readouterr().out
    row = json.loads((project / "train.jsonl").read_text().splitlines()[0])
    assert row["output"] in re.findall(r"«(.*?)»", text, re.DOTALL)[0]
    assert row["instruction"] not in "".join(re.findall(r"«(.*?)»", text, re.DOTALL))
    assert "24 examples" in text
    assert "6 steps of 4 rows, 6 an epoch" in text
    assert re.search(r"memory on cpu, estimated: [\d.]+ GB; [\d.]+ GB are available: it fits", text)
    assert not list((project / "out").rglob("*.ckpt"))


def test_preview_s_mistakes_point_to_preview_s_help(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--trainer.max_step=3"], ["--data.max_length=long"], []):
        with pytest.raises(SystemExit):
            run("preview", *(["--config", "mine.yaml"] if options else []), *options)
        told = capsys.readouterr().err
        assert "preview --help lists the options" in told
        assert "fit --help" not in told


def test_preview_of_one_text_counts_one_and_names_no_template(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "one.jsonl").write_text(json.dumps({"text": "1 plus 1 is 2."}) + "\n")
    options = ["--model.name_or_path=model", "--data.source.train=one.jsonl", "--trainer.accelerator=cpu"]
    run("preview", *options, "--trainer.max_epochs=1", "--trainer.logger=false", "--data.batch_size=1")
    text = capsys.readouterr().out
    assert "1 example; mean" in text
    assert "1 step of 1 row, 1 an epoch" in text
    assert "template: none, texts are learned unchanged" in text
