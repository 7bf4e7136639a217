"""Recipes on real text: what their selection rules, references and rounds came to.

    python benchmarks/recipes.py [NAME ...] [--out FOLDER]       about a quarter of an hour each on two cores

Runs `recipes/NAME.yaml` (or goes on with it) and copies the report's summary to benchmarks/results/recipes/NAME.json;
`python benchmarks/write_results.py` makes docs/results.md of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rho.config import load_config
from rho.pipeline import run
from rho.runs import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "recipes"
NAMES = [
    "math-demo",
    "self-reference",
    "weak-to-strong",
    "iterated-reference",
    "selection-rules",
    "cross-tokenizer",
    "filtered-backward",
]


def main() -> None:
    """Run the recipes asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], default=NAMES)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        page = run(load_config(HERE.parent / "recipes" / f"{name}.yaml"), arguments.out / name)
        summary = json.loads((page.parent / "summary.json").read_bytes())
        result = {"environment": environment(), "summary": summary}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        print(RESULTS / f"{name}.json")


if __name__ == "__main__":
    main()
