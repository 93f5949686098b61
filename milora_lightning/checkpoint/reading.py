"""Reading checkpoints with adapters, and refusing those that do not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from milora_lightning.adapters.parts import first_few
from milora_lightning.checkpoint.io import KEY, CheckpointError, read
from milora_lightning.utils.names import unwrapped_name

FORMAT = 1


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint that holds adapters, without executing any code in it.

    Args:
        path: A checkpoint file, or the checkpoint folder of a sharded run.

    Returns:
        Its content, with adapters and other trained weights under ``"state_dict"``.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it is damaged, is not a checkpoint, holds no adapters, or is from a newer version.
    """
    checkpoint = read(path)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{str(path)!r} is not a Lightning checkpoint: it has no state_dict.")
    if KEY not in state:
        raise CheckpointError(
            f"{str(path)!r} holds no adapters: it was saved without MiLoRAInit. If all weights were trained, add "
            "--config method/full.yaml to fit, validate, test and predict, as in training."
        )
    check_format(state[KEY])
    return checkpoint


def told_initialized(description: Mapping[str, Any] | None) -> dict[str, bool]:
    """Return which adapters were initialized when they were saved; empty for older checkpoints without that entry."""
    if description is None or "uninitialized" not in description:
        return {}
    without = {unwrapped_name(name) for name in description["uninitialized"]}
    return {name: name not in without for name in map(unwrapped_name, description["adapters"])}


def check_format(description: dict[str, Any]) -> None:
    """Refuse adapters written by a newer version of the package.

    Raises:
        CheckpointError: If the format is newer than this version reads.
    """
    if description["format"] > FORMAT:
        raise CheckpointError(
            f"The adapters were saved by a newer version of milora-lightning (format {description['format']}, this "
            f"version reads up to {FORMAT}). Upgrade: pip install --upgrade milora-lightning"
        )


def check_tensors(
    state: Mapping[str, Any], shapes: Mapping[str, torch.Size | None], optional: Collection[str] = ()
) -> None:
    """Refuse a state dict that does not hold exactly the tensors that a module saves.

    Args:
        state: The state dict.
        shapes: The shape of each required entry; None for entries that are not tensors.
        optional: Further entries that are allowed.

    Raises:
        CheckpointError: If an entry is missing, unexpected, or has another shape.
    """
    missing, extra = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys() - set(optional))
    if missing or extra:
        raise CheckpointError(
            f"The checkpoint lacks {first_of(missing)} and has unexpected {first_of(extra)}, compared with this module."
        )
    for key, shape in shapes.items():
        if shape is not None and state[key].shape != shape:
            raise CheckpointError(
                f"{key!r} has shape {tuple(state[key].shape)} in the checkpoint and {tuple(shape)} here."
            )


def first_of(names: list[str]) -> str:
    """Name the first of several tensors or layers, and the number of others."""
    return first_few(names, 1) or "nothing"
