"""Decay of adapters towards their initial values, unlike an optimizer's weight decay, which is towards zero.

MiLoRA's factors are a part of the model, and shrinking them removes that part. After each step of an optimizer with
learning rate η, decay to the start sets A ← A − η λ (A − A₀) and B ← B − η λ (B − B₀), so that ΔW decays to zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.strategies.base import calls_parts
from milora_lightning.utils.compat.torch import multiply_together, subtract_together
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn, warn_once

RATE = "decay_to_start"
"""Key in an optimizer's groups, by which a checkpoint tells a resumed run its rate."""

Starts = dict[nn.Parameter, Tensor | None]
"""The value that each factor decays to; None for zero."""


def decaying_factors(module: nn.Module) -> Starts:
    """Return the values that the trained factors of a module decay to.

    If B₀A₀ is zero, no initial values are stored. Then the factor that starts at zero decays to zero (B as in LoRA, or
    A if B is frozen), and ΔW with it.
    """
    starts: Starts = {}
    for layer in lora_layers(module).values():
        if layer.initial_A is not None and layer.initial_B is not None:
            starts |= {layer.lora_A: layer.initial_A, layer.lora_B: layer.initial_B}
        else:
            starts[layer.lora_A if layer.frozen == "lora_B" else layer.lora_B] = None
    return {factor: start for factor, start in starts.items() if factor.requires_grad}


def decay_to_start(module: nn.Module, optimizers: Sequence[Any], rate: float) -> list[RemovableHandle]:
    """Make factors decay towards their start after each step of their optimizers.

    The decay is a part of the step: if gradient scaling skips a step because of infinite gradients, nothing decays, and
    neither do factors without a gradient. Each rank decays its shards.

    Args:
        module: The module with its adapters.
        optimizers: Its optimizers.
        rate: The decay λ per step and unit of learning rate, like AdamW's ``weight_decay``.

    Returns:
        Handles that remove the decay.

    Raises:
        ValueError: If no optimizer has the factors, or an optimizer is not torch's.
    """
    starts = decaying_factors(module)
    held = [o for o in optimizers if any(p in starts for group in o.param_groups for p in group["params"])]
    other = next((o for o in held if not isinstance(o, Optimizer)), None)
    if not held or other is not None:
        what = "the Trainer knows of none that holds them" if other is None else f"{type(other).__name__} is none"
        raise InvalidInputError(
            f"decay_to_start changes factors after each step of a torch.optim.Optimizer, and {what}: leave it out."
        )
    return [each.register_step_post_hook(lambda optimizer, *_: _decay(optimizer, starts, rate)) for each in held]


class StartDecay:
    """Applies the decay from the beginning to the end of a run's training.

    Args:
        rate: The decay λ; 0 for none.
        adapted: Whether there are adapters.

    Raises:
        ValueError: If the rate is negative, or there is nothing to decay.
    """

    def __init__(self, rate: float, adapted: bool) -> None:
        if not rate >= 0 or (rate and not adapted):
            reason = "it cannot be negative" if adapted else "there are no adapters with init: full"
            raise InvalidInputError(f"decay_to_start={rate}, and {reason}: leave it out.")
        self.rate = rate
        self._handles: list[RemovableHandle] = []

    def check(self, trainer: Trainer) -> None:
        """Refuse a strategy under which factors are not separate tensors.

        Raises:
            ValueError: If there is a decay and the Trainer has such a strategy.
        """
        if self.rate and not calls_parts(trainer.strategy):
            raise InvalidInputError(
                f"decay_to_start does not work under {type(trainer.strategy).__name__}, whose shards do not show which "
                "factor a number belongs to: use strategy: milora_fsdp2, or leave it out."
            )

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Add the decay to the Trainer's optimizers, or warn if their weight decay would be towards zero.

        Args:
            trainer: The Trainer with its optimizers.
            module: The module with its adapters.
        """
        self.end()  # a tuner may have trained before
        warn_of_weight_decay(module, trainer.optimizers)
        if self.rate:
            self._handles = decay_to_start(module, trainer.optimizers, self.rate)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        before = {group[RATE] for group in groups if RATE in group}
        if other := before - {self.rate}:
            warn(
                f"The checkpoint was trained with decay_to_start={max(other):g}, and this run goes on with "
                f"{self.rate:g}: to train as before, give MiLoRAInit that rate (--adapter.decay_to_start)."
            )
        for group in groups if self.rate or before else ():
            group[RATE] = self.rate

    def end(self) -> None:
        """Remove the decay from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


@torch.no_grad()
def _decay(optimizer: Any, starts: Mapping[Any, Tensor | None], rate: float) -> None:
    skipped = getattr(optimizer, "found_inf", None)  # fused optimizers skip such steps internally
    for group in optimizer.param_groups:
        factors = [p for p in group["params"] if p in starts and p.grad is not None]
        if not factors:
            continue
        amount = group["lr"] * rate
        if skipped is not None:
            amount = torch.where(skipped.reshape(()).bool(), 0.0, amount)
        here = [_local(p.detach()) for p in factors]
        ends = [None if starts[p] is None else _local(starts[p]) for p in factors]  # type: ignore[arg-type]
        away = [p.clone() if end is None else p - end for p, end in zip(here, ends, strict=True)]
        multiply_together(away, amount)
        subtract_together(here, away)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def warn_of_weight_decay(module: nn.Module, optimizers: Sequence[Any]) -> None:
    """Warn if an optimizer's weight decay pulls factors towards zero that did not start there."""
    decomposed = {factor for factor, start in decaying_factors(module).items() if start is not None}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        decay = group.get("weight_decay") or 0.0
        if decay > 0 and any(p in decomposed for p in group["params"]):
            warn_once(
                module,
                f"weight_decay={decay:g} draws A and B towards zero, and so takes the part B₀A₀ of each weight out of "
                "the model that they start at: set weight_decay to 0, or decay_to_start of MiLoRAInit in its place.",
            )
