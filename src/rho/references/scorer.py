"""What every kind of reference has in common: batches in, columns out; and windows where it can't read all at once.

    tokens       t0 t1 t2 t3 t4 t5 t6        7 tokens, context 4, overlap 2
    window 1     t0 t1 t2 t3                 scores t1 t2 t3
    window 2           t2 t3 t4 t5           reads t2 t3 again, scores t4 t5
    window 3                 t4 t5 t6        scores t6

Each token that has a predecessor (the first of a block, or of an isolated document, has none) is scored exactly once,
with at least `overlap` tokens of context or all that there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rho.corpus import Corpus
from rho.errors import DataError
from rho.objective import IGNORE_INDEX

Batch = dict[str, Tensor]  # input_ids BT, position_ids BT and what else the corpus has of them
Scorer = Callable[[Batch], dict[str, Tensor]]  # columns BT on the CPU: ref_loss, and where it is known ref_entropy
UNREAD = "unread"  # a further column, of a reference with another tokenizer: a mask of what it knows nothing of


def windows(length: int, context: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Start, first token that is scored, and stop of each window over `length` tokens (see the module).

    Args:
        length: tokens in all.
        context: tokens in a window.
        overlap: tokens that a window reads before the first that it scores; 1 <= overlap < context.
    """
    start = done = 0
    while done < length:
        stop = min(start + context, length)
        yield start, done, stop
        start, done = stop - overlap, stop


def in_windows(scorer: Scorer, context: int, overlap: int) -> Scorer:
    """The scorer, given at most `context` tokens of a row at a time."""

    def scored(batch: Batch) -> dict[str, Tensor]:
        input_ids, position_ids = batch["input_ids"], batch["position_ids"]
        document = (position_ids == 0).cumsum(1)
        parts: dict[str, list[Tensor]] = {}
        for start, first, stop in windows(input_ids.shape[1], context, overlap):
            inside = slice(start, stop)
            # What goes on from before the window begins anew at its start.
            goes_on = document[:, inside] == document[:, start, None]
            positions = position_ids[:, inside] - position_ids[:, start, None] * goes_on
            for name, column in scorer({"input_ids": input_ids[:, inside], "position_ids": positions}).items():
                parts.setdefault(name, []).append(column[:, first - start :])
        return {name: torch.cat(columns, 1) for name, columns in parts.items()}

    return scored


@dataclass(frozen=True)
class MeanLoss:
    """Loss of a model on a set: sums over the tokens that have a label (special tokens do not)."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        """Mean loss."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Loss that does not depend on the tokenizer: bits for each UTF-8 byte of the scored tokens' text."""
        return self.nats / math.log(2) / self.bytes


def mean_of(scorer: Scorer, corpus: Corpus, batch_size: int) -> MeanLoss:
    """The loss that a scorer gives to all labelled tokens of one split of a corpus."""
    nats, tokens, size = 0.0, 0, 0
    for shard in corpus.shards:
        for batch in batches(corpus, shard, batch_size):
            scores = scorer(batch)
            loss_BT = scores["ref_loss"].cpu().double()
            labelled = batch["labels"] != IGNORE_INDEX
            if (unread_BT := scores.get(UNREAD)) is not None:
                labelled &= ~unread_BT
            nats += float(loss_BT[labelled].sum())
            tokens += int(labelled.sum())
            size += int(batch["num_bytes"][labelled].sum())
    return checked(MeanLoss(nats, tokens, size), corpus)


def checked(loss: MeanLoss, corpus: Corpus) -> MeanLoss:
    """The loss, if it is one; a `DataError` where nothing of the corpus was scored or it is not finite."""
    if loss.tokens == 0:
        raise DataError(f"{corpus.folder}: no token of the {corpus.split} split has a label. Give longer documents.")
    if not math.isfinite(loss.nats):
        raise DataError(
            f"{corpus.folder}: expected a finite loss of every token of the {corpus.split} split, found {loss.nats} in "
            "all. Check the model (its weights, its precision)."
        )
    return loss


def batches(corpus: Corpus, shard: Mapping[str, Any], batch_size: int) -> Iterator[Batch]:
    """The rows of a corpus shard, `batch_size` at a time."""
    columns = corpus.read_shard(shard, (*corpus.reads, "num_bytes"))
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for start in range(0, len(rows), batch_size):
        yield as_batch(corpus, rows[start : start + batch_size])


def as_batch(corpus: Corpus, rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Rows of a corpus together: input_ids, position_ids, labels, document and num_bytes, BT each."""
    inputs = [corpus.inputs(row) for row in rows]
    batch = {name: torch.stack([one[name] for one in inputs]) for name in inputs[0]}
    return batch | {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("document", "num_bytes")}
