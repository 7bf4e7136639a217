"""What a model loses on a held-out set, block by block, split by where the text comes from and what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedModel

from rho.corpus import Corpus
from rho.objective import IGNORE_INDEX
from rho.references.model import score_batch
from rho.references.scorer import MeanLoss, as_batch

SUMS = ("nats", "tokens", "bytes")
SCHEMA = pa.schema(
    {
        "block": pa.int64(),
        "source": pa.dictionary(pa.int32(), pa.string()),
        "label": pa.dictionary(pa.int32(), pa.string()),
        "nats": pa.float64(),
        "tokens": pa.int64(),
        "bytes": pa.int64(),
    }
)


def block_losses(model: PreTrainedModel, corpus: Corpus, batch_size: int = 8) -> pa.Table:
    """The loss of one split of a corpus (Eq. 1, summed), a row for each block, source and label in it.

    Columns: `block` (its number), `source` of the document, `label` of the tokens (null without), and sums over the
    labelled tokens: `nats`, `tokens`, `bytes` of their text.
    """
    was_training = model.training
    model.eval()
    sums: list[dict[str, Any]] = []
    block = 0
    for shard in corpus.shards:
        columns = corpus.read_shard(shard, (*corpus.reads, "num_bytes", "label", "source"))
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            batch = as_batch(corpus, some)
            losses_BT = score_batch(model, batch)[0].cpu().double().numpy()
            labelled_BT = (batch["labels"] != IGNORE_INDEX).numpy()
            for row, loss_T, labelled_T in zip(some, losses_BT, labelled_BT, strict=True):
                sums += _groups(corpus, block, row, loss_T, labelled_T)
                block += 1
    model.train(was_training)
    return pa.Table.from_pylist(sums, schema=SCHEMA)


def _groups(
    corpus: Corpus, block: int, row: Mapping[str, np.ndarray], loss_T: np.ndarray, labelled_T: np.ndarray
) -> Iterator[dict[str, Any]]:
    """The sums of one block, for each source and label that occur in it."""
    names, source_of = np.unique(row["source"].astype(str), return_inverse=True)  # of each document in the block
    _, document_T = np.unique(row["document"], return_inverse=True)  # numbers rise along a corpus
    kinds = len(corpus.labels) + 1
    group_T = source_of[document_T] * kinds + row["label"].astype(np.int64) + 1
    keys, group_N = np.unique(group_T[labelled_T], return_inverse=True)
    values = {"nats": loss_T[labelled_T], "tokens": None, "bytes": row["num_bytes"][labelled_T]}
    sums = {name: np.bincount(group_N, value, len(keys)).tolist() for name, value in values.items()}
    for n, key in enumerate(keys.tolist()):
        label = corpus.labels[key % kinds - 1] if key % kinds else None
        yield {
            "block": block,
            "source": str(names[key // kinds]),
            "label": label,
            "nats": sums["nats"][n],
            "tokens": int(sums["tokens"][n]),
            "bytes": int(sums["bytes"][n]),
        }


def total(table: pa.Table) -> MeanLoss:
    """The loss of all rows of a table of `block_losses`."""
    return MeanLoss(*((pc.sum(table[name]).as_py() or 0) for name in SUMS))


def by_domain(table: pa.Table) -> list[tuple[str, str | None, MeanLoss]]:
    """(`source` or `label`, its name, loss) of each source, and of each label where there are any."""
    found = []
    for column in ("source", "label"):
        plain = table.set_column(table.column_names.index(column), column, table[column].cast(pa.string()))
        groups = plain.group_by(column).aggregate([(name, "sum") for name in SUMS]).to_pylist()
        if column == "source" or any(group[column] is not None for group in groups):
            for group in sorted(groups, key=lambda group: (group[column] is None, group[column])):
                loss = MeanLoss(*(group[f"{name}_sum"] for name in SUMS))
                found.append((column, group[column], loss))
    return found
