"""The report's plots: SVG without any text of the user's; names stand in the page's own legends."""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from rho.report.data import Evaluation, Step
from rho.report.summary import label_share

MOST_POINTS = 100
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#a3498c",
    "#8a6d00",
    "#3a9bd1",
    "#555555",
)  # told apart by colour-blind eyes
_MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
STYLE = {
    "svg.hashsalt": "rho",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Key:
    """A legend entry: the glyph that marks the line, the index of its colour, the name."""

    glyph: str
    colour: int
    name: str


@dataclass(frozen=True)
class Numbers:
    """What a plot shows as a table: the name of the x axis, then for each x a value of every line, None where none."""

    x: str
    names: list[str]
    rows: list[tuple[float, list[float | None]]]


@dataclass(frozen=True)
class Plot:
    """An SVG as a data URI, what it shows in words, its legend, and its numbers."""

    uri: str
    alt: str
    keys: list[Key]
    caption: str
    numbers: Numbers

    @property
    def svg(self) -> bytes:
        """The picture as a file's content."""
        return base64.b64decode(self.uri.partition(",")[2])


class Canvas:
    """One pair of axes to draw on and the legend of what was drawn."""

    def __init__(self, x: str, y: str) -> None:
        self.figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        FigureCanvasSVG(self.figure)
        self.axes: Any = self.figure.add_subplot()
        self.axes.set(xlabel=x, ylabel=y)
        self.axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        self.keys: list[Key] = []
        self.x, self.series = x, dict[str, dict[float, float]]()

    def line(self, name: str, x: Sequence[float], y: Sequence[float], every: int = 1) -> str:
        """Draw a series in the next style, name it in the legend and the table; return its colour."""
        index = len(self.keys)
        marker, glyph = _MARKERS[index % len(_MARKERS)]
        colour = index % len(COLOURS)
        self.axes.plot(x, y, color=COLOURS[colour], marker=marker, markevery=(3 * index % every, every), label=name)
        self.keys.append(Key(glyph, colour, name))
        self.note(name, x, y)
        return COLOURS[colour]

    def note(self, name: str, x: Sequence[float], y: Sequence[float]) -> None:
        """A column of the table of numbers."""
        self.series[name] = dict(zip(x, y, strict=True))

    def band(self, name: str, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
        """A shaded band, with its borders in the table."""
        self.axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        self.note(f"{name}, lowest", x, low)
        self.note(f"{name}, highest", x, high)

    def finish(self, alt: str, caption: str) -> Plot:
        """The plot as it stands."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        rows = [
            (x, [series.get(x) for series in self.series.values()])
            for x in sorted({x for series in self.series.values() for x in series})
        ]
        return Plot(uri, alt, self.keys, caption, Numbers(self.x, list(self.series), rows))


def target_loss(
    curves: dict[str, list[list[Evaluation]]], goal: float | None, reference: float | None, since: float = 0.0
) -> Plot:
    """Target loss against tokens processed, from the share `since` of the tokens on: per arm the mean of its seeds.

    A band reaches from the lowest to the highest seed.
    """
    with rc_context(STYLE):
        canvas = Canvas("tokens processed", "target loss (nats per token)")
        end = max((row.tokens_seen for runs in curves.values() for run in runs for row in run), default=0)
        for name, runs in curves.items():
            x, losses = _common([[row for row in run if row.tokens_seen >= since * end] for run in runs])
            colour = canvas.line(name, x, [statistics.fmean(column) for column in losses])
            if len(runs) > 1:
                canvas.band(name, x, [min(column) for column in losses], [max(column) for column in losses], colour)
        if goal is not None:
            canvas.axes.axhline(goal, color="#222222", linewidth=1, linestyle=(0, (5, 3)))
        if reference is not None:
            canvas.axes.axhline(reference, color="#222222", linewidth=1.2, linestyle=":")
        canvas.axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        part = f"The last {1 - since:.0%} of the tokens." if since else "The whole run."
        return canvas.finish("Line plot: target loss against tokens processed, one line per arm. " + part, part)


def _common(runs: list[list[Evaluation]]) -> tuple[list[float], list[list[float]]]:
    """Mean tokens, and the seeds' losses, at the steps at which all of them were evaluated."""
    common = set.intersection(*({row.step for row in run} for run in runs)) if runs else set()
    columns = list(zip(*([row for row in run if row.step in common] for run in runs), strict=True))
    x = [statistics.fmean(row.tokens_seen for row in column) for column in columns]
    return x, [[row.loss for row in column] for column in columns]


def realised_ratio(arms: dict[str, list[list[Step]]]) -> Plot:
    """The share of the eligible tokens that were selected, by step, for every arm."""
    with rc_context(STYLE):
        canvas = Canvas("step", "selected / eligible")
        for name, runs in arms.items():
            groups = _groups(runs)
            y = [_ratio(sum(s.selected for s in group), sum(s.eligible for s in group)) for group in groups]
            canvas.line(name, _middles(groups), y, _every(groups))
        canvas.axes.set_ylim(0, 1.04)
        canvas.axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        return canvas.finish(
            "Line plot: share of tokens selected at each step, one line per arm.", _note(list(arms.values()))
        )


def losses(runs: list[list[Step]]) -> Plot:
    """One arm's training loss on the selected, the unselected and all tokens, by step."""
    with rc_context(STYLE):
        canvas = Canvas("step", "training loss (nats per token)")
        groups = _groups(runs)
        kinds: dict[str, Callable[[Step], float]] = {
            "selected": lambda step: step.loss_selected,
            "unselected": lambda step: step.loss_unselected,
            "all": lambda step: step.loss_all,
        }
        for name, value in kinds.items():
            canvas.line(name, _middles(groups), [_mean(map(value, group)) for group in groups], _every(groups))
        return canvas.finish("Line plot: loss of selected, unselected and all tokens by step.", _note([runs]))


def excess_quantiles(runs: list[list[Step]]) -> Plot:
    """One arm's excess loss by step: median, middle half, middle nine tenths."""
    with rc_context(STYLE):
        canvas = Canvas("step", "excess loss (nats)")
        groups = _groups(runs)
        x = _middles(groups)
        q = {
            name: [_mean(step.excess.get(name, math.nan) for step in group) for group in groups]
            for name in ("p05", "p25", "p50", "p75", "p95")
        }
        colour = canvas.line("median", x, q["p50"], _every(groups))
        for low, high, alpha in (("p05", "p95", 0.15), ("p25", "p75", 0.3)):
            canvas.axes.fill_between(x, q[low], q[high], color=colour, alpha=alpha, linewidth=0)
        for name in ("p05", "p25", "p75", "p95"):
            canvas.note(name, x, q[name])
        canvas.axes.axhline(0, color="#222222", linewidth=0.8)
        note = "Bands: 25th to 75th and 5th to 95th percentile. " + _note([runs])
        return canvas.finish("Line plot with bands: quantiles of the excess loss by step.", note)


def label_shares(runs: list[list[Step]]) -> Plot:
    """The share selected of each label's tokens, by step, for one arm."""
    with rc_context(STYLE):
        canvas = Canvas("step", "selected / eligible")
        groups = _groups(runs)
        for label in sorted({label for run in runs for step in run for label in step.labels}):
            shares = [label_share(group, label) for group in groups]
            y = [math.nan if share is None else share for share in shares]
            canvas.line(label, _middles(groups), y, _every(groups))
        canvas.axes.set_ylim(0, 1.04)
        canvas.axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        return canvas.finish("Line plot: share of tokens selected by step, one line per label.", _note([runs]))


def _groups(runs: list[list[Step]]) -> list[list[Step]]:
    """The steps of all seeds in at most `MOST_POINTS` consecutive groups, each to be drawn as one point."""
    by_step: dict[int, list[Step]] = {}
    for run in runs:
        for step in run:
            by_step.setdefault(step.step, []).append(step)
    parts = np.array_split(sorted(by_step), min(MOST_POINTS, max(1, len(by_step))))
    return [[step for number in part.tolist() for step in by_step[number]] for part in parts if part.size]


def _note(arms: list[list[list[Step]]]) -> str:
    """What one point of a step plot stands for."""
    logged = max((len({step.step for run in runs for step in run}) for runs in arms), default=0)
    size = math.ceil(logged / MOST_POINTS)
    seeds = max((len(runs) for runs in arms), default=0)
    parts = [f"up to {size} consecutive log entries"] * (size > 1) + [f"{seeds} seeds"] * (seeds > 1)
    over = f"the mean over {' and '.join(parts)}, each" if parts else "one log entry:"
    return f"Each point is {over} the training steps since the entry before."


def _middles(groups: list[list[Step]]) -> list[float]:
    return [statistics.fmean(step.step for step in group) for group in groups]


def _every(groups: list[list[Step]]) -> int:
    return max(1, len(groups) // 8)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan
