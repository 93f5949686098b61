"""Functions as operators of torch, which compilers call and do not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "milora_lightning"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def operator(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], mutates_args: tuple[str, ...] = ()
) -> Any:
    """Register a function as an operator, and return that.

    What ``torch.library.custom_op`` puts around a function takes five times as long as the call of a bare one.

    Args:
        name: Name of the operator.
        function: What it computes, on any device. Its annotations give the schema.
        fake: The same without data: makes tensors of the output's shapes and strides.
        mutates_args: Which arguments are changed in place.
    """
    schema = torch.library.infer_schema(function, mutates_args=mutates_args)
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def compiling_for_cpu(x: Tensor) -> bool:
    """Whether a compiler looks on, and x is on a CPU.

    There it makes copies where eager code works in place, and its loops over small integers go element by element, so
    that operators are better.
    """
    return x.device.type == "cpu" and torch.compiler.is_compiling()


def transformed() -> bool:
    """Whether torch.func's transforms (grad, vmap, jvp) or forward-mode differentiation look on.

    They differentiate, or repeat, each operation by itself: what is written as one operation has to be written in
    torch's own there.
    """
    # What torch.autograd.Function itself asks.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an operator a gradient, as ``torch.library.register_autograd`` does."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
