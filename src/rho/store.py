"""Token-aligned columns on disk: Parquet shards of one row a block, every byte under a checksum.

Corpus and scores are both such folders; shard k of the scores has the same rows, of the same lengths, as shard k of the
corpus, so that value t of a row belongs to token t of that row. Pages carry checksums that are verified at every read
(without them a flipped bit in a Parquet file goes unseen); the manifest holds each file's SHA-256.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rho.errors import DataError, MismatchError
from rho.runs import MANIFEST, Manifest, atomic_write, hash_file, read_manifest, refusal

ROW_GROUP = 32  # blocks decoded together: small enough for random access, large enough to compress
OPEN_SHARDS = 64  # files one process keeps open

SCORES = ("ref_loss", "ref_entropy")  # what a reference says of a token: Eq. 1 and Eq. 8, nats
Column = Sequence[np.ndarray]


def write_shard(path: Path, columns: Mapping[str, Column | np.ndarray]) -> None:
    """Atomically write one shard.

    Args:
        path: the Parquet file.
        columns: name -> one array for each row (a list column), or a 2-D array of equal rows. All columns have the
            same number of rows; token-aligned ones the same length in each row.
    """
    arrays = {name: _list_array(rows) for name, rows in columns.items()}
    # A dictionary of losses, nearly all different, takes a third more than the losses themselves.
    repeating = [f"{name}.list.element" for name, a in arrays.items() if not pa.types.is_floating(a.type.value_type)]
    options = {"row_group_size": ROW_GROUP, "use_dictionary": repeating, "write_page_checksum": True}
    with atomic_write(path) as file:
        pq.write_table(pa.table(arrays), file, compression="zstd", **options)


def _list_array(rows: Column | np.ndarray) -> pa.Array:
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int32, count=len(rows))
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    values = np.concatenate(list(rows)) if len(rows) else np.zeros(0)
    return pa.ListArray.from_arrays(offsets, pa.array(values))


class Shards:
    """Random and sequential access to the rows of one split of a stage folder.

    Opened lazily, so that it can be sent to worker processes. Every read verifies the page checksums.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str, stage: str) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest: Manifest = read_manifest(folder, stage)
        self.shards: list[dict[str, Any]] = [s for s in self.manifest.facts["shards"] if s["split"] == split]
        self._starts = np.cumsum([0, *(s["rows"] for s in self.shards)])

    def __len__(self) -> int:
        """Number of rows (blocks)."""
        return int(self._starts[-1])

    @property
    def columns(self) -> list[str]:
        """Names of the columns there are."""
        first = self.shards[0]
        return _open(str(self.folder / first["file"]), first["sha256"], os.getpid()).schema_arrow.names

    def locate(self, row: int) -> tuple[dict[str, Any], int]:
        """The shard that holds `row`, and the row's number in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.shards[shard], row - int(self._starts[shard])

    def first_row(self, shard: Mapping[str, Any]) -> int:
        """The number of a shard's first row."""
        return int(self._starts[self.shards.index(dict(shard))])

    def row(self, row: int, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
        """The named columns of one row, as arrays."""
        shard, local = self.locate(row)
        path = str(self.folder / shard["file"])
        starts = _group_starts(path, shard["sha256"])
        group = int(np.searchsorted(starts, local, side="right")) - 1
        found = _row_group(path, group, columns, shard["sha256"])
        return {name: column[local - int(starts[group])] for name, column in found.items()}

    def read_shard(self, shard: Mapping[str, Any], columns: tuple[str, ...]) -> dict[str, list[np.ndarray]]:
        """The named columns of a whole shard."""
        path = str(self.folder / shard["file"])
        groups = len(_group_starts(path, shard["sha256"])) - 1
        parts = [_row_group(path, g, columns, shard["sha256"]) for g in range(groups)]
        return {name: [row for part in parts for row in part[name]] for name in columns}


@lru_cache(maxsize=OPEN_SHARDS)
def _open(path: str, sha256: str, process: int) -> pq.ParquetFile:
    """One open file a path and process (a file handle must not be shared across a fork)."""
    try:
        _verify(path, sha256)
        return pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise DataError(f"{path}: this shard is missing. Restore it, or run its stage again.") from None
    except (OSError, pa.ArrowException) as error:
        if (refused := refusal(error, path)) is not None:
            raise refused from error
        raise DataError(f"{path}: damaged shard ({error}). Restore it or make it anew.") from error


@cache
def _verify(path: str, sha256: str) -> None:
    """Check a whole shard, once a process: page checksums leave out the footer."""
    if hash_file(Path(path)) != sha256:
        raise DataError(
            f"{path}: damaged shard (its SHA-256 is not the one in {MANIFEST}). "
            "Restore it, or remove it and run its stage again."
        )


@lru_cache(maxsize=OPEN_SHARDS)
def _group_starts(path: str, sha256: str) -> np.ndarray:
    """The first row of each row group, and the number of rows: others may write groups of any size."""
    metadata = _open(path, sha256, os.getpid()).metadata
    return np.cumsum([0, *(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))])


@lru_cache(maxsize=256)
def _row_group(path: str, group: int, columns: tuple[str, ...], sha256: str) -> dict[str, list[np.ndarray]]:
    try:
        file = _open(path, sha256, os.getpid())
        if missing := set(columns) - set(file.schema_arrow.names):
            raise DataError(
                f"{path}: has no column {', '.join(sorted(missing))}, only {', '.join(file.schema_arrow.names)}. "
                "Take a score that needs no other, or score the corpus again with a reference that gives it."
            )
        table = file.read_row_group(group, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged shard, row group {group} ({error}). Restore it or make it anew.") from error
    return {name: _rows(table[name].combine_chunks()) for name in columns}


def _rows(column: pa.ListArray) -> list[np.ndarray]:
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


class ScoreStore(Shards):
    """The reference's columns for the training split of a corpus: `ref_loss` and `ref_entropy`, in nats.

    Value t of a row belongs to token t of that row: the loss of predicting it. NaN where a token has no score.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder, "train", "score")

    def check_corpus(self, corpus: Shards) -> None:
        """Refuse a corpus other than the one that was scored, naming both.

        Raises:
            MismatchError: another tokenizer, another corpus, or shards that differ in number of rows.
        """
        for what in ("tokenizer", "corpus"):
            scored = self.manifest.inputs[what]
            given = corpus.manifest.inputs["tokenizer"] if what == "tokenizer" else corpus.manifest.fingerprint
            if scored != given:
                raise MismatchError(
                    f"{self.folder}: these are scores of another {what}. Scored: {what} {scored[:12]}; "
                    f"{corpus.folder}: {what} {given[:12]}. Score this corpus, or train on the one that was scored."
                )
        if [s["rows"] for s in self.shards] != [s["rows"] for s in corpus.shards]:
            raise MismatchError(
                f"{self.folder}: shards hold {[s['rows'] for s in self.shards]} blocks, those of {corpus.folder} hold "
                f"{[s['rows'] for s in corpus.shards]}. Score the corpus again."
            )
