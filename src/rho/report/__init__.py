"""The report stage: one static page and `summary.json`, made from what a run directory holds."""

from __future__ import annotations

import json
from pathlib import Path

from rho.report.data import read_run
from rho.report.page import render
from rho.report.summary import summarise
from rho.runs import atomic_write, make_folder

__all__ = ["write_report"]


def write_report(run: Path) -> Path:
    """Write `run/report/index.html` and `run/report/summary.json`; return the page's path.

    Only the run directory is read. The same run gives the same bytes, and a run that has grown is reported anew.

    Raises:
        DataError: the evaluate stage is not finished, or one of the files read is damaged.
        RhoError: the report can't be written.
    """
    data = read_run(Path(run))
    summary = summarise(data)
    page = render(data, summary)
    folder = Path(run) / "report"
    make_folder(folder)
    with atomic_write(folder / "summary.json") as file:
        file.write((json.dumps(summary, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
    with atomic_write(folder / "index.html") as file:
        file.write(page.encode())
    return folder / "index.html"
