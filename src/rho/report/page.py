"""The HTML page: what stands in it, in words, tables and plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rho.report import plots
from rho.report.data import REFERENCE, Run
from rho.report.dynamics import MOST_GROUPS, arrow, paper_order, perplexity, sections
from rho.report.html import count, percent, spread, template
from rho.report.tokens import by_quantity, documents


def render(run: Run, summary: dict[str, Any]) -> str:
    """The page as one string of HTML without scripts."""
    labels = sorted(
        {label for seeds in summary["arms"].values() for one in seeds.values() for label in one["label_share"]}
    )
    found, omitted = documents(run.tokens)
    return template("template.html.j2", arrow=arrow, paper_order=paper_order, perplexity=perplexity, mean=_mean).render(
        run=run,
        summary=summary,
        headline=headline(summary),
        evaluations=[row for row in run.evaluations if row.set == run.target and row.arm != REFERENCE],
        target_plots=_target_plots(run, summary),
        results=_results(summary),
        sets=_sets(summary),
        selective=[arm for arm in run.arms if run.selective(arm)],
        plots=_step_plots(run),
        filtered=_filtered_rows(run),
        labels=labels,
        label_rows=_label_rows(summary, labels),
        tokens=by_quantity("excess", found),
        omitted=omitted,
        colours=plots.COLOURS,
        versions=_versions(run),
        dynamics=sections(run),
        domains=_domain_rows(summary),
        evaluated=_evaluated(summary),
        before=_before(summary),
    )


def headline(summary: dict[str, Any]) -> str:
    """The result in one sentence, good or bad."""
    target, base = summary["target"], summary["baseline"]
    finals = {
        arm: [one["final"][target]["loss"] for one in seeds.values() if target in one["final"]]
        for arm, seeds in summary["arms"].items()
    }
    parts = [f"{arm} {_loss_of_seeds(losses)}" for arm, losses in finals.items() if losses]
    if not parts:
        return f"No trained model was evaluated on the target set “{target}” yet."
    results = [f"Final loss on the target set “{target}”: " + ", ".join(parts)]
    if base is None:
        return results[0] + "; there is no plain-training arm, so no ratio of tokens is given."
    results += [_reached(arm, base, seeds) for arm, seeds in summary["arms"].items() if arm != base]
    return "; ".join(filter(None, results)) + "."


def _loss_of_seeds(losses: Sequence[float | None]) -> str:
    finite = [loss for loss in losses if loss is not None]
    if not finite:
        return "not finite"
    count = f"mean of {len(finite)} seeds, {min(finite):.3f} to {max(finite):.3f}" if len(finite) > 1 else "one seed"
    lost = f", {len(losses) - len(finite)} not finite" if len(finite) < len(losses) else ""
    return f"{statistics.fmean(finite):.3f} ({count}{lost})"


def _reached(arm: str, base: str, seeds: dict[str, Any]) -> str:
    """Whether and when one arm came down to the baseline's final loss; empty if that can't be said."""
    compared = [one["tokens_to_target"] for one in seeds.values() if one["goal"] is not None]
    reached = [one for one in compared if one is not None]
    shares = [one["ratio_seen"] for one in reached if one["ratio_seen"] is not None]
    if compared and not reached:
        return f"{arm} never reached {base}'s final target loss"
    if not shares:
        return ""
    some = f" in {len(reached)} of {len(compared)} seeds" if len(reached) < len(compared) else ""
    most = "at most " if any(one["at_first_checkpoint"] for one in reached) else ""
    between = f" ({percent(min(shares))} to {percent(max(shares))})" if len(shares) > 1 else ""
    after = f"{most}{percent(statistics.fmean(shares))} of {base}'s tokens{between}"
    return f"{arm} reached {base}'s final target loss{some} after {after}"


def _target_plots(run: Run, summary: dict[str, Any]) -> list[plots.Plot]:
    curves = {arm: [c for seed in run.seeds(arm) if (c := run.curve(arm, seed, run.target))] for arm in run.arms}
    if not any(curves.values()):
        return []
    goals = [one["goal"] for one in summary["arms"].get(summary["baseline"], {}).values() if one["goal"] is not None]
    goal = statistics.fmean(goals) if goals else None
    whole = plots.target_loss(curves, goal, summary["reference_loss"])
    if max(len(curve) for runs in curves.values() for curve in runs) < 4:
        return [whole]
    return [whole, plots.target_loss(curves, goal, None, since=0.5)]


def _filtered_rows(run: Run) -> list[tuple[str, int, int, float, float]]:
    """Arm, seed, step, cosine and norm ratio wherever a filtered gradient was compared with the exact one."""
    return [
        (arm, seed, step.step, step.filtered.get("cosine", math.nan), step.filtered.get("norm_ratio", math.nan))
        for (arm, seed), steps in run.steps.items()
        for step in steps
        if step.filtered
    ]


def _step_plots(run: Run) -> dict[str, Any]:
    """The plots over optimizer steps: `ratio` for all arms, the others for each arm that selects."""
    steps = {arm: [s for seed in run.seeds(arm) if (s := run.steps.get((arm, seed), []))] for arm in run.arms}
    steps = {arm: runs for arm, runs in steps.items() if runs}
    selective = {arm: runs for arm, runs in steps.items() if run.selective(arm)}
    with_excess = {arm for arm, runs in steps.items() if any(step.excess for run in runs for step in run)}
    with_labels = {arm for arm, runs in steps.items() if any(step.labels for run in runs for step in run)}
    return {
        "ratio": plots.realised_ratio(steps) if steps else None,
        "losses": {arm: plots.losses(runs) for arm, runs in selective.items()},
        "excess": {arm: plots.excess_quantiles(runs) for arm, runs in selective.items() if arm in with_excess},
        "labels": {arm: plots.label_shares(runs) for arm, runs in selective.items() if arm in with_labels},
    }


def _results(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of results: every arm with its losses on all sets side by side, then the reference models."""
    trained = {arm: list(seeds.values()) for arm, seeds in summary["arms"].items()}
    rows = []
    for arm, seeds in [*trained.items(), *((f"{name} model", [one]) for name, one in summary["references"].items())]:
        finals = {name: [one["final"][name] for one in seeds if name in one["final"]] for name in _sets(summary)}
        rows.append(
            {
                "arm": arm,
                "seeds": len(seeds) if arm in trained else None,
                "loss": {name: [final["loss"] for final in found] for name, found in finals.items()},
                "bits": {name: [final["bits_per_byte"] for final in found] for name, found in finals.items()},
                "differences": {name: summary["differences"].get(arm, {}).get(name) for name in finals},
                **{
                    key: _mean(one[key] for one in seeds)
                    for key in ("tokens_seen", "tokens_selected", "tokens_per_second")
                },
            }
        )
    return [row for row in rows if any(row["loss"].values())]


def _sets(summary: dict[str, Any]) -> list[str]:
    """The sets that any model was evaluated on, the target first."""
    models = [one for seeds in summary["arms"].values() for one in seeds.values()] + [*summary["references"].values()]
    return sorted({name for one in models for name in one["final"]}, key=lambda name: (name != summary["target"], name))


def _domain_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, int, list[list[float | None]]]]:
    """Set, kind, name, tokens and the losses of each arm (a value a seed), of the largest sources and labels.

    What is all of a set is left out: it stands in the table of results.
    """
    rows = []
    for name, kinds in summary["domains"].items():
        for by, found in kinds.items():
            largest = sorted(found, key=lambda domain: -found[domain]["tokens"])[:MOST_GROUPS]
            for domain in largest if len(found) > 1 else []:
                losses = [found[domain]["losses"].get(arm, []) for arm in _evaluated(summary)]
                rows.append((name, by, domain, found[domain]["tokens"], losses))
    return rows


def _before(summary: dict[str, Any]) -> str:
    """The stages that come before the training of some arm, each once, with its seconds."""
    stages = {folder: seconds for found in summary["before"].values() for folder, seconds in found.items()}
    return ", ".join(f"{folder} {count(seconds)}" for folder, seconds in stages.items())


def _evaluated(summary: dict[str, Any]) -> list[str]:
    return [*summary["arms"], *summary["references"]]


def _label_rows(summary: dict[str, Any], labels: Sequence[str]) -> dict[str, list[str]]:
    """Per arm, the share selected of every label and of all tokens."""
    return {
        arm: [
            *(spread([one["label_share"].get(label) for one in seeds.values()], percent) for label in labels),
            spread([one["mean_ratio"] for one in seeds.values()], percent),
        ]
        for arm, seeds in summary["arms"].items()
    }


def _versions(run: Run) -> dict[str, list[str]]:
    """Each distinct set of versions with the stage folders made under it."""
    made: dict[str, list[str]] = {}
    for folder, manifest in run.stages.items():
        if manifest is not None:
            known = {key: value for key, value in manifest.environment.items() if key != "seconds"}
            made.setdefault(", ".join(f"{key} {value}" for key, value in known.items()), []).append(folder)
    return made


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
