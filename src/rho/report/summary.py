"""The numbers of the report, as the JSON value of `summary.json`."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from rho.compare import paired_bootstrap
from rho.report.data import Evaluation, Run, Step

FORMAT = 1


def summarise(run: Run) -> dict[str, Any]:
    """The whole summary: plain JSON values with stable keys; null stands for a number that there is not.

    `arms.<arm>.<seed>.tokens_to_target` is null where the arm never came down to `goal`, its baseline's final target
    loss with the same seed; where `goal` itself is null there was nothing to compare with. Its `seconds` are those of
    the arm's own training until then, `seconds_with_reference` those of the stages `before.<arm>` too; each ratio is to
    what the baseline took with that seed to come down to `goal`. `reference_loss` is the best reference's on
    the target. `differences.<arm>.<set>` is the arm's loss minus the baseline's (`differences`).
    `domains.<set>.<by>.<name>` has tokens, and each arm's loss on them at its last checkpoint, a value a seed.
    """
    base = baseline(run)
    references = {name: _model(run, name, 0) for name in run.references}
    found = [r["final"][run.target]["loss"] for r in references.values() if run.target in r["final"]]
    return {
        "format": FORMAT,
        "run": run.name,
        "target": run.target,
        "baseline": base,
        "reference_loss": min((loss for loss in found if loss is not None), default=None),
        "references": references,
        "arms": {arm: {str(seed): _trained(run, base, arm, seed) for seed in run.seeds(arm)} for arm in run.arms},
        "differences": {arm: differences(run, base, arm) for arm in run.arms if base is not None and arm != base},
        "before": {arm: {folder: seconds_of(run, folder) for folder in run.before.get(arm, [])} for arm in run.arms},
        "domains": domains(run),
    }


def baseline(run: Run) -> str | None:
    """The arm that the others are measured against: `clm`, else the first that trained on every eligible token."""
    if "clm" in run.arms:
        return "clm"
    logged = {arm for arm, _ in run.steps}
    return next((arm for arm in run.arms if arm in logged and not run.selective(arm)), None)


def differences(run: Run, base: str, arm: str) -> dict[str, dict[str, float | int]]:
    """Per set, `arm`'s final loss minus `base`'s, with its 95 % interval (`low`, `high`) and the number of seeds.

    The means over the seeds that both have, of each block, are what `paired_bootstrap` resamples: the interval is that
    of the held-out text, given these training runs. Sets of fewer than two blocks, or without losses by block (of a run
    made before there were any), are left out.
    """
    found: dict[str, dict[str, float | int]] = {}
    for name in sorted({name for other, _, name in run.blocks if other == arm}):
        pairs = [
            (run.blocks[arm, seed, name], run.blocks[base, seed, name])
            for seed in run.seeds(arm)
            if (arm, seed, name) in run.blocks and (base, seed, name) in run.blocks
        ]
        if pairs and len(pairs[0][0].tokens_B) > 1:
            first_B, second_B = (np.mean([pair[n].nats_B for pair in pairs], 0) for n in (0, 1))
            interval = paired_bootstrap(first_B, second_B, pairs[0][0].tokens_B)
            found[name] = {**vars(interval), "seeds": len(pairs)}
    return found


def tokens_to_loss(curve: Sequence[Evaluation], goal: float) -> tuple[float, float] | None:
    """Tokens (processed, selected) at which a loss curve first comes down to `goal`; None if it never does.

    Linear between checkpoints in (tokens, loss); checkpoints without a finite loss are passed over. A curve that starts
    at or below the goal gives its first checkpoint, which is an upper bound.
    """
    points = [point for point in curve if math.isfinite(point.loss)]
    along = [(float(point.tokens_seen), float(point.tokens_selected)) for point in points]
    found = come_down([point.loss for point in points], along, goal)
    return None if found is None else (found[0], found[1])


def come_down(losses: Sequence[float], along: Sequence[Sequence[float]], goal: float) -> tuple[float, ...] | None:
    """Where losses first come down to `goal`, in every coordinate of `along`; None if they never do.

    Linear between the points; a first one at or below the goal is an upper bound.
    """
    for n, loss in enumerate(losses):
        if loss <= goal:
            if n == 0:
                return tuple(along[0])
            part = (losses[n - 1] - goal) / (losses[n - 1] - loss)
            return tuple(a + part * (b - a) for a, b in zip(along[n - 1], along[n], strict=True))
    return None


def seconds_of(run: Run, folder: str) -> float | None:
    """How long a stage of the run took: a training by its step log, which outlasts interruptions, another by its clock.

    None where that is not known.
    """
    trained = re.fullmatch(r"train/(.+)-seed(\d+)", folder, re.DOTALL)
    key = (trained[1], int(trained[2])) if trained else (folder, 0)
    if key in run.steps:
        clock = training_clock(run.steps[key])
        return clock[-1][1] if clock else None
    made = run.stages.get(folder)
    return made.environment.get("seconds") if made else None


def training_clock(steps: Sequence[Step]) -> list[tuple[int, float]]:
    """(tokens seen, seconds of training) at each logged step; empty if the log does not tell all of them."""
    seconds = np.cumsum([step.seconds for step in steps]).tolist()
    return list(zip([step.tokens_seen for step in steps], seconds, strict=True)) if np.isfinite(seconds).all() else []


def domains(run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """By set, `source` or `label`, and name: tokens, and the losses of each arm, a value a seed."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in run.domains:
        of = found.setdefault(row.set, {}).setdefault(row.by, {}).setdefault(row.domain, {"tokens": 0, "losses": {}})
        of["tokens"] = row.tokens
        of["losses"].setdefault(row.arm, []).append(_finite(row.loss))
    return found


def _trained(run: Run, base: str | None, arm: str, seed: int) -> dict[str, Any]:
    curve = run.curve(arm, seed, run.target)
    goals = run.curve(base, seed, run.target) if base is not None else []
    return {
        **_model(run, arm, seed),
        "goal": _finite(goals[-1].loss) if goals else None,
        "tokens_to_target": _to_target(run, base, curve, goals) if base is not None and goals else None,
    }


def _model(run: Run, arm: str, seed: int) -> dict[str, Any]:
    """What evaluation and the logged steps say about one model."""
    rows = [row for row in run.evaluations if (row.arm, row.seed) == (arm, seed)]
    last = max(rows, key=lambda row: row.step, default=None)
    return {
        "step": last.step if last else None,
        "tokens_seen": last.tokens_seen if last else None,
        "tokens_selected": last.tokens_selected if last else None,
        "final": _final(run, arm, seed),
        **_logged(run.steps.get((arm, seed), [])),
    }


def _to_target(run: Run, base: str, curve: Sequence[Evaluation], goals: Sequence[Evaluation]) -> dict[str, Any] | None:
    """What it takes to come down to the baseline's final loss; shares are of what the baseline itself took for it."""
    reached, needed = (tokens_to_loss(points, goals[-1].loss) for points in (curve, goals))
    if reached is None or needed is None:
        return None
    seen, selected = reached
    arm, seed = curve[0].arm, curve[0].seed
    own, whole = _seconds(run, arm, seed, seen), _seconds(run, base, seed, needed[0])
    before = [seconds_of(run, folder) for folder in run.before.get(arm, [])]
    added = None if own is None or None in before else own + sum(filter(None, before))
    return {
        "seconds": own,
        "ratio_seconds": _share(own, whole),
        "seconds_with_reference": added,
        "ratio_seconds_with_reference": _share(added, whole),
        "tokens_seen": seen,
        "tokens_selected": selected,
        "ratio_seen": _share(seen, needed[0]),
        "ratio_selected": _share(selected, needed[1]),
        "at_first_checkpoint": seen == curve[0].tokens_seen,
    }


def _final(run: Run, arm: str, seed: int) -> dict[str, dict[str, float | None]]:
    """Per set, the loss and bits per byte of the last checkpoint evaluated on it."""
    curves = {name: run.curve(arm, seed, name) for name in sorted({row.set for row in run.evaluations})}
    return {
        name: {"loss": _finite(curve[-1].loss), "bits_per_byte": _finite(curve[-1].bits_per_byte)}
        for name, curve in curves.items()
        if curve
    }


def _logged(steps: Sequence[Step]) -> dict[str, Any]:
    """What the logged steps add up to."""
    speeds = [step.tokens_per_second for step in steps if math.isfinite(step.tokens_per_second)]
    labels = sorted({label for step in steps for label in step.labels})
    return {
        "mean_ratio": _share(sum(step.selected for step in steps), sum(step.eligible for step in steps)),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "label_share": {label: label_share(steps, label) for label in labels},
    }


def label_share(steps: Sequence[Step], label: str) -> float | None:
    """The share of the eligible tokens with `label` that were selected in `steps`; None if there were none."""
    counts = [step.labels[label] for step in steps if label in step.labels]
    return _share(sum(selected for _, selected in counts), sum(eligible for eligible, _ in counts))


def _seconds(run: Run, arm: str, seed: int, tokens: float) -> float | None:
    """Seconds of training until so many tokens were seen, of the arm and those it goes on after; None if not known."""
    clock, began, spent = training_clock(run.steps.get((arm, seed), [])), 0, 0.0
    if after := run.after.get(arm):
        began = max((row.tokens_seen for row in run.curve(after, seed, run.target)), default=0)
        whole = _seconds(run, after, seed, began)
        if whole is None:
            return None
        spent = whole
    if not clock or not 0 <= tokens - began <= clock[-1][0]:
        return None
    seen, seconds = zip((0, 0.0), *clock, strict=True)
    return spent + float(np.interp(tokens - began, seen, seconds))


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
