"""Analysis of a model's source: the layers whose weights it reads without calling the layers.

An adapter's ``weight`` is W + ΔW, so such a model computes with the update and trains it, but without dropout and
rounded to the weight's dtype. Other tools' adapters have no effect there.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear

ABOUT = {"dtype", "device", "shape", "ndim", "is_cuda", "is_meta", "requires_grad", "size", "dim", "numel", "data_ptr"}
ABOUT |= {"element_size", "is_floating_point", "layout", "__class__"}
"""Attributes of a weight that code may read without computing with it."""

_LIKE = {"to", "type_as"}
"""Methods that accept a tensor only for its dtype and device."""

ENTRIES = ("forward", "__call__")
Path = tuple[str, ...]


class _UnknownError(Exception):
    """The value of an expression is known only during a call."""


def read_weights(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapters, by name, whose layers' weights a model reads in its ``forward``.

    If attributes of modules and defaults of arguments determine which branch is taken in evaluation, only that one is
    followed; otherwise both are. Code without source is skipped.

    >>> class Reads(nn.Module):
    ...     pass
    >>> read_weights(Reads())
    {}
    """
    names = {layer: name for name, layer in lora_layers(model).items()}
    found = set()
    for owner in model.modules():
        if isinstance(owner, LoRALinear) or type(owner).__module__.startswith("torch."):
            continue
        for path in _paths(owner):
            layer: Any = owner
            for part in path:
                layer = getattr(layer, "_modules", {}).get(part)
            found.add(layer)
    return {name: layer for layer, name in names.items() if layer in found}


def _paths(owner: nn.Module) -> Iterator[Path]:
    """Yield the places, relative to a module, of the layers whose weights it may read."""
    kind, seen, following = type(owner), set(), [*ENTRIES]
    while following:
        name = following.pop()
        if name in seen or not inspect.isroutine(method := getattr(kind, name, None)):
            continue
        seen.add(name)
        names = _names_in(method := inspect.unwrap(method))
        if "weight" not in names:  # as in most modules; their source need not be parsed
            following += names
            continue
        tree = _parsed(method)
        if tree is not None:
            reader = _Reader(owner, _defaults(method))
            reader.follow(tree.body)
            following += reader.called
            yield from reader.found


def _names_in(method: Any) -> set[str]:
    """Return the names of all attributes and globals in a function's code, and in that of functions within it."""
    codes, names = [getattr(method, "__code__", None)], set()
    while codes:
        code = codes.pop()
        if code is not None:
            names |= {*code.co_names}
            codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return names


@lru_cache(maxsize=256)
def _parsed(method: Any) -> ast.FunctionDef | None:
    """Parse a method; None if there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


def _defaults(method: Any) -> dict[str, Any]:
    parameters = inspect.signature(method).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


class _Reader(ast.NodeVisitor):
    """Collects the paths of read weights, and the module's methods that are called."""

    def __init__(self, owner: nn.Module, defaults: Mapping[str, Any]) -> None:
        self.owner, self.known = owner, dict(defaults)
        self.found: list[Path] = []
        self.called: list[str] = []
        self.layers: dict[str, Path] = {}  # local names of parts of the module
        self.weights: dict[str, set[Path]] = {}  # local names that may stand for the weights of these

    def follow(self, statements: list[ast.stmt]) -> bool:
        """Visit statements up to one that certainly leaves the method or loop; return whether there is one."""
        for statement in statements:
            if isinstance(statement, ast.If):
                left = self._follow_branches(statement)
            elif isinstance(statement, ast.With):
                for item in statement.items:
                    self.visit(item)
                left = self.follow(statement.body)
            else:
                self.visit(statement)
                left = isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break))
            if left:
                return True
        return False

    def visit_With(self, node: ast.With) -> None:
        self.follow([node])

    def visit_For(self, node: ast.For) -> None:
        self._visit_loop(node, node.target, node.iter)

    def visit_While(self, node: ast.While) -> None:
        self._visit_loop(node, node.test)

    def _visit_loop(self, node: ast.For | ast.While, *head: ast.expr) -> None:
        for part in ast.walk(node):  # known in the first iteration only
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                self.known.pop(part.id, None)
        for part in head:
            self.visit(part)
        self.follow(node.body)
        self.follow(node.orelse)

    def visit_Assign(self, node: ast.Assign) -> None:
        path, names = _path(node.value, self.layers), [t.id for t in node.targets if isinstance(t, ast.Name)]
        weight = path and path[-1] == "weight" and len(names) == len(node.targets)
        if not weight:  # otherwise it is read where its name is used, unless only attributes are
            self.visit(node.value)
        for target in node.targets:
            self.visit(target)
        for name in names:
            if path and weight:
                self.weights.setdefault(name, set()).add(path[:-1])
            elif path is not None:
                self.layers[name] = path

    def visit_If(self, node: ast.If) -> None:
        self._follow_branches(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        taken = self._taken(node.test)
        for part in [node.body] if taken else [node.orelse] if taken is False else [node.body, node.orelse]:
            self.visit(part)

    def _follow_branches(self, node: ast.If) -> bool:
        self.visit(node.test)
        taken = self._taken(node.test)
        if taken is not None:
            return self.follow(node.body if taken else node.orelse)
        left = [self.follow(branch) for branch in (node.body, node.orelse)]
        return all(left)

    def _taken(self, test: ast.expr) -> bool | None:
        """Return whether a condition holds; None if that is not known before a call."""
        try:
            return bool(self._value(test))
        except Exception:  # a user's properties and comparisons, which may depend on a call or a trainer
            return None

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Name) and function.id in ("isinstance", "hasattr", "type", "id"):
            return
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self":
            self.called.append(function.attr)
        if isinstance(function, ast.Attribute) and function.attr in _LIKE:
            node = copy.copy(node)
            node.args = [other for other in node.args if not self._is_weight(other)]
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        inner = node.value
        if node.attr in ABOUT and self._is_weight(inner):
            return
        path = _path(inner, self.layers)
        if node.attr == "weight" and path:
            self.found.append(path)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found += self.weights.get(node.id, ())
        else:
            self.known.pop(node.id, None)
            self.layers.pop(node.id, None)

    def visit_Compare(self, node: ast.Compare) -> None:
        asked = node.left if all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops) else None
        for part in (node.left, *node.comparators):
            if part is not asked or not self._is_weight(part):
                self.visit(part)

    def _is_weight(self, node: ast.expr) -> bool:
        """Whether an expression is just a weight, of which possibly only attributes are read."""
        if isinstance(node, ast.Name):
            return node.id in self.weights
        return isinstance(node, ast.Attribute) and node.attr == "weight"

    def _value(self, node: ast.expr) -> Any:
        """Evaluate an expression of constants, defaults of arguments and the module's attributes."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id in self.known:
            return self.known[node.id]
        if isinstance(node, ast.Name) and node.id == "self":
            return self.owner
        if isinstance(node, ast.Attribute):
            owner = self._value(node.value)
            if owner is self.owner and node.attr == "training":
                return False
            if isinstance(owner, (nn.Module, type(None))) or hasattr(owner, "to_dict"):
                return getattr(owner, node.attr, None)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self._value(node.operand)
        if isinstance(node, ast.BoolOp):
            return self._any_or_all(node)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
            return _COMPARISONS[type(node.ops[0])](self._value(node.left), self._value(node.comparators[0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            return hasattr(*map(self._value, node.args))
        raise _UnknownError

    def _any_or_all(self, node: ast.BoolOp) -> bool:
        decisive, unknown = isinstance(node.op, ast.Or), False
        for part in node.values:
            holds = self._taken(part)
            if holds is decisive:
                return decisive
            unknown = unknown or holds is None
        if unknown:
            raise _UnknownError
        return not decisive


_COMPARISONS: dict[type[ast.cmpop], Any] = {
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Gt: lambda a, b: a > b,
    ast.Lt: lambda a, b: a < b,
}


def _path(node: ast.expr, layers: Mapping[str, Path]) -> Path | None:
    """Return the path from a module to a part of it, as a, 0 and b for ``self.a[0].b``; None for anything else."""
    if isinstance(node, ast.Name):
        return () if node.id == "self" else layers.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _path(node.value, layers)
        return None if owner is None else (*owner, node.attr)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        owner = _path(node.value, layers)
        return None if owner is None else (*owner, str(node.slice.value))
    return None
