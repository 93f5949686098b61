"""Where the package keeps what it makes, and files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from milora_lightning.utils.errors import OutputExistsError

PACKAGE = Path(__file__).parents[1]
"""The folder of this package."""


def cache_folder() -> Path:
    """Return where converted models and decompositions are kept: ``$MILORA_CACHE``, else the user's cache folder."""
    base = os.environ.get("MILORA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "milora_lightning"
    return Path(base).expanduser()


def check_output(output: str | Path) -> Path:
    """Return the path of a folder that may be made.

    Raises:
        FileExistsError: If there is something of that name already.
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputExistsError(f"There is something at {str(target)!r} already. Choose another output, or remove it.")
    return target


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Make a folder that appears under its name when it is whole, to be read by whom other files are."""
    target = check_output(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        folder = unfinished / "folder"
        folder.mkdir()  # whose mode, unlike that of mkdtemp's, is what the user's umask says
        yield folder
        (unfinished / "file").touch()
        mode = (unfinished / "file").stat().st_mode
        for file in folder.rglob("*"):
            if file.is_file():  # safetensors makes them for the owner alone
                file.chmod(mode)
        if target.exists():
            target.rmdir()
        folder.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def new_cache_folder(folder: Path) -> Iterator[Path]:
    """Make a folder of the cache; where several processes make the same, the first that is done has made it.

    What killed processes have left is removed after a day.
    """
    prefix = f".{folder.name}-"
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{prefix}*"):
        if time.time() - left.stat().st_mtime > 24 * 3600:
            shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first: its folder is as good
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Write a file under another name, which takes the place of the one that was there when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_by(path: Path, unfinished: Path) -> None:
    """Put a folder that is whole in the place of a folder, or a file, that is whole until then."""
    previous = path.with_name(f".{path.name}.previous")
    if path.exists():
        path.rename(previous)
    unfinished.rename(path)
    shutil.rmtree(previous) if previous.is_dir() else previous.unlink(missing_ok=True)
