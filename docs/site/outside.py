"""Pages of the site that are made from files outside ``docs/``: notes of the repository, examples, the reference."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from public import ROOT, Room

LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml"}

PAGES = ["CONTRIBUTING.md", "CHANGELOG.md"]
"""Files that are pages as they are, beside the results of benchmarks."""

INDEX = "api/index.md"
EXAMPLES = "examples.md"


def results() -> list[str]:
    """Return the pages with results of benchmarks."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "benchmarks" / "results").glob("*.md"))]


def pictures() -> list[str]:
    """Return the pictures that those pages show."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "benchmarks" / "plots").glob("*.*"))]


def reference(room: Room) -> str:
    """Return the page of a room."""
    blocks = [f"::: {room.module}.{name}" for name in room.names]
    about = without_roles(room.about)
    listed = ", ".join(f"[`{name}`][{room.module}.{name}]" for name in room.names)
    return "\n\n".join([f"# {room.name}", about, f"`{room.module}` offers {listed}.", *blocks]) + "\n"


def reference_index(found: list[Room]) -> str:
    """Return the page that lists all rooms."""
    rows = []
    for room in found:
        title = f"[{room.name}]({room.name}.md)" if room.names else room.name
        about = without_roles(room.about).partition("\n\n")[0].replace("\n", " ")
        names = ", ".join(f"[`{name}`][{room.module}.{name}]" for name in room.names)
        rows.append(f"| {title} | {about} | {names} |")
    return (
        "# Reference\n\nThe package consists of subpackages (rooms). These are the names that each of them offers; "
        "they, and the class paths in YAML files, stay from version to version. Everything else may change. Most of "
        "them can also be imported from `milora_lightning` itself.\n\n| room | | names |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def examples() -> str:
    """Return the page that shows all examples."""
    parts = [
        "# Examples\n\nPrograms and configs to start from, in the folder `examples/` of the repository. All of them "
        "run in the tests, on tiny models."
    ]
    for path in sorted((ROOT / "examples").iterdir()):
        if path.suffix == ".ipynb":
            parts.append(f"## {path.name}\n\n{notebook(path)}")
        elif path.suffix in LANGUAGES:
            parts.append(f"## {path.name}\n\n{fenced(path.read_text(encoding='utf-8'), LANGUAGES[path.suffix])}")
    return "\n\n".join(parts) + "\n"


def notebook(path: Path) -> str:
    """Return a notebook's cells as Markdown."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(
        fenced(text, "python") if kind == "code" else re.sub(r"^#+ ", "### ", text, flags=re.M) for kind, text in texts
    )


def fenced(text: str, language: str) -> str:
    """Return a text as a block of code."""
    return f"```{language}\n{text.strip()}\n```"


def result_pages() -> str:
    """Return a list of the pages with results of benchmarks, by their titles."""
    titles = {page: (ROOT / page).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for page in results()}
    return "\n".join(f"- [{title}](../{page})" for page, title in titles.items())


def configs() -> str:
    """Return a table of the shipped configs, each with the first sentence of its comment."""
    folder = ROOT / "configs"
    rows = ["| `--config` | |", "|---|---|"]
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), path)):
        comment = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
        words = " ".join(line.lstrip("# ") for line in (comment[0] if comment else "").splitlines())
        rows.append(f"| `{path.relative_to(folder)}` | {first_sentence(words)} |")
    return "\n".join(rows)


def scripts() -> str:
    """Return a table of the benchmark scripts, each with the first sentence of its docstring."""
    rows = ["| script | measures |", "|---|---|"]
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            about = (ast.get_docstring(tree) or "").partition("\n\n")[0]
            rows.append(f"| `{path.name}` | {first_sentence(about)} |")
    return "\n".join(rows)


def filled_in(text: str) -> str:
    """Return a text with results in place of the marks that quote them, and lists in place of theirs.

    Raises:
        KeyError: If there is no such result.
    """
    text = re.sub(r"<!-- quote: (\S+) (\S+) -->", lambda found: quoted(found[1], found[2]), text)
    for name, made in {"configs": configs, "benchmarks": scripts, "results": result_pages}.items():
        mark = f"<!-- list: {name} -->"
        text = text.replace(mark, made()) if mark in text else text
    return text


def quoted(page: str, name: str) -> str:
    """Return a published result: what stands between the marks of its name on a page of ``benchmarks/results``."""
    text = (ROOT / "benchmarks" / "results" / page).read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise KeyError(f"benchmarks/results/{page} has no result {name!r}")
    return text.partition(begin)[2].partition(end)[0].strip()


def first_sentence(text: str) -> str:
    """Return the first sentence of a text.

    >>> first_sentence("A 4-bit base (QLoRA): a 7B model. Needs bitsandbytes.")
    'A 4-bit base (QLoRA): a 7B model.'
    """
    return re.split(r"(?<=[.?]) (?=[A-Z])| (?=python (?:main|benchmarks))", " ".join(text.split()), maxsplit=1)[0]


def without_roles(text: str) -> str:
    """Return a docstring in Markdown, with code in place of Sphinx's roles.

    >>> without_roles("See :func:`inject`, ``r``.")
    'See `inject`, `r`.'
    """
    return re.sub(r"``(.+?)``", r"`\1`", re.sub(r":\w+:(`[^`]+`)", r"\1", text))
