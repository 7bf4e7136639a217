"""Checkpoints that can be trusted: written whole or not at all, every file hashed, verified before they are read.

`transformers` writes a checkpoint in place and resumes from a damaged one without a word. Here it is written under a
temporary name, hashed, synced and renamed; resuming verifies the newest, and falls back to the newest good one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from rho.errors import DataError
from rho.progress import say
from rho.runs import damage_of, hash_file, hash_json, sync, write_json

HASHES = "hashes.json"
PARTIAL = ".partial"  # folder of what is being written or removed: nothing in it counts


def commit(partial: Path, final: Path) -> None:
    """Hash and sync every file of the checkpoint `partial`, then give it its name."""
    files = {}
    for path in sorted(partial.rglob("*")):
        sync(path)
        if path.is_file():
            name = path.relative_to(partial).as_posix()
            files[name] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
    step = step_of(final)  # so that no other checkpoint can take this one's name
    write_json(partial / HASHES, {"files": files, "step": step, "sha256": hash_json([files, step])})
    os.replace(partial, final)
    sync(final.parent)


def damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, a line a file; empty if every file is as it was written, and no other there."""
    try:
        hashes = json.loads((checkpoint / HASHES).read_bytes())
        if hashes["sha256"] != hash_json([hashes["files"], hashes["step"]]):
            return [f"{HASHES}: content changed"]
        if hashes["step"] != step_of(checkpoint):
            return [f"made after step {hashes['step']}"]
    except OSError as error:
        return [f"{HASHES}: {error.strerror}"]
    except (ValueError, KeyError, TypeError):
        return [f"{HASHES}: content changed"]
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} - {HASHES}
    found = [f"{name}: not part of the checkpoint" for name in sorted(there - hashes["files"].keys())]
    for name, written in hashes["files"].items():
        if wrong := damage_of(checkpoint / name, written):
            found.append(f"{name}: {wrong}")
    return found


def check(checkpoint: Path) -> None:
    """Refuse a damaged checkpoint.

    Raises:
        DataError: names its bad files.
    """
    if bad := damage(checkpoint):
        raise DataError(f"{checkpoint}: damaged checkpoint ({'; '.join(bad)}). Restore these files, or train again.")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [
        path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[len("checkpoint-") :].isdigit()
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was made after."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_good(folder: Path) -> Path | None:
    """The newest undamaged checkpoint, to go on from; damaged ones after it are named and set aside."""
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        bad = damage(checkpoint)
        if not bad:
            return checkpoint
        aside = folder / f"damaged-{checkpoint.name}"  # kept: a person may still want the weights
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        say(f"{checkpoint}: damaged ({'; '.join(bad)}), not resumed from, now {aside.name}")
    if found:
        say(f"{folder}: every checkpoint is damaged, starting from scratch")
    return None


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a kill halfway leaves none that is damaged."""
    gone = checkpoint.parent / PARTIAL / checkpoint.name
    gone.parent.mkdir(exist_ok=True)
    os.replace(checkpoint, gone)
    shutil.rmtree(gone)
