"""Checkpoints under FSDP1, which keeps parameters in flat shards: one unit of the model at a time is made whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.fsdp import _get_full_state_dict_context
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.optim import Optimizer

from milora_lightning.checkpoint import AdapterCheckpoint, check_tensors, told_initialized
from milora_lightning.checkpoint_io import KEY
from milora_lightning.lora import LoRALinear, factors_tell
from milora_lightning.names import unwrapped_name
from milora_lightning.sharded_checkpoint import read_together
from milora_lightning.surgery import lora_layers


def adapter_state(strategy: FSDPStrategy) -> dict[str, Any]:
    """Collect the adapters and what else is trained, without the base; all ranks must call this.

    Returns:
        The state dict of the module on the first rank, an empty one on the others.
    """
    state: dict[str, Any] = {}
    for tensors in _kept_tensors(strategy):
        if strategy.is_global_zero:
            state |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    if strategy.is_global_zero:
        module, attached = _attached(strategy)
        state[KEY] = attached.description(module)
    return state


def load_fsdp1(strategy: FSDPStrategy, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Load a checkpoint written by any number of ranks; all ranks must call this.

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
    state = {unwrapped_name(key): value for key, value in checkpoint["state_dict"].items()}
    module, attached = _attached(strategy)
    description = state.pop(KEY, None)
    attached.check_description(module, description)
    shapes = {name: tensor.shape for tensors in _kept_tensors(strategy) for name, tensor in tensors.items()}
    check_tensors(state, shapes)
    with torch.no_grad():
        for tensors in _kept_tensors(strategy, writeback=True):
            for name, tensor in tensors.items():
                tensor.copy_(state[name])
    told = told_initialized(description)
    for name, layer in lora_layers(module).items():
        layer.initialized = told.get(name, False) or factors_tell(state, f"{name}.")
    if module.trainer.state.fn == TrainerFn.FITTING:
        for optimizer, saved in zip(strategy.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            _load_optimizer(strategy, optimizer, saved)
    return checkpoint


def _attached(strategy: FSDPStrategy) -> tuple[Any, AdapterCheckpoint]:
    module: Any = strategy.lightning_module
    return module, module._adapter_checkpoint


def _kept_tensors(strategy: FSDPStrategy, writeback: bool = False) -> Iterator[dict[str, Tensor]]:
    """Yield, unit by unit, the whole tensors that checkpoints hold; they are whole only until the next is asked for."""
    assert strategy.model is not None
    for name, unit in strategy.model.named_modules():
        if isinstance(unit, FullyShardedDataParallel):
            whole: Any = FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writeback)
            with whole:
                yield dict(_own_tensors(unit, f"{name}." if name else ""))


def _own_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """What a module trains or has in buffers, and the factors of its adapters, but for units inside it."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad or isinstance(module, LoRALinear):
            yield unwrapped_name(prefix + name), parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield unwrapped_name(prefix + name), buffer
    for name, child in module.named_children():
        if not isinstance(child, FullyShardedDataParallel):
            yield from _own_tensors(child, f"{prefix}{name}.")


def _load_optimizer(strategy: FSDPStrategy, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Identify saved parameters by the names that FSDP1 knows; their order is the same, whoever saved them."""
    module, model = strategy.lightning_module, strategy.model
    assert module is not None
    assert model is not None
    names = {parameter: clean_tensor_name(name) for name, parameter in module.named_parameters()}
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    here = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    renamed = dict(zip(keys, here, strict=True))
    state = {
        "state": {renamed[key]: entry for key, entry in saved["state"].items()},
        "param_groups": [{**g, "params": [renamed[key] for key in g["params"]]} for g in saved["param_groups"]],
    }
    whole: Any = _get_full_state_dict_context(model, world_size=strategy.world_size, rank0_only=False)
    with whole:
        flat = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, state)
    optimizer.load_state_dict(flat)
