"""Scoring by several workers: the same bytes in any order, and nothing lost with a worker but its shard."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rho.corpus import Corpus
from rho.engines import run_workers
from rho.errors import ConfigError, DataError, MismatchError, RhoError
from rho.models import ModelConfig, make_model, save_model
from rho.runs import read_manifest
from rho.score import ScoreConfig, score_corpus
from rho.store import ScoreStore


def content(folder: Path) -> dict[str, bytes]:
    """The shards and what the manifest says of them."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    return files | {"fingerprint": read_manifest(folder).fingerprint.encode()}


@pytest.fixture(scope="module")
def alone(corpus: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store as one process makes it."""
    out = tmp_path_factory.mktemp("alone") / "store"
    score_corpus(ScoreConfig(), Corpus(corpus), ModelConfig(path=str(reference)), out, Corpus(corpus, "validation"))
    return out


def score(corpus: Path, reference: Path, out: Path, **how: object) -> None:
    target = Corpus(corpus, "validation")
    score_corpus(ScoreConfig(), Corpus(corpus), ModelConfig(path=str(reference)), out, target, **how)  # type: ignore


def test_two_workers_make_the_same_bytes_as_one(alone: Path, corpus: Path, reference: Path, tmp_path: Path) -> None:
    score(corpus, reference, tmp_path / "two", workers=2)
    assert content(tmp_path / "two") == content(alone)
    left = {path.name for path in (tmp_path / "two").iterdir()} - {*content(alone), "manifest.json", ".lock"}
    assert left == set()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_jobs_that_share_a_folder_make_the_same_bytes_in_any_order(
    order: list[int], alone: Path, corpus: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number, index in enumerate(order):
        if number:
            with pytest.raises(DataError, match="not finished"):
                ScoreStore(tmp_path / "shared")
        score(corpus, reference, tmp_path / "shared", task=(index, 3))
    assert content(tmp_path / "shared") == content(alone)
    assert "are left to the other jobs" in capsys.readouterr().err


def test_a_lost_worker_is_replaced(
    alone: Path, corpus: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def kill_one() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.001)
        children[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    score(corpus, reference, tmp_path / "store", workers=2)
    killer.join()
    assert "ended with -9, starting another" in capsys.readouterr().err
    assert content(tmp_path / "store") == content(alone)


def test_a_worker_that_stands_still_for_a_while_is_waited_for(
    alone: Path, corpus: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def stop_one_until_the_other_has_done_the_rest() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.001)
        os.kill(children[0].pid, signal.SIGSTOP)
        while len(list((tmp_path / "store").glob("*.parquet"))) < len(content(alone)) - 2:
            time.sleep(0.01)
        os.kill(children[0].pid, signal.SIGCONT)

    stopper = threading.Thread(target=stop_one_until_the_other_has_done_the_rest)
    stopper.start()
    score(corpus, reference, tmp_path / "store", workers=2)
    stopper.join()
    assert "starting another" not in capsys.readouterr().err
    assert content(tmp_path / "store") == content(alone)


def refused_a_file(number: int) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "model.safetensors")


def test_a_worker_whose_system_refuses_a_file_says_so_and_is_not_lost(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(RhoError, match=r"model\.safetensors: Too many open files\. .*ulimit -n"):
        run_workers("local", refused_a_file, 1, lambda: None)
    assert capfd.readouterr().err == ""


def test_what_is_wrong_with_the_input_ends_all_workers_with_one_error(
    corpus: Path, reference: Path, tmp_path: Path
) -> None:
    broken = make_model(ModelConfig(path=str(reference)), 300)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    save_model(broken, tmp_path / "broken")
    how = {"workers": 2}
    with pytest.raises(MismatchError, match=r"logits \(up to nan\) differ from those of its head"):
        score_corpus(ScoreConfig(), Corpus(corpus), ModelConfig(path=str(tmp_path / "broken")), tmp_path / "x", **how)
    assert multiprocessing.active_children() == []


def test_a_shard_that_changed_before_the_end_is_noticed_and_scored_anew(
    alone: Path, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    for index in (0, 1):
        score(corpus, reference, tmp_path / "store", task=(index, 3))
    damaged = tmp_path / "store" / Corpus(corpus).shards[1]["file"]
    flipped = bytearray(damaged.read_bytes())
    flipped[100] ^= 1
    damaged.write_bytes(flipped)
    with pytest.raises(DataError, match=r"00001.parquet: changed since it was written"):
        score(corpus, reference, tmp_path / "store", task=(2, 3))
    score(corpus, reference, tmp_path / "store")
    assert content(tmp_path / "store") == content(alone)


@pytest.mark.parametrize("damage", ["flip", "cut", "other JSON"])
def test_a_damaged_receipt_only_costs_its_shard(
    damage: str, alone: Path, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    for index in (0, 1):
        score(corpus, reference, tmp_path / "store", task=(index, 3))
    for name in ("target", Corpus(corpus).shards[1]["file"]):
        receipt = tmp_path / "store" / f".{name}.json"
        whole = receipt.read_bytes()
        digit = max(place for place, byte in enumerate(whole) if chr(byte).isdigit())
        flipped = bytearray(whole)
        flipped[digit] ^= 1
        receipt.write_bytes({"flip": bytes(flipped), "cut": whole[:20], "other JSON": b"[1]"}[damage])
    score(corpus, reference, tmp_path / "store", task=(0, 3))
    score(corpus, reference, tmp_path / "store")
    assert content(tmp_path / "store") == content(alone)


@pytest.mark.parametrize("how", [{"task": (2, 2)}, {"task": (-1, 2)}, {"workers": 0}])
def test_an_impossible_share_of_the_work_is_refused(how: dict, corpus: Path, reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected 0 <= index < number, and a worker"):
        score(corpus, reference, tmp_path / "store", **how)


def kill_a_ray_worker() -> None:
    """Kill -9 one that is scoring, as soon as there is one."""
    while True:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if b"ray::score_shards" in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
                    return
            except OSError:  # gone meanwhile
                continue
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_ray_makes_the_same_bytes_even_if_a_worker_is_killed(
    alone: Path, corpus: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("ray")
    threading.Thread(target=kill_a_ray_worker, daemon=True).start()
    score(corpus, reference, tmp_path / "store", workers=2, engine="ray")
    assert content(tmp_path / "store") == content(alone)
    assert "was lost" in capsys.readouterr().err


def test_a_store_whose_workers_were_killed_at_20_random_moments_has_the_same_bytes(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "kill_scoring.py"
    command = [sys.executable, str(script), "--kills", "20", "--seed", "3", "--out", str(tmp_path / "result.json")]
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"] >= 20 and result["identical"]
