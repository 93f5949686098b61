"""Config files on the command line: finding shipped ones, and warning about replaced callbacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from milora_lightning.utils.folders import PACKAGE

# In a wheel the configs are inside the package; in a checkout they are next to it.
CONFIGS = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())


class SaveConfig(SaveConfigCallback):
    """Saves the config of a run in its folder; an evaluation does not replace the config of training."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config, unless that would replace the config of training."""
        folder = trainer.log_dir  # a collective operation: all ranks must read it
        path = Path(folder or trainer.default_root_dir) / self.config_filename
        if stage != "fit" and trainer.strategy.broadcast(path.is_file()):
            return
        # The logger does not write to a folder, such as MLflow's with a server.
        if folder is None and self.save_to_log_dir:
            self.save_to_log_dir = False
            if trainer.is_global_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)
        super().setup(trainer, pl_module, stage)


def resolve_configs(args: list[str]) -> list[str]:
    """Replace configs after ``--config`` by their paths: a local file, or otherwise the shipped one of that name.

    Args:
        args: Command-line arguments.

    Returns:
        The arguments with paths. A config that holds only a list ``config`` of other configs, relative to itself, is
        replaced by them.

    Raises:
        SystemExit: If a config is neither a file nor shipped; the message lists the shipped ones.

    >>> resolve_configs(["fit", "--trainer.max_steps=3"])
    ['fit', '--trainer.max_steps=3']
    """
    resolved: list[str] = []
    for previous, argument in zip(["", *args], args, strict=False):
        if previous in ("--config", "-c"):
            resolved.pop()
            resolved += [part for path in _expanded(_config_path(argument)) for part in (previous, path)]
        elif argument.startswith("--config="):
            resolved += [f"--config={path}" for path in _expanded(_config_path(argument.removeprefix("--config=")))]
        else:
            resolved.append(argument)
    return resolved


def _expanded(path: str) -> list[str]:
    """Return the configs in a list of configs, or the path itself for any other config."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else None
    except yaml.YAMLError:
        return [path]  # the parser reports the error
    if not isinstance(content, dict) or content.keys() != {"config"} or not isinstance(content["config"], list):
        return [path]
    return [str((Path(path).parent / part).resolve()) for part in content["config"]]


def _config_path(name: str) -> str:
    shipped = CONFIGS / name
    if Path(name).is_file() or not name.endswith((".yaml", ".yml")):
        return name
    if shipped.is_file():
        return str(shipped)
    names = ", ".join(sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")))
    sys.exit(
        f"error: There is no config {name!r}, neither in the working directory nor among the shipped ones: {names}."
    )


def replaced_checkpoints(args: Any) -> list[str]:
    """Describe where a list of callbacks replaces an earlier list with checkpoint callbacks.

    Args:
        args: Command-line arguments, with paths of configs. Anything but a list is ignored.

    Returns:
        One line for each such list.

    >>> replaced_checkpoints(["fit", "--trainer.callbacks=EarlyStopping"])
    []
    """
    lines: list[str] = []
    saving: list[str] = []
    for source, option, callbacks in _callbacks(args if isinstance(args, list) else []):
        if option == "callbacks":
            if saving:
                lines.append(
                    f"trainer.callbacks of {source} replaces the earlier list, which had {', '.join(saving)}: use "
                    "callbacks+ to add to the list."
                )
            saving = []
        saving += [name for name in map(_class_name, callbacks) if name.endswith("Checkpoint")]
    return lines


def _callbacks(args: list[str]) -> Iterator[tuple[str, str, list[Any]]]:
    """Yield each list of callbacks with its source and its option, ``callbacks`` or ``callbacks+``."""
    for argument, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        value = value if equals else following
        if name in ("--config", "-c"):
            yield from ((value, key, callbacks) for key, callbacks in _callbacks_in(value))
        elif name in ("--trainer.callbacks", "--trainer.callbacks+"):
            try:
                content = yaml.safe_load(value)
            except yaml.YAMLError:
                content = value
            yield "the command line", name.removeprefix("--trainer."), _as_list(content)


def _callbacks_in(path: str) -> Iterator[tuple[str, list[Any]]]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else None
    except yaml.YAMLError:
        return  # the parser reports the error
    trainer = content.get("trainer") if isinstance(content, dict) else None
    for key, value in trainer.items() if isinstance(trainer, dict) else ():
        if key in ("callbacks", "callbacks+"):
            yield key, _as_list(value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _class_name(callback: Any) -> str:
    path = callback.get("class_path") if isinstance(callback, dict) else callback
    return str(path).rpartition(".")[2]
