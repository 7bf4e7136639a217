"""The evidence in docs/results.md: what was learned before all else, then every experiment's page."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from evidence_page import how_to_read, in_seeds, ranking, section, table_row, what_it_is
from evidence_results import BASE, RESULTS, Line, Runs, each_seed, extra_seconds, losses, read_lines

# The experiment of the first table, the longer one that is spoken of beside it, and the rows of the table.
GLANCE, LONGER = "evidence-small", "evidence-small-5m"
ROWS = (
    BASE,
    "random-06",
    "random-04-step",
    "slm-06",
    "slm-03",
    "slm-04-step",
    "soft",
    "slm-04-step-cheap",
    "slm-04-step-retention",
    "reference-cheap",
    "clm-mixed",
    "clm-then-curated",
)

INTRODUCTION = """## The evidence

Selective training against plain training on real text. The noisy corpus (25.7 M tokens) is by bytes about a fifth
mathematics, in the mark-up it came in, 30 % documentation of mathematical software, 7 % formal proofs, and the rest has
nothing to do with mathematics. The curated text (3.2 M tokens) is clean mathematics; a *reference* is a model that read
it. Unless a section says otherwise, arms on the noisy corpus read 2.0 M of its first 2.1 M tokens; `clm-mixed` and
`base` draw as many from all of their texts.

Curated are OpenStax textbooks and GSM8K's training problems. `test` are other chapters of those books, GSM8K's test
problems and, a thirteenth of it, sections of another textbook, ORCCA. The noisy corpus has other parts of all these
books as raw XML or flattened text, worksheets as JSON, Stack Exchange as HTML, and no GSM8K. So most of the tests are
of just the kind that the reference has read; only ORCCA is not, and stands apart in *By set*. Training text that
shares 13 words in a row with a test was removed, stock phrases excepted. `general` is WikiText-2's test text, whose
validation text is 1.6 % of the noisy corpus.

| arm | what it is | test | less CLM, each seed | `general` | `noisy_valid` | seconds in all |
|---|---|---|---|---|---|---|
{rows}

`test` is held-out mathematics, `general` encyclopedic English, `noisy_valid` more of the noisy corpus: losses in nats a
token, less is better. Seconds are of one thread, with the training and scoring of the reference that an arm uses.

**Should you?** If you may train on the curated text, do, in the mix or at the end: no selection from the noisy corpus
comes near it. For the target alone training on nothing else goes further still (two epochs of it: `reference-curated`
below), and is two nats worse on general text. Selection makes more of a noisy corpus, also of one that has the
curated text in it, and does not learn what it leaves out.

**In how much time?** Leaving tokens out saves no measurable time a step at this size, so what selection saves are
steps, and the reference must cost less than they do: with all counted, the three arms with the cheapest references
come to plain training's loss in less time than it, those with the others in more.

**What we choose by it.** A selection has no ratio unless it is given one, and ranks each sequence by itself, which
changes with neither micro-batches nor devices. Where the text is as mixed as this we recommend, by three seeds unless
it says otherwise, what follows. The learning rate was chosen for plain training. These choices, though, are made on the
seeds and the text that the tables show: of two arms within each other's intervals either may be the better one.

{recommended}
What was learned, also where the controls win, and what was not run: [log.md](log.md).

### How to read the tables

Beside the paper's arms stand the controls that it leaves out: tokens drawn at random, plain training on curated and
noisy text together (`clm-mixed`, one token in nine is curated), plain training that ends with curated text
(`clm-then-curated`, a quarter more tokens), and the reference's own loss. A number in a name is its ratio (06 is 0.6);
`step` ranks the tokens of a whole optimizer step together, `batch` those of a micro-batch, `running` those of the steps
so far, `dataset` the whole corpus, the others each sequence by itself. *Excess loss* is the model's loss of a token
less the reference's. *curated*, *weak*, *brief*, *cheap* and *cheapest* are references, from the dear to the cheap: the
sections say what they read. CLM is plain training on the noisy corpus, of which the curated text is a part in the mixed
experiment. All settings are in an experiment's recipe.

{how_to_read}"""

RECOMMENDED = """\
- a ratio of 0.3 of each sequence ({gain[slm-03]} on `test`), or 0.3 to 0.4 of the step ({gain[slm-03-step]},
  {gain[slm-04-step]}) where a step is one micro-batch; of several it costs a second forward. The smaller the share,
  the better for the target and the worse for all else: the paper's 0.6 ({gain[slm-06]}) gives up less, 0.2 of the step
  ({gain[slm-02-step]}) more. Ranked over the step a share gives up much more of the rest of the corpus than ranked in
  each sequence, and a little less of general text;
- where other text matters too, a retention of 0.1: about nine tenths of the gain, a third of what is given up (at 0.6
  and at 0.4 of the step; not run at 0.3). Soft weights gain as much as 0.4 of the step ({gain[soft]}) and
  give up less than it, but more than retention does;
- no schedule: coming down to 0.3 is worse than beginning with it;
- a small reference, trained for a fraction of an epoch, before anything dearer, as long as the model stays well behind
  it. In runs of 5 M tokens the model came within 0.1 of it, and half of the gain was left
  ({longer[slm-04-step-cheap]}); a reference of two epochs kept nearly all ({longer[slm-04-step]});
- curated text in the corpus wherever it may be there: selection comes on top, not instead.
"""


def sections(folder: Path) -> list[str]:
    """Every experiment on record, the smallest model and the shortest run first; plots go to `folder`."""
    found = [Runs(lines) for file in RESULTS.glob("evidence-*.jsonl") if (lines := read_lines(file))]
    found.sort(key=lambda runs: (runs.first["parameters"], runs.first["train_tokens"], runs.name))
    pages = []
    for runs in found:
        ranked = read_lines(RESULTS / f"ranking-{runs.name}.jsonl")
        pages.append(section(runs, folder) + (ranking(ranked) if ranked else ""))
    named = {runs.name: runs for runs in found}
    return [*([introduction(named[GLANCE], named.get(LONGER))] if GLANCE in named else []), *pages]


def introduction(runs: Runs, longer: Runs | None = None) -> str:
    """What stands before the experiments."""
    recommended = RECOMMENDED.format(gain=gains(runs), longer=gains(longer, with_seeds=True))
    rows = [table_row(glance_cells(runs, model)) for model in ROWS if model in runs.lines]
    return INTRODUCTION.format(rows="\n".join(rows), recommended=recommended, how_to_read=how_to_read())


def gains(runs: Runs | None, with_seeds: bool = False) -> dict[str, str]:
    """Each arm's mean difference from plain training on the tests, and of how many seeds."""
    found: dict[str, str] = defaultdict(lambda: "not run")
    for arm in runs.arms if runs is not None else []:
        if less := each_seed(runs.pairs(arm, BASE), runs.tests):
            found[arm] = f"{statistics.fmean(less):+.3f}{f', {in_seeds(len(less))}' if with_seeds else ''}"
    return found


def glance_cells(runs: Runs, model: str) -> list[str]:
    """A row of the first table."""
    less = each_seed(runs.pairs(model, BASE), runs.tests) if model != BASE else []
    corpus = runs.of(model)[0]["settings"].get("corpus")
    return [
        model,
        f"{what_it_is(runs, model)}{f', on {corpus}' if corpus else ''}",
        _mean(losses(runs, model, runs.tests)),
        " ".join(f"{value:+.2f}" for value in less) or "-",
        *(_mean(losses(runs, model, [name])) for name in runs.others),
        f"{statistics.fmean(seconds(run) for run in runs.of(model)):.0f}",
    ]


def seconds(run: Line) -> float:
    """Of training, with what the references cost."""
    return run["curve"]["seconds"][-1] + extra_seconds(run)


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f}"
