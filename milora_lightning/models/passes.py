"""Counting the tokens that a model generates, by its forward passes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


class ForwardPasses:
    """Reports each forward pass of the language model in a module: in generation, each pass gives one token.

    Args:
        then: Called after each pass with the number of passes since :meth:`restart`.
    """

    def __init__(self, then: Callable[[int], None]) -> None:
        self._then = then
        self._number = 0
        self._hook: RemovableHandle | None = None

    def watch(self, module: nn.Module) -> None:
        """Count the passes of the first language model in a module, instead of any watched before."""
        self.stop()
        model = next((child for child in module.modules() if isinstance(child, PreTrainedModel)), None)
        if model is not None:
            self._hook = model.register_forward_pre_hook(lambda *_: self._count())

    def restart(self) -> None:
        """Count from the beginning."""
        self._number = 0

    def stop(self) -> None:
        """Stop counting."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _count(self) -> None:
        self._number += 1
        self._then(self._number)
