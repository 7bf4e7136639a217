"""The evidence as a plot: losses on the way, and how far from plain training each arm ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from evidence_results import BASE, Runs, each_seed, has_curve
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from rho.report.plots import COLOURS, STYLE


def draw(runs: Runs, path: Path) -> None:
    """Curves of the first arms, the mean and thin lines each seed; every arm's difference from CLM, best first."""
    others = [model for model in runs.ranked() if model != BASE]
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, max(3.2, 0.22 * len(others) + 1)), layout="constrained")
        FigureCanvasSVG(figure)
        curves, dots = figure.subplots(1, 2, width_ratios=[3, 2])
        shown = [model for model in runs.arms if has_curve(runs, model)]
        for model, colour in zip(shown, COLOURS, strict=False):
            found = [run["curve"] for run in runs.of(model)]
            curves.plot(found[0]["tokens"], np.mean([one["loss"] for one in found], 0), color=colour, label=model)
            for one in found:
                curves.plot(one["tokens"], one["loss"], color=colour, linewidth=0.5, alpha=0.6)
        curves.set(xlabel="tokens processed", ylabel=f"loss on {runs.first['target']}")
        curves.xaxis.set_major_formatter(EngFormatter(sep=""))
        if shown:
            curves.legend(frameon=False, fontsize=7)
        for row, model in enumerate(others):
            values = each_seed(runs.pairs(model, BASE), runs.tests)
            dots.plot(values, [row] * len(values), "o", color=COLOURS[0], markersize=3)
        dots.axvline(0, color="#222222", linewidth=1)
        dots.set_yticks(range(len(others)), others, fontsize=7)
        dots.invert_yaxis()
        dots.set(xlabel="loss on test less CLM's, a dot each seed")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
