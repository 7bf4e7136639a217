"""The evidence as a page: tables and plots of the JSON lines that benchmarks/evidence.py wrote, and of nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from rho.compare import paired_bootstrap
from rho.report.data import is_reference
from rho.report.plots import COLOURS, STYLE
from rho.report.summary import come_down

RESULTS = Path(__file__).parent / "results"
BASE, TEST = "clm", "test"
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
        random: the arm that selects at random.
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

    def pairs(self, model: str, base: str | None) -> list[tuple[Line, Line]]:
        """Runs of a model and of another with the same seed; a reference, trained once, meets every seed."""
        own, others = self.lines[model], self.lines.get(base or "", {})
        if is_reference(model):
            return [(run, other) for run in own.values() for other in others.values()]
        return [(own[seed], others[seed]) for seed in sorted(own.keys() & others.keys())]


def loss(run: Line, sets: Sequence[str]) -> float:
    """Final loss on the tokens of some sets together."""
    nats, tokens = (sum(sum(run["units"][name][of]) for name in sets) for of in ("nats", "tokens"))
    return nats / tokens


def difference(pairs: Sequence[tuple[Line, Line]], sets: Sequence[str]) -> tuple[float, float, float] | None:
    """Loss of the first runs less that of the second on some sets, and its 95 % interval over text, means over pairs.

    What is drawn are stretches of held-out text, each with the losses of all these runs in it.
    """
    if not pairs:
        return None

    def joined(run: Line, of: str) -> np.ndarray:
        return np.concatenate([run["units"][name][of] for name in sets])

    first_U, second_U = (np.mean([joined(pair[n], "nats") for pair in pairs], 0) for n in (0, 1))
    tokens_U = joined(pairs[0][0], "tokens")
    if len(tokens_U) < 2:
        return None
    found = paired_bootstrap(first_U, second_U, tokens_U)
    return found.difference, found.low, found.high


def each_seed(pairs: Sequence[tuple[Line, Line]], sets: Sequence[str]) -> list[float]:
    """Differences of the final losses on some sets, seed by seed."""
    return [loss(first, sets) - loss(second, sets) for first, second in pairs]


def extra_seconds(run: Line) -> float:
    """What a run's references cost: their training and their scoring."""
    return sum(run.get("reference_seconds", {}).values()) + sum(run.get("scoring_seconds", {}).values())


def to_target(run: Line, base: Line) -> dict[str, float] | None:
    """What a run needs to come down to the final target loss of `base`, as shares of what `base` took.

    `tokens` processed, `selected` ones, `seconds` of training, and `all`: with the training and scoring of its
    references. None where it never comes down to it.
    """
    curve, goal = run["curve"], base["curve"]
    along = list(zip(curve["tokens"], curve["selected"], curve["seconds"], strict=True))
    found = come_down(curve["loss"], along, goal["loss"][-1])
    if found is None:
        return None
    tokens, selected, seconds = found
    return {
        "tokens": tokens / goal["tokens"][-1],
        "selected": selected / goal["selected"][-1],
        "seconds": seconds / goal["seconds"][-1],
        "all": (seconds + extra_seconds(run)) / goal["seconds"][-1],
    }


def loss_at(curve: dict[str, list[float]], along: str, where: float) -> float | None:
    """A curve's loss at so many tokens or seconds; its last one beyond its end, None before its first checkpoint."""
    if where < curve[along][0]:
        return None
    return float(np.interp(where, curve[along], curve["loss"]))


def at_equal(run: Line, base: Line) -> dict[str, float | None]:
    """Target loss less that of `base` at equal tokens trained on, equal seconds of training, equal seconds in all."""
    curve, other = run["curve"], base["curve"]
    trained_on = loss_at(other, "selected", curve["selected"][-1])
    limit = other["seconds"][-1]
    seconds, everything = (loss_at(curve, "seconds", limit - cost) for cost in (0.0, extra_seconds(run)))
    return {
        "selected": None if trained_on is None else curve["loss"][-1] - trained_on,
        "seconds": None if seconds is None else seconds - other["loss"][-1],
        "all": None if everything is None else everything - other["loss"][-1],
    }


PAGE = """## {title}

{parameters:.3g} M parameters, {tokens:.3g} M tokens a run, seeds {seeds}; the arms of a seed start from the same
weights. Losses are nats a token on `test` ({tests}: their tokens together) at equal tokens processed.
*Less CLM* is the mean difference over the seeds, with its 95 % interval over held-out text (paired bootstrap). A
reference is trained once; what it loses itself stands below the arms.

    {command}

| arm | test | less CLM | each seed | less random, each seed | {others} | selected |
|---|---|---|---|---|{rule}---|
{main}

By set, means over the seeds:

| arm | {sets} |
|---|{set_rule}
{by_set}

What it takes to come down to CLM's final loss on `{target}` (other documents of the same sources), as shares of what
CLM of the same seed took, interpolated between checkpoints, means over the seeds. Seconds are {clock} ({devices}); *all
counted* adds training and scoring of the references that an arm uses ({spent}). On the right the
loss on `{target}` less CLM's: at as many tokens trained on (of a CLM whose learning rate has not yet come down), at
CLM's seconds of training, and at CLM's seconds with all counted.

| arm | tokens | of them selected | seconds | all counted | equal selected | equal seconds | all counted |
|---|---|---|---|---|---|---|---|
{costs}

| goal, of the arms that select by excess loss | asked | found |
|---|---|---|
{goals}

Loss on `{target}` along the way, means over the seeds, by million tokens:

![Loss on the target along the way, and differences from CLM]({plot})

| arm | {steps} |
|---|{step_rule}
{curves}

Trained on {hashes}.
"""


def section(lines: Sequence[Line], folder: Path, title: str | None = None) -> str:
    """The tables of one experiment as Markdown; its plot is written to `folder`."""
    runs = Runs(lines)
    models = [*runs.arms, *runs.references]
    everything = [run for model in models for run in runs.of(model)]
    sets = [*runs.tests, *runs.others]
    sizes = {name: int(sum(runs.first["units"][name]["tokens"])) for name in runs.tests}
    columns = [f"{tokens / 1e6:.3g}" for tokens in runs.first["curve"]["tokens"]]
    draw(runs, folder / f"{runs.name}.svg")
    return PAGE.format(
        title=title or runs.name,
        parameters=runs.first["parameters"] / 1e6,
        tokens=runs.first["train_tokens"] / 1e6,
        seeds=", ".join(map(str, runs.first["seeds"])),
        tests=", ".join(f"{name} {size:,} tokens" for name, size in sizes.items()),
        target=runs.first["target"],
        command=f"python benchmarks/evidence.py --size {runs.name.removeprefix('evidence-')}",
        others=" | ".join(f"`{name}`, less CLM" for name in runs.others),
        rule="---|" * len(runs.others),
        main="\n".join(_row(main_cells(runs, model)) for model in models),
        sets=" | ".join(sets),
        set_rule="---|" * len(sets),
        by_set="\n".join(_row([m, *(_mean(losses(runs, m, [name])) for name in sets)]) for m in models),
        clock=runs.first["clock"],
        devices=", ".join(sorted({device(run) for run in everything})),
        spent=spent(everything),
        costs="\n".join(_row(cost_cells(runs, model)) for model in runs.arms if model != BASE),
        goals="\n".join(_row(cells) for cells in goals(runs)),
        plot=f"{runs.name}.svg",
        steps=" | ".join(columns),
        step_rule="---|" * len(columns),
        curves="\n".join(_row([m, *curve_cells(runs, m)]) for m in models if has_curve(runs, m)),
        hashes=", ".join(f"{name} {value[:12]}" for name, value in sorted(hashes(everything).items())),
    )


def losses(runs: Runs, model: str, sets: Sequence[str]) -> list[float]:
    """Final losses of a model on some sets together, by seed."""
    return [loss(run, sets) for run in runs.of(model)]


def device(run: Line) -> str:
    """What a run was made on."""
    threads = run["environment"]["threads"]
    return run["environment"]["device"] + (f", {threads} thread{'s' * (threads > 1)}" if "CPU" in run["clock"] else "")


def spent(runs: Iterable[Line]) -> str:
    """Seconds of the references."""
    training: dict[str, float] = {}
    scoring: dict[str, float] = {}
    for run in runs:
        training |= run.get("reference_seconds", {})
        scoring |= run.get("scoring_seconds", {})
    words = [f"{name} {training[name]:.0f} s and {scoring[name]:.0f} s" for name in training]
    return ", ".join(words) or "none yet"


def hashes(runs: Iterable[Line]) -> dict[str, str]:
    """Content hashes of what the arms were trained on."""
    found: dict[str, str] = {}
    for run in runs:
        corpus = run["settings"].get("corpus", "the noisy corpus")
        found |= {corpus: run["hashes"]["corpus"]}
        found |= {
            key.replace("scores:", "scores by "): v for key, v in run["hashes"].items() if key.startswith("scores:")
        }
    return found


def has_curve(runs: Runs, model: str) -> bool:
    """Whether a model was evaluated at as many tokens as the first one."""
    curves = [run["curve"]["tokens"] for run in runs.of(model)]
    return all(curve == runs.first["curve"]["tokens"] for curve in curves)


def curve_cells(runs: Runs, model: str) -> list[str]:
    """Losses along the way, means over the seeds."""
    curves = [run["curve"]["loss"] for run in runs.of(model)]
    return [_mean(values) for values in zip(*curves, strict=True)]


def draw(runs: Runs, path: Path) -> None:
    """Curves of the first arms (the mean over the seeds, thin lines each seed), and every arm's difference from CLM."""
    others = [model for model in runs.arms if model != BASE]
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


INTRODUCTION = """## The evidence

Selective training against plain training on real text: mathematics hidden in web-like text, with a reference that read
clean mathematics (3.2 M tokens; the noisy corpus has 25.7 M). Beside the paper's arms stand the controls that it leaves
out: tokens selected at random, plain training on curated and noisy text together (`clm-mixed`, one token in nine is
curated), plain training that ends with curated text (`clm-then-curated`, whose additional tokens count), and the
reference's own loss. What each arm is: the recipe. A number in a name is its ratio.
What was learned, also where the controls win, and what is not run yet: [log.md](log.md).
"""


def sections(folder: Path) -> list[str]:
    """Every experiment on record, the smallest model first; plots go to `folder`."""
    found = [lines for file in RESULTS.glob("evidence-*.jsonl") if (lines := read_lines(file))]
    found.sort(key=lambda lines: (lines[-1]["parameters"], lines[-1]["experiment"]))
    pages = []
    for lines in found:
        name = lines[0]["experiment"]
        ranked = read_lines(RESULTS / f"ranking-{name}.jsonl")
        pages.append(section(lines, folder) + (ranking(ranked) if ranked else ""))
    return [INTRODUCTION, *pages] if found else []


RANKING = """
Multiple choice: how often the right answer is the likeliest, of at most {questions} questions a task, means over the
seeds. *Less CLM*: of the mean over the tasks, seed by seed. The standard error of one task's number for one
model is about {error:.1%}.

    python benchmarks/evidence_ranking.py --size {size}

| arm | {tasks} | mean | less CLM, each seed |
|---|{rule}---|---|
{rows}
"""


def ranking(lines: Sequence[Line]) -> str:
    """The table of what benchmarks/evidence_ranking.py found; beside the models what guessing would give."""
    found: dict[str, dict[int, list[Line]]] = {}
    for line in lines:
        found.setdefault(line["model"], {})[line["seed"]] = line["rows"]
    tasks = lines[-1]["rows"]
    base = found.get(BASE, {})

    def mean(rows: Sequence[Line], of: str = "value") -> float:
        return statistics.fmean(row[of] for row in rows)

    rows = [["guessing", *(f"{row['chance']:.1%}" for row in tasks), f"{mean(tasks, 'chance'):.1%}", "-"]]
    for model, seeds in found.items():
        values = [[row["value"] for row in of_seed] for of_seed in seeds.values()]
        numbers = [statistics.fmean(of_task) for of_task in zip(*values, strict=True)]
        less = [] if model == BASE else [mean(seeds[seed]) - mean(base[seed]) for seed in sorted(seeds.keys() & base)]
        rows.append([model, *(f"{n:.1%}" for n in [*numbers, statistics.fmean(numbers)]), _percents(less)])
    return RANKING.format(
        questions=lines[-1]["questions"],
        error=mean(tasks, "stderr"),
        size=lines[0]["experiment"].removeprefix("evidence-"),
        tasks=" | ".join(row["title"] for row in tasks),
        rule="---|" * len(tasks),
        rows="\n".join(map(_row, rows)),
    )


def write_page(lines: Sequence[Line], folder: Path) -> Path:
    """The tables of one experiment as a file beside its plot."""
    page = folder / "evidence.md"
    text = section(lines, folder)
    page.write_text(text)
    return page


def main_cells(runs: Runs, model: str) -> list[str]:
    """A row of the main table."""
    test = runs.tests
    pairs, random = runs.pairs(model, BASE), runs.pairs(model, runs.random)
    to_base = [] if model == BASE else pairs
    return [
        model,
        _mean(losses(runs, model, test)),
        _interval(difference(to_base, test)),
        _signed(each_seed(to_base, test)),
        _signed(each_seed(random, test) if model not in (BASE, runs.random) else []),
        *(_interval(difference(to_base, [name])) for name in runs.others),
        f"{statistics.fmean(run['ratio'] for run in runs.of(model)):.0%}",
    ]


def cost_cells(runs: Runs, model: str) -> list[str]:
    """A row of the table of costs."""
    pairs = runs.pairs(model, BASE)
    reached = [found for run, base in pairs if (found := to_target(run, base)) is not None]
    if len(reached) == len(pairs) > 0:
        shares = [_mean([one[what] for one in reached], 2) for what in ("tokens", "selected", "seconds", "all")]
    else:
        shares = [f"reached by {len(reached)} of {len(pairs)}", "", "", ""]
    equal = [at_equal(run, base) for run, base in pairs]
    differences = [
        _signed([statistics.fmean(one[what] for one in equal)]) if all(one[what] is not None for one in equal) else "-"
        for what in ("selected", "seconds", "all")
    ]
    return [model, *shares, *differences]


def goals(runs: Runs) -> Iterator[list[str]]:
    """What selection by excess loss was to reach, and what it did: the best of its arms."""
    departs = ("score", "corpus", "after")
    plain = [arm for arm in runs.arms if arm != BASE and not any(key in runs.of(arm)[0]["settings"] for key in departs)]
    for base, called in ((BASE, "CLM"), (runs.random, "random")):
        pairs = {arm: each_seed(runs.pairs(arm, base), runs.tests) for arm in plain}
        below = [arm for arm, found in pairs.items() if found and max(found) < 0]
        yield [f"`test` loss below {called}'s for every seed", "all arms", f"{len(below)} of {len(pairs)} arms"]
    for what, words, asked in (("tokens", "tokens", "0.5"), ("all", "seconds, all counted,", "1")):
        reached = {arm: [to_target(run, base) for run, base in runs.pairs(arm, BASE)] for arm in plain}
        means = {
            arm: statistics.fmean(one[what] for one in found if one is not None)
            for arm, found in reached.items()
            if found and None not in found
        }
        best = min(means, key=means.__getitem__, default=None)
        found = "by none" if best is None else f"{means[best]:.2f} ({best})"
        yield [f"share of CLM's {words} to its final loss", f"at most {asked}", found]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float], digits: int = 4) -> str:
    return f"{statistics.fmean(values):.{digits}f}" if values else "-"


def _signed(values: Sequence[float]) -> str:
    return " ".join(f"{value:+.3f}" for value in values) or "-"


def _percents(values: Sequence[float]) -> str:
    return " ".join(f"{value:+.1%}" for value in values) or "-"


def _interval(found: tuple[float, float, float] | None) -> str:
    return "-" if found is None else f"{found[0]:+.4f} ({found[1]:+.4f} to {found[2]:+.4f})"
