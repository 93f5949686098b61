"""What is private in other packages is used in one folder, and is there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_WRAPPED_MODULE
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE

import milora_lightning
from milora_lightning.utils.compat import USED_IN_PLACE
from milora_lightning.utils.compat import torch as _torch

PACKAGE = Path(milora_lightning.__file__).parent
COMPAT = PACKAGE / "utils" / "compat"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(trees: list[ast.Module]) -> Iterator[str]:
    """Names of the package's own functions, classes, attributes and fields."""
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(attr=name, value=ast.Name(id="self"), ctx=ast.Store()):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def private(tree: ast.Module) -> Iterator[str]:
    """Private names that a module imports from other packages, or asks of objects."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if not module.startswith("milora_lightning"):
                yield from filter(is_private, [*module.split("."), *(alias.name for alias in names)])
            case ast.Attribute(attr=name) if is_private(name):
                yield name


def test_what_is_private_elsewhere_is_used_in_one_folder() -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if COMPAT not in path.parents]
    trees = {path: ast.parse(path.read_text()) for path in paths}
    known = {*defined([*trees.values()]), *USED_IN_PLACE, "_adapter_checkpoint", "_origin"}
    known |= {"_asdict", "_fields", "_replace", "_exit"}  # which are public, whatever they look like
    found = {path.name: set(private(tree)) - known for path, tree in trees.items()}
    assert {name: names for name, names in found.items() if names} == {}
    assert set(private(ast.parse("from torch._dynamo import a; model._guess"))) == {"_dynamo", "_guess"}


def test_names_of_wrappers_are_torch_s() -> None:
    assert _torch.FSDP_WRAPPED == FSDP_WRAPPED_MODULE
    assert _torch.CHECKPOINT_WRAPPED == _CHECKPOINT_WRAPPED_MODULE
    assert _torch.COMPILED in dict(torch.compile(nn.Linear(1, 1), backend="eager").named_children())


def test_a_compiled_layer_calls_what_is_inside_it_now() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    compiled._orig_mod = nn.Identity()
    _torch.bind_compiled(compiled)
    assert torch.equal(compiled(torch.ones(2)), torch.ones(2))
    _torch.bind_compiled(nn.Linear(1, 1))
