"""Optimizers by their short names: those of torch, and the memory-saving ones of bitsandbytes."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from milora_lightning.utils.compat import class_resolver, set_class_resolver
from milora_lightning.utils.errors import InvalidInputError

LIBRARY = "bitsandbytes"


def full_path(name: str) -> str:
    """Return the class path of an optimizer.

    A name that both libraries have means torch's optimizer. A name that ends in ``8bit`` or begins with ``Paged`` is
    looked up in bitsandbytes, which is imported for it.

    Args:
        name: A class name or a class path. A path, or a name that neither library has, is returned unchanged.

    Raises:
        ValueError: If the optimizer is one of bitsandbytes and bitsandbytes is not installed.

    >>> full_path("AdamW"), full_path("my.own.AdamW8bit"), full_path("AdanW")
    ('torch.optim.AdamW', 'my.own.AdamW8bit', 'AdanW')
    """
    module, _, short = name.rpartition(".")
    if not module and _is_optimizer(torch.optim, short):
        return f"torch.optim.{short}"
    if module.partition(".")[0] != LIBRARY and (module or not (short.endswith("8bit") or short.startswith("Paged"))):
        return name
    if importlib.util.find_spec(LIBRARY) is None:
        raise InvalidInputError(
            f"The optimizer {short} needs the package {LIBRARY}: pip install milora-lightning[quantization]"
        )
    known = _is_optimizer(importlib.import_module(f"{LIBRARY}.optim"), short)
    return f"{LIBRARY}.optim.{short}" if known and not module else name


def _is_optimizer(module: Any, name: str) -> bool:
    found = getattr(module, name, None)
    return isinstance(found, type) and issubclass(found, torch.optim.Optimizer)


_resolve = class_resolver()


def _resolve_with_optimizers(cls: Any, name: str) -> str:
    return _resolve(cls, full_path(name) if cls is torch.optim.Optimizer else name)


def know_short_names() -> None:
    """Make jsonargparse resolve the names of optimizers by :func:`full_path`.

    By itself it only knows classes that have been imported, and refuses a name that two of them share.
    """
    set_class_resolver(_resolve_with_optimizers)
