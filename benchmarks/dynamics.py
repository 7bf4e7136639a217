"""Token dynamics: what the line fit costs, and what the classes are on real text.

    python benchmarks/dynamics.py fit [--tokens 100000000] [--checkpoints 15]     minutes, 6 GB of disk
    python benchmarks/dynamics.py runs RUN ...                                    run directories that have dynamics

`fit` makes losses in a file, fits and classifies them in a process of its own, and writes
benchmarks/results/dynamics.json; `runs` copies shares out of finished runs into benchmarks/results/token-dynamics.json.
`python benchmarks/write_results.py` makes docs/results.md of both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rho.runs import environment
from rho.trajectories import CHUNK, CLASSES, class_shares, token_dynamics

RESULTS = Path(__file__).parent / "results"


class OnDisk:
    """Losses in a file, mapped anew for each slice: what is mapped counts as memory, so nothing stays mapped."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, int]) -> None:
        self.path, self.dtype, self.shape = path, np.dtype(dtype), shape

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.memmap(self.path, self.dtype, "r", shape=self.shape)[part]


def make(path: Path, dtype: str, tokens: int, checkpoints: int) -> None:
    """Write trajectories: a level, a slope and noise; one token in 256, a block's first, has no loss."""
    draw = np.random.default_rng(0)
    x = np.linspace(0, 1, checkpoints, dtype=np.float32)
    with path.open("wb") as file:
        for start in range(0, tokens, CHUNK):
            size = min(CHUNK, tokens - start)
            level, slope = 4 * draw.random((2, size, 1), np.float32)
            losses = level + 4 + (slope / 4 - 0.6) * x + 0.3 * draw.standard_normal((size, checkpoints), np.float32)
            losses[::256] = np.nan
            file.write(losses.astype(dtype).tobytes())


def fit(path: Path, dtype: str, tokens: int, checkpoints: int) -> dict[str, Any]:
    """Time and peak memory of the fit, in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    found = token_dynamics(OnDisk(path, dtype, (tokens, checkpoints)))  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "before_mib": before // 1024,
        "shares": class_shares(found.class_N),
    }


def measure(tokens: int, checkpoints: int) -> dict[str, Any]:
    """Both precisions, each in a process of its own."""
    rows = {}
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "losses"
            make(path, dtype, tokens, checkpoints)
            command = [sys.executable, __file__, "one", str(path), dtype, str(tokens), str(checkpoints)]
            rows[dtype] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(dtype, rows[dtype], flush=True)
    return {
        "tokens": tokens,
        "checkpoints": checkpoints,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "rows": rows,
        "environment": environment(),
    }


def from_run(run: Path) -> dict[str, Any]:
    """Shares of the classes, and shares selected by label, of each arm of a run."""
    arms = {}
    for path in sorted(run.glob("dynamics/*/summary.json")):
        summary = json.loads(path.read_bytes())
        selection = summary["selection"]
        keys = ("share", "eligible", "excess_above_0")
        arms[path.parent.name] = {
            "tokens": summary["tokens"],
            "checkpoints": len(summary["checkpoints"]),
            "steps": [one["step"] for one in summary["checkpoints"]],
            "classes": {name: summary["classes"][name]["share"] for name in CLASSES},
            "labels": selection and {k: {key: v[key] for key in keys} for k, v in selection["by"]["label"].items()},
            "label_of_source": selection and selection["by"]["source and label"],
            "selected_by_class": selection and {k: v["share"] for k, v in selection["by"]["class"].items()},
            "preference": selection and selection["preference"],
        }
    return arms


def write(name: str, value: dict[str, Any]) -> None:
    """Into results/."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    print(RESULTS / name)


def main() -> None:
    """Measure, or copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("fit")
    job.add_argument("--tokens", type=int, default=100_000_000)
    job.add_argument("--checkpoints", type=int, default=15)
    jobs.add_parser("runs").add_argument("folders", type=Path, nargs="+")
    one = jobs.add_parser("one")  # what `fit` starts
    for name, kind in (("path", Path), ("dtype", str), ("tokens", int), ("checkpoints", int)):
        one.add_argument(name, type=kind)
    arguments = parser.parse_args()
    if arguments.job == "fit":
        write("dynamics.json", measure(arguments.tokens, arguments.checkpoints))
    elif arguments.job == "one":
        print(json.dumps(fit(arguments.path, arguments.dtype, arguments.tokens, arguments.checkpoints)))
    else:
        runs = {folder.name: from_run(folder) for folder in arguments.folders}
        write("token-dynamics.json", {"runs": runs, "environment": environment()})


if __name__ == "__main__":
    main()
