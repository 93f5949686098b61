"""Where the package keeps what it makes, and folders that appear under their name when they are whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from milora_lightning.errors import OutputExistsError


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
