"""A float32 score inside each int64 label: what survives every trainer's column pruning, packing and padding.

    bits 63..32  the score as IEEE 754 float32; NaN says that the token has none; 0.0 is stored as -0.0
    bits 31..0   the token id

-100 stays -100. An ordinary label has an empty upper half, which no score has: labels without scores are told from
labels with scores, and refused where scores are needed. Labels of `attach_scores` given to a loss that does not know
of them are ids far beyond the vocabulary: `torch.nn.functional.cross_entropy` raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rho.objective import IGNORE_INDEX


def attach_scores(labels: Tensor | Sequence[int], scores: Tensor | Sequence[float]) -> Tensor:
    """Labels, int64, that hold a score each: a reference loss (nats), or a loss weight.

    In `datasets`: `rows.map(lambda row: {"labels": attach_scores(row["labels"], row["ref_loss"]).tolist()})`.

    Args:
        labels: token ids, `labels[t]` is token t; -100 where a token takes no part.
        scores: one for each label; NaN where there is none, for instance at the first token.

    Raises:
        ValueError: shapes differ, a label is no token id or holds a score already.
    """
    label, score = torch.as_tensor(labels).long(), torch.as_tensor(scores).float()
    if label.shape != score.shape:
        raise ValueError(
            f"expected a score for each label, found labels {tuple(label.shape)}, scores {tuple(score.shape)}"
        )
    ignored = label == IGNORE_INDEX
    if bool((~ignored & ((label < 0) | (label >> 31 != 0))).any()):
        raise ValueError("expected labels that are token ids or -100; some are negative or hold a score already")
    score = torch.where(score == 0, -0.0, score)
    return ((score.view(torch.int32).long() << 32) | label).masked_fill(ignored, IGNORE_INDEX)


def split_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Plain labels and scores, float32 (NaN where the label is -100), of the labels of `attach_scores`.

    Raises:
        ValueError: a label holds no score.
    """
    ignored = labels == IGNORE_INDEX
    missing = ~ignored & (labels >> 32 == 0)
    if bool(missing.any()):
        raise ValueError(
            f"{int(missing.sum())} of {int((~ignored).sum())} labels hold no score: these are plain token ids. Make "
            "the labels with rho.attach_scores(labels, ref_loss), and see that nothing makes them anew from input_ids."
        )
    score = (labels >> 32).int().view(torch.float32).masked_fill(ignored, torch.nan)
    return (labels & 0xFFFFFFFF).masked_fill(ignored, IGNORE_INDEX), score


def is_packed(labels: Tensor) -> bool:
    """Whether any label holds a score."""
    return bool(((labels != IGNORE_INDEX) & (labels >> 32 != 0)).any())


def labels_with(row: dict[str, Any], column: str) -> dict[str, list[int]]:
    """The row's labels (its input_ids, if it has none) with the scores of a column in them, for `datasets`' `map`.

    Raises:
        ValueError: see `attach_scores`.
    """
    return {"labels": attach_scores(row.get("labels", row["input_ids"]), row[column]).tolist()}
