"""The tests catch the faults they are there for: each of `mutations.py`, in a copy of the source, fails a test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from mutations import MUTATIONS, Mutation

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"
ONE_FAILED = 1  # pytest's exit status: the tests ran, some failed
# These need no asset of conftest.py, whose imports take most of the time.
ALONE = ("test_objective.py", "test_selection.py", "test_linear_loss.py", "test_store.py", "test_a_step")


def run_with(mutation: Mutation, folder: Path) -> subprocess.CompletedProcess[str]:
    """The mutation's test against a copy of the source that has it."""
    source = shutil.copytree(SOURCE, folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    path = source / "rho" / mutation.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'tests'}"]
    if any(name in mutation.test for name in ALONE):
        options.append("--noconftest")
    env = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", *options, str(TESTS / mutation.test)]
    return subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """All of them at once, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        folders = {m.name: tmp_path_factory.mktemp("mutation") for m in MUTATIONS}
        yield {m.name: pool.submit(run_with, m, folders[m.name]) for m in MUTATIONS}
        pool.shutdown(cancel_futures=True)


def test_every_fault_is_a_change_to_one_place_of_the_source() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 20
    for mutation in MUTATIONS:
        text = (SOURCE / "rho" / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1 and mutation.new != mutation.old, mutation.name


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_is_caught(mutation: Mutation, runs: dict[str, Future]) -> None:
    done = runs[mutation.name].result()
    assert done.returncode == ONE_FAILED and " failed" in done.stdout, done.stdout + done.stderr
