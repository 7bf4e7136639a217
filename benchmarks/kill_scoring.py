"""Kill scoring with SIGKILL at random moments, two workers at a time, and compare the stores with an undisturbed one.

    python benchmarks/kill_scoring.py --kills 100

Two processes score one folder. Both are killed, after a random time or one of them at a random opening or renaming of a
file in the folder; they start again a few times, and a last one completes the store.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

from kill_training import Killer, command, finish, fork, make_assets

import rho.score
from rho.corpus import Corpus
from rho.models import ModelConfig
from rho.runs import read_manifest
from rho.score import ScoreConfig, score_corpus

KILLS_A_STORE = 4


def run(assets: Path, out: Path, at: int | None = None) -> None:
    """Score, or go on scoring, into `out`, noting each shard that is begun; killed at event number `at`."""
    original = rho.score._score_shard

    def noted(*args: Any) -> int:
        with open(out.parent / f"{out.name}-begun", "a") as file:
            file.write(f"{args[2]['file']}\n")
        return original(*args)

    rho.score._score_shard = noted
    killer = Killer(out, at)
    corpus, reference = Corpus(assets / "corpus"), ModelConfig(path=str(assets / "reference"))
    score_corpus(ScoreConfig(batch_size=2), corpus, reference, out)
    (out.parent / f"{out.name}-events").write_text(str(killer.events))


def content(store: Path) -> dict[str, str]:
    """The shards' bytes and the manifest's fingerprint."""
    shards = {path.name: path.read_bytes().hex() for path in sorted(store.glob("*.parquet"))}
    return shards | {"fingerprint": read_manifest(store).fingerprint}


def disturb(assets: Path, out: Path, draw: random.Random, seconds: float, events: int) -> bool:
    """Let two workers score, and kill one of them; whether it was not done before."""
    log = out.parent / f"{out.name}.log"
    at = draw.randint(1, events) if draw.random() < 0.5 else None
    pids = [fork(partial(run, assets, out, at), log), fork(partial(run, assets, out), log)]
    if at is None:
        time.sleep(draw.uniform(0.0, seconds))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(code not in (0, -signal.SIGKILL) for code in codes):
        raise RuntimeError(f"exit codes {codes}:\n{log.read_text()[-4000:]}")
    return any(codes)


def kill_all(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Disturb stores until `kills` are done; what differed, and the most shards that were begun again for one kill."""
    draw, log = random.Random(seed), folder / "log"
    finish(fork(lambda: make_assets(folder, shard_blocks=2), log), log)
    started = time.monotonic()
    finish(fork(partial(run, folder, folder / "whole"), log), log)
    seconds, events = time.monotonic() - started, int((folder / "whole-events").read_text())
    whole = content(folder / "whole")
    shards = len(whole) - 1
    done = stores = again = 0
    differing: list[str] = []
    while done < kills:
        out = folder / f"store-{stores}"
        kills_here = sum(disturb(folder, out, draw, seconds, events) for _ in range(min(KILLS_A_STORE, kills - done)))
        finish(fork(partial(run, folder, out), log), log)
        if content(out) != whole:
            differing.append(out.name)
        begun = len((out.parent / f"{out.name}-begun").read_text().splitlines())
        again = max(again, begun - shards - 2 * kills_here)
        done, stores = done + kills_here, stores + 1
        shutil.rmtree(out)
    identical = not differing and again <= 0
    found = {"kills": done, "stores": stores, "identical": identical, "differing": differing}
    return found | {"shards begun again beyond one a killed worker": max(again, 0)}


if __name__ == "__main__":
    command(__doc__, "kill_scoring", kill_all)
