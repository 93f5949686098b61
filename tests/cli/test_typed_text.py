"""Options of text hold what was typed, in all commands, whatever YAML would make of it."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any, Union

import pytest
from jsonargparse import auto_cli
from lightning.pytorch import Trainer

from milora_lightning import CausalLMModule, MiLoRAInit, SFTDataModule, load_for_inference
from milora_lightning.callbacks import EvaluationSummary, PredictionWriter
from milora_lightning.cli.commands import COMMANDS
from milora_lightning.cli.commands.running import FIT
from milora_lightning.cli.main import main
from milora_lightning.cli.option_errors import Parser
from milora_lightning.cli.typed_text import CommandParser, take_values_as_typed
from milora_lightning.data import Files

ODD = ["#x", "# x", "1", "1e3", "true", "a: b", "~", "---", "Null", "'x'", '"x"', "*x", ""]


def is_text(parameter_type: Any) -> bool:
    return parameter_type is str or parameter_type == (str | None)


@pytest.fixture(autouse=True)
def _as_typed() -> None:
    take_values_as_typed()


@pytest.mark.parametrize("name", COMMANDS)
def test_text_of_commands_is_taken_as_typed(name: str) -> None:
    module, _, function = COMMANDS[name].partition(":")
    parser = CommandParser()
    parser.add_function_arguments(getattr(import_module(module), function), as_group=False, skip={FIT})
    texts = [action.dest for action in parser._actions if is_text(getattr(action, "_typehint", None))]
    assert texts or name in ("preview", "env")
    for text in texts:
        for value in [*ODD, "null", "[x]", "{x: y}"]:
            given = parser.parse_args([f"--{text}={value}"], _skip_validation=True)
            assert given[text] == value, (text, value)
    assert parser.parse_args([], _skip_validation=True) == parser.get_defaults(skip_validation=True)


@pytest.mark.parametrize(
    "cls", [CausalLMModule, SFTDataModule, MiLoRAInit, EvaluationSummary, PredictionWriter, Files, Trainer]
)
def test_text_of_fit_is_taken_as_typed(cls: type) -> None:
    """On the command line and, in quotes, in configs, where null takes back what another config has given."""
    parser = Parser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(cls, "it", fail_untyped=False)
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    texts = {name: hint for name, hint in hints.items() if "str" in str(hint) and not name.endswith(".help")}
    for name, hint in texts.items():
        if is_text(hint):
            for value in [*ODD, "[x]"]:
                assert parser.parse_args([f"--{name}={value}"], _skip_validation=True)[name] == value, (name, value)
                config = json.dumps({"it": {name.removeprefix("it."): value}})
                assert parser.parse_string(config, _skip_validation=True)[name] == value, (name, value)
        elif "dict" not in str(hint) and "list[str]" in str(hint) and "Union" in str(hint):  # names of files, of layers
            assert parser.parse_args([f"--{name}=#x"], _skip_validation=True)[name] == "#x"
            assert parser.parse_args([f"--{name}=[x]"], _skip_validation=True)[name] == ["x"]
        if hint == (str | None):
            assert parser.parse_args([f"--{name}=null"], _skip_validation=True)[name] is None
    assert "it.modules_to_save" not in texts or parser.parse_args(["--it.modules_to_save=null"]) is not None


def test_configs_of_commands_may_leave_text_out(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("b: null\na: '#1'\n")

    def command(a: str, b: str | None = None) -> tuple[str, str | None]:
        return a, b

    assert auto_cli(command, args=[f"--config={config}"], as_positional=False, parser_class=CommandParser) == (
        "#1",
        None,
    )
    assert inspect.signature(command).parameters["b"].default is None


def test_devices_and_outputs_that_there_are_not_are_named_before_any_work(tmp_path: Path) -> None:
    for odd in ("#x", "null", "", "cuda:77", "xla:99"):
        with pytest.raises(ValueError, match=r"There is no device .* here, only cpu"):
            load_for_inference("nowhere", device=odd)
        with pytest.raises(SystemExit, match="There is no device"):
            main(["generate", "--model=nowhere", "--prompt=Hi", f"--device={odd}"])
    with pytest.raises(SystemExit, match="is a folder"):
        main(["generate", "--model=nowhere", "--prompt=Hi", f"--output={tmp_path}"])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}')
    with pytest.raises(SystemExit, match="from which the prompts come"):
        main(["generate", "--model=nowhere", *(f"--{name}={tmp_path}/prompts.jsonl" for name in ("input", "output"))])


def test_whole_numbers_are_ints_whatever_the_order_of_a_union() -> None:
    """As float, ``limit_train_batches: 1`` would be all batches. Earlier unions decide which order typing gives."""
    take_values_as_typed()
    parser = Parser(exit_on_error=False)
    parser.add_argument("--batches", type=Union[float, int, None])  # noqa: UP007 (the order is the subject)
    for typed, value in {"1": 1, "1.0": 1.0, "0.5": 0.5, "null": None, "1e3": 1000.0}.items():
        read = parser.parse_args(["--batches", typed]).batches
        assert (read, type(read)) == (value, type(value)), typed
