"""The explorer: one static page with a text coloured by everything that is known of its tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rho.errors import DataError
from rho.report.data import read_run
from rho.report.html import template
from rho.report.tokens import documents, highest, sections, totals
from rho.rows import TokenRow
from rho.runs import atomic_write

MOST_TOKENS = 20_000  # each stands in every section


def write_page(rows: Sequence[TokenRow], title: str, out: str | os.PathLike[str]) -> None:
    """Write the page: a section for each quantity, the views of a document side by side, and no script."""
    found, omitted = documents(rows, MOST_TOKENS)
    views = {name: [row for row in rows if row.view == name] for name in dict.fromkeys(row.view for row in rows)}
    page = template("explorer.html.j2").render(
        title=title,
        views=[(name, totals(of_view)) for name, of_view in views.items()],
        highest=[(name, highest(of_view)) for name, of_view in views.items()],
        sections=sections(found),
        omitted=omitted,
    )
    with atomic_write(out) as file:
        file.write(page.encode())


def rows_of_run(run: Path, arms: Sequence[str] = ()) -> list[TokenRow]:
    """The token rows that a run's evaluate stages wrote: of the models named `ARM-seedN`, or of every one.

    Raises:
        DataError: there are none.
    """
    rows = read_run(run).tokens
    by_model: dict[str, list[TokenRow]] = {}
    for row in rows:
        by_model.setdefault(f"{row.arm}-seed{row.seed}", []).append(row)
    if not rows:
        raise DataError(
            f"{run}: expected a tokens.parquet under evaluate/, found none. Set evaluate.explore in the run's config "
            "and run it again."
        )
    if missing := [arm for arm in arms if arm not in by_model]:
        raise DataError(f"{run}: expected one of {', '.join(by_model)}, found {missing[0]}. Give a model of this run.")
    return [row for arm in arms or by_model for row in by_model[arm]]
