"""The evidence as a page: tables of the JSON lines that benchmarks/evidence.py wrote, and of nothing else."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from evidence_plot import draw
from evidence_results import (
    BASE,
    RESULTS,
    Line,
    Runs,
    at_equal,
    difference,
    each_seed,
    has_curve,
    losses,
    read_lines,
    to_target,
)

from rho.report.data import is_reference

RECIPES = Path(__file__).parents[1] / "recipes"

PAGE = """## {title}

{about}{parameters:.3g} M parameters, {tokens:.3g} M tokens a run unless the table of arms says otherwise, {seeds}; the
arms of a seed start from the same weights. Losses are nats a token on `test` ({tests}: their tokens together).
*Less CLM* is the mean difference over the seeds, with its 95 % interval over held-out text (paired bootstrap). An arm
with fewer values under *each seed* was not run with the other seeds yet. A reference is trained once; what it loses
itself stands below the arms: it is no arm, and may be of another size and trained on more.

    {command}

| arm | what it is | trained on | M tokens |
|---|---|---|---|
{arms}

| arm | test | less CLM | each seed | less random, each seed |{others} selected |
|---|---|---|---|---|{rule}---|
{main}

{side_by_side}By set, means over the seeds:

| arm | {sets} |
|---|{set_rule}
{by_set}

What it takes to come down to CLM's final loss on `{target}`{documents}, as shares of what
CLM of the same seed took, interpolated between checkpoints, means over the seeds. Seconds are {clock} ({devices}); *all
counted* adds training and scoring of the references that an arm uses ({spent}). On the right the
loss on `{target}` less CLM's: at as many tokens trained on (of a CLM whose learning rate has not yet come down), at
CLM's seconds of training, and at CLM's seconds with all counted.

| arm | tokens | of them selected | seconds | all counted | at its selected | at its seconds | at all seconds |
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


def section(lines: Sequence[Line], folder: Path) -> str:
    """The tables of one experiment as Markdown; its plot is written to `folder`."""
    runs = Runs(lines)
    models = [*runs.arms, *runs.references]
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
        arms="\n".join(_row(arm_cells(runs, model)) for model in models),
        tests=", ".join(f"{name} {size:,} tokens" for name, size in sizes.items()),
        target=runs.first["target"],
        documents="" if runs.first["target"] in runs.tests else " (other documents of the same sources)",
        command=command("evidence.py", runs.name),
        others="".join(f" `{name}`, less CLM |" for name in runs.others),
        rule="---|" * len(runs.others),
        main="\n".join(_row(main_cells(runs, model)) for model in models),
        side_by_side=side_by_side(runs),
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
        run["settings"].get("corpus", "the noisy corpus"),
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


# Arms that differ in one setting.
SETTINGS = {
    "share of each sequence": ["slm-08", "slm-07", "slm-06", "slm-05", "slm-03"],
    "share of the step": ["slm-06-step", "slm-04-step", "slm-03-step", "slm-02-step"],
    "what is ranked together": ["slm-06", "slm-06-batch", "slm-06-running", "slm-06-step"],
    "score": ["slm-06", "highest-loss-06", "low-reference-loss-07", "low-entropy-07", "low-both-07", "random-06"],
    "weights": ["slm-06", "soft", "retention"],
    "weights, 0.4 of the step": ["slm-04-step", "slm-04-step-retention"],
    "share over time": ["slm-03", "slm-warm-up"],
    "reference": ["slm-06", "slm-06-brief", "slm-06-weak", "slm-06-cheap", "slm-06-two"],
    "reference, 0.4 of the step": ["slm-04-step", "slm-04-step-cheap", "slm-04-step-online"],
    "curated text as well": ["clm-mixed", "clm-then-curated", "slm-06-then-curated"],
}

SIDE_BY_SIDE = """Arms that differ in one thing: less CLM on {sets}, means over the seeds that all of a line have.

| | less CLM |
|---|---|
{rows}

"""


def side_by_side(runs: Runs) -> str:
    """The table of the settings of which two arms or more were run; nothing where there is none."""
    rows, sets = [], {"test": runs.tests, **{name: [name] for name in runs.others[:1]}}
    for setting, wanted in SETTINGS.items():
        arms = [arm for arm in wanted if arm in runs.lines]
        seeds = set.intersection(*(set(runs.lines[arm]) for arm in [BASE, *arms])) if BASE in runs.lines else set()
        if len(arms) < 2 or not seeds:
            continue
        cells = []
        for arm in arms:
            pairs = [(runs.lines[arm][seed], runs.lines[BASE][seed]) for seed in seeds]
            less = [statistics.fmean(each_seed(pairs, names)) for names in sets.values()]
            cells.append(" / ".join([f"{arm} {less[0]:+.3f}", *(f"{value:+.3f}" for value in less[1:])]))
        rows.append([f"{setting} ({len(seeds)} seed{'s' * (len(seeds) > 1)})", ", ".join(cells)])
    named = " / ".join(f"`{name}`" for name in sets)
    return SIDE_BY_SIDE.format(sets=named, rows="\n".join(map(_row, rows))) if rows else ""


def about(recipe: Path) -> str:
    """What the first paragraph of a recipe's comment says that it is, as a paragraph; nothing without a recipe."""
    lines = recipe.read_text().splitlines() if recipe.is_file() else []
    said = [line.removeprefix("# ") for line in takewhile(lambda line: re.match(r"# \S", line), lines)]
    return "\n".join([*said, "", ""]) if said else ""


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


def curve_cells(runs: Runs, model: str) -> list[str]:
    """Losses along the way, means over the seeds."""
    curves = [run["curve"]["loss"] for run in runs.of(model)]
    return [_mean(values) for values in zip(*curves, strict=True)]


INTRODUCTION = """## The evidence

Selective training against plain training on real text: mathematics hidden in web-like text, with a reference that read
clean mathematics (3.2 M tokens; the noisy corpus has 25.7 M). Beside the paper's arms stand the controls that it leaves
out: tokens selected at random, plain training on curated and noisy text together (`clm-mixed`, one token in nine is
curated), plain training that ends with curated text (`clm-then-curated`, whose additional tokens count), and the
reference's own loss. Each section begins with its arms; all settings are in its recipe. A number in a name is its
ratio (06 is 0.6). CLM is plain training on the noisy corpus (of which the curated text is a part in the mixed
experiment); a negative *less CLM* is better than that. `general` is text of another kind, `noisy_valid` more of the
noisy corpus: what is given up.
What was learned, also where the controls win, and what is not run yet: [log.md](log.md).

**What we choose by it.** A selection has no ratio unless it is given one, and ranks each sequence by itself, which
changes with neither micro-batches nor devices. Partly by one seed, as the tables say, we recommend

- a ratio of 0.3 to 0.4 where the text is as mixed as this, ranked over the step where a step is one micro-batch (with
  accumulation that costs a second forward; at 0.3 it hardly matters). The paper's 0.6 gives up less elsewhere;
- where other text must not suffer, a retention of 0.1: a third of what is given up, nine tenths of the gain or more;
- no schedule: coming down to a share was worse than starting with it;
- a small reference, trained for a fraction of an epoch, before anything dearer; online, if the corpus is read once. In
  a longer run the model catches up with it (5 M tokens, one seed: half the gain); whether a better one helps there is
  not measured;
- curated text in the corpus wherever it may be there: selection comes on top, not instead.
"""


def sections(folder: Path) -> list[str]:
    """Every experiment on record, the smallest model first; plots go to `folder`."""
    found = [lines for file in RESULTS.glob("evidence-*.jsonl") if (lines := read_lines(file))]
    found.sort(key=lambda lines: (max(line["parameters"] for line in lines), lines[0]["experiment"]))
    pages = []
    for lines in found:
        name = lines[0]["experiment"]
        ranked = read_lines(RESULTS / f"ranking-{name}.jsonl")
        pages.append(section(lines, folder) + (ranking(ranked) if ranked else ""))
    return [INTRODUCTION, *pages] if found else []


RANKING = """
Multiple choice: how often the right answer is the likeliest, of at most {questions} questions a task, means over the
seeds. *Less CLM*: of the mean over the tasks, seed by seed. For one model the standard error of a task's number is
about {error:.1%}, that of the mean over the tasks {of_mean:.1%}: smaller differences say nothing.

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

    rows = [["guessing", *(f"{row['chance']:.1%}" for row in tasks), f"{mean(tasks, 'chance'):.1%}", "-"]]
    for model, seeds in found.items():
        values = [[row["value"] for row in of_seed] for of_seed in seeds.values()]
        numbers = [statistics.fmean(of_task) for of_task in zip(*values, strict=True)]
        less = [] if model == BASE else [mean(seeds[seed]) - mean(base[seed]) for seed in sorted(seeds.keys() & base)]
        rows.append([model, *(f"{n:.1%}" for n in [*numbers, statistics.fmean(numbers)]), _percents(less)])
    return RANKING.format(
        questions=lines[-1]["questions"],
        error=mean(tasks, "stderr"),
        of_mean=sum(row["stderr"] ** 2 for row in tasks) ** 0.5 / len(tasks),
        command=command("evidence_ranking.py", lines[0]["experiment"]),
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
    # Of a curve that begins below the goal it is only known that it got there before.
    bound = "≤ " if any(run["curve"]["loss"][0] <= base["curve"]["loss"][-1] for run, base in pairs) else ""
    if len(reached) == len(pairs) > 0:
        shares = [bound + _mean([one[what] for one in reached], 2) for what in ("tokens", "selected", "seconds", "all")]
    else:
        shares = [f"reached by {len(reached)} of {len(pairs)}" if pairs else "-", "", "", ""]
    equal = [at_equal(run, base) for run, base in pairs]
    found = [[one[what] for one in equal] for what in ("selected", "seconds", "all")]
    differences = [_signed([statistics.fmean(values)]) if values and None not in values else "-" for values in found]
    return [model, *shares, *differences]


def goals(runs: Runs) -> Iterator[list[str]]:
    """What selection by excess loss was to reach, and what it did: the best of its arms."""
    departs = ("score", "corpus", "after")
    plain = [arm for arm in runs.arms if arm != BASE and not any(key in runs.of(arm)[0]["settings"] for key in departs)]
    for base, called in ((BASE, "CLM"), (runs.random, "random")):
        pairs = {arm: each_seed(runs.pairs(arm, base), runs.tests) for arm in plain}
        met = {arm: max(found) < 0 for arm, found in pairs.items() if found}
        count = f"{sum(met.values())} of {len(met)} arms" if met else "not run yet"
        yield [f"`test` loss below {called}'s for every seed", "all arms", count]
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
