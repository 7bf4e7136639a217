"""The section of docs/results.md on preference training (benchmarks/results/preference.jsonl)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

PREFERENCE = """## Preference pairs whose key tokens are known

Synthetic pairs ([what is trained](preference.md)): {facts} facts an answer, right ones in the chosen, common errors in
the rejected; between them {least} to {most} words that say nothing, drawn alike for both. Selected are {ratio:.0%} of
an answer's tokens, about the share of key tokens, by an oracle of half the model's width that was trained with DPO for
{oracle_steps} steps of {oracle_pairs} pairs of its own. On other pairs, so many of the selected tokens
are key (and so many of the key tokens selected):

| | {seeds} |
|---|{ruler}
{precision}

Accuracy: the share of {held_out} held-out pairs whose chosen answer has gained more log-probability over the model
before training than the rejected one, all tokens counted, for every arm. {pairs} pairs an update, {steps} updates, mean
of {number} seeds (lowest and highest). `selected`: DPO on the oracle's tokens; `sepo`: the reference-free loss on the
same; `random`: DPO on as many tokens drawn at random; `key`: DPO on the tokens that are known to be key. Each arm has
the learning rate, of {rates}, that was best with a seed of its own.

    python benchmarks/preference.py

| arm | {points} | mean over training |
|---|{points_ruler}---|
{rows}

{verdict}

"""
Curve = dict[str, float]


def preference_section(lines: Sequence[dict[str, Any]]) -> str:
    """What was selected, and the accuracy of each arm after some updates."""
    [tuning] = [line for line in lines if "settings" in line]
    settings, seeds = tuning["settings"], [line for line in lines if "settings" not in line]
    curves: dict[str, list[Curve]] = {
        arm: [curve for line in seeds for curve in line["arms"][arm].values()] for arm in seeds[0]["arms"]
    }
    measured = list(curves["dpo"][0])
    points = [measured[0], measured[1], measured[len(measured) // 4], measured[len(measured) // 2], measured[-1]]
    precision = [
        f"| {side} | " + " | ".join("{:.1%} ({:.1%})".format(*line["selection"][side]) for line in seeds) + " |"
        for side in ("chosen", "rejected")
    ]
    rows = [
        f"| {arm} | {' | '.join(spread([one[point] for one in found]) for point in points)} "
        f"| {spread([mean(one.values()) for one in found])} |"
        for arm, found in curves.items()
    ]
    return PREFERENCE.format(
        facts=settings["facts"],
        least=settings["between"][0],
        most=settings["between"][1],
        ratio=settings["ratio"],
        oracle_steps=settings["oracle"]["steps"],
        oracle_pairs=settings["oracle"]["pairs"],
        seeds=" | ".join(f"seed {line['seed']}" for line in seeds),
        ruler="---|" * len(seeds),
        precision="\n".join(precision),
        held_out=settings["held_out"],
        pairs=settings["pairs"],
        steps=settings["steps"],
        number=len(seeds),
        rates=" and ".join(f"{rate:g}" for rate in settings["rates"]),
        points=" | ".join(f"{point} updates" for point in points),
        points_ruler="---|" * len(points),
        rows="\n".join(rows),
        verdict=verdict(curves),
    )


def spread(values: Sequence[float]) -> str:
    """The mean, lowest and highest."""
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def verdict(curves: dict[str, list[Curve]]) -> str:
    """By how much each seed's mean over training differs from plain DPO's, and how often an arm is above it."""
    plain, said = curves["dpo"], []
    for arm, found in curves.items():
        if arm == "dpo":
            continue
        pairs = list(zip(found, plain, strict=True))
        gains = ", ".join(f"{mean(one.values()) - mean(other.values()):+.3f}" for one, other in pairs)
        above, below = (
            sum(sign * one[point] > sign * other[point] for one, other in pairs for point in other) for sign in (1, -1)
        )
        said.append(f"- `{arm}`: {gains}; above it at {above} of {sum(map(len, plain))} measurements, below at {below}")
    return "Mean over training less that of plain DPO (`dpo`), seed by seed:\n\n" + "\n".join(said)
