"""The demo over three seeds, twice: does selection win for each seed, and is every weight the same the second time?

    python benchmarks/demo_seeds.py [PART ...] [--out FOLDER]      about half an hour on two cores

The parts (`one` seed, to be timed on a quiet machine; the `first` and the `second` run of all seeds) may be done one by
one: the result is written when both runs of all seeds are there.

Writes benchmarks/results/demo.json; `python benchmarks/write_results.py` makes docs/results.md of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from rho.runs import environment, hash_file

PARTS = {"one": [0], "first": [0, 1, 2], "second": [0, 1, 2]}
HERE = Path(__file__).parent
RESULT = HERE / "results" / "demo.json"


def run_demo(folder: Path, seeds: list[int]) -> dict[str, float]:
    """Run the demo in a process of its own: seconds to the first progress line and in all, MiB at most, threads."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [str(Path(sys.executable).parent / "rho"), "demo", "--out", str(folder), "--set", f"train.seeds={seeds}"]
    started = time.monotonic()
    first = None
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", flush=True)
            if first is None and "tokenizer" in line:  # the first stage's first line
                first = time.monotonic() - started
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "first_line_seconds": round(first or 0.0, 1),
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
        "threads": torch.get_num_threads(),
    }


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of every model a run trained."""
    return {
        str(f.parent.parent.relative_to(folder)): hash_file(f) for f in sorted(folder.glob("**/model/*.safetensors"))
    }


def main() -> None:
    """Do the parts asked for; with all of them done, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-demo"))
    arguments = parser.parse_args()
    out: Path = arguments.out
    for part in arguments.parts:
        measured = run_demo(out / part, PARTS[part])
        (out / f"{part}.json").write_text(json.dumps(measured))
    runs = {part: json.loads(file.read_text()) for part in PARTS if (file := out / f"{part}.json").is_file()}
    if "first" not in runs:
        print(f"done: {' '.join(runs)}; still to do: {' '.join(PARTS.keys() - runs.keys())}")
        return
    first, second = weights(out / "first"), weights(out / "second")
    result = {
        "machine": f"{os.cpu_count()} x {cpu_name()}",
        "environment": environment(),
        "runs": runs,
        "weights": first,
        "repeated": {name: second[name] == first[name] for name in second},
        "summary": json.loads((out / "first" / "report" / "summary.json").read_bytes()),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(RESULT)


def cpu_name() -> str:
    """The processor, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
