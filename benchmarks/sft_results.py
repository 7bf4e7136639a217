"""The section of docs/results.md on fine-tuning with wrong answers (benchmarks/results/sft.json)."""

from __future__ import annotations

from statistics import mean
from typing import Any

SFT = """## Fine-tuning on answers of which {corrupted:.0%} are wrong

Grade-school problems ([sft.yaml](../recipes/sft.yaml), [what the rules are](sft.md)): {mixed:,} to be learned,
{wrong} of them with the solution of another problem. Loss is nats a token of the right solutions to {heldout} held-out
problems, after {steps} steps of {rows_a_step} blocks. The model ({width} wide, {layers} layers) was trained on {base:,}
other problems before, for {base_steps} steps; the reference is that model after {reference_steps} steps on {clean:,}
problems with right solutions: {reference:.4f} where the base model is at {base_loss:.4f}.

    python benchmarks/sft.py

| arm | {seeds} | mean | right answers selected | wrong ones |
|---|{ruler}---|---|---|
{rows}

{verdict}

"""


def sft_section(result: dict[str, Any]) -> str:
    """Loss of each arm and seed, and the share of right and wrong answers' tokens that it was trained on."""
    summary, problems = result["summary"], result["problems"]
    losses = {
        arm: {seed: run["final"][summary["target"]]["loss"] for seed, run in seeds.items()}
        for arm, seeds in summary["arms"].items()
    }
    shares = {
        arm: {label: mean(run["label_share"][label] for run in seeds.values()) for label in ("clean", "corrupted")}
        for arm, seeds in summary["arms"].items()
    }
    references = {name: one["final"][summary["target"]]["loss"] for name, one in summary["references"].items()}
    seeds = list(losses["clm"])
    rows = [
        f"| {arm} | "
        + " | ".join(f"{of_seed[seed]:.4f}" for seed in seeds)
        + f" | {mean(of_seed.values()):.4f} | {shares[arm]['clean']:.1%} | {shares[arm]['corrupted']:.1%} |"
        for arm, of_seed in losses.items()
    ]
    return SFT.format(
        corrupted=result["corrupted"],
        wrong=round(result["corrupted"] * problems["mixed"]),
        steps=result["steps"],
        rows_a_step=result["rows"],
        rows="\n".join(rows),
        base=problems["base"],
        clean=problems["clean"],
        mixed=problems["mixed"],
        heldout=problems["heldout"],
        width=result["base"]["architecture"]["hidden_size"],
        layers=result["base"]["architecture"]["num_hidden_layers"],
        base_steps=result["base"]["max_steps"],
        reference_steps=result["reference_steps"],
        reference=references["reference"],
        base_loss=references["reference-base"],
        seeds=" | ".join(f"seed {seed}" for seed in seeds),
        ruler="---|" * len(seeds),
        verdict=verdict(losses),
    )


def verdict(losses: dict[str, dict[str, float]]) -> str:
    """Which arms end below plain fine-tuning, with every seed."""
    plain = losses["clm"]
    better = [arm for arm, found in losses.items() if all(found[seed] < plain[seed] for seed in plain)]
    if not better:
        return "No rule ends below plain fine-tuning (`clm`) with every seed."
    return f"Below plain fine-tuning (`clm`) with every seed: {', '.join(f'`{arm}`' for arm in better)}."
