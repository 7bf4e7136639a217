"""Who does what in a store that several workers make, and what of it is done.

A worker claims a piece of work, a shard or the reference's loss on the target, by a lock that its death gives back, and
leaves a receipt when the piece is on disk. Receipts are files until the manifest of the finished store takes them over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rho.runs import hash_file, hash_json, load_manifest, write_json

TARGET = "target"  # a piece of work that is no shard
QUARANTINED = "quarantined"  # blocks of a shard that have tokens without a score
FILE = ("sha256", "bytes")


@contextmanager
def claim(folder: Path, name: str, made_from: str) -> Iterator[bool]:
    """Whether this piece of work is ours: not finished, and nobody else is at it. A dead holder's lock is free."""
    lock = FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield receipt(folder, name, made_from) is None
    finally:
        lock.release()


def receipt_path(folder: Path, name: str) -> Path:
    """The file of a receipt."""
    return folder / f".{name}.json"


def quarantine_path(folder: Path, shard: str) -> Path:
    """The list of the blocks of a shard that have tokens without a score; there is none if all have."""
    return folder / f"{shard.removesuffix('.parquet')}.quarantine.json"


def write_receipt(folder: Path, name: str, made_from: str, **facts: Any) -> None:
    """Note that a piece of work is done: of a shard its hash and size, and what else is to be known of it.

    Args:
        folder: the store.
        name: of the shard, or `TARGET`.
        made_from: `Manifest.made_from`: what is done counts only for a job that was asked for the same.
        facts: JSON values.
    """
    if name != TARGET:
        path = folder / name
        facts = {"sha256": hash_file(path), "bytes": path.stat().st_size, **facts}
    write_json(receipt_path(folder, name), {"of": hash_json([made_from, facts]), "facts": facts})


def receipt(folder: Path, name: str, made_from: str) -> dict[str, Any] | None:
    """What was noted when a piece of work was finished. None if it is still to be done, or what it made is gone."""
    try:
        note = json.loads(receipt_path(folder, name).read_bytes())
        found: dict[str, Any] | None = note["facts"] if note["of"] == hash_json([made_from, note["facts"]]) else None
    except FileNotFoundError:
        found = _in_manifest(folder, name, made_from)
    except (ValueError, TypeError, KeyError):
        found = None  # damaged, or another job's: the work is done again
    if found is None or name == TARGET:
        return found
    shard = folder / name
    whole = shard.is_file() and shard.stat().st_size == found["bytes"]
    listed = found[QUARANTINED] == 0 or quarantine_path(folder, name).is_file()
    return found if whole and listed else None


def _in_manifest(folder: Path, name: str, made_from: str) -> dict[str, Any] | None:
    made = load_manifest(folder)
    if made is None or made.made_from != made_from:
        return None
    if name == TARGET:
        return {"loss": made.facts["target_loss"]} if "target_loss" in made.facts else None
    quarantined = {shard["file"]: shard[QUARANTINED] for shard in made.facts.get("shards", ()) if QUARANTINED in shard}
    return {**made.outputs[name], QUARANTINED: quarantined.get(name, 0)} if name in made.outputs else None


def remove_receipt(folder: Path, name: str) -> None:
    """The manifest has taken it over."""
    receipt_path(folder, name).unlink(missing_ok=True)
    (folder / f".{name}.lock").unlink(missing_ok=True)
