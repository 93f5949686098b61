"""Reads the options of classes and functions from their source code, so that help does not have to import them.

torch and Lightning take seconds to import, and help should appear at once.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from milora_lightning.utils.folders import PACKAGE


@dataclass(frozen=True)
class Option:
    """An option as shown in help.

    Attributes:
        name: Its name in the signature.
        kind: Its type, such as ``int`` or ``peft | merged``.
        default: Its default as code; None if it is required.
        text: Its description in the docstring.
    """

    name: str
    kind: str
    default: str | None
    text: str


@dataclass(frozen=True)
class Description:
    """The help for a class or function.

    Attributes:
        summary: The docstring's first line.
        text: Its paragraphs up to the first section.
        options: The options, in the signature's order.
    """

    summary: str
    text: str
    options: list[Option]


def describe(place: str) -> Description:
    """Describe a class or function of this package.

    Args:
        place: ``module:name``.

    Returns:
        Its docstring and options.

    Raises:
        LookupError: If the module does not define it.

    >>> [option.name for option in describe("milora_lightning.data.tasks.word_problems:WordProblems").options][:2]
    ['train_size', 'validation_size']
    """
    module, _, name = place.partition(":")
    tree = _parsed(module)
    node = next((n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == name), None)
    if node is None:
        raise LookupError(f"{module} defines no {name}.")
    doc = ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        functions = [each for each in node.body if isinstance(each, ast.FunctionDef)]
        signature = next((function.args for function in functions if function.name == "__init__"), None)
    else:
        signature = node.args
    texts = _arguments(doc)
    text = plain(re.split(r"\n\n?(?:Args|Returns|Raises|Attributes|>>>)", doc)[0])
    options = [
        Option(argument.arg, _kind(module, argument.annotation), _default(module, default), texts.get(argument.arg, ""))
        for argument, default in ([] if signature is None else _with_defaults(signature))
    ]
    return Description(text.partition("\n")[0], text, options)


def plain(text: str) -> str:
    """Remove the markup of reStructuredText from a docstring's text.

    >>> plain("``null`` or :class:`milora_lightning.data.Files`")
    'null or Files'
    """
    text = re.sub(r":\w+:`(?:[\w.]*\.)?(\w+)`", r"\1", text)
    return text.replace("``", "").strip()


@functools.cache
def _parsed(module: str) -> ast.Module:
    spec = importlib.util.find_spec("milora_lightning")
    folder = Path(spec.origin).parent if spec and spec.origin else PACKAGE
    path = folder.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _with_defaults(signature: ast.arguments) -> list[tuple[ast.arg, ast.expr | None]]:
    positional = [*signature.posonlyargs, *signature.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(signature.defaults))
    pairs = list(zip(positional, [*missing, *signature.defaults], strict=True))
    pairs += zip(signature.kwonlyargs, signature.kw_defaults, strict=True)
    return [(argument, default) for argument, default in pairs if argument.arg != "self"]


def _arguments(doc: str) -> dict[str, str]:
    r"""Return the description of each argument in the Args section of a Google-style docstring.

    >>> _arguments("X.\n\nArgs:\n    a: First\n        line.\n    b: Second.\n\nRaises:\n    E: c.")
    {'a': 'First line.', 'b': 'Second.'}
    """
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n(?=[ ]{4}))*)", doc, re.MULTILINE)
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: plain(" ".join(text.split())) for name, text in found}


def _kind(module: str, annotation: ast.expr | None) -> str:
    """Format a type for users: choices by their values, other types by their names, without None."""
    if annotation is None:
        return ""
    if isinstance(annotation, ast.BinOp):
        kinds = [_kind(module, annotation.left), _kind(module, annotation.right)]
        return " | ".join(kind for kind in kinds if kind not in ("None", ""))
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        values = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return " | ".join(str(ast.literal_eval(value)) for value in values)
    if isinstance(annotation, ast.Name) and isinstance(meaning := _meaning(module, annotation.id), ast.Subscript):
        return _kind(module, meaning)
    if isinstance(annotation, ast.Subscript):
        return ast.unparse(annotation.value)
    return ast.unparse(annotation).rpartition(".")[2]


def _default(module: str, default: ast.expr | None) -> str | None:
    if default is None:
        return None
    if isinstance(default, ast.Name) and (meaning := _meaning(module, default.id)) is not None:
        default = meaning
    if isinstance(default, ast.Lambda):
        return ast.unparse(default.body)
    text = str(default.value) if isinstance(default, ast.Constant) else ast.unparse(default)
    return text.lower() if text in ("True", "False") else text


def _meaning(module: str, name: str) -> ast.expr | None:
    """Find the value that is assigned to a name in a module, or in the module of the package it is imported from."""
    for node in _parsed(module).body:
        if isinstance(node, ast.Assign):
            for target, value in _pairs(node.targets[0], node.value):
                if ast.unparse(target) == name:
                    return value
        if isinstance(node, ast.AnnAssign) and name == ast.unparse(node.target):
            return node.value
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return _meaning(str(node.module), name) if str(node.module).startswith("milora_lightning.") else None
    return None


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=False))
    return [(target, value)]
