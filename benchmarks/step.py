"""The training step against what people run: time, memory and gradient error of forward and backward, interleaved.

    python benchmarks/step.py [--size NAME ...] [--rounds 9] [--threads 1]

Sizes `demo`, `8k`, `32k` and `wide` are for a CPU, `125m`, `1b` and `128k` for a GPU (random weights, bfloat16, 2,048
tokens a sequence); without `--size` all that suit the device are run. Needs torch, transformers and this folder's `src`
(installed, or `PYTHONPATH=src`). Writes benchmarks/results/step-MACHINE.json, where sizes measured before are kept.

All rows of a size run in one process, in a random order in every round; a ratio is the median over rounds of a row's
time by that of plain Transformers CLM in the same round, with quartiles. With one thread on a CPU, times are CPU time,
which a busy machine disturbs least. No optimizer: it is the same for all.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from rho.backends import MODULES, Backend, SumLoss, cce_sum, liger_sum, linear_loss, torch_sum
from rho.filtered import FilteredBackward
from rho.linear_loss import Head, linear_token_loss
from rho.objective import IGNORE_INDEX, excess_loss, predictors, slm_loss
from rho.runs import environment
from rho.selection import Selector

RESULTS = Path(__file__).parent / "results"
BASELINE = "plain Transformers CLM"
RATIOS = (0.3, 0.6)
SUMS: dict[Backend, SumLoss] = {"torch": torch_sum, "liger": liger_sum, "cce": cce_sum}


@dataclass(frozen=True)
class Size:
    """A llama and a batch; `accelerator` says where it is worth running."""

    vocab: int
    width: int
    layers: int
    heads: int
    inner: int
    rows: int
    length: int
    key_value_heads: int | None = None
    tied: bool = True
    accelerator: bool = False

    def model(self, device: torch.device) -> LlamaForCausalLM:
        """With random weights, ready to train."""
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads or self.heads,
            intermediate_size=self.inner,
            max_position_embeddings=self.length,
            tie_word_embeddings=self.tied,
        )
        return LlamaForCausalLM(config).to(device, torch.bfloat16 if self.accelerator else torch.float32).train()


SIZES = {
    "demo": Size(4096, 128, 4, 4, 352, rows=8, length=256),
    "8k": Size(8192, 256, 8, 4, 704, rows=4, length=512),
    "32k": Size(32000, 256, 8, 4, 704, rows=4, length=512),
    "wide": Size(8192, 512, 8, 8, 1376, rows=4, length=512),
    "125m": Size(32000, 768, 12, 12, 2048, rows=8, length=2048, accelerator=True),
    "1b": Size(32000, 2048, 22, 32, 5632, 4, 2048, key_value_heads=4, tied=False, accelerator=True),  # TinyLlama
    "128k": Size(128256, 2048, 16, 32, 8192, 4, 2048, key_value_heads=8, accelerator=True),  # Llama 3.2 1B
}


@dataclass
class Batch:
    """What a loss is made of beside hidden states and head."""

    input_ids: Tensor
    labels: Tensor
    ref_loss: Tensor
    thresholds: dict[float, float]  # that of scope running by ratio, as if tracked perfectly
    chunk: int | None


# (unshifted hidden states, head, batch) -> the mean loss of the trained tokens and their mask
Loss = Callable[[Tensor, Head, Batch], tuple[Tensor, Tensor]]


def transformers_clm(hidden: Tensor, head: Head, batch: Batch) -> tuple[Tensor, Tensor]:
    """As in the forward of `LlamaForCausalLM`."""
    logits = F.linear(hidden, head.weight_VD)
    loss = ForCausalLMLoss(logits=logits, labels=batch.labels, vocab_size=len(head.weight_VD))
    return loss, batch.labels != IGNORE_INDEX


def library_clm(sum_loss: SumLoss, hidden: Tensor, head: Head, batch: Batch) -> tuple[Tensor, Tensor]:
    """Another library's fused loss of all tokens, without one for each."""
    mask = batch.labels != IGNORE_INDEX
    rows = predictors(hidden).flatten(0, 1)
    return sum_loss(rows, head.weight_VD, batch.labels.flatten()) / mask.sum(), mask


def naive_losses(hidden: Tensor, head: Head, batch: Batch) -> Tensor:
    """A loss a token from full logits. Hidden states are shifted, not logits: that copy is spared the naive rows."""
    logits = F.linear(predictors(hidden), head.weight_VD).float()
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(batch.labels)


def naive_slm(ratio: float, hidden: Tensor, head: Head, batch: Batch) -> tuple[Tensor, Tensor]:
    """What re-implementations do: full logits, a loss a token, a mask."""
    loss = naive_losses(hidden, head, batch)
    mask = Selector("excess", ratio).select([excess_loss(loss.detach(), batch.ref_loss)], batch.labels != IGNORE_INDEX)
    return slm_loss(loss, mask, mask.sum()), mask


def ours(
    selector: Selector, hidden: Tensor, head: Head, batch: Batch, backend: Backend = "rho"
) -> tuple[Tensor, Tensor]:
    """One pass over the head, or two where another library's loss follows ours."""

    def choose(part: slice, loss: Tensor, seen: Tensor, everything: bool) -> Tensor:
        score = excess_loss(loss, batch.ref_loss[part])
        if selector.scope == "step" and everything:
            return selector.select_step([[score]], [seen])[0]
        return selector.select([score], seen, batch.thresholds.get(selector.ratio))

    total, _, mask = linear_loss(backend)(
        predictors(hidden),
        head,
        batch.labels,
        choose,
        "sequence" if selector.scope == "sequence" else "batch",
        chunk=batch.chunk,
    )
    return total / mask.sum(), mask


def rows() -> dict[str, Loss]:
    """What is measured, by name."""
    found: dict[str, Loss] = {BASELINE: transformers_clm}
    here = libraries()
    for name, sum_loss in SUMS.items():
        if here[name]:
            found[f"chunked CLM, {name}"] = partial(library_clm, sum_loss)
    found["chunked CLM, ours"] = partial(ours, Selector("excess", 1.0))
    for ratio in RATIOS:
        found[f"naive SLM {ratio}"] = partial(naive_slm, ratio)
    for scope in ("sequence", "running", "batch", "step"):
        for ratio in RATIOS:
            found[f"ours, {scope} {ratio}"] = partial(ours, Selector("excess", ratio, scope))  # type: ignore[arg-type]
    for name in SUMS:
        if here[name]:
            found[f"two passes, {name} 0.6"] = partial(ours, Selector("excess", 0.6), backend=name)  # type: ignore[arg-type]
    return found


def libraries() -> dict[Backend, bool]:
    """Whose losses are here and work."""
    found: dict[Backend, bool] = {"torch": hasattr(F, "linear_cross_entropy")}
    for name, module in MODULES.items():
        try:
            __import__(module)
            found[name] = torch.cuda.is_available()
        except Exception:  # whatever a library without its GPU raises
            found[name] = False
    return found


def backbone(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Hidden states, unshifted."""
    return model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state


def with_reference(loss: Loss, naive: bool, reference: LlamaForCausalLM, model: LlamaForCausalLM, batch: Batch) -> None:
    """A step that makes the reference losses by itself, from full logits or by our head."""
    with torch.no_grad():
        hidden, head = backbone(reference, batch), Head(reference.lm_head.weight)
        if naive:
            found = naive_losses(hidden, head, batch)
        else:
            flat = predictors(hidden).flatten(0, 1)
            found = linear_token_loss(flat, head, batch.labels.flatten(), chunk=batch.chunk)[0].view_as(batch.labels)
    step(loss, model, replace(batch, ref_loss=found))


def step(loss: Loss, model: LlamaForCausalLM, batch: Batch) -> None:
    """Forward and backward."""
    loss(backbone(model, batch), Head(model.lm_head.weight), batch)[0].backward()


def filtered_step(loss: Loss, model: LlamaForCausalLM, filtered: FilteredBackward, batch: Batch) -> None:
    """A step of a model that is not the one whose gradients are cleared for every row."""
    model.zero_grad()
    with filtered:
        step(loss, model, batch)


def head_only(loss: Loss, hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    """Forward and backward of head and loss, the hidden states given; the mask."""
    total, mask = loss(hidden, Head(weight), batch)
    total.backward()
    return mask


# --- measuring ---------------------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """How much memory grows at most while something runs, as the allocator has it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of CPU time with one thread on a CPU, else as a clock on the wall has it."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def exact_gradients(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss of the tokens in a mask, in float64, for the (unshifted) hidden states and weight."""
    weight, wide = weight.double(), hidden.detach().double().requires_grad_()
    aligned = predictors(wide)
    flat, kept = aligned.detach().flatten(0, 1), mask.flatten().nonzero().squeeze(-1)
    grad_rows, grad_weight = torch.zeros_like(flat), torch.zeros_like(weight)
    for some in kept.split(256):
        grad = (flat[some] @ weight.T).softmax(-1)
        grad[torch.arange(len(some)), labels.flatten()[some]] -= 1.0
        grad /= len(kept)
        grad_rows[some] = grad @ weight
        grad_weight += grad.T @ flat[some]
    return torch.autograd.grad(aligned, wide, grad_rows.view_as(aligned))[0], grad_weight


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Of norms."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each run, and its ratios to the first and to our CLM in the same round."""
    order, times = list(runs), {name: [] for name in runs}
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            found = seconds(runs[name], device)
            if number:  # the first round warms up
                times[name].append(found)
    own = times["chunked CLM, ours"]
    return {
        name: {
            "seconds": round(statistics.median(found), 5),
            "to_transformers": spread([a / b for a, b in zip(found, times[BASELINE], strict=True)]),
            "to_chunked": spread([a / b for a, b in zip(found, own, strict=True)]),
        }
        for name, found in times.items()
    }


def make_batch(size: Size, model: LlamaForCausalLM, device: torch.device, chunk: int | None) -> tuple[Batch, Tensor]:
    """Random tokens and reference losses; and the hidden states that the model makes of them."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocab, (size.rows, size.length), generator=draw).to(device)
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    batch = Batch(ids, labels, torch.zeros(labels.shape, device=device), {}, chunk)
    with torch.no_grad():
        hidden = backbone(model, batch)
        flat = predictors(hidden).flatten(0, 1)
        loss = linear_token_loss(flat, Head(model.lm_head.weight), labels.flatten(), chunk=chunk)[0].view_as(labels)
    batch.ref_loss = loss + torch.randn(labels.shape, generator=draw).to(device)
    score = (loss - batch.ref_loss)[labels != IGNORE_INDEX]
    batch.thresholds = {ratio: score.quantile(1 - ratio).item() for ratio in RATIOS}
    return batch, hidden.detach().requires_grad_()


def measure(size: Size, rounds: int, device: torch.device, chunk: int | None) -> dict[str, Any]:
    """All rows of one size."""
    torch.manual_seed(0)
    model = size.model(device)
    batch, hidden = make_batch(size, model, device, chunk)
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    losses = rows()
    result: dict[str, Any] = {}

    def fresh(run: Callable[[], Any]) -> Any:
        model.zero_grad()
        hidden.grad = weight.grad = None
        return run()

    for name, loss in losses.items():
        head_bytes = fresh(lambda: peak_bytes(partial(head_only, loss, hidden, weight, batch), device))  # noqa: B023
        mask = fresh(lambda: head_only(loss, hidden, weight, batch))  # noqa: B023
        exact = exact_gradients(hidden.detach(), weight.detach(), batch.labels, mask)
        errors = [relative_error(leaf.grad, best) for leaf, best in zip((hidden, weight), exact, strict=True)]
        step_bytes = fresh(lambda: peak_bytes(partial(step, loss, model, batch), device))  # noqa: B023
        result[name] = {"gradient_error": max(errors), "head_bytes": head_bytes, "step_bytes": step_bytes}
        result[name]["selected"] = int(mask.sum())
        del exact
    heads = {name: partial(fresh, partial(head_only, loss, hidden, weight, batch)) for name, loss in losses.items()}
    for name, found in interleaved(heads, rounds, device).items():
        result[name]["head"] = found
    steps = {name: partial(fresh, partial(step, loss, model, batch)) for name, loss in losses.items()}
    reference = size.model(device).eval().requires_grad_(False)
    for name, naive in (("naive SLM 0.6", True), ("ours, sequence 0.6", False)):
        online = partial(with_reference, losses[name], naive, reference, model, batch)
        steps[f"{name}, online reference"] = partial(fresh, online)
    for what, exact in (("last block skipped", True), ("filtered backward", False)):
        other = copy.deepcopy(model)
        filtered = FilteredBackward(other, exact)
        for ratio in RATIOS:
            name = f"ours, sequence {ratio}"
            steps[f"{name}, {what}"] = partial(fresh, partial(filtered_step, losses[name], other, filtered, batch))
    for name, found in interleaved(steps, rounds, device).items():
        per_second = batch.labels.numel() / found["seconds"]
        result.setdefault(name, {}).update(step=found, tokens_per_second=round(per_second, 1))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"size": vars(size), "parameters": parameters, "chunk": chunk, "rounds": rounds, "rows": result}


def table(rows: dict[str, Any]) -> str:
    """One size for the terminal."""
    lines = [f"{'':<38}{'step s':>9}{'x plain':>9}{'x chunked':>10}{'head x':>8}{'MiB':>9}{'error':>10}"]
    for name, row in rows.items():
        head = f"{row['head']['to_transformers']['median']:8.3f}" if "head" in row else " " * 8
        rest = f"{row['head_bytes'] / 2**20:9.1f}{row['gradient_error']:10.1e}" if "head" in row else ""
        ratios = f"{row['step']['to_transformers']['median']:9.3f}{row['step']['to_chunked']['median']:10.3f}"
        lines.append(f"{name:<38}{row['step']['seconds']:9.3f}{ratios}{head}{rest}")
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """What a reader calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} x {cpu}"


def main() -> None:
    """Measure the sizes asked for and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), help="those that suit the device unless given")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--chunk", type=int, help="rows of logits at once")
    parser.add_argument("--out", type=Path, help="results/step-MACHINE.json unless given")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    name = machine(device)
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    out = arguments.out or RESULTS / f"step-{slug}.json"
    result = {"sizes": {}} | (json.loads(out.read_bytes()) if out.is_file() else {})
    clock = "CPU time" if device.type == "cpu" and arguments.threads == 1 else "wall time"
    result |= {"machine": name, "environment": environment(), "threads": arguments.threads, "clock": clock}
    result["not_run"] = [f"chunked CLM, {library}" for library, found in libraries().items() if not found]
    for size in arguments.size or [one for one, size in SIZES.items() if size.accelerator == (device.type == "cuda")]:
        load = os.getloadavg()[0]
        result["sizes"][size] = measure(SIZES[size], arguments.rounds, device, arguments.chunk) | {"load": load}
        print(f"\n{size} on {name}\n{table(result['sizes'][size]['rows'])}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"not run, for want of the library: {', '.join(result['not_run']) or 'nothing'}\n{out}")


if __name__ == "__main__":
    main()
