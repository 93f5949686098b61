"""A cache key for functions that changes with their code."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

NOT_CODE = {"__dict__", "__weakref__", "__doc__", "__firstlineno__", "__static_attributes__", "_abc_impl"}
HEAP_TYPE = 1 << 9  # of `type.__flags__`
PACKAGE = __name__.partition(".")[0]


def code_key(*functions: Any) -> str:
    """Return a key that changes with the code of functions and of everything that they use in the same project.

    It is computed from the compiled code in memory. So it needs no source files, which notebooks and compiled
    installations lack, and a file edited after its import does not change it. It covers the functions, classes and
    constants that the code names in this package, in the package of each function, and in modules that are not
    installed; libraries are represented by names only.

    Args:
        functions: Functions, methods, classes or partials of them.

    Returns:
        A hexadecimal key, the same in every process.
    """
    homes = {PACKAGE, *(_package(_module(function)) for function in functions)} - {"", "builtins"}
    digest = hashlib.sha256(repr(sys.version_info[:2]).encode())  # other Python versions compile to different code
    for part in _parts(functions, {}, homes):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _parts(value: Any, seen: dict[int, tuple[int, Any]], homes: set[str]) -> Iterator[str]:
    """Describe a value; ``seen`` maps the ids of values described so far to their number and the value."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in seen:
        yield f"seen {seen[id(value)][0]}"
        return
    seen[id(value)] = len(seen), value  # keeping the value alive, so that no other value gets its id
    if isinstance(value, CodeType):
        table = getattr(value, "co_exceptiontable", b"")  # from Python 3.11 on
        yield f"code {value.co_code.hex()} {table.hex()} {value.co_names} {value.co_varnames} {value.co_freevars}"
        yield from _parts(value.co_consts, seen, homes)
    elif isinstance(value, FunctionType):
        if not _followed(_module(value), homes):
            yield f"function {_module(value)}.{value.__qualname__}"
            yield from _parts(getattr(value, "__wrapped__", None), seen, homes)
            return
        yield "function"
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        yield from _parts((value.__code__, value.__defaults__, value.__kwdefaults__, cells), seen, homes)
        names = _names(value.__code__)
        for name in sorted(names & value.__globals__.keys()):
            yield f"global {name}"
            yield from _used(value.__globals__[name], names, seen, homes)
    elif isinstance(value, type):
        yield f"class {value.__module__}.{value.__qualname__}"
        if _followed(_module(value), homes):
            members = {k: v for k, v in vars(value).items() if k not in NOT_CODE}
            yield from _parts((value.__bases__, members), seen, homes)
    elif isinstance(value, MethodType):
        yield from _parts((value.__func__, value.__self__), seen, homes)
    elif isinstance(value, staticmethod | classmethod):
        yield from _parts(value.__func__, seen, homes)
    elif isinstance(value, property):
        yield from _parts((value.fget, value.fset), seen, homes)
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), seen, homes)
    elif isinstance(value, re.Pattern):
        yield f"pattern {value.pattern!r} {value.flags}"
    elif isinstance(value, ModuleType):
        yield f"module {value.__name__}"
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}"
        for key, entry in value.items():
            yield from _parts(key, seen, homes)
            yield from _parts(entry, seen, homes)
    elif isinstance(value, list | tuple):
        yield f"sequence {len(value)}"
        for entry in value:
            yield from _parts(entry, seen, homes)
    elif isinstance(value, set | frozenset):
        yield f"set {sorted(map(repr, value))}"
    elif callable(wrapped := getattr(value, "__wrapped__", None)):  # functools.cache and similar wrappers
        yield from _parts(wrapped, seen, homes)
    else:
        yield f"object {type(value).__module__}.{type(value).__qualname__} {getattr(value, '__name__', '')}"
        if _followed(_module(type(value)), homes):
            yield from _parts((type(value), getattr(value, "__dict__", None)), seen, homes)
        elif callable(getattr(value, "tobytes", None)):  # arrays, whose repr leaves out the middle
            yield hashlib.sha256(value.tobytes()).hexdigest()
        elif " at 0x" not in (shown := repr(value)):
            yield shown


def _used(value: Any, names: set[str], seen: dict[int, tuple[int, Any]], homes: set[str]) -> Iterator[str]:
    """Describe a global; for a module of the project, describe the attributes that the code names."""
    if isinstance(value, ModuleType) and _followed(value.__name__, homes):
        yield f"module {value.__name__}"
        for name in sorted(names & vars(value).keys()):
            yield f"attribute {name}"
            yield from _parts(vars(value)[name], seen, homes)
    else:
        yield from _parts(value, seen, homes)


def _names(code: CodeType) -> set[str]:
    """Return the names of globals and attributes in a function's code and in the code nested in it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _is_filled(cell: Any) -> bool:
    return bool(cell != CellType())


def _module(value: Any) -> str:
    """Return the name of the module in which a function or class was defined."""
    if isinstance(value, type):
        # Code executed without a module name counts as builtins, whose real classes are not heap types.
        unnamed = value.__module__ == "builtins" and value.__flags__ & HEAP_TYPE
        return "" if unnamed else value.__module__
    # A decorator may have given a function another's `__module__`.
    names = getattr(value, "__globals__", {"__name__": getattr(value, "__module__", None)})
    return names.get("__name__") or ""


def _package(module: str) -> str:
    return module.partition(".")[0]


def _followed(module: str, homes: set[str]) -> bool:
    """Return whether a module belongs to this package or to the package of a given function, or is not installed."""
    return _package(module) in homes or not _is_installed(module)


@functools.cache
def _is_installed(module: str) -> bool:
    if _package(module) in sys.stdlib_module_names and module != "__main__":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return False
    paths = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return bool(paths & set(Path(file).resolve().parents))
