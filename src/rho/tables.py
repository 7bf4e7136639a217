"""A store as plain tables: what is in it, one block for reading, one row a token for everything else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rho.corpus import Corpus
from rho.runs import MANIFEST, atomic_write, load_manifest
from rho.store import SCORES, ScoreStore

SCHEMA = pa.schema(
    {
        "block": pa.int64(),
        "position": pa.int32(),
        "document": pa.string(),
        "source": pa.string(),
        "token": pa.int32(),
        "text": pa.string(),
        "ref_loss": pa.float32(),
        "ref_entropy": pa.float32(),
    }
)


def summary(store: ScoreStore) -> dict[str, Any]:
    """What a store is: its reference, what it was made from, its size, and how many bytes a token it takes."""
    manifest = store.manifest
    size = sum((store.folder / shard["file"]).stat().st_size for shard in store.shards)
    tokens = len(store) * manifest.facts["block_length"]
    return {
        "store": str(store.folder),
        "reference": manifest.facts["reference"],
        "dtype": manifest.config["dtype"],
        "blocks": len(store),
        "tokens": tokens,
        "shards": len(store.shards),
        "quarantined_blocks": sum(shard.get("quarantined", 0) for shard in store.shards),
        "bytes_per_token": round(size / max(tokens, 1), 2),
        "target_loss": manifest.facts.get("target_loss"),
        "corpus": manifest.inputs["corpus"],
        "reference_sha256": manifest.inputs["reference"],
    }


def token_rows(store: ScoreStore, corpus: Corpus, block: int) -> dict[str, list[Any]]:
    """The tokens of one block, a column each (`SCHEMA`); losses and entropies in nats, NaN where there is none.

    The store must be of this corpus (`ScoreStore.check_corpus`).
    """
    text = corpus.row(block, ("input_ids", "document", "document_id", "source"))
    scores = store.row(block, tuple(name for name in SCORES if name in store.columns))
    origins = corpus.origins(text)
    nothing = np.full(len(origins), np.nan)  # an API gives no entropy
    return {
        "block": [block] * len(origins),
        "position": list(range(len(origins))),
        "document": [document for document, _ in origins],
        "source": [source for _, source in origins],
        "token": text["input_ids"].tolist(),
        "text": corpus.tokenizer.pieces(text["input_ids"]),
        **{name: scores.get(name, nothing).astype(np.float32).tolist() for name in SCORES},
    }


def export(store: ScoreStore, corpus: Corpus, out: str | os.PathLike[str]) -> int:
    """Write one Parquet file with one row a token, block after block; the number of rows.

    NaN where a token has no score. Memory does not grow with the store.

    Raises:
        MismatchError: the store is of another corpus.
    """
    store.check_corpus(corpus)
    rows = 0
    with atomic_write(out) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for table in _tables(store, corpus):
            writer.write_table(table)
            rows += len(table)
    return rows


def _tables(store: ScoreStore, corpus: Corpus, blocks: int = 64) -> Iterator[pa.Table]:
    for start in range(0, len(store), blocks):
        some = [token_rows(store, corpus, block) for block in range(start, min(start + blocks, len(store)))]
        yield pa.table({name: [v for one in some for v in one[name]] for name in SCHEMA.names}, schema=SCHEMA)


def stores_in(folder: str | os.PathLike[str]) -> list[Path]:
    """Folders of finished score stores at or below `folder`."""
    found = sorted(path.parent for path in Path(folder).rglob(MANIFEST))
    return [
        path for path in found if (made := load_manifest(path)) and (made.stage, made.status) == ("score", "complete")
    ]
