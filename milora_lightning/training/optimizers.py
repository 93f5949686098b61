"""Optimizers by their short names: those of torch, and the memory-saving ones of bitsandbytes and torchao."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from milora_lightning.utils.compat.jsonargparse import class_resolver, set_class_resolver
from milora_lightning.utils.errors import InvalidInputError

EXTRAS = {"bitsandbytes": "quantization", "torchao": "torchao"}
"""The libraries of memory-saving optimizers, in their modules ``optim``, and the extras that install them."""


def full_path(name: str) -> str:
    """Return the class path of an optimizer.

    If several libraries have the name, it means torch's optimizer, or else that of bitsandbytes. A name that ends in
    ``bit`` or ``Fp8`` or begins with ``Paged`` is looked up in the library with such names, which is then imported.

    Args:
        name: A class name or a class path. A path, or a name that no library has, is returned unchanged.

    Raises:
        ValueError: If the optimizer belongs to a library that is not installed.

    >>> full_path("AdamW"), full_path("my.own.AdamW8bit"), full_path("AdanW")
    ('torch.optim.AdamW', 'my.own.AdamW8bit', 'AdanW')
    """
    module, _, short = name.rpartition(".")
    if not module and _is_optimizer(torch.optim, short):
        return f"torch.optim.{short}"
    library = module.partition(".")[0] if module else _library_of(short)
    if library not in EXTRAS:
        return name
    if importlib.util.find_spec(library) is None:
        raise InvalidInputError(missing(library, short))
    known = _is_optimizer(importlib.import_module(f"{library}.optim"), short)
    return f"{library}.optim.{short}" if known and not module else name


def missing(library: str, optimizer: str) -> str:
    """Return a message: a library is not installed, and how to install it.

    Args:
        library: The library.
        optimizer: The optimizer that needs it.
    """
    return f'The optimizer {optimizer} needs the package {library}: pip install "milora-lightning[{EXTRAS[library]}]"'


def _library_of(short: str) -> str | None:
    """Return the library in which to look up an optimizer of this name.

    >>> _library_of("AdamW8bit"), _library_of("PagedAdamW"), _library_of("AdamW4bit"), _library_of("AdamW")
    ('bitsandbytes', 'bitsandbytes', 'torchao', None)
    """
    if short.endswith(("4bit", "Fp8")):
        return "torchao"
    return "bitsandbytes" if short.endswith("8bit") or short.startswith("Paged") else None


def _is_optimizer(module: Any, name: str) -> bool:
    found = getattr(module, name, None)
    return isinstance(found, type) and issubclass(found, torch.optim.Optimizer)


_resolve = class_resolver()


def _resolve_with_optimizers(cls: Any, name: str) -> str:
    return _resolve(cls, full_path(name) if cls is torch.optim.Optimizer else name)


def know_short_names() -> None:
    """Make jsonargparse resolve the names of optimizers by :func:`full_path`.

    By itself it knows only imported classes, and refuses ambiguous names.
    """
    set_class_resolver(_resolve_with_optimizers)
