"""Caches are keyed by what functions do, wherever they were defined, with or without their sources."""

from __future__ import annotations

import compileall
import functools
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from helpers.data_fixtures import isolate_cache, make_tokenizer

import milora_lightning
from milora_lightning.data import Files
from milora_lightning.data.code_key import code_key

SOURCE = """
import functools
import re

PATTERN = re.compile("a+")
WORDS = {"yes": ["right", 1], "no": {"wrong"}}

def helper(text):
    return text.strip()

def deeper(text):
    return [helper(part) for part in text.split()]

class Kinds:
    prefix = "Q: "
    @staticmethod
    def of(record):
        return Kinds.prefix + str(deeper(record["q"]))

def make(suffix):
    return lambda text: text + suffix

close = make("!")

@functools.cache
def remembered(text):
    return text.upper()

def convert(record, sep=" "):
    # A comment.
    asked = Kinds.of(record) + sep + close(remembered(PATTERN.sub("b", record["q"])))
    return {"instruction": asked, "output": WORDS.get(record["a"], "text")}
"""


def defined(source: str, name: str | None = "__main__") -> Any:
    """Run a source as notebooks do: there is no file to read it from."""
    names: dict[str, Any] = {} if name is None else {"__name__": name}
    exec(compile(source, "<cell>", "exec"), names)
    return names["convert"]


@pytest.mark.parametrize("name", ["__main__", None])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('sep=" "', 'sep="-"'),
        ("text.strip()", "text.lstrip()"),
        ("text.split()", "text.split('a')"),
        ('"Q: "', '"Frage: "'),
        ("str(deeper", "repr(deeper"),
        ('"a+"', '"aa+"'),
        ('"right", 1', '"right", 2'),
        ('{"wrong"}', '{"false"}'),
        ("text + suffix", "suffix + text"),
        ('make("!")', 'make("?")'),
        ("text.upper()", "text.lower()"),
        ('"text"', '"texts"'),
        ("re.compile(", "re.compile(flags=re.I, pattern="),
    ],
)
def test_every_edit_changes_the_key(name: str | None, old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert code_key(defined(SOURCE, name)) != code_key(defined(SOURCE.replace(old, new), name))


def test_what_does_not_change_what_is_done_keeps_the_key() -> None:
    key = code_key(defined(SOURCE))
    assert key == code_key(defined(SOURCE))
    assert key == code_key(defined("\n\n" + SOURCE.replace("# A comment.", "# Another.\n\n")))


def test_modules_of_a_project_are_followed_and_libraries_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(body: str) -> str:
        module = types.ModuleType("project_helpers")
        exec(f"def clean(text): {body}\ndef other(text): {body}", vars(module))
        monkeypatch.setitem(sys.modules, "project_helpers", module)
        source = "import json, project_helpers\ndef convert(r): return json.loads(project_helpers.clean(r))"
        return code_key(defined(source))

    assert key("return text") == key("return text")
    assert key("return text") != key("return text + 'x'")


def test_what_a_partial_gives_its_function_changes_the_key() -> None:
    convert = defined("def convert(record, before='', after=''): return before + record['q'] + after")
    options: list[dict[str, str]] = [{}, {"before": "a"}, {"before": "b"}, {"after": "a"}]
    made = [*(functools.partial(convert, **given) for given in options), functools.partial(convert, "a")]
    assert len({code_key(each) for each in made}) == len(made)
    assert code_key(made[1]) == code_key(functools.partial(convert, before="a"))


def test_recursion_ends() -> None:
    source = "def convert(n): return n and other(n - 1)\ndef other(n): return n and convert(n - 1)"
    assert code_key(defined(source)) != code_key(defined(source.replace("n - 1)\ndef", "n - 2)\ndef")))


def test_edited_converter_of_a_notebook_reads_the_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_cache(monkeypatch, tmp_path)
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "1 + 1?", "a": "2"}\n')
    cell = """
class Own(Files):
    @staticmethod
    def convert(record):
        return {"instruction": record["q"], "output": PREFIX + record["a"]}
"""

    def responses(prefix: str) -> list[str]:
        names = {"Files": Files, "PREFIX": prefix, "__name__": "__main__"}
        exec(cell, names)
        return names["Own"](train=str(path)).load("train")["response"][:]  # type: ignore[index, operator]

    assert responses("A: ") == ["A: 2"]
    assert responses("B: ") == ["B: 2"]
    files = set(tmp_path.rglob("*.arrow"))
    assert responses("A: ") == ["A: 2"]
    assert set(tmp_path.rglob("*.arrow")) == files


USE = """
import sys
import milora_lightning
assert milora_lightning.__file__.endswith(".pyc"), milora_lightning.__file__
from transformers import AutoTokenizer
from milora_lightning.data import Files, tokenize_dataset
data = Files(train=sys.argv[1]).load("train")
print(tokenize_dataset(data, AutoTokenizer.from_pretrained(sys.argv[2]), "plain")["length"][:])
"""


@pytest.mark.slow
def test_package_works_from_compiled_files_alone(tmp_path: Path) -> None:
    home = Path(milora_lightning.__file__).parent
    copy = tmp_path / "milora_lightning"
    shutil.copytree(home, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if not (copy / "configs").exists():  # beside the package in a checkout
        shutil.copytree(home.parent / "configs", tmp_path / "configs")
    compileall.compile_dir(copy, legacy=True, quiet=1)
    for source in copy.rglob("*.py"):
        source.unlink()
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text('{"instruction": "1 + 1?", "output": "2"}\n')
    command = [sys.executable, "-c", USE, "a.jsonl", "tokenizer"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("[")


@pytest.mark.parametrize("source", ["{f}", "{f}\nhelper = convert\ndef convert(record): return helper(record)"])
def test_defaults_of_parameters_by_keyword_alone_change_the_key(source: str) -> None:
    def key(default: str) -> str:
        function = f"def convert(record, *, sep={default!r}): return record['q'] + sep"
        return code_key(defined(source.replace("{f}", function)))

    assert key(" ") == key(" ")
    assert key(" ") != key("-")
