"""The tests catch the faults they are there for: each of `mutations.py`, in a copy of the source, fails a test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mutations import MUTATIONS, Mutation

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"
# Tests in these need no asset of conftest.py, which imports nearly everything.
ALONE = (
    "test_objective.py",
    "test_selection.py",
    "test_labels.py",
    "test_linear_loss.py",
    "test_selective.py",
    "test_store.py",
    "test_api.py",
    "test_trajectories.py",
    "test_a_step",
    "test_rows",
)


def prepare(mutation: Mutation, folder: Path) -> list[str]:
    """A copy of the source with the fault; pytest's arguments."""
    source = shutil.copytree(SOURCE, folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    path = source / "rho" / mutation.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    alone = ["--noconftest"] if any(name in mutation.test for name in ALONE) else []
    quiet = "-Wignore::pytest.PytestAssertRewriteWarning"  # of what the fork had imported
    return ["-x", quiet, "-p", "no:cacheprovider", f"--basetemp={folder / 'tests'}", *alone, str(TESTS / mutation.test)]


pytestmark = pytest.mark.timeout(1200)  # all faults are tried at once, before the first test


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What pytest said with each of the faults."""
    folders = {mutation.name: tmp_path_factory.mktemp("mutation") for mutation in MUTATIONS}
    jobs = [(str(folders[m.name]), prepare(m, folders[m.name])) for m in MUTATIONS]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, __file__, json.dumps(jobs)], cwd=TESTS.parent, env=env, check=True, timeout=1100)
    return {name: (folder / "output").read_text(encoding="utf-8") for name, folder in folders.items()}


def test_every_fault_is_a_change_to_one_place_of_the_source() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 20
    for mutation in MUTATIONS:
        text = (SOURCE / "rho" / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1 and mutation.new != mutation.old, mutation.name


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_is_caught(mutation: Mutation, outputs: dict[str, str]) -> None:
    assert "\nFAILED " in outputs[mutation.name], outputs[mutation.name]


def in_a_fork(folder: str, arguments: list[str]) -> int:
    """Run pytest with the source in `folder` in a child process, which has all but that imported already."""
    child = os.fork()
    if child:
        return child
    with open(f"{folder}/output", "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        sys.path.insert(0, f"{folder}/src")
        status = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(int(status))


def main() -> None:
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pydantic  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    assert "rho" not in sys.modules
    running: set[int] = set()
    for folder, arguments in json.loads(sys.argv[1]):
        running.add(in_a_fork(folder, arguments))
        if len(running) == 2:
            running.discard(os.wait()[0])
    while running:
        running.discard(os.wait()[0])


if __name__ == "__main__":
    main()
