"""Loading a checkpoint of adapters on several ranks, each of which keeps only its shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from milora_lightning.checkpoint.io import read
from milora_lightning.parallel.work import raise_on_all_ranks


def load_adapters(
    strategy: ParallelStrategy,
    checkpoint_path: str | Path,
    load_module: Callable[[dict[str, Any]], None],
    load_optimizer: Callable[[Optimizer, dict[str, Any]], None],
) -> dict[str, Any]:
    """Load a checkpoint, a file or a folder, written by any number of ranks; all ranks must call this.

    Every rank reads the whole checkpoint, which is little larger than the adapters.

    Args:
        strategy: The strategy, connected to a module with adapters.
        checkpoint_path: The checkpoint.
        load_module: Checks a state dict and loads it into the module's shards.
        load_optimizer: Loads the state of an optimizer; called in fitting only.

    Returns:
        The content of the checkpoint.

    Raises:
        CheckpointError: If it cannot be read or does not fit the module. Nothing is loaded then.
        ValueError: If this happens on another rank.
    """
    module = strategy.lightning_module
    assert module is not None
    checkpoint = _read_together(strategy, checkpoint_path)
    load_module(checkpoint["state_dict"])
    if module.trainer.state.fn == TrainerFn.FITTING:
        for optimizer, state in zip(strategy.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            load_optimizer(optimizer, state)
    return checkpoint


def _read_together(strategy: ParallelStrategy, checkpoint_path: str | Path) -> dict[str, Any]:
    """Read the first rank's checkpoint path on all ranks; if one fails, all of them do."""
    path = strategy.broadcast(checkpoint_path)
    checkpoint, error = {}, None
    try:
        checkpoint = read(path)
    except Exception as raised:  # any error, because the other ranks wait for this one
        error = raised
    raise_on_all_ranks(error, strategy.world_size)
    return checkpoint
