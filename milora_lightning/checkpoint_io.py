"""Reading checkpoint files, with clear errors for those that cannot be read."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO


class CheckpointError(ValueError):
    """A checkpoint is damaged, or does not belong to this model."""


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong in reading a checkpoint into one clear error.

    Raises:
        CheckpointError: In place of any error but a missing file's.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many types for files it cannot read
        reason = "it is damaged, incomplete, or something else"
        if isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in str(error):
            reason = "it holds Python objects, perhaps in the module's hyper_parameters (see save_hyperparameters)"
        raise CheckpointError(
            f"{str(path)!r} cannot be read as a checkpoint: {reason} ({type(error).__name__})."
        ) from error


class ClearCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, with a clear error for files that cannot be read."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If it cannot be read.
        """
        with readable(path):
            return super().load_checkpoint(path, *args, **kwargs)
