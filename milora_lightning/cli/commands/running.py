"""Calling the function of a command with the options on the command line."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from milora_lightning.cli.commands import COMMANDS
from milora_lightning.cli.typed_text import CommandParser, take_values_as_typed
from milora_lightning.utils.compat.jsonargparse import option_strings

FIT = "fit"


def run_command(name: str, args: Sequence[str]) -> Any:
    """Run a command.

    Args:
        name: One of :data:`COMMANDS`.
        args: Its command-line arguments.

    Returns:
        The return value of its function.
    """
    take_values_as_typed()
    module, _, function_name = COMMANDS[name].partition(":")
    function: Callable[..., Any] = getattr(import_module(module), function_name)
    prog = f"{Path(sys.argv[0]).name} {name}"
    if next(iter(inspect.signature(function).parameters), None) != FIT:
        return auto_cli(function, args=list(args), as_positional=False, parser_class=CommandParser, prog=prog)
    parser = CommandParser(prog=prog)
    parser.add_function_arguments(function, as_group=False, skip={FIT})
    names = option_strings(parser)
    options, fit = split_arguments(args, names)
    return function(fit, **parser.parse_args(options).as_dict())


def split_arguments(args: Sequence[str], names: set[str]) -> tuple[list[str], list[str]]:
    """Split command-line arguments into options with the given names, including their values, and all others.

    >>> split_arguments(["--seeds", "[0]", "--config", "a.yaml", "--output=x"], {"--seeds", "--output"})
    (['--seeds', '[0]', '--output=x'], ['--config', 'a.yaml'])
    """
    named: list[str] = []
    fit: list[str] = []
    rest: Iterator[str] = iter(args)
    for argument in rest:
        if argument.partition("=")[0] not in names:
            fit.append(argument)
            continue
        named.append(argument)
        if "=" not in argument and argument not in ("-h", "--help"):
            named += [value for value in [next(rest, None)] if value is not None]
    return named, fit
