"""Kill tiny training runs with SIGKILL at random moments, resume them until they are done, and compare with whole runs.

    python benchmarks/kill_training.py --kills 100

One process pays for the imports and forks every run. Half of the kills come after a random time, half at a random
opening, renaming or removal of a file in the run's folder: most of those belong to checkpoints.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.models import ModelConfig, make_model
from rho.runs import environment, write_json
from rho.score import ScoreConfig, score_corpus
from rho.store import ScoreStore
from rho.tokenizer import Tokenizer, train_tokenizer
from rho.train import TrainConfig, train

KILLS_A_RUN = 3
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,  # so that the state of the random number generator matters
}
COMMON = {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "logging_steps": 3, "use_cpu": True}
RUNS = {  # several epochs, a threshold that is tracked, accumulation; and checkpoints that are removed again
    "running": TrainConfig(
        ratio=0.6,
        scope="running",
        arguments={**COMMON, "gradient_accumulation_steps": 2, "num_train_epochs": 3, "save_steps": 2},
    ),
    "sequence": TrainConfig(ratio=0.6, arguments={**COMMON, "max_steps": 12, "save_steps": 1, "save_total_limit": 2}),
}
SAME = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")  # of the last checkpoint
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def fork(work: Callable[[], None], log: Path) -> int:
    """Do `work` in a forked process that writes to `log`; its process id."""
    if pid := os.fork():
        return pid
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def finish(pid: int, log: Path) -> None:
    """Wait for a process that must succeed."""
    if status := os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"exit status {status}:\n{log.read_text()[-4000:]}")


def make_assets(folder: Path, shard_blocks: int = 4096) -> None:
    """A corpus of 22 blocks of 16 tokens, and an untrained model's scores of it."""
    draw = random.Random(0)
    words = ["the", "shift", "by", "one", "is", "done", "in", "function", "def", "add", "return", "selected"]
    text = [" ".join(draw.choices(words, k=40)) for _ in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    train_tokenizer([str(folder / "text.jsonl")], 300, folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer" / "tokenizer")
    sources = [str(folder / "text.jsonl")]
    config = CorpusConfig(sources=sources, block_length=16, max_tokens=22 * 16, shard_blocks=shard_blocks)
    build_corpus(config, tokenizer, folder / "corpus")
    reference = make_model(ModelConfig(architecture=ARCHITECTURE), Corpus(folder / "corpus").vocab_size, seed=1)
    reference.save_pretrained(folder / "reference")
    tokenizer.save(folder / "reference")
    model = ModelConfig(path=str(folder / "reference"))
    score_corpus(ScoreConfig(dtype="float32"), Corpus(folder / "corpus"), model, folder / "scores")


class Killer:
    """Counts what happens to files in a folder, and dies at event number `at`."""

    def __init__(self, folder: Path, at: int | None = None) -> None:
        self.folder, self.at, self.events = str(folder), at, 0
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and str(args[0]).startswith(self.folder) and (event != "open" or "r" not in str(args[1])):
            self.events += 1
            if self.events == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def run(name: str, assets: Path, out: Path, at: int | None = None) -> None:
    """Train, or go on training, into `out`; killed at event number `at`."""
    killer = Killer(out, at)
    train(
        RUNS[name],
        Corpus(assets / "corpus"),
        ModelConfig(architecture=ARCHITECTURE),
        out,
        ScoreStore(assets / "scores"),
    )
    killer.folder = "nothing more"
    (out.parent / f"{out.name}-events").write_text(str(killer.events))


def outcome(out: Path) -> dict[str, Any]:
    """What must be the same: final weights, optimizer, schedule, random state and step log."""
    last = max(out.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    found: dict[str, Any] = {f"last {name}": (last / name).read_bytes() for name in SAME}
    found["weights"] = (out / "model" / "model.safetensors").read_bytes()
    found["step log"] = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    for record in found["step log"]:
        for clock in ("tokens_per_second", "seconds", "cpu_seconds"):
            del record[clock]
    return found


def where(out: Path) -> str:
    """What a killed run was at, as its folder shows."""
    if not (out / "manifest.json").exists():
        return "before it began"
    if list((out / "checkpoints" / ".partial").glob("checkpoint-*")):
        return "in checkpoint writing or removal"
    if (out / "model").exists():
        return "in writing the final model"
    return "between checkpoints" if list(out.glob("checkpoints/checkpoint-*")) else "before the first checkpoint"


def kill_once(name: str, assets: Path, out: Path, draw: random.Random, seconds: float, events: int) -> str | None:
    """Start or resume a run and kill it; where it was hit, None if it was done before."""
    log = out.parent / f"{out.name}.log"
    if draw.random() < 0.5:
        at = draw.randint(1, events)
        pid = fork(partial(run, name, assets, out, at), log)
    else:
        pid = fork(partial(run, name, assets, out), log)
        time.sleep(draw.uniform(0.0, seconds))
        os.kill(pid, signal.SIGKILL)  # until it is waited for the id stays its own
    status = os.waitpid(pid, 0)[1]
    if status == 0:
        return None
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError(f"exit status {status}:\n{log.read_text()[-4000:]}")
    return where(out)


def kill_all(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill runs until `kills` are done, each resumed to its end after a few; what was hit and what differed."""
    draw = random.Random(seed)
    log = folder / "log"
    finish(fork(lambda: make_assets(folder), log), log)
    whole, seconds, events = {}, {}, {}
    for name in RUNS:
        started = time.monotonic()
        finish(fork(partial(run, name, folder, folder / name), log), log)
        seconds[name] = time.monotonic() - started
        whole[name], events[name] = outcome(folder / name), int((folder / f"{name}-events").read_text())
    hit: Counter[str] = Counter()
    differing: list[str] = []
    runs = 0
    while hit.total() < kills:
        name, out = list(RUNS)[runs % len(RUNS)], folder / f"killed-{runs}"
        for _ in range(min(KILLS_A_RUN, kills - hit.total())):
            found = kill_once(name, folder, out, draw, seconds[name], events[name])
            if found is None:
                break
            hit[found] += 1
        finish(fork(partial(run, name, folder, out), log), log)
        differing += [f"{out.name}: {what}" for what, value in outcome(out).items() if value != whole[name][what]]
        shutil.rmtree(out)
        runs += 1
    return {"kills": hit.total(), "hit": dict(hit), "runs": runs, "identical": not differing, "differing": differing}


def command(description: str | None, name: str, kill_all: Callable[[int, int, Path], dict[str, Any]]) -> None:
    """Parse the arguments, kill, print and write the result to results/NAME.json."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{name}.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    make_model(ModelConfig(architecture=ARCHITECTURE), 300)  # its imports are paid for once
    gc.freeze()  # or every fork copies, and `Trainer` collects, what they left
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = kill_all(args.kills, args.seed, Path(folder))
    result |= {"seed": args.seed, "seconds": round(time.monotonic() - started, 1), "cpus": os.cpu_count()}
    result |= {"platform": platform.platform(), **environment()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["identical"] else 1)


if __name__ == "__main__":
    command(__doc__, "kill_training", kill_all)
