"""What each of Lightning's strategies needs for MiLoRA: the one place where they are told apart."""

from __future__ import annotations

from functools import partial

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy

from milora_lightning.checkpoint_io import ClearCheckpointIO
from milora_lightning.sharded_checkpoint import load_sharded, save_sharded


def prepare(trainer: Trainer) -> None:
    """Make a Trainer's strategy ready for adapters, once its processes know one another.

    Raises:
        ValueError: If adapters do not work under the strategy, or not as it is set.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = ClearCheckpointIO()
    if isinstance(strategy, ModelParallelStrategy):
        _check_mesh(strategy)
        # Lightning's own would want the base's weights in every checkpoint, take the optimizer's parameters for all
        # of the model's, and overwrite a folder in place.
        strategy.load_checkpoint = partial(load_sharded, strategy)  # type: ignore[method-assign]
        strategy.save_checkpoint = partial(save_sharded, strategy)  # type: ignore[method-assign]
    elif not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"MiLoRAInit does not work under {type(strategy).__name__}: use one device, strategy: ddp, or, for models "
            "that do not fit a device, ModelParallelStrategy (FSDP2)."
        )


def restores_late(strategy: Strategy) -> bool:
    """Whether checkpoints are restored after ``on_fit_start``: factors that they bring need not be computed there."""
    return strategy.restore_checkpoint_after_setup


def _check_mesh(strategy: ModelParallelStrategy) -> None:
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise ValueError(
            f"tensor_parallel_size is {size}, and tensor parallelism cuts the layers that adapters are put around, "
            "which their factors do not follow: set tensor_parallel_size: 1 and data_parallel_size: "
            f"{strategy.world_size} in ModelParallelStrategy."
        )
