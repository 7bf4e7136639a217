"""Write docs/results.md from benchmarks/results/*.json: no number in it is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"


def demo_section(result: dict[str, Any]) -> list[str]:
    """The demo over seeds: final losses, tokens to target, reproducibility, time and memory."""
    summary, one = result["summary"], result["one_seed"]
    target = summary["target"]
    lines = [
        "## The embedded demo",
        "",
        "Prose hidden in raw Python files, learned by a 1.3 M parameter model (`recipes/demo.yaml`). Loss is nats a token on",
        f"held-out docstrings (set `{target}`), at equal tokens processed. The reference's is {summary['reference_loss']:.4f}.",
        "*Tokens to target*: share of CLM's tokens at which an arm reaches CLM's final loss, interpolated.",
        "",
        "    make bench        # runs benchmarks/demo_seeds.py",
        "",
        "| seed | arm | final target loss | bits per byte | tokens to target | of them selected | loss on the noisy corpus |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed in next(iter(summary["arms"].values())):
        for arm, seeds in summary["arms"].items():
            run = seeds[seed]
            reached = run["tokens_to_target"]
            seen, selected = (
                (f"{reached['ratio_seen']:.2f}", f"{reached['ratio_selected']:.2f}") if reached else ("not reached", "-")
            )
            final, noisy = run["final"][target], run["final"]["noisy"]
            lines.append(
                f"| {seed} | {arm} | {final['loss']:.4f} | {final['bits_per_byte']:.4f} | {seen} | {selected} "
                f"| {noisy['loss']:.4f} |"
            )
    lines += ["", "Share of each kind of token that was selected, over the whole run, seed 0:", ""]
    labels = list(next(iter(summary["arms"]["slm"].values()))["label_share"])
    lines += ["| arm | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for arm, seeds in summary["arms"].items():
        share = next(iter(seeds.values()))["label_share"]
        lines.append(f"| {arm} | " + " | ".join(f"{share[label]:.1%}" for label in labels) + " |")
    same = "identical, bit for bit" if result["second_run_identical"] else "NOT identical"
    lines += [
        "",
        f"A second run of all three seeds gave {len(result['weights'])} models with weights that are {same}. One seed with "
        f"three arms took {one['seconds']:.0f} s",
        f"({one['first_line_seconds']:.1f} s to the first progress line, peak memory {one['peak_memory_mib']} MiB) on "
        f"{result['machine']}.",
        "",
    ]
    return lines


def main() -> None:
    demo = json.loads((HERE / "results" / "demo.json").read_bytes())
    lines = [
        "# Results",
        "",
        "Made by `python benchmarks/write_results.py` from the JSON under `benchmarks/results/`.",
        "",
        *demo_section(demo),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(demo["environment"].items())) + ".",
    ]
    PAGE.write_text("\n".join(lines) + "\n")
    print(PAGE)


if __name__ == "__main__":
    main()
