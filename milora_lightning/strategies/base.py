"""What each of Lightning's strategies needs for MiLoRA: the one place where they are told apart."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from milora_lightning.checkpoint.io import ClearCheckpointIO
from milora_lightning.parallel.dtensor import full_tensor
from milora_lightning.strategies.fsdp import MiLoRAFSDPStrategy
from milora_lightning.strategies.model_parallel import MiLoRAModelParallelStrategy
from milora_lightning.utils.errors import InvalidInputError

__all__ = [
    "MiLoRAFSDPStrategy",
    "MiLoRAModelParallelStrategy",
    "calls_parts",
    "check_whole",
    "clips_itself",
    "finish",
    "gradient_norm",
    "needs_early_start",
    "prepare",
    "restores_late",
    "shards",
]

SHARDING: dict[type[Strategy], type[Strategy]] = {
    ModelParallelStrategy: MiLoRAModelParallelStrategy,
    FSDPStrategy: MiLoRAFSDPStrategy,
}
"""Ours, by those of Lightning's strategies that they derive from."""

for _strategy in SHARDING.values():
    _strategy.register_strategies(StrategyRegistry)


def prepare(trainer: Trainer) -> None:
    """Make a Trainer's strategy ready for adapters, once its processes know one another.

    Raises:
        ValueError: If adapters do not work under the strategy, or not as it is set.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = ClearCheckpointIO()
    for kind, ours in SHARDING.items():
        if isinstance(strategy, kind):
            _become(strategy, kind, ours)
            strategy.check()  # type: ignore[attr-defined]
            return
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise InvalidInputError(
            f"MiLoRAInit does not work under {type(strategy).__name__}: use one device, strategy: ddp, or, for models "
            "that do not fit a device, strategy: milora_fsdp2 (FSDP2)."
        )


def _become(strategy: Strategy, kind: type[Strategy], ours: type[Strategy]) -> None:
    """Let a strategy of Lightning's class, or of one derived from it, do for adapters what ours does.

    Lightning's own ways would want the base's weights in each checkpoint, take the optimizer's parameters for all of
    the model's, and overwrite a folder in place. Projects and YAML files name its classes all the same, and the Trainer
    has made the object already. What a user's class overrides stays, with ours as its ``super()``.
    """
    given = type(strategy)
    if not isinstance(strategy, ours):
        attributes = {"__module__": given.__module__, "__qualname__": given.__qualname__, "__doc__": given.__doc__}
        strategy.__class__ = ours if given is kind else type(given.__name__, (given, ours), attributes)


def finish(trainer: Trainer, module: nn.Module) -> None:
    """Have a strategy look at a module, between the building of the model and the strategy's setup.

    Raises:
        ValueError: If the strategy cannot hold the module's parameters.
    """
    if isinstance(trainer.strategy, MiLoRAFSDPStrategy):
        trainer.strategy.check_module(module)


def needs_early_start(trainer: Trainer) -> bool:
    """Whether factors have to be computed before the strategy's setup, from weights that are whole only until then."""
    return isinstance(trainer.strategy, FSDPStrategy) or isinstance(trainer.precision_plugin, BitsandbytesPrecision)


def shards(strategy: Strategy) -> bool:
    """Whether weights are in shards under a strategy.

    >>> shards(FSDPStrategy())
    True
    """
    return isinstance(strategy, (ModelParallelStrategy, FSDPStrategy))


def check_whole(strategy: Strategy, name: str) -> None:
    """Refuse to have a callback look at single weights where they are in shards.

    Args:
        strategy: The Trainer's strategy.
        name: Of the callback.

    Raises:
        ValueError: If weights are in shards.

    >>> check_whole(FSDPStrategy(), "SubspaceMonitor")
    Traceback (most recent call last):
    milora_lightning.utils.errors.InvalidInputError: SubspaceMonitor needs whole weights, and FSDPStrategy shards \
them: use one device, or strategy: ddp.
    """
    if shards(strategy):
        raise InvalidInputError(
            f"{name} needs whole weights, and {type(strategy).__name__} shards them: use one device, or strategy: ddp."
        )


def calls_parts(strategy: Strategy) -> bool:
    """Whether a part of the module can be called: FSDP1 collects weights for calls of the whole module only."""
    return not isinstance(strategy, FSDPStrategy)


def restores_late(strategy: Strategy) -> bool:
    """Whether checkpoints are restored after ``on_fit_start``: factors that they bring need not be computed there."""
    return strategy.restore_checkpoint_after_setup


def gradient_norm(strategy: Strategy, gradients: list[Tensor]) -> Tensor:
    """Compute the norm of a gradient, over all shards where it is sharded; all ranks must call this."""
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    if isinstance(strategy, FSDPStrategy):  # whose shards are plain tensors
        norm = strategy.reduce(norm.to(strategy.root_device).square(), reduce_op="sum").sqrt()
    return norm


def clips_itself(strategy: Strategy) -> FullyShardedDataParallel | None:
    """Return the wrapped model where only that can clip by norm, as under FSDP1, for which Lightning has no way."""
    return strategy.model if isinstance(strategy.model, FullyShardedDataParallel) else None
