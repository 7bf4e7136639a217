"""What pages are made with: templates that let no string of a user's through unseen, and how numbers are written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from rho.report.tokens import colours, in_line, visible

NONE = "–"


def template(name: str, **filters: Callable[..., Any]) -> Template:
    """A template of the package, with escaping, and filters beside those that all have."""
    environment = Environment(
        loader=PackageLoader("rho.report", ""),
        autoescape=True,
        # Applies to every expression of the template, before escaping: no string of a user's can come out unseen.
        finalize=lambda value: visible(value) if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        loss=loss, excess=excess, count=count, percent=percent, spread=spread, in_line=in_line, interval=interval
    )
    environment.filters.update(filters)
    environment.globals.update(light=colours(dark=False), dark=colours(dark=True))
    return environment.get_template(name)


def loss(value: float | None) -> str:
    """A loss in nats, or a dash."""
    return NONE if value is None or math.isnan(value) else f"{value:.3f}"


def excess(value: float | None) -> str:
    """A difference of losses in nats, with its sign, or a dash."""
    return NONE if value is None or math.isnan(value) else f"{value:+.3f}"


def count(value: float | None) -> str:
    """A whole number with separators, or a dash."""
    return NONE if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share as a percentage, or a dash."""
    return NONE if value is None else f"{100 * value:.1f} %"


def interval(difference: dict[str, Any] | None) -> str:
    """A difference with its interval, or a dash."""
    return NONE if difference is None else "{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference)


def spread(values: Sequence[float | None], form: Callable[[float | None], str] = loss) -> str:
    """Mean over seeds, with the range where it shows."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return NONE
    low, high = form(min(known)), form(max(known))
    return form(statistics.fmean(known)) + (f" ({low} to {high})" if low != high else "")
