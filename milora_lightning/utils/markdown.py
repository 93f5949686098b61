"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Write a table in Markdown.

    Args:
        columns: Column headings.
        rows: The cells of each row.

    >>> print(table(["a", "b"], [["1", "2\n|"]]))
    | a | b |
    | --- | --- |
    | 1 | 2<br>\| |
    """
    lines = [list(columns), ["---"] * len(columns), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
