"""Private APIs of Lightning, read in version 2.6."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader

from milora_lightning.utils.compat.torch import without_iterator

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities import CombinedLoader


def is_sharded_folder(path: Path) -> bool:
    """Whether a folder is one into which the ranks of a sharded run have written a checkpoint."""
    from lightning.fabric.strategies.fsdp import _is_sharded_checkpoint

    return _is_sharded_checkpoint(path)


def metadata_file(folder: Path) -> Path:
    """Return the file of such a folder that holds what is no tensor."""
    from lightning.fabric.utilities.load import _METADATA_FILENAME

    return folder / _METADATA_FILENAME


def read_sharded_folder(folder: Path) -> dict[str, Any]:
    """Read such a folder in one process."""
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    return _load_distributed_checkpoint(folder)


def whole_optimizer_states(model: nn.Module, world_size: int) -> AbstractContextManager[None]:
    """Have FSDP1 take and give states of optimizers whole, on all ranks."""
    from lightning.fabric.strategies.fsdp import _get_full_state_dict_context

    context: Any = _get_full_state_dict_context(model, world_size=world_size, rank0_only=False)
    return context  # type: ignore[no-any-return]


def is_placeholder(optimizer: object) -> bool:
    """Whether an optimizer stands in for none, where ``configure_optimizers`` returns nothing."""
    from lightning.pytorch.core.optimizer import _MockOptimizer

    return isinstance(optimizer, _MockOptimizer)


def current_hook(module: LightningModule) -> str | None:
    """Return the name of the hook in which the Trainer is calling a module."""
    return module._current_fx_name


def logged_step(trainer: Trainer) -> int:
    """The step under which Lightning logs what is measured now: counted from 0, and by steps of all optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def find_by_keyword(trainer: Trainer, keyword: str, function: TrainerFn) -> Any:
    """Return the path of the checkpoint that ``ckpt_path=keyword`` means for a Trainer, or None.

    Raises:
        ValueError: If there is none.
    """
    find = trainer._checkpoint_connector._parse_ckpt_path
    return find(function, keyword, model_provided=True, model_connected=False)


def training_data(trainer: Trainer) -> Any:
    """Return what a Trainer takes its training batches from, made once more by whoever has a ``train_dataloader``."""
    return trainer.fit_loop._data_source.dataloader()


def read_apart(source: Any) -> CombinedLoader:
    """Return loaders that give the batches of a Trainer's from their beginning, and leave those where they are.

    They are copies, as an iterator that training has begun to read, or its persistent workers, would go on from there.
    """
    from lightning.pytorch.utilities import CombinedLoader

    mode: Any = "max_size_cycle"
    if isinstance(source, CombinedLoader):
        source, mode = source.iterables, source._mode
    return CombinedLoader(_apart(source), mode)


def _apart(source: Any) -> Any:
    if isinstance(source, (list, tuple)):
        return type(source)(_apart(each) for each in source)
    if isinstance(source, dict):
        return {key: _apart(each) for key, each in source.items()}
    return without_iterator(source) if isinstance(source, DataLoader) else source


def placed_for_training(trainer: Trainer, batch: Any) -> Any:
    """Convert and move a batch as before a training step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def checkpoint_being_loaded(trainer: Trainer) -> dict[str, Any]:
    """Return the content of the checkpoint that a Trainer is restoring."""
    return trainer._checkpoint_connector._loaded_checkpoint


def averaged_model(callback: Any) -> Any:
    """Return the average of WeightAveraging or StochasticWeightAveraging, or None before there is one."""
    return callback._average_model


def change_average(callback: Any, change: Any) -> None:
    """Replace the function by which StochasticWeightAveraging averages by what ``change`` makes of it."""
    callback._avg_fn = change(callback._avg_fn)


def numbers_versions(callback: ModelCheckpoint) -> bool:
    """Whether a ModelCheckpoint gives a file another name where there is one of the same."""
    return callback._enable_version_counter


def expect_processes_to_end() -> None:
    """Have Lightning not take the end of processes that it has started for a failure, for which it would kill this one.

    Its thread that watches them sees them killed where Lightning itself ends a run on Ctrl-C.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def options_of_wandb(logger: WandbLogger) -> dict[str, Any]:
    """Return the options with which a logger will begin its run, to be changed."""
    return logger._wandb_init
