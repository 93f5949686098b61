"""MkDocs hooks: pages from outside ``docs/``, links that also lead somewhere in the repository, quoted results.

Pages under ``docs/`` are plain Markdown that reads well in the repository, too: their links are paths of files. Files
outside ``docs/`` keep their path on the site, so that a link is found by resolving it in the repository.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

import messages
import outside
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from public import ROOT, rooms

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(^```.*?^```|^    .*?$|`[^`\n]+`)", re.M | re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation: rooms, results, and pages that mkdocs.yml does not name yet."""
    _section(config.nav, "Reference").extend(f"api/{room.name}.md" for room in rooms() if room.names)
    _section(config.nav, "Benchmarks").extend(outside.results())
    named = set(_named(config.nav))
    pages = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    _section(config.nav, "Guides").extend(page for page in pages if page not in named)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from files outside ``docs/``."""
    made = {page: (ROOT / page).read_bytes() for page in [*outside.PAGES, *outside.results(), *outside.pictures()]}
    made[messages.PAGE] = messages.page().encode()
    made[outside.EXAMPLES] = outside.examples().encode()
    made[outside.INDEX] = outside.reference_index(rooms()).encode()
    made |= {f"api/{room.name}.md": outside.reference(room).encode() for room in rooms() if room.names}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is quoted, and turn links between files of the repository into links between pages."""
    here = page.file.src_uri
    repository = here if here in outside.PAGES or here.startswith("benchmarks/") else f"docs/{here}"

    def link(found: re.Match[str]) -> str:
        begin, target, anchor, end = found[1], found[2], found[3] or "", found[4]
        if ":" in target:
            return found[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(repository), target))
        there = there.removeprefix("docs/").removesuffix("/")
        if there == "README.md":
            there = "index.md"
        elif there == "examples":
            there = outside.EXAMPLES
        elif there.startswith("examples/"):
            anchor, there = "#" + re.sub(r"[^\w\-]", "", there.removeprefix("examples/")), outside.EXAMPLES
        elif there == "benchmarks":
            there = "benchmarks.md"
        return f"{begin}{posixpath.relpath(there, posixpath.dirname(here) or '.')}{anchor}{end}"

    if here.startswith("api/") or here in (outside.EXAMPLES, messages.PAGE):
        return markdown
    try:
        return "".join(
            part if FENCE.fullmatch(part) else LINK.sub(link, outside.filled_in(part)) for part in FENCE.split(markdown)
        )
    except KeyError as error:
        raise PluginError(f"{here}: {error.args[0]}") from error


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mark code that is one word, which is not to be broken after its hyphens (see the stylesheet)."""
    html = re.sub(r"<code>([^<\s]{1,20})</code>", r'<code class="short word">\1</code>', html)
    return re.sub(r"<code>([^<\s]+)</code>", r'<code class="word">\1</code>', html)


def _section(nav: Any, title: str) -> list[Any]:
    """Return the list of a section of the navigation, at any depth."""
    for entry in nav:
        for name, inside in entry.items() if isinstance(entry, dict) else ():
            if isinstance(inside, list):
                if name == title:
                    return inside
                try:
                    return _section(inside, title)
                except PluginError:
                    continue
    raise PluginError(f"mkdocs.yml has no section {title!r} in its navigation.")


def _named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in _named(entry)]
