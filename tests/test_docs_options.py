"""Commands, options and configs that the documentation names exist."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import lightning.pytorch
import pytest
import torch
import yaml
from helpers.command_line import run
from helpers.pages import ROOT, blocks, page, read

import milora_lightning.data
from milora_lightning.cli.commands import COMMANDS, LIGHTNING
from milora_lightning.cli.commands.running import FIT

CONFIGS = ROOT / "configs"
PARTS = ("model", "adapter", "data", "trainer", "predictions", "summary")


@pytest.fixture(scope="module")
def fit_options() -> set[str]:
    """The options of ``fit``, with those of classes that may be named in them."""
    import contextlib
    import io

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        run("fit", "--help_all")
    options = {name.rstrip("+") for name in re.findall(r"--([\w.]+\+?)", shown.getvalue())}
    sources = [c for c in vars(milora_lightning.data).values() if inspect.isclass(c)]
    for name, classes in {"data.source": sources, "model.optimizer": [torch.optim.AdamW]}.items():
        for kind in classes:
            options |= {f"{name}.{parameter}" for parameter in inspect.signature(kind).parameters}
    return options | {"help", "help_all", "print_config"}


def options_of(command: str, fit: set[str]) -> set[str]:
    if command in LIGHTNING:
        return fit
    module, _, name = COMMANDS[command].partition(":")
    parameters = set(inspect.signature(getattr(import_module(module), name)).parameters)
    return parameters - {FIT} | (fit if FIT in parameters else {"help"})


def commands(text: str) -> Iterator[list[str]]:
    """The calls of this program in blocks and in lines of text: the command and its arguments."""
    text = re.sub(r"\\\n\s*", " ", text)
    inline = [code.replace("\n", " ") for code in re.findall(r"`((?:python\s+main\.py|milora)\s[^`]+)`", text)]
    lines = [line.strip(" #") for line in text.splitlines()]
    for line in [*inline, *lines]:
        called = re.match(r"(?:\S+ \| )?(?:\S*python (?:\S*/)?main\.py|(?:\S*/)?milora) +([a-z]+)\b(.*)", line)
        if called and (called[1] in COMMANDS or called[1] in LIGHTNING or " --" in called[2]):
            yield [called[1], *shlex.split(called[2].replace("…", "x"), comments=True)]


@page
def test_commands_and_their_options_exist(page: Path, fit_options: set[str]) -> None:
    for command, *arguments in commands(read(page)):
        assert command in {*COMMANDS, *LIGHTNING}, command
        known = options_of(command, fit_options)
        given = [a[2:].partition("=")[0].rstrip("+") for a in arguments if a.startswith("--")]
        assert [name for name in given if name not in known and not re.match(r"trainer\.callbacks\.", name)] == [], (
            f"{command} {arguments}"
        )


def test_an_option_that_is_none_is_seen(fit_options: set[str]) -> None:
    ((command, *arguments),) = commands("```\npython main.py fit --config a.yaml --adapter.rank \\\n  8\n```")
    assert (command, arguments) == ("fit", ["--config", "a.yaml", "--adapter.rank", "8"])
    assert "adapter.rank" not in fit_options
    assert "adapter.r" in fit_options


@page
def test_options_named_in_sentences_exist(page: Path, fit_options: set[str]) -> None:
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    named = re.findall(rf"`(?:--)?((?:{'|'.join(PARTS)})\.[\w.]+)(?:[+:= ][^`]*)?`", text)
    named = [re.sub(r"\.(class_path|init_args)(\..*)?$", "", name) for name in named]
    unknown = [name for name in named if name not in fit_options and not name.endswith((".py", ".yaml", "..."))]
    # methods and attributes of a trainer or module that a sentence speaks of
    owners = {"trainer": lightning.pytorch.Trainer, "model": torch.nn.Module}
    assert [n for n in unknown if not hasattr(owners.get(n.partition(".")[0]), n.partition(".")[2])] == []


@page
def test_shipped_configs_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"--config[ =]((?:method|model|recipe|strategy)/[\w./-]+\.yaml)", read(page))
    named += re.findall(r"`((?:method|model|recipe|strategy)/[\w./-]+\.yaml)`", read(page))
    assert [name for name in named if not (CONFIGS / name).is_file() and Path(name).stem != "NAME"] == []


@page
def test_options_in_yaml_blocks_exist(page: Path, fit_options: set[str]) -> None:
    for block in blocks(read(page), "yaml"):
        content = yaml.safe_load(block)
        for part in [part for part in content if part in PARTS]:
            for name in content[part]:
                assert f"{part}.{name.rstrip('+')}" in fit_options, f"{part}.{name}"
