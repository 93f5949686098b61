"""Files and folders are there whole or not at all, and nothing is left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from milora_lightning.cli.main import main
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import (
    check_file,
    check_output,
    new_cache_folder,
    new_folder,
    replace_by,
    replaced_file,
)


def test_a_file_is_what_it_was_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "entry.txt"
    with replaced_file(path) as unfinished:
        unfinished.write_text("first")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), replaced_file(path) as unfinished:  # noqa: PT012
        unfinished.write_text("half")
        raise OSError("full")
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["entry.txt"]


def test_of_several_processes_one_makes_a_folder_of_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    with new_cache_folder(folder) as slower:
        (slower / "by").write_text("the slower")
        with new_cache_folder(folder) as faster:
            (faster / "by").write_text("the faster")
    assert (folder / "by").read_text() == "the faster"
    assert os.listdir(folder.parent) == ["tiny"]


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path: Path) -> None:
    for name, age in {".tiny-old": 25, ".tiny-new": 1, ".other-old": 25}.items():
        (tmp_path / name).mkdir()
        then = time.time() - age * 3600
        os.utime(tmp_path / name, (then, then))
    with new_cache_folder(tmp_path / "tiny"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".other-old", ".tiny-new", "tiny"]


def test_a_folder_that_fails_does_not_appear(tmp_path: Path) -> None:
    for making in (new_folder, new_cache_folder):
        with pytest.raises(ValueError, match="no"), making(tmp_path / "out") as folder:  # noqa: PT012
            (folder / "half").touch()
            raise ValueError("no")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("before", ["nothing", "file", "folder", "link"])
def test_a_whole_folder_takes_the_place_of_what_was_there(before: str, killed: bool, tmp_path: Path) -> None:
    """Also where a process was killed before it had removed what it had replaced."""
    path, unfinished, other = (tmp_path / name for name in ("last.ckpt", "unfinished", "other"))
    for folder in (unfinished, other, *([path] if before == "folder" else [])):
        folder.mkdir()
        (folder / "old").touch()
    (unfinished / "old").rename(unfinished / "new")
    if before == "file":
        path.touch()
    elif before == "link":
        path.symlink_to(other)
    if killed:
        (tmp_path / ".last.ckpt.previous").mkdir()
        (tmp_path / ".last.ckpt.previous" / "older").touch()
    replace_by(path, unfinished)
    assert os.listdir(path) == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "other"]
    assert os.listdir(other) == ["old"]


def test_places_that_take_no_files_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here before")
    check_file(tmp_path / "not" / "yet" / "there.jsonl", "Answers")
    check_file(tmp_path / "file", "Answers")
    check_output(tmp_path / "new")
    with pytest.raises(InvalidInputError, match=r"Answers cannot be written to .* \(Is a directory\): name a file"):
        check_file(tmp_path, "Answers")
    # /proc takes no files from anybody, and a file none either
    for place in (tmp_path / "file", Path("/proc")):
        with pytest.raises(InvalidInputError, match=f"Answers cannot be written to {place}/a.jsonl"):
            check_file(place / "a.jsonl", "Answers")
        with pytest.raises(InvalidInputError, match=f"The output cannot be written to {place}/a"):
            check_output(place / "a")
    assert (tmp_path / "file").read_text() == "here before"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "--model=nowhere", "--prompt=Hi", "--output=/proc/answers.txt"],
        ["evaluate", "--model=nowhere", "--tasks=sums", "--output=/proc/results.json"],
        ["export", "--ckpt_path=nowhere.ckpt", "--output=/proc/adapters"],
        ["analyze", "--ckpt_path=nowhere.ckpt", "--output=/proc/analysis"],
        ["compare", "--methods=[milora,lora]", "--learning_rates=[1e-3]", "--output=/proc/compared"],
    ],
)
def test_commands_refuse_them_before_they_load_anything(args: list[str]) -> None:
    with pytest.raises(SystemExit, match="cannot be written to /proc/"):
        main(args)
