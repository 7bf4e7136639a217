"""The evidence as a page: tables of the JSON lines that benchmarks/evidence.py wrote, and of nothing else."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import yaml
from evidence_plot import draw
from evidence_results import (
    BASE,
    STRETCH,
    UNIT,
    Line,
    Runs,
    at_equal,
    difference,
    each_seed,
    has_curve,
    losses,
    over_seeds,
    to_target,
)

from rho.report.data import is_reference

RECIPES = Path(__file__).parents[1] / "recipes"

HOW_TO_READ = """Losses are nats a token on `test`: the sets whose names begin so, their tokens together; `target` are
other documents of the same sources, looked at along the way, or the same where there is one set. *Less CLM* is the
mean difference from plain training (CLM) of the same seed, which starts from the same weights: negative is better,
and best stands first. After ± stands the 95 % interval over other seeds (Student's t, from three on), in brackets
that over other held-out text, given these runs (paired bootstrap of stretches of {stretch:,} tokens). An arm with
fewer values under *each seed* was not run with the other seeds yet: compare it seed by seed, not by its mean. A
reference is trained once; what it loses itself stands below the arms: it is no arm, and may be of another size and
trained on more.
"""

PAGE = """## {title}

{about}{parameters:.3g} M parameters, {tokens:.3g} M tokens a run unless the table of arms says otherwise, {seeds}.
`test` has {tests}.

    {command}

<details><summary>What the arms are</summary>

| arm | what it is | trained on | M tokens |
|---|---|---|---|
{arms}

</details>

| arm | test | less CLM | each seed | less {random}, each seed |{others} selected |
|---|---|---|---|---|{rule}---|
{main}

{side_by_side}<details><summary>By set, means over the seeds</summary>

| arm | {sets} |
|---|{set_rule}
{by_set}

</details>

What it takes to come down to CLM's final loss on `{target}`, as shares of what CLM of the same seed took to come down
to it, interpolated between checkpoints: means over the seeds, and from the least to the most. Seconds are {clock}
({devices}); *all counted* adds training and scoring of the references that an arm uses ({spent}).
*Selected tokens* are a share of CLM's tokens too. On the right the loss on `{target}` less CLM's: at as many tokens
trained on (of a CLM whose learning rate has not yet come down), at CLM's seconds of training, and at CLM's seconds
with all counted. Seconds stand only where CLM of the same seed ran on the same kind of machine.

| arm | tokens | selected tokens | seconds | all counted | at its selected | at its seconds | at all seconds |
|---|---|---|---|---|---|---|---|
{costs}

| goal, set before the runs, of the arms that select by excess loss | asked | found |
|---|---|---|
{goals}

![Loss on the target along the way, and differences from CLM]({plot})

<details><summary>Loss on {target} along the way, means over the seeds, by million tokens</summary>

| arm | {steps} |
|---|{step_rule}
{curves}

</details>

Trained on {hashes}.
"""


def how_to_read() -> str:
    """What stands before the tables of all experiments."""
    return HOW_TO_READ.format(stretch=STRETCH * UNIT)


def section(runs: Runs, folder: Path) -> str:
    """The tables of one experiment as Markdown; its plot is written to `folder`."""
    models = [*runs.ranked(), *runs.references]
    everything = [run for model in models for run in runs.of(model)]
    sets = [*runs.tests, *runs.others]
    sizes = {name: int(sum(runs.first["units"][name]["tokens"])) for name in runs.tests}
    seeds = sorted({run["seed"] for arm in runs.arms for run in runs.of(arm)})
    columns = [f"{tokens / 1e6:.3g}" for tokens in runs.first["curve"]["tokens"]]
    draw(runs, folder / f"{runs.name}.svg")
    return PAGE.format(
        title=runs.name,
        about=about(recipe_of(runs.name)),
        parameters=runs.first["parameters"] / 1e6,
        tokens=runs.first["train_tokens"] / 1e6,
        seeds=f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
        arms="\n".join(table_row(arm_cells(runs, model)) for model in models),
        tests=", ".join(f"{size:,} tokens of {name}" for name, size in sizes.items()),
        target=runs.first["target"],
        command=command("evidence.py", runs.name),
        others="".join(f" `{name}`, less CLM |" for name in runs.others),
        rule="---|" * len(runs.others),
        random=f"`{runs.random}`" if runs.random else "random",
        main="\n".join(table_row(main_cells(runs, model)) for model in models),
        side_by_side=side_by_side(runs),
        sets=" | ".join(sets),
        set_rule="---|" * len(sets),
        by_set="\n".join(table_row([m, *(_mean(losses(runs, m, [name])) for name in sets)]) for m in models),
        clock=runs.first["clock"],
        devices=" and ".join(sorted({device(run) for run in everything})),
        spent=spent(everything),
        costs="\n".join(table_row(cost_cells(runs, model)) for model in models if model in runs.arms and model != BASE),
        goals="\n".join(table_row(cells) for cells in goals(runs)),
        plot=f"{runs.name}.svg",
        steps=" | ".join(columns),
        step_rule="---|" * len(columns),
        curves="\n".join(table_row([m, *curve_cells(runs, m)]) for m in models if has_curve(runs, m)),
        hashes=", ".join(f"{name} {value[:12]}" for name, value in sorted(hashes(everything).items())),
    )


def recipe_of(experiment: str) -> Path:
    """Where the recipe of an experiment is, if it is one of ours."""
    return RECIPES / f"{experiment}.yaml"


def command(script: str, experiment: str) -> str:
    """What makes an experiment again."""
    recipe = recipe_of(experiment)
    folder = "FOLDER " if recipe.is_file() and "my-texts/" in recipe.read_text() else ""
    size = experiment.removeprefix("evidence-") if recipe.is_file() else f"PATH/OF/THE/RECIPE/OF/{experiment}.yaml"
    return f"python benchmarks/{script} {folder}--size {size}"


SCORES = {
    "excess": "highest excess loss",
    "retrospective": "most learned since",
    "loss": "highest loss",
    "ref_loss": "lowest reference loss",
    "ref_entropy": "lowest reference entropy",
    "random": "drawn at random",
}
SCOPES = {
    "sequence": "each sequence",
    "batch": "each micro-batch",
    "step": "each step",
    "running": "the steps so far",
    "dataset": "the whole corpus",
}


def arm_cells(runs: Runs, model: str) -> list[str]:
    """A row of the table of arms: what the settings of its first run say."""
    run = runs.of(model)[0]
    return [
        model,
        what_it_is(runs, model),
        corpus_of(run),
        f"{run['train_tokens'] / 1e6:.3g}",
    ]


def what_it_is(runs: Runs, model: str) -> str:
    """A model in words."""
    run = runs.of(model)[0]
    settings = run["settings"]
    if is_reference(model):
        own = f", of {run['parameters'] / 1e6:.2g} M parameters" if "model" in settings else ""
        online = ", reads the batches of its arms as they come" if settings.get("online") else ""
        return f"reference{own}{online}"
    if "after" in settings and "corpus" in settings:
        return f"`{settings['after']}`, then plain training"
    if not settings.keys() & {"ratio", "schedule", "weighting"}:
        return f"plain training{' (CLM)' * (model == BASE)}"
    names = settings.get("references", {}).get("names", [])
    by = f" against {' and '.join(names)}" if names and settings.get("score") not in ("loss", "random") else ""
    share = "a share by schedule" if "schedule" in settings else f"{settings.get('ratio', 1.0):.0%}"
    kept = f"{share} of {SCOPES[settings.get('scope', 'sequence')]}, {SCORES[settings.get('score', 'excess')]}{by}"
    if "weighting" in settings:
        kept = f"all tokens, weighted ({settings['weighting']}) by {SCORES[settings.get('score', 'excess')]}{by}"
    if "second" in settings:
        kept += f", and what {SCORES[settings['second'].get('score', 'excess')]} keeps as well"
    if "retention" in settings:
        kept += f", the rest with weight {settings['retention']:g}"
    return f"`{settings['after']}`, then {kept}" if "after" in settings else kept


# Arms that differ in one setting; in the last line also in how many tokens they read.
SETTINGS = {
    "share of each sequence": ["slm-08", "slm-07", "slm-06", "slm-05", "slm-03"],
    "share of the step": ["slm-06-step", "slm-04-step", "slm-03-step", "slm-02-step"],
    "0.3 of what is ranked together": ["slm-03", "slm-03-step"],
    "0.6 of it": ["slm-06", "slm-06-batch", "slm-06-running", "slm-06-step"],
    "score, 0.6": ["slm-06", "highest-loss-06", "random-06"],
    "score, 0.7": ["slm-07", "low-reference-loss-07", "low-entropy-07", "low-both-07"],
    "score, 0.4 of the step": ["slm-04-step", "random-04-step"],
    "weights": ["slm-06", "soft", "retention"],
    "weights, 0.4 of the step": ["slm-04-step", "slm-04-step-retention"],
    "share over time": ["slm-05", "slm-03", "slm-warm-up"],
    "reference": ["slm-06", "slm-06-brief", "slm-06-weak", "slm-06-cheap", "slm-06-two"],
    "reference, 0.4 of the step": ["slm-04-step", "slm-04-step-cheap", "slm-04-step-online"],
    "curated text as well": ["clm-mixed", "clm-then-curated", "slm-06-then-curated"],
}

SIDE_BY_SIDE = """Settings side by side: less CLM on {sets}, means over the seeds that all of a line have.

| | less CLM |
|---|---|
{rows}

"""


def side_by_side(runs: Runs) -> str:
    """The table of the settings of which two arms or more were run; nothing where there is none."""
    rows, sets = [], {"test": runs.tests, **{name: [name] for name in runs.others}}
    for setting, wanted in SETTINGS.items():
        arms = [arm for arm in wanted if arm in runs.lines]
        seeds = set.intersection(*(set(runs.lines[arm]) for arm in [BASE, *arms])) if BASE in runs.lines else set()
        if len(arms) < 2 or not seeds:
            continue
        cells = []
        for arm in arms:
            pairs = [(runs.lines[arm][seed], runs.lines[BASE][seed]) for seed in seeds]
            less = [f"{statistics.fmean(each_seed(pairs, names)):+.3f}" for names in sets.values()]
            cells.append(f"{arm} {' / '.join(less)}")
        rows.append([f"{setting} ({in_seeds(len(seeds))})", "<br>".join(cells)])
    named = " / ".join(f"`{name}`" for name in sets)
    return SIDE_BY_SIDE.format(sets=named, rows="\n".join(map(table_row, rows))) if rows else ""


def about(recipe: Path) -> str:
    """What the first paragraph of a recipe's comment says that it is, as a paragraph; nothing without a recipe."""
    lines = recipe.read_text().splitlines() if recipe.is_file() else []
    said = [line.removeprefix("# ") for line in takewhile(lambda line: re.match(r"# \S", line), lines)]
    return "\n".join([*said, "", ""]) if said else ""


def corpus_of(run: Line) -> str:
    """What a run was trained on: the corpus of the recipe unless its settings name another."""
    recipe = recipe_of(run["experiment"])
    usual = yaml.safe_load(recipe.read_text())["corpus"] if recipe.is_file() else "noisy"
    corpus = run["settings"].get("corpus", usual)
    return "the noisy corpus" if corpus == "noisy" else corpus


def device(run: Line) -> str:
    """What a run was made on."""
    threads = run["environment"]["threads"]
    return run["environment"]["device"] + (f", {threads} thread{'s' * (threads > 1)}" if "CPU" in run["clock"] else "")


def spent(runs: Iterable[Line]) -> str:
    """Seconds of the references' training and scoring, from the least to the most."""
    training, scoring = defaultdict(set), defaultdict(set)
    for run in runs:
        for name, seconds in run.get("reference_seconds", {}).items():
            training[name].add(round(seconds))
            scoring[name].add(round(run["scoring_seconds"][name]))

    def said(values: set[int]) -> str:
        return f"{'-'.join(map(str, sorted({min(values), max(values)})))} s"

    return ", ".join(f"{name} {said(training[name])} and {said(scoring[name])}" for name in training) or "none yet"


def hashes(runs: Iterable[Line]) -> dict[str, str]:
    """Content hashes of what the arms were trained on."""
    found: dict[str, str] = {}
    for run in runs:
        found |= {corpus_of(run): run["hashes"]["corpus"]}
        found |= {
            key.replace("scores:", "scores by "): v for key, v in run["hashes"].items() if key.startswith("scores:")
        }
    return found


def curve_cells(runs: Runs, model: str) -> list[str]:
    """Losses along the way, means over the seeds."""
    curves = [run["curve"]["loss"] for run in runs.of(model)]
    return [_mean(values) for values in zip(*curves, strict=True)]


RANKING = """
Multiple choice: how often the right answer is the likeliest, of at most {questions} questions a task, {seeds}.
*Less CLM*: of the mean over the tasks, seed by seed. For one model the standard error of a task's number is {error},
that of the mean over the tasks {of_mean:.1%}: a difference of two models of less than {least:.1%} says nothing.
{verdict}
    {command}

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

    errors = [row["stderr"] for row in tasks]
    of_mean = sum(error**2 for error in errors) ** 0.5 / len(errors)
    told = False
    rows = [["guessing", *(f"{row['chance']:.1%}" for row in tasks), f"{mean(tasks, 'chance'):.1%}", "-"]]
    for model, seeds in found.items():
        values = [[row["value"] for row in of_seed] for of_seed in seeds.values()]
        numbers = [statistics.fmean(of_task) for of_task in zip(*values, strict=True)]
        less = [] if model == BASE else [mean(seeds[seed]) - mean(base[seed]) for seed in sorted(seeds.keys() & base)]
        rows.append([model, *(f"{n:.1%}" for n in [*numbers, statistics.fmean(numbers)]), _percents(less)])
        told |= abs(statistics.fmean(numbers) - mean(tasks, "chance")) > 1.96 * of_mean
    return RANKING.format(
        questions=lines[-1]["questions"],
        seeds="means over the seeds" if any(len(seeds) > 1 for seeds in found.values()) else f"seed {lines[0]['seed']}",
        error=" to ".join(f"{error:.1%}" for error in sorted({min(errors), max(errors)})),
        of_mean=of_mean,
        least=1.96 * 2**0.5 * of_mean,  # unpaired
        verdict="" if told else "No model's mean can be told from guessing.\n",
        command=command("evidence_ranking.py", lines[0]["experiment"]),
        tasks=" | ".join(row["title"] for row in tasks),
        rule="---|" * len(tasks),
        rows="\n".join(map(table_row, rows)),
    )


def write_page(lines: Sequence[Line], folder: Path) -> Path:
    """The tables of one experiment as a file beside its plot."""
    page = folder / "evidence.md"
    page.write_text(f"{how_to_read()}\n{section(Runs(lines), folder)}")
    return page


def main_cells(runs: Runs, model: str) -> list[str]:
    """A row of the main table."""
    test = runs.tests
    pairs, random = runs.pairs(model, BASE), runs.pairs(model, runs.random)
    to_base = [] if model == BASE else pairs
    return [
        model,
        _mean(losses(runs, model, test)),
        less(to_base, test),
        _signed(each_seed(to_base, test)),
        _signed(each_seed(random, test) if model not in (BASE, runs.random) else []),
        *(less(to_base, [name]) for name in runs.others),
        f"{statistics.fmean(run['ratio'] for run in runs.of(model)):.0%}",
    ]


def less(pairs: Sequence[tuple[Line, Line]], sets: Sequence[str]) -> str:
    """A mean difference with its intervals: over seeds, and over text."""
    found = difference(pairs, sets)
    if found is None:
        return "-"
    once = any(is_reference(run["model"]) for run, _ in pairs)  # trained with one seed only
    spread = None if once else over_seeds(each_seed(pairs, sets))
    return f"{found[0]:+.3f}{'' if spread is None else f' ± {spread:.3f}'} ({found[1]:+.3f} to {found[2]:+.3f})"


def cost_cells(runs: Runs, model: str) -> list[str]:
    """A row of the table of costs."""
    pairs = runs.pairs(model, BASE)
    reached = [found for run, base in pairs if (found := to_target(run, base)) is not None]
    # Of a curve that begins below the goal it is only known that it got there before.
    bound = "≤ " if any(run["curve"]["loss"][0] <= base["curve"]["loss"][-1] for run, base in pairs) else ""
    if any("after" in run["settings"] for run, _ in pairs):  # it may have been there in what it goes on after
        shares = ["-"] * 4
    elif len(reached) == len(pairs) > 0:
        found = ([one[what] for one in reached if what in one] for what in ("tokens", "selected", "seconds", "all"))
        shares = [bound + _range(values) if values else "-" for values in found]
    else:
        shares = [f"reached by {len(reached)} of {len(pairs)}" if pairs else "-", "", "", ""]
    equal = [at_equal(run, base) for run, base in pairs]
    values = [[one[what] for one in equal] for what in ("selected", "seconds", "all")]
    differences = [_signed([statistics.fmean(each)]) if each and None not in each else "-" for each in values]
    return [model, *shares, *differences]


def goals(runs: Runs) -> Iterator[list[str]]:
    """What selection by excess loss was to reach, and what it did: the best of its arms."""
    departs = ("score", "corpus", "after")
    plain = [arm for arm in runs.arms if arm != BASE and not any(key in runs.of(arm)[0]["settings"] for key in departs)]
    for base, called in ((BASE, "CLM"), (runs.random, "random")):
        pairs = {arm: each_seed(runs.pairs(arm, base), runs.tests) for arm in plain}
        met = {arm: max(found) < 0 for arm, found in pairs.items() if found}
        fewest = min((len(found) for found in pairs.values() if found), default=0)
        count = f"{sum(met.values())} of {len(met)} arms, of {in_seeds(fewest)} at least" if met else "not run yet"
        yield [f"`test` loss below {called}'s for every seed", "all arms", count]
    for what, words, asked in (("tokens", "tokens", "0.5"), ("all", "seconds, all counted,", "1")):
        found = {arm: [to_target(run, base) for run, base in runs.pairs(arm, BASE)] for arm in plain}
        reached = {arm: [one[what] for one in each if what in one] for arm, each in found.items() if None not in each}
        means = {arm: statistics.fmean(values) for arm, values in reached.items() if values}
        best = min(means, key=means.__getitem__, default=None)
        said = "by none" if best is None else f"{means[best]:.2f} ({best}, {in_seeds(len(reached[best]))})"
        yield [f"share of CLM's {words} to its final loss", f"at most {asked}", said]


def in_seeds(number: int) -> str:
    return f"{number} seed{'s' * (number > 1)}"


def table_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f}" if values else "-"


def _range(values: Sequence[float]) -> str:
    low, mean, high = (f"{value:.2f}" for value in (min(values), statistics.fmean(values), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"


def _signed(values: Sequence[float]) -> str:
    return " ".join(f"{value:+.3f}" for value in values) or "-"


def _percents(values: Sequence[float]) -> str:
    return " ".join(f"{value:+.1%}" for value in values) or "-"
