"""Checkpoints that can be trusted: written whole or not at all, every file hashed, verified before they are resumed.

`transformers` writes a checkpoint in place and resumes from a damaged one without a word. Here it is written under a
temporary name, hashed, synced and renamed; resuming verifies the newest, and falls back to the newest good one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from rho.progress import say
from rho.runs import atomic_write, hash_file, sync_folder

HASHES = "hashes.json"
PARTIAL = ".partial"


def commit(partial: Path, final: Path) -> None:
    """Hash and sync every file of the checkpoint `partial`, then give it its name."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    hashes = {}
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        hashes[path.relative_to(partial).as_posix()] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
    with atomic_write(partial / HASHES) as out:
        out.write(json.dumps(hashes, indent=1, sort_keys=True).encode())
    if final.exists():  # damaged, or it would have been resumed from
        shutil.rmtree(final)
    os.replace(partial, final)
    sync_folder(final.parent)


def damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, a line a file; empty if every file is as it was written."""
    try:
        hashes = json.loads((checkpoint / HASHES).read_bytes())
        expected = {name: (entry["sha256"], entry["bytes"]) for name, entry in hashes.items()}
    except FileNotFoundError:
        return [f"{HASHES}: missing"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{HASHES}: damaged"]
    found = []
    for name, (sha256, size) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif path.stat().st_size != size:
            found.append(f"{name}: {path.stat().st_size} bytes, {size} were written")
        elif hash_file(path) != sha256:
            found.append(f"{name}: content changed")
    return found


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and step_of(p) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def step_of(checkpoint: Path) -> int | None:
    """The optimizer step a checkpoint was made after."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else None


def newest_good(folder: Path) -> Path | None:
    """The newest undamaged checkpoint; of damaged ones it is said which files are bad."""
    for checkpoint in reversed(checkpoints(folder)):
        bad = damage(checkpoint)
        if not bad:
            return checkpoint
        say(f"{checkpoint}: damaged, not resumed from ({'; '.join(bad)})")
    return None
