"""What each of Lightning's strategies needs for MiLoRA: the one place where they are told apart."""

from __future__ import annotations

from functools import partial

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
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import PreTrainedModel

from milora_lightning.checkpoint_io import ClearCheckpointIO
from milora_lightning.errors import InvalidInputError
from milora_lightning.fsdp1 import adapter_state, load_fsdp1
from milora_lightning.pretrained import decoder_layers
from milora_lightning.sharded_checkpoint import load_sharded, save_sharded
from milora_lightning.sharding import full_tensor


def prepare(trainer: Trainer) -> None:
    """Make a Trainer's strategy ready for adapters, once its processes know one another.

    Raises:
        ValueError: If adapters do not work under the strategy, or not as it is set.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = ClearCheckpointIO()
    # Lightning's own ways would want the base's weights in each checkpoint, take the optimizer's parameters for all of
    # the model's, and overwrite a folder in place.
    if isinstance(strategy, ModelParallelStrategy):
        _check_mesh(strategy)
        strategy.load_checkpoint = partial(load_sharded, strategy)  # type: ignore[method-assign]
        strategy.save_checkpoint = partial(save_sharded, strategy)  # type: ignore[method-assign]
    elif isinstance(strategy, FSDPStrategy):
        _prepare_fsdp1(strategy)
        strategy.load_checkpoint = partial(load_fsdp1, strategy)  # type: ignore[method-assign]
        strategy.lightning_module_state_dict = partial(adapter_state, strategy)  # type: ignore[method-assign]
    elif not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise InvalidInputError(
            f"MiLoRAInit does not work under {type(strategy).__name__}: use one device, strategy: ddp, or, for models "
            "that do not fit a device, ModelParallelStrategy (FSDP2)."
        )


def finish(trainer: Trainer, module: nn.Module) -> None:
    """Tell a strategy what it needs to know of a module, between the building of the model and the strategy's setup.

    Raises:
        ValueError: If the strategy cannot hold the module's parameters.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, FSDPStrategy):
        return
    other = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32}
    if other:
        raise InvalidInputError(
            f"FSDPStrategy (FSDP1) shards parameters of one dtype only, and adapters are float32 while the model has "
            f"{', '.join(map(str, other))}: set dtype: float32 and precision: bf16-mixed, or use FSDP2 "
            "(ModelParallelStrategy), which takes a half-precision model."
        )
    if "auto_wrap_policy" not in strategy.kwargs:
        models = [child for child in module.modules() if isinstance(child, PreTrainedModel)][:1]
        layers = {type(layer) for model in models for layer in decoder_layers(model)}
        strategy.kwargs["auto_wrap_policy"] = ModuleWrapPolicy(layers)


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
    milora_lightning.errors.InvalidInputError: SubspaceMonitor needs whole weights, and FSDPStrategy shards them: \
use one device, or strategy: ddp.
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


def _check_mesh(strategy: ModelParallelStrategy) -> None:
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise InvalidInputError(
            f"tensor_parallel_size is {size}, and tensor parallelism cuts the layers that adapters are put around, "
            "which their factors do not follow: set tensor_parallel_size: 1 and data_parallel_size: "
            f"{strategy.world_size} in ModelParallelStrategy."
        )


def _prepare_fsdp1(strategy: FSDPStrategy) -> None:
    if strategy.precision_plugin.precision in ("bf16-true", "16-true"):
        raise InvalidInputError(
            f"precision {strategy.precision_plugin.precision} under FSDPStrategy (FSDP1) would make the adapters half "
            "precision, too: set precision: bf16-mixed, or use FSDP2 (ModelParallelStrategy)."
        )
    if not strategy.kwargs["use_orig_params"]:
        raise InvalidInputError(
            "FSDPStrategy cannot mix frozen and trained parameters with use_orig_params: false. Leave it out."
        )
    if strategy._state_dict_type == "sharded":
        raise InvalidInputError(
            "Adapters under FSDPStrategy (FSDP1) are saved as one file: leave out state_dict_type: sharded, or use "
            "FSDP2 (ModelParallelStrategy)."
        )
    if strategy.mixed_precision is None:
        # Factors that were cast for the forward pass would lose what training adds to them; autocast casts what is
        # multiplied.
        strategy.mixed_precision = MixedPrecision()
