"""Token dynamics in the report: the plots of a dynamics stage, and what its section of the page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rho.report.data import Run
from rho.report.plots import STYLE, Canvas, Plot
from rho.trajectories import CLASSES

MOST_LINES = 5  # of one plot with a line for each checkpoint, or for each of some tokens
MOST_GROUPS = 30  # sources, and labels, of the table


@dataclass(frozen=True)
class Section:
    """The dynamics of one trained model, as the page shows them.

    Attributes:
        arm, seed: the model.
        summary: as `rho.dynamics_summary.summarise` made it.
        what, moments: what its checkpoints are told apart by, and the value of each.
        plots: by name, see `figures`.
        by_label: share selected by label over the checkpoints, where there are labels and a selection.
        target: loss on the target set at each checkpoint, where it was evaluated.
        groups: rows of the table of classes: kind, name, tokens and shares of each source and label, largest first.
    """

    arm: str
    seed: int
    summary: dict[str, Any]
    what: str
    moments: list[int]
    plots: dict[str, Plot]
    by_label: Plot | None
    target: list[float | None]
    groups: list[tuple[str, str, dict[str, Any]]]


def sections(run: Run) -> list[Section]:
    """A section for the first seed of each arm whose dynamics were followed."""
    found = []
    for one in {one.arm: one for one in sorted(run.dynamics, key=lambda one: -one.seed)}.values():
        target = {row.step: row.loss for row in run.curve(one.arm, one.seed, run.target)}
        kinds = {kind: one.summary["classes_by"][kind] for kind in ("source", "label")}
        groups = [
            (kind, name, groups[name])
            for kind, groups in kinds.items()
            for name in sorted(groups, key=lambda name: -groups[name]["tokens"])[:MOST_GROUPS]
        ]
        found.append(
            Section(
                one.arm,
                one.seed,
                one.summary,
                *moments(one.summary),
                figures(one.summary),
                label_plot(one.summary),
                [target.get(checkpoint["step"]) for checkpoint in one.summary["checkpoints"]],
                groups,
            )
        )
    return found


def figures(summary: Mapping[str, Any], legend: bool = False) -> dict[str, Plot]:
    """The plots of a stage's `summary.json` by name; none of them holds text of the user's.

    Args:
        summary: as `rho.dynamics_summary.summarise` made it.
        legend: draw the legend into the picture, for a file; in the page it is text.
    """
    plots = {
        "classes": _classes(summary, legend),
        **{
            f"fluctuating-{level}": _fluctuating(summary, name, legend)
            for level, name in (("low", "L->L"), ("high", "H->H"))
            if summary["fluctuating"][name]
        },
    }
    if (selection := summary["selection"]) is not None:
        plots["selected-by-class"] = _shares(summary, paper_order(selection["by"]["class"]), legend)
        plots["selected-losses"] = _selected_losses(summary, legend)
        plots["selected-perplexity"] = _perplexity(summary, legend)
        if selection["accuracy"] is not None:
            plots["accuracy"] = _accuracy(selection["accuracy"], legend)
    return plots


def label_plot(summary: Mapping[str, Any]) -> Plot | None:
    """Share selected of each label's tokens over the checkpoints; its legend is text of the user's."""
    selection = summary["selection"]
    return _shares(summary, selection["by"]["label"], False) if selection and selection["by"]["label"] else None


def moments(summary: Mapping[str, Any]) -> tuple[str, list[int]]:
    """What the checkpoints are told apart by, `step` or `checkpoint` (its number), and the value of each."""
    steps = [one["step"] for one in summary["checkpoints"]]
    return "step" if summary["at"] == steps else "checkpoint", summary["at"]


def arrow(name: str) -> str:
    """A class as the paper writes it; any other name as it is."""
    return name.replace("->", "→") if name in CLASSES else name


def paper_order(classes: Mapping[str, Any]) -> dict[str, Any]:
    """What there is of each class, in the paper's order."""
    return {name: classes[name] for name in CLASSES}


def perplexity(loss: float | None) -> str:
    """exp of a mean loss, in a table; a dash where there is none."""
    return "–" if loss is None else f"{math.exp(loss):,.1f}" if loss < 20 else f"{math.exp(min(loss, 700)):.1e}"


def _finish(canvas: Canvas, alt: str, caption: str, legend: bool) -> Plot:
    if legend:
        canvas.axes.legend(frameon=False, fontsize=8)
    return canvas.finish(alt, caption)


def _values(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _classes(summary: Mapping[str, Any], legend: bool) -> Plot:
    """Mean loss of each class over the checkpoints (Fig. 3a, 10)."""
    what, x = moments(summary)
    with rc_context(STYLE):
        canvas = Canvas(what, "loss (nats per token)")
        for name, found in paper_order(summary["classes"]).items():
            canvas.line(f"{arrow(name)} {found['share']:.0%}", x, _values(found["losses"]))
        caption = f"Mean loss of each class, with its share of {summary['tokens']:,} tokens."
        return _finish(canvas, "Line plot: mean loss of the four classes over the checkpoints.", caption, legend)


def _fluctuating(summary: Mapping[str, Any], name: str, legend: bool) -> Plot:
    """Losses of single tokens of a class that fluctuate most (Fig. 3b, c)."""
    what, x = moments(summary)
    with rc_context(STYLE):
        canvas = Canvas(what, "loss (nats)")
        for number, token in enumerate(summary["fluctuating"][name][:MOST_LINES], 1):
            canvas.line(f"token {number}", x, token["losses"])
        caption = f"The tokens of {arrow(name)} whose loss fluctuates most."
        return _finish(canvas, f"Line plot: losses of single tokens of {arrow(name)}.", caption, legend)


def _shares(summary: Mapping[str, Any], groups: Mapping[str, Any], legend: bool) -> Plot:
    what, x = moments(summary)
    with rc_context(STYLE):
        canvas = Canvas(what, "selected / eligible")
        for name, found in groups.items():
            canvas.line(arrow(name), x, _values(found["share"]))
        canvas.axes.set_ylim(0, 1.04)
        canvas.axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        caption = "Share that each checkpoint would select."
        return _finish(canvas, "Line plot: share selected over the checkpoints.", caption, legend)


def _selected_losses(summary: Mapping[str, Any], legend: bool) -> Plot:
    """Loss of what each checkpoint selects, of the rest and of all (Fig. 6)."""
    what, x = moments(summary)
    selection = summary["selection"]
    with rc_context(STYLE):
        canvas = Canvas(what, "loss (nats per token)")
        canvas.line("selected", x, _values(selection["loss_selected"]))
        canvas.line("unselected", x, _values(selection["loss_unselected"]))
        canvas.line("all", x, [one["loss"] for one in summary["checkpoints"]])
        caption = "Of the tokens that the checkpoint itself would select, and of the others."
        return _finish(canvas, "Line plot: loss of selected, unselected and all tokens.", caption, legend)


def _perplexity(summary: Mapping[str, Any], legend: bool) -> Plot:
    """Perplexity at each checkpoint of the tokens that some checkpoints select (Fig. 8)."""
    what, x = moments(summary)
    rows = summary["selection"]["losses_of_selected"]
    with rc_context(STYLE):
        canvas = Canvas(what, "perplexity")
        for row in sorted(set(np.linspace(0, len(x) - 1, MOST_LINES).round().astype(int).tolist())):
            canvas.line(f"selected at {x[row]}", x, np.exp(_values(rows[row])).tolist())
        canvas.axes.set_yscale("log")
        caption = "exp of the mean loss of the tokens that one checkpoint selects, at every checkpoint."
        return _finish(canvas, "Line plot: perplexity of the tokens selected by each checkpoint.", caption, legend)


def _accuracy(found: Mapping[str, Any], legend: bool) -> Plot:
    """Accuracy against loss with the fitted curves (Fig. 7)."""
    with rc_context(STYLE):
        canvas = Canvas("loss (nats per token)", "accuracy")
        for name in ("selected", "unselected"):
            fit, losses = found[name], np.array(found[name]["losses"])
            order = losses.argsort()
            colour = canvas.line(
                f"{name}: log({fit['a']:.3g} L {fit['c']:+.3g}), R² {fit['r2']:.2f}",
                losses[order].tolist(),
                np.array(found["accuracies"])[order].tolist(),
            )
            canvas.axes.lines[-1].set_linestyle("none")
            dense = np.linspace(losses.min(), losses.max(), 50)
            canvas.axes.plot(dense, np.log(fit["a"] * dense + fit["c"]), color=colour)
        canvas.axes.xaxis.set_major_locator(MaxNLocator("auto"))
        canvas.axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        caption = "Points: checkpoints. Loss of the tokens that the last one selects, and of the others."
        return _finish(canvas, "Scatter plot with fitted curves: accuracy against loss.", caption, legend)
