"""Every byte of what was written is checked, and what is wrong is named."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from rho.errors import DataError
from rho.runs import read_manifest
from rho.verify import verify


def wrong(folder: Path) -> dict[str, list[str]]:
    return {stage.name: found for stage, found in verify(folder) if found}


def test_what_was_written_is_good(corpus: Path, reference: Path, scores: Path) -> None:
    for folder in (corpus, reference, scores):
        assert list(verify(folder)) == [(folder, [])]


@pytest.mark.parametrize("stage", ["scores", "corpus", "reference"])
def test_flipped_bits_truncations_and_swaps_are_named(
    stage: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / stage
    shutil.copytree(request.getfixturevalue(stage), folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    draw = random.Random(0)
    for number in range(60):
        path = draw.choice(files)
        content = path.read_bytes()
        if number < 50:
            bit = draw.randrange(8 * len(content))
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
        else:
            changed = bytearray(content[: draw.randrange(len(content))])
        path.write_bytes(changed)
        found = wrong(folder)[stage]
        assert any(path.name in line for line in found), (path, found)
        path.write_bytes(content)
    assert wrong(folder) == {}


def test_swapped_and_missing_files_are_named(scores: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scores, tmp_path / "scores")
    a, b, c, *_ = sorted(folder.glob("*.parquet"))
    a.rename(tmp_path / "x")
    b.rename(a)
    (tmp_path / "x").rename(b)
    c.unlink()
    found = wrong(tmp_path)["scores"]
    assert [line.partition(":")[0] for line in found] == [a.name, b.name, c.name]
    assert found[2] == f"{c.name}: No such file or directory"


def test_a_shard_that_is_not_among_the_outputs_is_named(scores: Path, tmp_path: Path) -> None:
    shutil.copytree(scores, tmp_path / "scores")
    made = read_manifest(tmp_path / "scores")
    left_out = made.facts["shards"][0]["file"]
    del made.outputs[left_out]
    made.write(tmp_path / "scores")
    [line] = wrong(tmp_path)["scores"]
    assert line == f"{left_out}: its hash among the shards is not the one among the outputs"


def test_a_folder_of_something_else_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing that rho wrote"):
        list(verify(tmp_path))
