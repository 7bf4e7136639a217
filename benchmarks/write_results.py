"""Write docs/results.md from benchmarks/results/*.json: no number in it is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evidence_summary import sections as evidence_sections
from preference_results import preference_section
from sft_results import sft_section

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"


DEMO = """## The embedded demo

Prose hidden in raw Python files, learned by a 1.3 M parameter model (`recipes/demo.yaml`). Loss is nats a token on
held-out docstrings (set `{target}`), at equal tokens processed. The reference's is {reference:.4f}. *Tokens to target*:
the share of CLM's tokens at which an arm reaches CLM's final loss, interpolated.

    make bench        # benchmarks/demo_seeds.py, then this page

| seed | arm | final target loss | bits per byte | tokens to target | of them selected | loss on the noisy corpus |
|---|---|---|---|---|---|---|
{rows}

Share of each kind of token that was selected, over the whole run, seed 0:

| arm | {labels} |
{ruler}
{shares}

Of the {models} models, {repeated} were trained a second time in a process of their own: {same} of them have
identical weights, bit for bit (threads: {threads}, {machine}).
{timing}
"""


def demo_section(result: dict[str, Any]) -> str:
    """The demo over seeds: final losses, tokens to target, reproducibility, time and memory."""
    summary = result["summary"]
    arms, target = summary["arms"], summary["target"]
    shares = {arm: next(iter(seeds.values()))["label_share"] for arm, seeds in arms.items()}
    labels = list(shares["slm"])
    return DEMO.format(
        target=target,
        reference=summary["reference_loss"],
        rows="\n".join(row(seed, arm, arms[arm][seed], target) for seed in arms["clm"] for arm in arms),
        labels=" | ".join(labels),
        ruler="|---" * (len(labels) + 1) + "|",
        shares="\n".join(
            f"| {a} | " + " | ".join(f"{s[name]:.1%}" for name in labels) + " |" for a, s in shares.items()
        ),
        models=len(result["weights"]),
        repeated=len(result["repeated"]),
        same=sum(result["repeated"].values()),
        threads=result["runs"]["first"]["threads"],
        machine=result["machine"],
        timing=timing(result["runs"].get("one")),
    )


def timing(one: dict[str, Any] | None) -> str:
    """How long one seed took, where that was measured."""
    if one is None:
        return "One seed was not timed on a quiet machine with these settings."
    return (
        f"One seed with three arms took {one['seconds']:.0f} s ({one['first_line_seconds']:.1f} s to the first "
        f"progress line, peak memory {one['peak_memory_mib']} MiB, {one['threads']} threads)."
    )


def row(seed: str, arm: str, run: dict[str, Any], target: str) -> str:
    """One run as a table row."""
    reached, final = run["tokens_to_target"], run["final"]
    seen = f"{reached['ratio_seen']:.2f}" if reached else "not reached"
    selected = f"{reached['ratio_selected']:.2f}" if reached else "-"
    return (
        f"| {seed} | {arm} | {final[target]['loss']:.4f} | {final[target]['bits_per_byte']:.4f} | {seen} | {selected} "
        f"| {final['noisy']['loss']:.4f} |"
    )


RECIPES = """## Recipes on real text

Mathematics hidden in raw mark-up, forms and off-domain text (a small cut of real corpora); the target is held-out
mathematics. The same 1.3 M parameter model, 2,048 tokens a step, one seed: differences of a few hundredths are noise.

    python benchmarks/recipes.py
"""
RECIPE = """### [{name}](../recipes/{name}.yaml)

References: {references}.

| arm | target loss | bits per byte | loss on the noisy corpus | share selected | tokens to target |
|---|---|---|---|---|---|
{rows}
"""


def recipe_section(name: str, summary: dict[str, Any]) -> str:
    """The arms of one recipe."""
    target = summary["target"]
    references = [f"{known} {model['final'][target]['loss']:.4f}" for known, model in summary["references"].items()]
    rows = []
    for arm, seeds in summary["arms"].items():
        run = next(iter(seeds.values()))
        final, reached = run["final"], run["tokens_to_target"]
        noisy = next((found["loss"] for known, found in final.items() if known != target), None)
        rows.append(
            f"| {arm} | {final[target]['loss']:.4f} | {final[target]['bits_per_byte']:.4f} | "
            + (f"{noisy:.4f}" if noisy is not None else "-")
            + f" | {run['mean_ratio']:.1%} | "
            + (f"{reached['ratio_seen']:.2f}" if reached else "not reached")
            + " |"
        )
    return RECIPE.format(name=name, references=", ".join(references), rows="\n".join(rows))


KILLS = """## Killed and resumed

A tiny training was killed with SIGKILL at {kills} random moments, {writing} of them while a checkpoint was being
written or removed, and resumed each time: weights, optimizer and step log {verdict} to those of a run without kills.

    python benchmarks/kill_training.py
"""


def kill_section(result: dict[str, Any]) -> str:
    """What became of a training that was killed again and again."""
    return KILLS.format(
        kills=result["kills"],
        writing=result["hit"]["in checkpoint writing or removal"],
        verdict="were identical, bit for bit," if result["identical"] else "were NOT identical",
    )


SCORING = """## What scoring costs

On {device}, {threads} threads, against the same model with the same batches in the same process, interleaved: a bare
forward to the logits, and the memory of a forward to the hidden states.

    python benchmarks/scoring.py        # speed memory; `store` on a CPU

| model | | tokens/s | of a bare forward (least - most) | peak memory | of the hidden states |
|---|---|---|---|---|---|
{rows}
"""
STORE = """A store of the demo's noisy corpus ({tokens:,} tokens): {sizes} bytes a token. The demo's model trains on
{consumed:,} tokens/s; reading is {reading} as fast.
"""


def scoring_section(result: dict[str, Any]) -> str:
    """Speed and memory of scoring, and its store."""
    rows = []
    for model, works in result["speed"].items():
        peaks = result["memory"][model]
        for work, found in works.items():
            of = found["of_bare_forward"]
            mfu = f", MFU {found['mfu']:.1%}" if "mfu" in found else ""
            rows.append(
                f"| {model} | {work} | {found['tokens_per_second']:,}{mfu} | {of['median']:.2f} ({of['min']:.2f} - "
                f"{of['max']:.2f}) | {peaks[work]['mib']:.0f} MiB | {peaks[work]['of_hidden_states']:.2f} |"
            )
    page = SCORING.format(device=result["device"], threads=result["threads"], rows="\n".join(rows))
    if (store := result.get("store")) is None:
        return page
    return page + STORE.format(
        tokens=store["tokens"],
        sizes=", ".join(f"{name} {size:.3f}" for name, size in store["bytes_a_token"].items()),
        consumed=store["training_tokens_per_second"],
        reading=", ".join(f"({name}) {found['times_training']:.0f} times" for name, found in store["reading"].items()),
    )


SCORING_KILLS = """Scoring with two workers at a time was killed at {kills} random moments: of {stores} stores
{verdict}.

    python benchmarks/kill_scoring.py
"""


DYNAMICS = """## Token dynamics

Shares of tokens by what becomes of their loss over the checkpoints (App. D.1; a line through each token's losses, 0.2
nats), on a held-out part of the noisy corpus.

    rho run recipes/math-demo.yaml
    rho run recipes/demo.yaml --set train.arguments.save_steps=22 --set 'dynamics={{set: noisy, arms: [clm, slm]}}'
    python benchmarks/dynamics.py runs runs/math-demo runs/demo

| run | arm | tokens | checkpoints | H→H | L→H | H→L | L→L |
|---|---|---|---|---|---|---|---|
| paper, TinyLlama 1.1B | CLM | 320,000 | 15B tokens, one a 1B | 11% | 12% | 26% | 51% |
{rows}

The paper continues the pretraining of a model that knows language: half of the tokens are learned before the first
checkpoint (L→L). Ours start from random weights, the first checkpoint stands after a tenth of the training, and nearly
every token that will be learned is learned between the first and the last: it is H→L.

"""
LABELS = """Of {run}, by kind of text: the share of the tokens that an arm's last checkpoint would select (all blocks of
the followed text ranked at once, but for scope `sequence`), and in parentheses the share on which it is worse than the
reference (excess above 0).

| label | tokens | {arms} |
|---|---|{columns}
{rows}

"""
LINE_FIT = """The line fit and the classes of {tokens:,} tokens at {checkpoints} checkpoints (threads: {threads}):

    python benchmarks/dynamics.py fit

| losses | seconds | tokens/s | peak memory |
|---|---|---|---|
{rows}
"""


def dynamics_section(found: dict[str, Any], cost: dict[str, Any]) -> str:
    """Shares of the classes beside the paper's, selection by label, and what the fit costs."""
    arms = [(run, arm, one) for run, arms in found["runs"].items() for arm, one in arms.items()]
    rows = [
        f"| {run} | {arm} | {one['tokens']:,} | {one['checkpoints']} | "
        + " | ".join(f"{one['classes'][name]:.1%}" for name in ("H->H", "L->H", "H->L", "L->L"))
        + " |"
        for run, arm, one in arms
    ]
    page = DYNAMICS.format(rows="\n".join(rows))
    for run, of_run in found["runs"].items():
        if selective := {arm: one["labels"] for arm, one in of_run.items() if one["labels"]}:
            page += labels_table(run, selective)
    costs = [
        f"| {kind} | {row['seconds']:.0f} | {row['tokens_per_second']:,} | {row['peak_memory_mib']:,} MiB |"
        for kind, row in cost["rows"].items()
    ]
    return page + LINE_FIT.format(**{**cost, "rows": "\n".join(costs)})


def labels_table(run: str, arms: dict[str, dict[str, Any]]) -> str:
    """What the arms of a run select of each kind of text, and how much rather content than markup where it has both."""
    first, keys = next(iter(arms.values())), ("share", "excess_above_0")
    rows = [
        f"| {label} | {of['eligible']:,} | "
        + " | ".join("{:.1%} ({:.1%})".format(*(labels[label][key][-1] for key in keys)) for labels in arms.values())
        + " |"
        for label, of in first.items()
    ]
    if {"content", "markup"} <= first.keys():
        cells = [
            "{:.1f} ({:.1f})".format(*(labels["content"][key][-1] / labels["markup"][key][-1] for key in keys))
            for labels in arms.values()
        ]
        rows.append(f"| content / markup | | {' | '.join(cells)} |")
    return LABELS.format(run=run, arms=" | ".join(arms), columns="---|" * len(arms), rows="\n".join(rows))


STEPS = """## The training step

Forward and backward, no optimizer, random weights; every row of a size in one process, interleaved. Ratios are medians
of {rounds} rounds or more (with quartiles) by plain Transformers CLM in the same round, in the columns "of ours" by our
own chunked CLM; *head* is head and loss alone, *MiB* what they allocate at most beside hidden states and weights;
*error* is of their gradients, against float64. What each row is: [step.md](step.md).

    PYTHONPATH=src python benchmarks/step.py        # sizes that suit the device; on a GPU 125m, 1b and 128k

Not run: {not_run}.
"""
STEP = """### {name}: {parameters:.1f} M parameters, vocabulary {vocab:,}, {tokens:,} tokens ({machine}, {clock})

| | step | of ours | tokens/s | head | of ours | MiB | error |
|---|---|---|---|---|---|---|---|
{rows}
"""


def step_section(result: dict[str, Any], name: str) -> str:
    """One size on one machine."""
    found = result["sizes"][name]
    size = found["size"]
    return STEP.format(
        name=name,
        parameters=found["parameters"] / 1e6,
        vocab=size["vocab"],
        tokens=size["rows"] * size["length"],
        machine=result["machine"],
        clock=result["clock"],
        rows="\n".join(step_row(row, measured) for row, measured in found["rows"].items()),
    )


def step_row(name: str, row: dict[str, Any]) -> str:
    """One way to train, as a table row."""
    step, *head = (
        [
            f"{one['to_transformers']['median']:.3f} ({one['to_transformers']['low']:.3f}-"
            f"{one['to_transformers']['high']:.3f})",
            f"{one['to_chunked']['median']:.2f}",
        ]
        for one in (row[part] for part in ("step", "head") if part in row)
    )
    rest = [*head[0], f"{row['head_bytes'] / 2**20:.0f}", f"{row['gradient_error']:.1e}"] if head else ["-"] * 4
    return f"| {name} | {' | '.join(step)} | {row['tokens_per_second']:,.0f} | {' | '.join(rest)} |"


def not_run(steps: list[dict[str, Any]]) -> str:
    """Rows and sizes that no machine has measured yet."""
    sizes = [size for size in ("125m", "1b", "128k") if not any(size in one["sizes"] for one in steps)]
    libraries = set.intersection(*(set(one["not_run"]) for one in steps))
    found = [f"size {size} (no GPU was at hand)" for size in sizes] + sorted(libraries)
    return ", ".join(found) or "nothing"


GROWTH = """## How step and memory grow

A llama of 4 layers, 256 wide; vocabulary 8,192, 2 sequences of 512 unless the axis says otherwise
({machine}, one thread, CPU time). Seconds of forward and backward; the ratio is to plain Transformers CLM.

    PYTHONPATH=src python benchmarks/growth.py

![Step time and loss memory](growth.svg)

| axis | | plain, s | selection 0.6, s | ratio |
|---|---|---|---|---|
{times}

Memory of head and loss at a vocabulary of 32,000, width 256, MiB. *Beyond* is what selection takes beside the gradients
of hidden states and head: the buffer, and the shifted copy of the hidden states, 1 KiB a token here.

| tokens | plain | selection 0.6 | share | beyond |
|---|---|---|---|---|
{memory}
"""
PLAIN, SELECTION = "plain Transformers CLM", "ours, sequence 0.6"


def growth_section(result: dict[str, Any]) -> str:
    """Tables of the growth; the plot goes beside the page."""
    times = [
        f"| {axis} | {int(value):,} | {rows[PLAIN]['seconds']:.3f} | {rows[SELECTION]['seconds']:.3f} | "
        f"{rows[SELECTION]['to_transformers']['median']:.2f} |"
        for axis, points in result["axes"].items()
        for value, rows in points.items()
    ]
    memory = []
    for tokens, one in result["memory"].items():
        plain, selection = (one["rows"][name] / 2**20 for name in (PLAIN, SELECTION))
        beyond = selection - (one["hidden_bytes"] + one["weight_bytes"]) / 2**20
        memory.append(f"| {int(tokens):,} | {plain:,.0f} | {selection:.0f} | {selection / plain:.3f} | {beyond:.0f} |")
    growth_plot(result, PAGE.parent / "growth.svg")
    return GROWTH.format(machine=result["machine"], times="\n".join(times), memory="\n".join(memory))


def growth_plot(result: dict[str, Any], path: Path) -> None:
    """Step time along each axis, and memory along the tokens."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rho"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    lines = [(PLAIN, "#D55E00", "o"), (SELECTION, "#0072B2", "s")]
    labels = {"length": "tokens a sequence", "vocab": "vocabulary", "rows": "sequences"}
    for ax, (axis, points) in zip(axes, result["axes"].items(), strict=False):
        values = [int(value) for value in points]
        for name, colour, marker in lines:
            seconds = [rows[name]["seconds"] for rows in points.values()]
            ax.plot(values, seconds, marker=marker, color=colour, label=name)
        ax.set(xlabel=labels[axis], ylabel="seconds a step", xscale="log", ylim=0)
        ax.set_xticks(values, [f"{value:,}" for value in values])
        ax.minorticks_off()
    memory = result["memory"]
    for name, colour, marker in lines:
        sizes = [one["rows"][name] / 2**20 for one in memory.values()]
        axes[-1].plot([int(tokens) for tokens in memory], sizes, marker=marker, color=colour, label=name)
    axes[-1].set(xlabel="tokens", ylabel="MiB of head and loss", xscale="log", yscale="log")
    axes[-1].set_xticks([int(tokens) for tokens in memory], [f"{int(tokens) // 1024}k" for tokens in memory])
    axes[-1].set_yticks([100, 300, 1000, 3000], ["100", "300", "1,000", "3,000"])
    axes[-1].minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def load(name: str) -> dict[str, Any]:
    """What a benchmark found."""
    return json.loads((HERE / "results" / f"{name}.json").read_bytes())


def main() -> None:
    """Write the page."""
    demo, kills = (load(name) for name in ("demo", "kill_training"))
    recipes = [(file.stem, json.loads(file.read_bytes())) for file in sorted((HERE / "results" / "recipes").glob("*"))]
    sections = [*evidence_sections(PAGE.parent), demo_section(demo)]
    if recipes:
        sections += [RECIPES, *(recipe_section(name, result["summary"]) for name, result in recipes)]
    sections.append(dynamics_section(*(load(name) for name in ("token-dynamics", "dynamics"))))
    scoring = [json.loads(file.read_bytes()) for file in sorted((HERE / "results").glob("scoring-*.json"))]
    sections += [scoring_section(result) for result in scoring]
    killed = json.loads((HERE / "results" / "kill_scoring.json").read_bytes())
    wrong = len(killed["differing"])
    verdict = f"{wrong} differed" if wrong else "all were the undisturbed one, byte for byte"
    killed_scoring = SCORING_KILLS.format(kills=killed["kills"], stores=killed["stores"], verdict=verdict)
    steps = [json.loads(file.read_bytes()) for file in sorted((HERE / "results").glob("step-*.json"))]
    if steps:
        rounds = min(size["rounds"] for one in steps for size in one["sizes"].values())
        sections.append(STEPS.format(rounds=rounds, not_run=not_run(steps)))
        sections += [step_section(one, name) for one in steps for name in one["sizes"]]
    sft = HERE / "results" / "sft.json"
    if sft.is_file():
        sections.append(sft_section(json.loads(sft.read_bytes())))
    preference = HERE / "results" / "preference.jsonl"
    if preference.is_file():
        sections.append(preference_section([json.loads(line) for line in preference.read_text().splitlines()]))
    growth = HERE / "results" / "growth.json"
    if growth.is_file():
        sections.append(growth_section(json.loads(growth.read_bytes())))
    versions = ", ".join(f"{name} {version}" for name, version in sorted(demo["environment"].items()))
    PAGE.write_text("\n".join([HEAD, *sections, kill_section(kills), killed_scoring, f"Versions: {versions}.\n"]))
    print(PAGE)


HEAD = """# Results

Made by `python benchmarks/write_results.py` from the JSON under `benchmarks/results/`. Which tables are older than
the code: [log.md](log.md).
"""


if __name__ == "__main__":
    main()
