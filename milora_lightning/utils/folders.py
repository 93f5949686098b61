"""The cache folder, and writing files and folders atomically: completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from milora_lightning.utils.errors import InvalidInputError, OutputExistsError

PACKAGE = Path(__file__).parents[1]
"""The folder of this package."""


def cache_folder() -> Path:
    """Return the folder for converted models and decompositions: ``$MILORA_CACHE``, or a folder in the user's cache."""
    base = os.environ.get("MILORA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "milora_lightning"
    return Path(base).expanduser()


def check_output(output: str | Path) -> Path:
    """Return the path of a folder that can be created.

    Raises:
        FileExistsError: If the path exists and is not an empty folder.
        InvalidInputError: If nothing can be written there.
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputExistsError(f"There is something at {str(target)!r} already. Choose another output, or remove it.")
    _check_writable(target, "The output", "choose another folder")
    return target


def check_file(output: str | Path, what: str) -> None:
    """Refuse a file that cannot be written, before any work could be lost.

    Args:
        output: The file; its parent folders need not exist yet.
        what: What is to be written, the first words of the message.

    Raises:
        InvalidInputError: If it is a folder, or its folder is not writable.
    """
    path = Path(output).expanduser()
    remedy = "name a file in another place"
    if path.exists():
        try:
            path.open("ab").close()
        except OSError as error:
            raise InvalidInputError(f"{what} cannot be written to {path} ({error.strerror}): {remedy}.") from error
    else:
        _check_writable(path, what, remedy)


def _check_writable(path: Path, what: str, remedy: str) -> None:
    """Try to write in a folder or, if it does not exist, in its nearest existing parent."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InvalidInputError(
            f"{what} cannot be written to {path} ({error.strerror}: {folder}): {remedy}."
        ) from error


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Create a folder that gets its name only once it is complete, with the permissions of the user's umask."""
    target = check_output(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        folder = unfinished / "folder"
        folder.mkdir()  # with the user's umask, unlike mkdtemp
        yield folder
        (unfinished / "file").touch()
        mode = (unfinished / "file").stat().st_mode
        for file in folder.rglob("*"):
            if file.is_file():  # safetensors makes files readable for their owner only
                file.chmod(mode)
        if target.exists():
            target.rmdir()
        folder.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def new_cache_folder(folder: Path) -> Iterator[Path]:
    """Create a folder in the cache; if several processes create the same one, the first to finish wins.

    What killed processes have left behind is removed after a day.
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
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name, and rename it over the old one once it is complete."""
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
    """Replace a folder, a file or a link by a complete folder, even where a killed process has left the one before.

    Args:
        path: The folder or file to replace.
        unfinished: The complete folder that takes its name.
    """
    previous = path.with_name(f".{path.name}.previous")
    if path.exists() or path.is_symlink():
        _remove(previous)
        path.rename(previous)
    unfinished.rename(path)
    _remove(previous)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
