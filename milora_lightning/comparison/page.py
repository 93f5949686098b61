"""The report as one HTML file with interactive plots."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from milora_lightning.comparison.measures import TOLD, parts, title_of
from milora_lightning.comparison.runs import Run, by_method
from milora_lightning.comparison.sections import Report
from milora_lightning.comparison.selection import SELECTION_LOSS

TEMPLATE = Path(__file__).with_name("report.html")
DATA = "/*DATA*/null"
"""Placeholder of the data in the template."""


def write_page(path: Path, report: Report) -> None:
    """Write a report as a self-contained page."""
    template = TEMPLATE.read_text(encoding="utf-8")
    path.write_text(template.replace(DATA, script_text(page_data(report)), 1), encoding="utf-8")


def page_data(report: Report) -> dict[str, Any]:
    """Return the data of the page as plain lists and numbers."""
    runs = [*((run, True) for run in report.runs), *((run, False) for run in report.sweep)]
    there = dict.fromkeys(name for run, _ in runs for row in run.rows for name in row)
    titles = {"step": "optimizer step", SELECTION_LOSS: "loss on the selection set"}
    titles |= {name: title_of(name) for name in (*(m.name for m in TOLD), *parts(there))}
    return {
        "title": report.title,
        "setting": report.setting,
        "sections": [{"title": s.title, "text": s.text, "columns": s.columns, "rows": s.rows} for s in report.sections],
        "measures": {name: title for name, title in titles.items() if name in there},
        "methods": list(by_method([run for run, _ in runs])),
        "runs": [_run(run, reported, list(titles)) for run, reported in runs],
    }


def script_text(data: Any) -> str:
    r"""Write data as JSON for a script in HTML, such that no text in them can end the script.

    >>> script_text({"name": "</script>"})
    '{"name":"\\u003c/script>"}'
    """
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _run(run: Run, reported: bool, names: list[str]) -> dict[str, Any]:
    courses = {name: [_number(row.get(name)) for row in run.rows] for name in names}
    kept = {name: course for name, course in courses.items() if any(value is not None for value in course)}
    return {"name": run.name, "method": run.method, "reported": reported, "courses": kept}


def _number(value: float | None) -> float | None:
    """Round to the precision of a plot; None for NaN and infinity.

    >>> _number(0.123456789), _number(float("nan"))
    (0.123457, None)
    """
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
