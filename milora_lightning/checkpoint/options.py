"""The options of the run that wrote a checkpoint, which are defaults for runs with ``--ckpt_path``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from milora_lightning.checkpoint.io import KEY, read_without_weights
from milora_lightning.checkpoint.reading import read_checkpoint
from milora_lightning.models.files import ModelNotFoundError
from milora_lightning.starts import find_start
from milora_lightning.utils.compat.lightning import find_by_keyword
from milora_lightning.utils.errors import MissingFileError

BASE = "model.name_or_path"
KEYWORDS = ("last", "best", "hpc")
"""Keywords for ``--ckpt_path`` with which Lightning finds the checkpoint."""


def options_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the module and of the adapters with which a checkpoint was written.

    Args:
        checkpoint: The content of the checkpoint.

    Returns:
        The values of the options by name.

    >>> options_in({"hyper_parameters": {"max_new_tokens": 4, "_instantiator": "x"}, "state_dict": {}})
    {'model.max_new_tokens': 4}
    """
    module = checkpoint.get("hyper_parameters", {})
    adapters = checkpoint.get("state_dict", {}).get(KEY, {}).get("config", {})
    return {
        **{f"model.{name}": value for name, value in module.items() if not name.startswith("_")},
        **{f"adapter.{name}": list(value) if isinstance(value, tuple) else value for name, value in adapters.items()},
    }


def read_for_options(path: str | Path, adapters: bool = True) -> dict[str, Any]:
    """Read a checkpoint for the options with which it was written.

    Args:
        path: The checkpoint, a file or a folder.
        adapters: Whether it must hold adapters. If not, its weights are not read: a checkpoint of full
            fine-tuning is as large as the model.

    Returns:
        Its content, for :func:`options_in`.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        CheckpointError: If it cannot be read, or must hold adapters and does not.
    """
    return read_checkpoint(path) if adapters else read_without_weights(path)


def differences(given: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Describe each given option that differs from the checkpoint's, in one line.

    Args:
        given: The given options by name.
        saved: The checkpoint's options by name.

    >>> differences({"model.max_new_tokens": 9, "model.dtype": "auto"}, {"model.max_new_tokens": 4})
    ['model.max_new_tokens: 9 here, 4 in the checkpoint']
    """
    here, there = _meaning(given), _meaning(saved)
    return [
        f"{name}: {here[name]} here, {value} in the checkpoint"
        for name, value in there.items()
        if name in here and here[name] != value
    ]


def find_checkpoint(trainer: Trainer, keyword: str, subcommand: str) -> str:
    """Return the path of the checkpoint that a keyword refers to.

    Args:
        trainer: The Trainer whose callbacks know where checkpoints are.
        keyword: One of ``KEYWORDS``.
        subcommand: The subcommand that uses the checkpoint, such as ``"fit"``.

    Raises:
        FileNotFoundError: If there is none. Lightning would start a new run, or evaluate an untrained model.
    """
    remedy = "Give the path of a checkpoint" + (
        ", or leave --ckpt_path out to start a new run." if subcommand == "fit" else "."
    )
    if keyword == "best":
        raise MissingFileError(
            f"--ckpt_path best is known only in the process that trained, and {subcommand} starts another. {remedy}"
        )
    function = {"fit": TrainerFn.FITTING, "predict": TrainerFn.PREDICTING}.get(subcommand) or TrainerFn(subcommand)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no last checkpoint available.*")
            path = find_by_keyword(trainer, keyword, function)
    except ValueError:  # Lightning raises it when there is no checkpoint
        path = None
    if path is None:
        folders = {c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath}
        place = (
            f"in {', '.join(map(str, folders))}" if folders else "where this run's logger and default_root_dir point"
        )
        raise MissingFileError(f"There is no checkpoint for --ckpt_path {keyword} {place}. {remedy}")
    return str(path)


@contextmanager
def base_may_have_moved(option: str, name_or_path: str | None) -> Iterator[None]:
    """Within this context, explain in the error if a base model named by a checkpoint is missing, and the remedy.

    Args:
        option: The option for naming another base.
        name_or_path: The base according to the checkpoint; None if the user has named the base.
    """
    try:
        yield
    except ModelNotFoundError as error:
        if name_or_path is None:
            raise
        raise ModelNotFoundError(
            f"The checkpoint's base model {name_or_path!r} does not exist: it has moved, or the working directory is "
            f"another one. Say where it is now with {option}."
        ) from error


def _meaning(options: Mapping[str, Any]) -> dict[str, Any]:
    """Normalize options so that equivalent values are equal."""
    plain = {name: _plain(value) for name, value in options.items()}
    r, alpha = plain.get("adapter.r"), plain.get("adapter.lora_alpha")
    if r is not None and (alpha == "2r" or (alpha is None and not plain.get("adapter.rank_pattern"))):
        plain["adapter.lora_alpha"] = 2.0 * r if alpha == "2r" else float(r)
    if isinstance(init := plain.get("adapter.init"), str) and init != "full":
        plain["adapter.init"] = find_start(init).name
    return plain


def _plain(value: Any) -> Any:
    """Convert a parsed value to plain types, with None for empty containers."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()} or None
    return ([_plain(entry) for entry in value] or None) if isinstance(value, (list, tuple)) else value
