"""How the step's time and the loss's memory grow with sequence length, vocabulary and batch.

    python benchmarks/growth.py [--rounds 5]

Plain Transformers CLM against selection (ratio 0.6, scope sequence), forward and backward of a llama of 4 layers, 256
wide, measured as in benchmarks/step.py, one point after the other; and the memory of head and loss alone at a
vocabulary of 32,000. Writes benchmarks/results/growth.json.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch
from step import BASELINE, RESULTS, Batch, Size, head_only, interleaved, machine, make_batch, ours, peak_bytes, step
from step import transformers_clm as plain

from rho.runs import environment
from rho.selection import Selector

BASE = {"vocab": 8192, "width": 256, "layers": 4, "heads": 4, "inner": 704, "rows": 2, "length": 512}
AXES = {
    "length": (256, 512, 1024, 2048),
    "vocab": (4096, 8192, 16384, 32768, 65536),
    "rows": (1, 2, 4, 8),
}
TOKENS = (1024, 2048, 4096, 8192, 16384)
SELECTION = "ours, sequence 0.6"
LOSSES = {
    BASELINE: plain,
    SELECTION: partial(ours, Selector("excess", 0.6)),
    "chunked CLM, ours": partial(ours, Selector("excess", 1.0)),
}


def point(size: Size, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of the step, and its ratios to plain training."""
    torch.manual_seed(0)
    model = size.model(device)
    batch, _ = make_batch(size, model, device, None)

    def run(loss: Any) -> None:
        model.zero_grad()
        step(loss, model, batch)

    return interleaved({name: partial(run, loss) for name, loss in LOSSES.items()}, rounds, device)


def memory(size: Size, device: torch.device) -> dict[str, Any]:
    """Bytes that head and loss take at most, and those of the gradients of hidden states and weight among them."""
    torch.manual_seed(0)
    hidden = torch.randn(size.rows, size.length, size.width, device=device).requires_grad_()
    weight = torch.randn(size.vocab, size.width, device=device).mul_(0.02).requires_grad_()
    labels = torch.randint(size.vocab, (size.rows, size.length), device=device)
    batch = Batch(labels, labels, torch.zeros(labels.shape, device=device), {}, None)
    found: dict[str, Any] = {"hidden_bytes": hidden.numel() * 4, "weight_bytes": weight.numel() * 4, "rows": {}}
    for name, loss in LOSSES.items():
        hidden.grad = weight.grad = None
        found["rows"][name] = peak_bytes(partial(head_only, loss, hidden, weight, batch), device)
    return found


def main() -> None:
    """Measure every point and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine(device), "environment": environment(), "base": BASE, "axes": {}}
    for axis, values in AXES.items():
        found["axes"][axis] = {}
        for value in values:
            one = point(Size(**{**BASE, axis: value}), arguments.rounds, device)
            found["axes"][axis][value] = one
            print(axis, value, {name: row["seconds"] for name, row in one.items()}, flush=True)
    found["memory"] = {n: memory(Size(32000, 256, 1, 4, 704, 1, n), device) for n in TOKENS}
    (RESULTS / "growth.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
