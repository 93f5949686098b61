"""Finding the data at a location: files, a split in a folder, saved data sets, and data sets on the Hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from milora_lightning.data.reading.records import SUFFIXES, is_data_file
from milora_lightning.data.sources import Split
from milora_lightning.utils.errors import InvalidInputError, MissingFileError
from milora_lightning.utils.suggestions import closest

# Words in the names of files and folders that indicate their split.
WORDS: dict[Split, set[str]] = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes


def is_hub_name(name: str) -> bool:
    """Return whether a location is a Hub name: it does not exist as a path, and has no data file's suffix."""
    return not (Path(name).expanduser().exists() or name.lower().endswith(SUFFIXES) or glob.has_magic(name))


def is_saved(name: str) -> bool:
    """Return whether a location was written by ``save_to_disk``."""
    folder = Path(name).expanduser()
    return any((folder / file).is_file() for file in SAVED)


def saved_dataset(name: str, split: Split, split_name: str, needed: bool) -> datasets.Dataset | None:
    """Open a data set written by ``save_to_disk``.

    Args:
        name: The folder.
        split: Which split to open, if there are several.
        split_name: Name of the split in this data set.
        needed: Whether a missing split is an error. If so, a single split is used whatever its name.

    Returns:
        The data set; None if there is no such split and ``needed`` is false.

    Raises:
        ValueError: If it is damaged, or has no such split.
    """
    folder = Path(name).expanduser().absolute()
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged files raise many kinds of errors
        raise InvalidInputError(
            f"{folder} cannot be opened as a saved data set ({type(error).__name__}: {error}). Save it again."
        ) from error
    if isinstance(data, datasets.Dataset):
        return data.with_format(None) if needed else None
    names = [split_name, *sorted(WORDS[split])] if split_name == split else [split_name]
    found = next((each for each in names if each in data), None)
    if found is None and needed and len(data) == 1:
        found = next(iter(data))
    if found is None and needed:
        raise InvalidInputError(
            f"{folder} has the splits {list(data)}, but no {split_name!r}: set {split}_split to one of them."
        )
    return None if found is None else data[found].with_format(None)


def files_at(name: str, split: Split, needed: bool) -> list[Path]:
    """Find the files of a path, glob or folder.

    Args:
        name: The location.
        split: Which split to find in a folder that has several.
        needed: Whether a missing split is an error. If so and no file name in a folder indicates a split, all files are
            used.

    Returns:
        The files in the order of their names; an empty list if there are none and ``needed`` is false.

    Raises:
        FileNotFoundError: If nothing exists there.
        ValueError: If a file is not a data file, or cannot be read.
    """
    path = Path(name).expanduser().absolute()
    try:
        if path.is_dir():
            return _files_in(path, split, needed)
        return _matching_files(name, path) if needed else []
    except PermissionError as error:
        raise InvalidInputError(
            f"{path} cannot be read ({error}). Check the permissions of the file and its folder."
        ) from error


def _matching_files(name: str, path: Path) -> list[Path]:
    found = [Path(p) for p in sorted(glob.glob(str(path)))] if not path.exists() and glob.has_magic(name) else [path]
    if not found or not found[0].exists():
        meant = closest(path.name, [file.name for file in path.parent.glob("*") if is_data_file(file)])
        hint = f"Did you mean {meant}?" if meant else f"Check the path; a relative one starts at {Path.cwd()}."
        raise MissingFileError(f"There is no data file {path}. {hint}")
    for file in found:
        if not file.is_file() or not is_data_file(file):
            raise InvalidInputError(f"{file} is not a data file: {_suffix_rule()}. Convert it, or leave it out.")
    return found


def _files_in(folder: Path, split: Split, needed: bool) -> list[Path]:
    """Return the files of a split in a folder; if no name indicates a split, all files belong to the needed one."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and _is_data(file.relative_to(folder))]
    if not files:
        raise InvalidInputError(f"There is no data file in the folder {folder}: {_suffix_rule()}.")
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    without = [file for file, found in splits.items() if found is None]
    if len(without) == len(files):
        return files if needed else []
    if without:
        raise InvalidInputError(
            f"The name of {without[0]} tells no split, but that of {next(f for f in files if f not in without)} does. "
            "Name the files themselves, or put train, validation or test into the names of all."
        )
    chosen = [file for file, found in splits.items() if found == split]
    if not chosen and needed:
        if len(set(splits.values())) == 1:
            return files
        raise InvalidInputError(
            f"No file in the folder {folder} is named as the {split} split. Name the files themselves."
        )
    return chosen


def _is_data(path: Path) -> bool:
    hidden = any(part[0] in "._" for part in path.parts)
    return not hidden and path.name not in DESCRIPTIONS and is_data_file(path)


def _split_of(path: Path) -> Split | None:
    """Return the split indicated by the name of a file or, failing that, of its innermost folder that indicates one.

    Raises:
        ValueError: If a name indicates several splits.
    """
    for part in (path.name, *reversed(path.parent.parts)):
        words = set(re.split(r"[^a-z]+", part.lower()))
        found = [split for split, known in WORDS.items() if words & known]
        if len(found) > 1:
            raise InvalidInputError(
                f"The name of {path} tells {' and '.join(found)}. Name the files of each split themselves."
            )
        if found:
            return found[0]
    return None


def _suffix_rule() -> str:
    return f"its name must end in {', '.join(_short(SUFFIXES))}"


def _short(suffixes: Iterable[str]) -> list[str]:
    plain = [suffix for suffix in suffixes if suffix.count(".") == 1]
    return [*plain[:-1], f"{plain[-1]}, or .gz, .bz2, .xz or .zst after one of text"]


def hub_dataset(name: str, split_name: str, needed: bool, streaming: bool = False) -> Any:
    """Load a split of a data set from the Hub.

    Args:
        name: Its name on the Hub, optionally followed by a colon and a configuration.
        split_name: Name of the split.
        needed: Whether a missing split is an error.
        streaming: Whether to read rows only when they are requested.

    Returns:
        The data set, an ``IterableDataset`` with ``streaming``; None if it has no such split and ``needed`` is false.

    Raises:
        FileNotFoundError: If the Hub does not have it, or cannot be reached.
        ValueError: If there is no such split or configuration.
    """
    repository, _, config = name.partition(":")
    try:
        options = {"streaming": True} if streaming else {}
        return datasets.load_dataset(repository, config or None, split=split_name, **options)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise MissingFileError(
            f"There is no file {Path(name).expanduser().absolute()}, and the Hugging Face Hub does not have the data "
            f"set {name!r} or cannot be reached. Check the name and the network, or give the path of a file, "
            f"whose name ends in {', '.join(_short(SUFFIXES))}. ({type(error).__name__}: {error})"
        ) from error
    except ValueError as error:  # no such split, or no such configuration
        if not needed and "split" in str(error):
            return None
        raise InvalidInputError(f"The data set {name!r} cannot be loaded with split={split_name!r}: {error}") from error
