"""Support for Lightning's strategies; this is the only module that distinguishes between them."""

from __future__ import annotations

from typing import Any, NamedTuple

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
from transformers import PreTrainedModel

from milora_lightning.checkpoint.io import ClearCheckpointIO
from milora_lightning.models.sharding import Sharding, shard
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
    "data_rank",
    "finish",
    "gradient_norm",
    "needs_early_start",
    "prepare",
    "restores_late",
    "shard_model",
    "sharding_of",
    "shards",
]

SHARDING: dict[type[Strategy], type[Strategy]] = {
    ModelParallelStrategy: MiLoRAModelParallelStrategy,
    FSDPStrategy: MiLoRAFSDPStrategy,
}
"""The strategies of this package by the Lightning strategies that they extend."""

REASONS = {
    "DeepSpeedStrategy": ", which nobody has tried: its engine partitions the weights that factors are computed from, "
    "and writes checkpoints of its own, with the base in them",
}
"""Reasons for refusing strategies, by class name."""

for _strategy in SHARDING.values():
    _strategy.register_strategies(StrategyRegistry)


def prepare(trainer: Trainer) -> None:
    """Prepare a Trainer's strategy for adapters, after its processes have been connected.

    Raises:
        ValueError: If the strategy, or one of its settings, does not support adapters.
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
        reason = next((REASONS[kind.__name__] for kind in type(strategy).__mro__ if kind.__name__ in REASONS), "")
        raise InvalidInputError(
            f"MiLoRAInit does not work under {type(strategy).__name__}{reason}: use one device, strategy: ddp, or, for "
            "models that do not fit on one device, strategy: milora_fsdp2 (FSDP2)."
        )


def _become(strategy: Strategy, kind: type[Strategy], ours: type[Strategy]) -> None:
    """Turn an instance of Lightning's strategy, or of a subclass of it, into one of ours by changing its class.

    Lightning's strategy would require the base weights in each checkpoint, assume that the optimizer has all parameters
    of the model, and overwrite a checkpoint folder in place. However, projects and YAML files name Lightning's class,
    and the Trainer has already created the object. Methods of a user's subclass are kept, with ours as their
    ``super()``.
    """
    given = type(strategy)
    if not isinstance(strategy, ours):
        attributes = {"__module__": given.__module__, "__qualname__": given.__qualname__, "__doc__": given.__doc__}
        strategy.__class__ = ours if given is kind else type(given.__name__, (given, ours), attributes)


def finish(trainer: Trainer, module: nn.Module) -> None:
    """Let a strategy check a module, after the model is built and before the strategy's setup.

    Args:
        trainer: The Trainer.
        module: The module with its model.

    Raises:
        ValueError: If the strategy does not support the module's parameters.
    """
    if isinstance(trainer.strategy, MiLoRAFSDPStrategy):
        trainer.strategy.check_module(module)


def needs_early_start(trainer: Trainer) -> bool:
    """Whether factors must be computed before the strategy's setup, which shards or quantizes the weights."""
    return isinstance(trainer.strategy, FSDPStrategy) or isinstance(trainer.precision_plugin, BitsandbytesPrecision)


def shards(strategy: Strategy) -> bool:
    """Whether a strategy shards the weights.

    >>> shards(FSDPStrategy())
    True
    """
    return isinstance(strategy, (ModelParallelStrategy, FSDPStrategy))


def sharding_of(strategy: Strategy) -> Sharding:
    """Return how a strategy shards models with FSDP2; the defaults for one that does not.

    >>> sharding_of(FSDPStrategy()).cpu_offload
    False
    """
    return strategy.sharding if isinstance(strategy, MiLoRAModelParallelStrategy) else Sharding()


def shard_model(strategy: Strategy, model: PreTrainedModel) -> None:
    """Shard a language model according to a strategy, which may be Lightning's: without adapters it is not replaced.

    Args:
        strategy: The Trainer's strategy.
        model: The model; changed in place.
    """
    if isinstance(strategy, MiLoRAModelParallelStrategy):
        strategy.shard(model)
    elif isinstance(strategy, ModelParallelStrategy):
        shard(model, strategy.device_mesh["data_parallel"])


def check_whole(strategy: Strategy, name: str) -> None:
    """Refuse a callback that needs whole weights if the strategy shards them.

    Args:
        strategy: The Trainer's strategy.
        name: Name of the callback.

    Raises:
        ValueError: If the strategy shards the weights.

    >>> check_whole(FSDPStrategy(), "SubspaceMonitor")
    Traceback (most recent call last):
    milora_lightning.utils.errors.InvalidInputError: SubspaceMonitor needs whole weights, and FSDPStrategy shards \
them: use one device, or strategy: ddp.
    """
    if shards(strategy):
        raise InvalidInputError(
            f"{name} needs whole weights, and {type(strategy).__name__} shards them: use one device, or strategy: ddp."
        )


class DataRank(NamedTuple):
    """The share of the data that a process gets.

    Attributes:
        number: Index of the share.
        size: Number of shares.
        first: Whether this is the first process with this share; under tensor parallelism several have the same.
    """

    number: int
    size: int
    first: bool


def data_rank(trainer: Trainer) -> DataRank:
    """Return the share of the data that this process gets."""
    share: dict[str, Any] = getattr(trainer, "distributed_sampler_kwargs", None) or {}
    number, size = share.get("rank", trainer.global_rank), share.get("num_replicas", trainer.world_size)
    return DataRank(number, size, trainer.global_rank == number * (trainer.world_size // size))


def calls_parts(strategy: Strategy) -> bool:
    """Whether submodules can be called separately; FSDP1 gathers weights only in calls of the whole module."""
    return not isinstance(strategy, FSDPStrategy)


def refuse_flat_shards(strategy: Strategy, what: str) -> None:
    """Refuse FSDP1 where its flat shards are not supported.

    Args:
        strategy: The Trainer's strategy.
        what: What does not support them; the beginning of the message.

    Raises:
        ValueError: If the strategy is FSDP1.
    """
    if not calls_parts(strategy):
        raise InvalidInputError(
            f"{what} under FSDPStrategy (FSDP1): use FSDP2 (strategy: milora_fsdp2), ddp or one device."
        )


def restores_late(strategy: Strategy) -> bool:
    """Whether checkpoints are restored after ``on_fit_start``, so that factors must not be computed there yet."""
    return strategy.restore_checkpoint_after_setup


def gradient_norm(strategy: Strategy, gradients: list[Tensor]) -> Tensor:
    """Compute the norm of a gradient over all shards; all ranks must call this.

    Args:
        strategy: The Trainer's strategy.
        gradients: This rank's gradients.
    """
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    if isinstance(strategy, FSDPStrategy):  # FSDP1's shards are plain tensors
        norm = strategy.reduce(norm.to(strategy.root_device).square(), reduce_op="sum").sqrt()
    return norm


def clips_itself(strategy: Strategy) -> FullyShardedDataParallel | None:
    """Return the model under FSDP1, the only one that can clip its gradients by norm; None under other strategies."""
    return strategy.model if isinstance(strategy.model, FullyShardedDataParallel) else None
