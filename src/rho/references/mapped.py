"""A reference with another tokenizer: it reads the corpus's text in its own tokens, and `align` maps its losses back.

    corpus row   [ca t _s |  T he]        the model's tokens; | ends a document
    text          cat s        The        of each document's stretch in the row
    read        ^ cat _s  |  The          the reference's, | is its own end token, ^ what begins its texts
    ref_loss      a a  b  c   d d         a group's loss is shared out by bytes

^ stands for whatever the reference's tokenizer puts before a text (its end token if it puts nothing), so that the first
token has a score as well. The losses of a stretch add up to what the reference gives to all of its tokens; but the
share of a token that nothing predicts (the first of a row, or of an isolated document) is left out, as everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rho.corpus import positions
from rho.references.align import byte_spans, map_losses, recover_text
from rho.references.scorer import UNREAD, Batch, Scorer
from rho.tokenizer import Tokenizer


class _Stretch(NamedTuple):
    """One document's part of a row."""

    own: slice  # the model's tokens, in the row
    spans_T2: np.ndarray  # theirs, in bytes of the text
    read: slice  # the reference's tokens, in what it reads
    ref_spans_M2: np.ndarray


def mapped(scorer: Scorer, own: Tokenizer, reference: Tokenizer, isolated: bool) -> Scorer:
    """A scorer of batches in the tokens of `own`, made of one that takes the tokens of `reference`.

    Its batches hold `document` and `num_bytes` (BT) besides. Entropies are shared out as losses are. NaN where nothing
    predicts a token, as with the same tokenizer; and where the reference's tokenizer makes nothing of a text (of white
    space at a row's end, say): the mask `UNREAD` tells of these.
    """
    start_id = start_of_text(reference)

    def read(row: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[int], list[_Stretch]]:
        """The ids that the reference reads for one row, the document of each, and what belongs to what."""
        ids, documents, stretches = [], [], []
        size = 0
        starts = np.flatnonzero(np.diff(row["document"], prepend=-1))
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(row["document"])], strict=True)):
            if number == 0 or isolated:
                ids.append(np.array([start_id], np.int32))
                documents.append(number)
                size += 1
            tokens, num_bytes = row["input_ids"][start:stop], row["num_bytes"][start:stop]
            text, spans = recover_text(own, tokens, num_bytes)
            ended = tokens[-1] == own.eos_id and num_bytes[-1] == 0
            ref_ids, ref_spans = byte_spans(reference, text, bool(ended))
            stretches.append(_Stretch(slice(start, stop), spans, slice(size, size + len(ref_ids)), ref_spans))
            ids.append(ref_ids)
            documents += [number] * len(ref_ids)
            size += len(ref_ids)
        return ids, documents, stretches

    def scored(batch: Batch) -> dict[str, Tensor]:
        names = ("input_ids", "document", "num_bytes")
        rows = [dict(zip(names, row, strict=True)) for row in zip(*(batch[n].numpy() for n in names), strict=True)]
        ids, documents, stretches = zip(*map(read, rows), strict=True)
        found = scorer(_padded([np.concatenate(one) for one in ids], documents, isolated, start_id))
        unread_BT = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        for row, parts in enumerate(stretches):
            for part in parts:
                unread_BT[row, part.own] = len(part.ref_spans_M2) == 0
        columns = {UNREAD: unread_BT}
        for name, read_BM in found.items():
            column_BT = torch.full(batch["input_ids"].shape, torch.nan)
            for row, parts in enumerate(stretches):
                for part in parts:
                    values = map_losses(read_BM[row, part.read].numpy(), part.ref_spans_M2, part.spans_T2)
                    column_BT[row, part.own] = torch.from_numpy(values)
            columns[name] = column_BT.masked_fill(batch["position_ids"] == 0, torch.nan)
        return columns

    return scored


def _padded(ids: list[np.ndarray], documents: list[list[int]], isolated: bool, fill: int) -> Batch:
    """Rows of one length. What is filled up is, token by token, a text of its own, which is not scored."""
    longest = max(map(len, ids))
    input_ids = np.full((len(ids), longest), fill, np.int64)
    position_ids = np.zeros((len(ids), longest), np.int64)
    for row, (tokens, document) in enumerate(zip(ids, documents, strict=True)):
        input_ids[row, : len(tokens)] = tokens
        position_ids[row, : len(tokens)] = positions(np.array(document), isolated)
    return {"input_ids": torch.from_numpy(input_ids), "position_ids": torch.from_numpy(position_ids)}


def start_of_text(tokenizer: Tokenizer) -> int:
    """The id that stands before a text: what the tokenizer puts there, else its end-of-document token."""
    with_added = tokenizer.backend.encode("a", add_special_tokens=True)
    is_added = with_added.special_tokens_mask
    return int(with_added.ids[0]) if is_added and is_added[0] else tokenizer.eos_id
