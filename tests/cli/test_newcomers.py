"""What somebody meets who tries the command line and their own files for the first time."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.models import quiet_trainer, save_tiny_model, write_examples
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from transformers import LlamaConfig, LlavaConfig

from milora_lightning.cli import main as cli
from milora_lightning.cli.ending import what_next
from milora_lightning.cli.loggers import no_logs_of_refused_runs
from milora_lightning.data import Files
from milora_lightning.utils.errors import MiLoRAError
from milora_lightning.utils.messages import warn
from milora_lightning.utils.notices import leave_out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps({"data": [{"prompt": "a", "completion": "b"}]}), "rows seem to be in the field 'data'"),
        ("a.json", json.dumps({"train": [{"prompt": "a"}], "test": []}), "Write the array that it holds to a file"),
        ("a.jsonl", '["a", "b"]\n["c", "d"]\n', "an array on each line names no fields"),
        ("a.csv", "What is 1 plus 1?,2\nWhat is 1 plus 2?,3\n", "first line of such a file has to name the fields"),
        ("a.TSV", "What is 1 plus 1?\t2\nWhat is 1 plus 2?\t3\n", "first line of such a file has to name the fields"),
    ],
)
def test_files_of_a_usual_but_other_form_are_told_what_to_change(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Files(train=str(tmp_path / name)).load("train")


def test_a_conversation_of_an_unknown_field_is_not_taken_for_a_file_of_rows(tmp_path: Path) -> None:
    row = {"talk": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="messages_field"):
        Files(train=str(tmp_path / "a.jsonl")).load("train")


def test_a_misspelt_file_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "messages.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "messages.xlsx").write_text("")
    with pytest.raises(FileNotFoundError, match=r"messages\.json\. Did you mean messages\.jsonl\?"):
        Files(train=str(tmp_path / "messages.json")).load("train")
    with pytest.raises(FileNotFoundError, match="Check the path"):
        Files(train=str(tmp_path / "elsewhere" / "messages.json")).load("train")


@pytest.mark.parametrize(("kind", "refused"), [("gpt2", True), ("llama", False)])
def test_too_few_positions_are_told_by_the_preview_and_a_refused_run_leaves_no_logs(
    kind: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model", kind)
    write_examples(tmp_path / "train.jsonl", 4)
    options = ["--model.name_or_path", "model", "--data.source.train", "train.jsonl", "--data.template", "alpaca"]
    options += ["--data.num_generation_examples", "0", "--data.source.validation_size", "0"]
    if not refused:
        with pytest.warns(match="64 positions and was not trained on any beyond: set max_length to 64"):
            cli.main(["preview", *options])
        return
    for command in ("preview", "fit"):
        with pytest.raises(SystemExit, match="64 positions and none beyond: set max_length to 64"):
            cli.main([command, *options])
    assert not (tmp_path / "lightning_logs").exists()


def test_a_folder_of_logs_that_holds_more_is_kept(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    for name, kept in (("metrics.csv", True), ("config.yaml", False)):
        logger = trainer.logger = CSVLogger(tmp_path, name)
        folder = Path(logger.log_dir)
        with suppress(MiLoRAError), no_logs_of_refused_runs(trainer):
            folder.mkdir(parents=True)
            (folder / name).write_text("")
            raise MiLoRAError
        assert folder.is_dir() == folder.parent.is_dir() == kept


def test_what_to_do_next_with_a_model_that_sees(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    for config, command in ((LlavaConfig(), " export "), (LlamaConfig(), " chat ")):
        module = LightningModule()
        module.model = nn.Identity()
        module.model.config = config
        trainer.strategy.connect(module)
        (line,) = what_next(trainer, "a.ckpt")
        assert command in line


def test_a_command_with_nothing_points_to_its_own_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    with pytest.raises(SystemExit) as end:
        cli.main(["fit"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert "model.name_or_path is missing" in told
    assert "fit --help" in told


def test_a_file_that_is_no_config_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.csv").write_text("question,answer\n" + "What is 1 plus 1?,2\n" * 50)
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(tmp_path / "data.csv")])
    told = capsys.readouterr().err
    assert "--config: the file is not a YAML mapping of options" in told
    assert told.count("What is") == 0


def test_warnings_of_this_package_come_without_a_line_of_code() -> None:
    leave_out()
    leave_out()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("Mind this.")
        warnings.warn("Mind that.", stacklevel=1)
    ours, others = caught
    package = str(Path(cli.__file__).parent / "lora.py")
    assert warnings.formatwarning(ours.message, ours.category, package, 1) == "warning: Mind this.\n"
    assert __file__ in warnings.formatwarning(others.message, others.category, others.filename, others.lineno)
