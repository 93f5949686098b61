"""Reading checkpoint files, with clear errors for those that cannot be read."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from milora_lightning.utils.compat.lightning import is_sharded_folder, metadata_file, read_sharded_folder
from milora_lightning.utils.errors import InvalidInputError, MissingFileError

KEY = "milora_lightning"
"""State dict entry with the description of the adapters."""


class CheckpointError(InvalidInputError):
    """A checkpoint is damaged, or does not fit this model."""


@contextmanager
def checkpoint_errors(path: str | Path) -> Iterator[None]:
    """Within this context, turn any error of reading a checkpoint into one clear error.

    Raises:
        CheckpointError: In place of any error except that for a missing file.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (Exception, CheckpointException) as error:  # torch raises many types for files it cannot read
        reason = "it is damaged, incomplete, or not a checkpoint"
        if _needs_torchao(error):
            reason = 'it holds the state of an optimizer of torchao: pip install "milora-lightning[torchao]"'
        elif isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in str(error):
            reason = "it holds Python objects, perhaps in the module's hyper_parameters (see save_hyperparameters)"
        raise CheckpointError(
            f"{str(path)!r} cannot be read as a checkpoint: {reason} ({type(error).__name__})."
        ) from error


class ClearCheckpointIO(TorchCheckpointIO):
    """Lightning's CheckpointIO, with clear errors for files that cannot be read."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If it cannot be read.
        """
        if is_sharded_folder(Path(path)):
            return read(path)
        super_load = super().load_checkpoint
        with checkpoint_errors(path):
            content: dict[str, Any] = _with_torchao(lambda: super_load(path, *args, **kwargs))
            return content


def read_without_weights(path: str | Path) -> dict[str, Any]:
    """Read everything in a checkpoint except the data of its weights.

    Args:
        path: As for :func:`read`.

    Returns:
        Its content; the tensors of a file are memory-mapped, those of a folder are left out.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        CheckpointError: If it cannot be read, or is not a checkpoint.
    """
    path = Path(path)
    _check_exists(path)
    with checkpoint_errors(path):
        file = metadata_file(path) if path.is_dir() else path
        content = _with_torchao(lambda: torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file)))
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} is not a Lightning checkpoint: it has no state_dict.")
    return content


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; only tensors and primitive types are accepted.

    Args:
        path: A file, or a folder into which the ranks of a sharded run have written their shards. (In a folder, the
            list of tensors is a pickle, which torch loads as such.)

    Returns:
        Its content, in the layout of a file.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        CheckpointError: If it cannot be read.
    """
    path = Path(path)
    _check_exists(path)
    with checkpoint_errors(path):
        if not path.is_dir():
            content: dict[str, Any] = _with_torchao(lambda: torch.load(path, map_location="cpu", weights_only=True))
            return content
        content = read_sharded_folder(path)
    state = content.pop("state_dict", None) or content.pop("model")  # the names that FSDP2 and FSDP1 use
    if KEY in content:
        state[KEY] = content.pop(KEY)
    optimizers = sorted(key for key in content if key.startswith("optimizer_") and key[10:].isdigit())
    states = [content.pop(key) for key in optimizers]
    return {**content, "state_dict": state, **({"optimizer_states": states} if states else {})}


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise MissingFileError(f"There is no checkpoint {str(path)!r}. Check the path.")
    if path.is_dir() and not is_sharded_folder(path):
        inside = sorted(child.name for child in path.glob("*.ckpt"))
        found = f"Give the path of a file in it, such as {path / inside[-1]}." if inside else "Check the path."
        raise CheckpointError(f"{str(path)!r} is a folder, but not a checkpoint folder of a sharded run. {found}")


def _needs_torchao(error: BaseException) -> bool:
    return isinstance(error, pickle.UnpicklingError) and "torchao" in str(error)


def _with_torchao(load: Callable[[], Any]) -> Any:
    """Load a checkpoint; if it holds tensors of torchao, import it first, so that torch accepts them as safe."""
    try:
        return load()
    except pickle.UnpicklingError as error:
        if not _needs_torchao(error) or importlib.util.find_spec("torchao") is None:
            raise
    importlib.import_module("torchao.optim")
    return load()
