"""The evidence's numbers: what the JSON lines that benchmarks/evidence.py wrote say when runs are compared."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rho.compare import paired_bootstrap
from rho.report.data import is_reference
from rho.report.summary import come_down

RESULTS = Path(__file__).parent / "results"
BASE, TEST = "clm", "test"
UNIT = 2048  # tokens of held-out text whose losses are kept as one sum
STRETCH = 8  # units of text that are drawn together: units of one document are alike
# 97.5 % quantiles of Student's t for two degrees of freedom (three seeds), three, ...
STUDENT = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The runs recorded in a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


class Runs:
    """The runs of one experiment by model and seed; of a run that was done again, the last.

    Attributes:
        lines: by model, then seed.
        tests: the final sets of the target's kind of text, whose names begin with `test`: their tokens count together.
        others: the other final sets.
        first: a run that stands for all: of CLM, where there is one.
        random: the arm that selects at random, of several the first that was run.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines: dict[str, dict[int, Line]] = {}
        for line in lines:
            self.lines.setdefault(line["model"], {})[line["seed"]] = line
        self.arms = [name for name in self.lines if not is_reference(name)]
        self.references = [name for name in self.lines if is_reference(name)]
        self.first = self.of(BASE if BASE in self.lines else [*self.arms, *self.references][0])[0]
        self.name = self.first["experiment"]
        final = list(self.first["final"])
        self.tests = [name for name in final if name.startswith(TEST)] or final[:1]
        self.others = [name for name in final if name not in self.tests]
        self.random = next((arm for arm in self.arms if self.of(arm)[0]["settings"].get("score") == "random"), None)

    def of(self, model: str) -> list[Line]:
        """The runs of a model, by seed."""
        return [run for _, run in sorted(self.lines[model].items())]

    def ranked(self) -> list[str]:
        """The arms: plain training, then the others from the best to the worst on the tests, seed by seed."""

        def order(arm: str) -> tuple[bool, float]:
            less = each_seed(self.pairs(arm, BASE), self.tests)
            return arm != BASE, statistics.fmean(less) if less else 0.0

        return sorted(self.arms, key=order)

    def pairs(self, model: str, base: str | None) -> list[tuple[Line, Line]]:
        """Runs of a model and of another with the same seed; a reference, trained once, meets every seed."""
        own, others = self.lines[model], self.lines.get(base or "", {})
        if is_reference(model):
            return [(run, other) for run in own.values() for other in others.values()]
        return [(own[seed], others[seed]) for seed in sorted(own.keys() & others.keys())]


def has_curve(runs: Runs, model: str) -> bool:
    """Whether a model was evaluated at as many tokens as the first one."""
    curves = [run["curve"]["tokens"] for run in runs.of(model)]
    return all(curve == runs.first["curve"]["tokens"] for curve in curves)


def loss(run: Line, sets: Sequence[str]) -> float:
    """Final loss on the tokens of some sets together."""
    nats, tokens = (sum(sum(run["units"][name][of]) for name in sets) for of in ("nats", "tokens"))
    return nats / tokens


def losses(runs: Runs, model: str, sets: Sequence[str]) -> list[float]:
    """Final losses of a model on some sets together, by seed."""
    return [loss(run, sets) for run in runs.of(model)]


def difference(pairs: Sequence[tuple[Line, Line]], sets: Sequence[str]) -> tuple[float, float, float] | None:
    """Loss of the first runs less that of the second on some sets, and its 95 % interval over text, means over pairs.

    What is drawn are stretches of held-out text, each with the losses of all these runs in it: the interval is that of
    other text, given these runs.
    """
    if not pairs:
        return None

    def joined(run: Line, of: str) -> np.ndarray:
        return np.concatenate([run["units"][name][of] for name in sets])

    first_U, second_U = (np.mean([joined(pair[n], "nats") for pair in pairs], 0) for n in (0, 1))
    tokens_U = joined(pairs[0][0], "tokens")
    if len(tokens_U) < 2:
        return None
    found = paired_bootstrap(first_U, second_U, tokens_U, stretch=STRETCH)
    return found.difference, found.low, found.high


def each_seed(pairs: Sequence[tuple[Line, Line]], sets: Sequence[str]) -> list[float]:
    """Differences of the final losses on some sets, seed by seed."""
    return [loss(first, sets) - loss(second, sets) for first, second in pairs]


def over_seeds(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean over other seeds, by Student's t; None of fewer than three."""
    if len(values) < 3:
        return None
    return STUDENT[min(len(values) - 3, len(STUDENT) - 1)] * statistics.stdev(values) / len(values) ** 0.5


def extra_seconds(run: Line) -> float:
    """What a run's references cost: their training and their scoring."""
    return sum(run.get("reference_seconds", {}).values()) + sum(run.get("scoring_seconds", {}).values())


def same_clock(run: Line, base: Line) -> bool:
    """Whether the seconds of two runs are of one kind of machine."""
    first, second = ((one["environment"]["device"], one["environment"]["threads"], one["clock"]) for one in (run, base))
    return first == second


def to_target(run: Line, base: Line) -> dict[str, float] | None:
    """What a run needs to come down to the final target loss of `base`, as shares of what `base` needs for it.

    `tokens` processed, `selected` ones, `seconds` of training, and `all`: with the training and scoring of its
    references; no seconds of runs on different machines. None where it never comes down to it. `base` itself may be
    there before its end.
    """
    goal = base["curve"]["loss"][-1]
    found, needed = _come_down(run, goal), _come_down(base, goal)
    if found is None or needed is None:
        return None
    shares = {name: found[name] / needed[name] for name in ("tokens", "selected")}
    if same_clock(run, base):
        shares["seconds"] = found["seconds"] / needed["seconds"]
        shares["all"] = shares["seconds"] + extra_seconds(run) / needed["seconds"]
    return shares


def _come_down(run: Line, goal: float) -> dict[str, float] | None:
    names = ("tokens", "selected", "seconds")
    found = come_down(run["curve"]["loss"], list(zip(*(run["curve"][name] for name in names), strict=True)), goal)
    return None if found is None else dict(zip(names, found, strict=True))


def loss_at(curve: dict[str, list[float]], along: str, where: float) -> float | None:
    """A curve's loss at so many tokens or seconds; its last one beyond its end, None before its first checkpoint."""
    if where < curve[along][0]:
        return None
    return float(np.interp(where, curve[along], curve["loss"]))


def at_equal(run: Line, base: Line) -> dict[str, float | None]:
    """Target loss less that of `base` at equal tokens trained on, equal seconds of training, equal seconds in all.

    None where the run has no checkpoint that early, and of seconds on different machines.
    """
    curve, other = run["curve"], base["curve"]
    trained_on = loss_at(other, "selected", curve["selected"][-1])
    limit = other["seconds"][-1]
    seconds = everything = None
    if same_clock(run, base):
        seconds, everything = (loss_at(curve, "seconds", limit - cost) for cost in (0.0, extra_seconds(run)))
    return {
        "selected": None if trained_on is None else curve["loss"][-1] - trained_on,
        "seconds": None if seconds is None else seconds - other["loss"][-1],
        "all": None if everything is None else everything - other["loss"][-1],
    }
