"""The options of the run that wrote a checkpoint: what is not given beside ``--ckpt_path`` comes from it."""

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

from milora_lightning.checkpoint.adapter import read_checkpoint
from milora_lightning.checkpoint.io import KEY, read_without_weights
from milora_lightning.models.files import ModelNotFoundError
from milora_lightning.utils.compat import find_by_keyword
from milora_lightning.utils.errors import MissingFileError

BASE = "model.name_or_path"
KEYWORDS = ("last", "best", "hpc")
"""What ``--ckpt_path`` may be in place of a path: checkpoints that Lightning looks for."""


def options_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the module and of the adapters that a checkpoint was written with.

    Args:
        checkpoint: Its content.

    Returns:
        Their values by name.

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
    """Read a checkpoint for the options that it was written with.

    Args:
        path: The checkpoint, a file or a folder.
        adapters: Whether it has to hold adapters; one of full fine-tuning is as large as the model, and is not read
            to find out more than the module's options.

    Returns:
        Its content, of which :func:`options_in` takes them.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it cannot be read, or holds no adapters.
    """
    return read_checkpoint(path) if adapters else read_without_weights(path)


def differences(given: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Describe in one line each where options that were given differ from those of a checkpoint.

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
    """Return the path of the checkpoint that a keyword stands for.

    Args:
        trainer: Whose callbacks say where checkpoints are.
        keyword: One of ``KEYWORDS``.
        subcommand: What is to be done with it, such as ``"fit"``.

    Raises:
        FileNotFoundError: If there is none; without one Lightning would begin anew, or evaluate an untrained model.
    """
    remedy = "Give the path of a checkpoint" + (
        ", or leave --ckpt_path out to begin anew." if subcommand == "fit" else "."
    )
    if keyword == "best":
        raise MissingFileError(
            f"--ckpt_path best is known only to the process that trains, and {subcommand} begins another. {remedy}"
        )
    function = {"fit": TrainerFn.FITTING, "predict": TrainerFn.PREDICTING}.get(subcommand) or TrainerFn(subcommand)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no last checkpoint available.*")
            path = find_by_keyword(trainer, keyword, function)
    except ValueError:  # which is how Lightning says that there is none
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
    """Within this context, say of a base that is not there that its name is a checkpoint's, and how to give another.

    Args:
        option: The option that gives another.
        name_or_path: What the checkpoint calls its base; None if the user has named it.
    """
    try:
        yield
    except ModelNotFoundError as error:
        if name_or_path is None:
            raise
        raise ModelNotFoundError(
            f"The checkpoint's base model {name_or_path!r} is not there: it has moved, or the working directory is "
            f"another. Say where it is now with {option}."
        ) from error


def _meaning(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as values that are equal where they mean the same."""
    plain = {name: _plain(value) for name, value in options.items()}
    r, alpha = plain.get("adapter.r"), plain.get("adapter.lora_alpha")
    if r is not None and (alpha == "2r" or (alpha is None and not plain.get("adapter.rank_pattern"))):
        plain["adapter.lora_alpha"] = 2.0 * r if alpha == "2r" else float(r)
    return plain


def _plain(value: Any) -> Any:
    """The value without what parsing makes of it, and None for what is empty."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()} or None
    return ([_plain(entry) for entry in value] or None) if isinstance(value, (list, tuple)) else value
