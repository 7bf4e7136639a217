"""Is what lies on disk still what was written? Every byte of a run or stage against the hashes recorded of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rho.checkpoints import checkpoints, damage
from rho.errors import DataError
from rho.runs import MANIFEST, damage_of, load_manifest


def verify(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, list[str]]]:
    """Each stage folder in `folder` (itself, or below it) with what is wrong with it, a line a file.

    Outputs are read whole and compared with the SHA-256 of their manifest, checkpoints with that of their own list.

    Raises:
        DataError: there is no stage folder.
    """
    folder = Path(folder)
    stages = sorted(path.parent for path in folder.rglob(MANIFEST))
    if not stages:
        raise DataError(f"{folder}: no {MANIFEST} here or below, so nothing that rho wrote. Check the path.")
    for stage in stages:
        yield stage, _wrong(stage)


def _wrong(stage: Path) -> list[str]:
    try:
        manifest = load_manifest(stage)
    except DataError as error:
        return [str(error)]
    wrong = [] if manifest is None or manifest.status == "complete" else [f"{MANIFEST}: the stage was not finished"]
    for name, recorded in manifest.outputs.items() if manifest else ():
        if found := damage_of(stage / name, recorded):
            wrong.append(f"{name}: {found}")
    listed = manifest.outputs if manifest else {}
    for shard in manifest.facts.get("shards", ()) if manifest else ():
        if listed.get(shard["file"], {}).get("sha256") != shard["sha256"]:
            wrong.append(f"{shard['file']}: its hash among the shards is not the one among the outputs")
    for checkpoint in checkpoints(stage / "checkpoints"):
        wrong += [f"checkpoints/{checkpoint.name}/{line}" for line in damage(checkpoint)]
    return wrong
