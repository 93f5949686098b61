"""Converting the parser's long errors to one sentence that says what is wrong with an option."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torchmetrics import Metric

from milora_lightning.data import Files, Source
from milora_lightning.training.optimizers import EXTRAS, know_short_names, missing
from milora_lightning.utils.compat.jsonargparse import option_strings
from milora_lightning.utils.suggestions import closest, suggest

# Options that take the name of a class.
CLASSES: dict[str, type] = {
    "data.source": Source,
    "model.optimizer": torch.optim.Optimizer,
    "model.metric": Metric,
    "trainer.callbacks": Callback,
    "trainer.logger": Logger,
    "trainer.strategy": Strategy,
}
# Default classes of some options. The parser knows the options of a class only when the class is given.
NESTED: dict[str, type] = {"data.source": Files, "model.optimizer": torch.optim.AdamW}
MOST_NAMES = 50
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
WORDS.update(dict="a mapping such as {name: value}", list="a list such as [a, b]")


class ShortFormatter(DefaultHelpFormatter):
    """Shows classes in help by their short names, and only the first of very many."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return super()._split_lines(re.sub(r"known subclasses: ([\w., ]+)", _short_names, text), width)


class Parser(LightningArgumentParser):
    """A parser whose errors are single sentences with suggestions, and that accepts no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        know_short_names()
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": ShortFormatter, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and where to find help, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        sys.stderr.write(
            f"error: {in_a_sentence(message, known_options(parser))}\n({prog} --help lists the options.)\n"
        )
        self.exit(2)


def known_options(parser: Any) -> list[str]:
    """Return the options of a parser, including those of default classes."""
    options = option_strings(parser)
    nested = (
        f"--{name}.{option}" for name, cls in NESTED.items() if f"--{name}" in options for option in options_of(cls)
    )
    return sorted(options.union(nested))


def in_a_sentence(message: str, options: Iterable[str] = ()) -> str:
    r"""Describe an error in one sentence.

    Args:
        message: The parser's message.
        options: All existing options.

    Returns:
        The sentence, or the message itself if it is of an unknown kind.

    >>> in_a_sentence("unrecognized arguments: --lr=1", ["--model.optimizer.lr"])
    '--lr: there is no such option. Did you mean --model.optimizer.lr?'
    >>> in_a_sentence('Parser key "trainer.max_steps": Expected a <class \'int\'>. Got value: x')
    '--trainer.max_steps=x: expected a whole number.'
    """
    if match := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        return _unrecognized(match[1].split(), options)
    if message.startswith("Unexpected config: "):
        return "--config: the file is not a YAML mapping of options, such as model: {name_or_path: embedded}."
    if match := re.match(r"argument (--[\w.+]+).*: expected (?:one|at least one) argument", message):
        return f"{match[1]}: a value is missing."
    if match := re.match(r"the following arguments are required: (.*)", message):
        names = [re.sub(r"^(--)?(fit|validate|test|predict)\.", "", name.strip()) for name in match[1].split(",")]
        return (
            f"{' and '.join('--' + name.lstrip('-') for name in names)} {'is' if len(names) == 1 else 'are'} missing."
        )
    for library in EXTRAS:
        if f"No module named '{library}'" in message and (found := re.search(rf"{library}\.optim\.(\w+)", message)):
            return f"--model.optimizer: {missing(library, found[1])}"
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    return (key and (_of_a_class(key, message) or _of_a_value(key, message))) or message


def missing_package(error: BaseException) -> str | None:
    """Return the message about a missing package that a class given by name needs; None for other errors.

    Args:
        error: The parser's error, which describes everything that it tried.
    """
    given = re.search(r"given class_path '([\w.]+)':\s*(.*)", str(error))
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if not given or not any(isinstance(each, ImportError) for each in causes):
        return None
    return f"{given[1].rpartition('.')[2]}: {given[2]}"


def options_of(cls: type) -> list[str]:
    """Return the names of the options of a class."""
    return [name for name, parameter in inspect.signature(cls).parameters.items() if parameter.kind.name[:3] != "VAR"]


def class_names(option: str) -> dict[str, type]:
    """Return the classes that can be given for an option, by their short names."""
    return {cls.__name__: cls for cls in _subclasses(CLASSES[option])} if option in CLASSES else {}


def _short_names(match: re.Match[str]) -> str:
    names = [name.rpartition(".")[2] for name in match[1].split(", ")]
    return f"known subclasses: {', '.join(names[:MOST_NAMES])}" + (" ..." if len(names) > MOST_NAMES else "")


def _subclasses(cls: type) -> Iterator[type]:
    subclasses: list[type] = cls.__subclasses__()
    for each in subclasses:
        if not getattr(each, "_is_protocol", False):
            yield each
        yield from _subclasses(each)


def _unrecognized(arguments: list[str], options: Iterable[str]) -> str:
    option = arguments[0].partition("=")[0]
    if not option.startswith("-"):
        needs = "a value with spaces or brackets needs quotes, and so does a pattern such as *.jsonl"
        return f"{option!r} is not an option: options begin with --, and {needs}."
    meant = suggest(option, options)
    return f"{option}: there is no such option." + (f" Did you mean {' or '.join(meant)}?" if meant else "")


def _of_a_class(key: str, message: str) -> str | None:
    """Describe an error in a class given by name, or in its options."""
    if match := re.search(r"The optimizer \w+ needs the package .*", message):
        return f"--{key}: {match[0]}"
    given = re.search(r"given class_path '([\w.]+)'", message)
    short = given[1].rpartition(".")[2] if given else ""
    if given and (match := re.search(r"Option '(\w+)' is not accepted", message)):
        cls = class_names(key).get(short)
        meant = closest(match[1], options_of(cls)) if cls else None
        known = f" It has: {', '.join(options_of(cls))}." if cls else ""
        return f"--{key}.{match[1]}: {short} has no such option." + (f" Did you mean {meant}?" if meant else known)
    if given and (match := re.search(r"arguments are required: ([\w, ]+)", message)):
        names = " and ".join(f"--{key}.{name.strip()}" for name in match[1].split(","))
        return f"{short} needs more options: give {names}."
    named = re.search(r"Expected a dot import path string: (\S+)", message)
    if key in CLASSES and named and named[1].isidentifier():
        known_classes = sorted(class_names(key))
        meant = closest(named[1], known_classes)
        rest = f"There are {', '.join(known_classes[:20])}; give your own by its full path."
        rest = f"Did you mean {meant}?" if meant else rest
        return f"--{key}={named[1]}: there is no class of that name. {rest}"
    return None


def _of_a_value(key: str, message: str) -> str | None:
    """Describe the expected value."""
    value = re.search(r"(?:Given|Got) value: (.*?)(?:\. Got value: .*)?$", message, re.MULTILINE)
    types = re.findall(r"Expected an? (.*?)(?:\. Got.*)?$", message, re.MULTILINE)
    wanted = [words for words in dict.fromkeys(map(_in_words, types)) if words]
    if not value or not wanted or len(value[1]) > 200:
        return None
    meant = closest(value[1], [choice for each in types for choice in _choices(each)])
    return f"--{key}={value[1]}: expected {' or '.join(wanted)}." + (f" Did you mean {meant}?" if meant else "")


def _in_words(expected: str) -> str:
    """Describe a type that the parser prints; empty if it is not a type.

    >>> _in_words("<class 'float'>"), _in_words("typing.Literal['a', 'b']"), _in_words("path but x is none")
    ('a number', 'a or b', '')
    """
    if match := re.fullmatch(r"<class '(\w+)'>", expected):
        return WORDS.get(match[1], match[1])
    return " or ".join(_choices(expected))


def _choices(expected: str) -> list[str]:
    match = re.fullmatch(r"typing\.Literal\[(.*)\]", expected)
    return [choice.strip().strip("'\"") for choice in match[1].split(",")] if match else []
