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
    """Whether a folder is a sharded checkpoint."""
    from lightning.fabric.strategies.fsdp import _is_sharded_checkpoint

    return _is_sharded_checkpoint(path)


def metadata_file(folder: Path) -> Path:
    """Return the file of a sharded checkpoint with everything that is not a tensor."""
    from lightning.fabric.utilities.load import _METADATA_FILENAME

    return folder / _METADATA_FILENAME


def read_sharded_folder(folder: Path) -> dict[str, Any]:
    """Read a sharded checkpoint in one process."""
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    return _load_distributed_checkpoint(folder)


def whole_optimizer_states(model: nn.Module, world_size: int) -> AbstractContextManager[None]:
    """Within this context, FSDP1 loads and returns full optimizer states on all ranks.

    Args:
        model: The model under FSDP1.
        world_size: Number of ranks.
    """
    from lightning.fabric.strategies.fsdp import _get_full_state_dict_context

    context: Any = _get_full_state_dict_context(model, world_size=world_size, rank0_only=False)
    return context  # type: ignore[no-any-return]


def is_placeholder(optimizer: object) -> bool:
    """Whether an optimizer is Lightning's placeholder for ``configure_optimizers`` returning None."""
    from lightning.pytorch.core.optimizer import _MockOptimizer

    return isinstance(optimizer, _MockOptimizer)


def current_hook(module: LightningModule) -> str | None:
    """Return the name of the module's hook that the Trainer is currently calling."""
    return module._current_fx_name


def logged_step(trainer: Trainer) -> int:
    """Return the step number under which Lightning logs values now: counted from 0, over all optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def find_by_keyword(trainer: Trainer, keyword: str, function: TrainerFn) -> Any:
    """Resolve a keyword for ``ckpt_path``, such as ``"last"``, to a checkpoint's path, or None.

    Args:
        trainer: The Trainer.
        keyword: The keyword.
        function: The function of the Trainer that uses the checkpoint.

    Raises:
        ValueError: If there is none.
    """
    find = trainer._checkpoint_connector._parse_ckpt_path
    return find(function, keyword, model_provided=True, model_connected=False)


def training_data(trainer: Trainer) -> Any:
    """Call a Trainer's ``train_dataloader`` again, and return its result."""
    return trainer.fit_loop._data_source.dataloader()


def read_apart(source: Any) -> CombinedLoader:
    """Return loaders that yield a Trainer's training batches from the beginning, without affecting its own loaders.

    They are copies, because iterators that training has begun to read, or persistent workers, would continue from
    there.
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
    """Convert and move a batch as before a training step.

    Args:
        trainer: The Trainer.
        batch: The batch.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def checkpoint_being_loaded(trainer: Trainer) -> dict[str, Any]:
    """Return the content of the checkpoint that a Trainer is restoring."""
    return trainer._checkpoint_connector._loaded_checkpoint


def averaged_model(callback: Any) -> Any:
    """Return the averaged model of WeightAveraging or StochasticWeightAveraging, or None if there is none yet."""
    return callback._average_model


def change_average(callback: Any, change: Any) -> None:
    """Replace StochasticWeightAveraging's averaging function by the result of ``change`` for it.

    Args:
        callback: The StochasticWeightAveraging callback.
        change: Function from the averaging function to its replacement.
    """
    callback._avg_fn = change(callback._avg_fn)


def numbers_versions(callback: ModelCheckpoint) -> bool:
    """Whether a ModelCheckpoint adds a version to a file name that already exists."""
    return callback._enable_version_counter


def step_of_last_save(callback: ModelCheckpoint) -> int:
    """Return the step at which a ModelCheckpoint has saved last in this run; 0 if it has not."""
    return callback._last_global_step_saved


def expect_processes_to_end() -> None:
    """Keep Lightning from treating the end of processes it has started as a failure, for which it would kill this one.

    When Lightning itself ends a run on Ctrl-C, its watching thread sees the processes killed.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def options_of_wandb(logger: WandbLogger) -> dict[str, Any]:
    """Return the options with which a logger will start its run, as a dictionary that may be modified."""
    return logger._wandb_init
