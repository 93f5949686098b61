"""Checkpoints of adapters that are sharded among ranks: as one file or as a folder, for any number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from milora_lightning.checkpoint_io import KEY, read
from milora_lightning.names import unwrapped_name
from milora_lightning.sharding import shard_like
from milora_lightning.sharing import raise_together


def save_sharded(
    strategy: ModelParallelStrategy, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
) -> None:
    """Write a checkpoint; all ranks must call this. One that was there before is whole until this one is.

    Args:
        strategy: The strategy, whose own way of writing is used.
        checkpoint: What ``Trainer.save_checkpoint`` has collected.
        filepath: File or, where each rank writes its own shards, folder to make or replace.
        storage_options: Not supported by the strategy.
    """
    save = type(strategy).save_checkpoint
    if not strategy._save_distributed_checkpoint:
        save(strategy, checkpoint, filepath, storage_options)  # which replaces a file at once
        return
    path = Path(strategy.broadcast(filepath))
    unfinished, previous = (path.with_name(f".{path.name}.{state}") for state in ("unfinished", "previous"))
    if strategy.is_global_zero:
        shutil.rmtree(unfinished, ignore_errors=True)
    strategy.barrier()
    # The description of the adapters is no tensor; it goes where the folder keeps such things.
    state = dict(checkpoint["state_dict"])
    described = {KEY: state.pop(KEY)} if KEY in state else {}
    save(strategy, {**checkpoint, **described, "state_dict": state}, unfinished, storage_options)
    strategy.barrier()
    if strategy.is_global_zero:
        if path.exists():
            path.rename(previous)
        unfinished.rename(path)
        shutil.rmtree(previous) if previous.is_dir() else previous.unlink(missing_ok=True)
    strategy.barrier()


def load_sharded(
    strategy: ModelParallelStrategy, checkpoint_path: str | Path, weights_only: bool | None = None
) -> dict[str, Any]:
    """Load a checkpoint, a file or a folder, written by any number of ranks; all ranks must call this.

    Every rank reads all of it, which is no more than the adapters, and keeps its shards.

    Args:
        strategy: The strategy, its model and optimizers set up.
        checkpoint_path: The checkpoint.
        weights_only: Ignored: nothing but tensors and primitives is read.

    Returns:
        The content of the checkpoint.

    Raises:
        CheckpointError: If it cannot be read or does not fit the module; nothing is loaded then.
        ValueError: Likewise, if another rank has met that.
    """
    checkpoint = read_together(strategy, checkpoint_path)
    module = strategy.lightning_module
    assert module is not None
    _load_module(module, checkpoint["state_dict"], strict=module.strict_loading)
    if module.trainer.state.fn == TrainerFn.FITTING:
        for optimizer, state in zip(strategy.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            _load_optimizer(optimizer, state)
    return checkpoint


def read_together(strategy: ParallelStrategy, checkpoint_path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on all ranks, the one that the first rank names; none goes on if one cannot.

    Raises:
        CheckpointError: If it cannot be read.
        ValueError: If it cannot be read on another rank.
    """
    path = strategy.broadcast(checkpoint_path)
    checkpoint, error = {}, None
    try:
        checkpoint = read(path)
    except Exception as raised:  # all of them, because the other ranks go on together with this one
        error = raised
    raise_together(error, strategy.world_size)
    return checkpoint


def _load_module(module: nn.Module, state: dict[str, Any], strict: bool) -> None:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    here = {unwrapped_name(name): tensor for name, tensor in named}
    plain = {unwrapped_name(key): value for key, value in state.items()}
    sharded = {key: shard_like(value, here[key]) if key in here else value for key, value in plain.items()}
    module.load_state_dict(sharded, strict=strict)


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Shard the state of each parameter as the parameter is.

    Saved parameters are identified by numbers or names, depending on who saved them; the order is the same in all.
    """
    saved = [key for group in state["param_groups"] for key in group["params"]]
    here = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def sharded(value: Any, parameter: Tensor) -> Any:
        return shard_like(value, parameter) if getattr(value, "shape", None) == parameter.shape else value

    entries = {
        key: {name: sharded(value, parameter) for name, value in state["state"][key].items()}
        for key, parameter in zip(saved, here, strict=True)
        if key in state["state"]
    }
    optimizer.load_state_dict({**state, "state": entries})
