"""A float32 score inside each int64 label: what survives every trainer's column pruning, packing and padding.

    bits 63..32  the score as IEEE 754 float32, finite; 0.0 is stored as -0.0
    bits 31..0   the token id

-100 stays -100. An ordinary label has an empty upper half, which no score has: labels without scores are told from
labels with scores, and refused where scores are needed. Labels of `attach_scores` given to a loss that does not know
of them are ids far beyond the vocabulary: `torch.nn.functional.cross_entropy` raises.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rho.objective import IGNORE_INDEX


def attach_scores(labels: Tensor | Sequence[int], scores: Tensor | Sequence[float | None]) -> Tensor:
    """Labels, int64, that hold a score each: a reference loss (nats), or a loss weight.

    A label whose score is NaN (or None, as data sets have it) becomes -100: the token can't take part, and so what a
    framework counts as labels are the tokens that can.

    Args:
        labels: token ids, `labels[t]` is token t; -100 where a token takes no part.
        scores: one for each label; NaN where there is none, for instance at the first token.

    Raises:
        ValueError: shapes differ, a score is infinite, a label is no token id or holds a score already.
    """
    values = scores if isinstance(scores, Tensor) else torch.from_numpy(np.array(scores, dtype=np.float64))
    label, score = torch.as_tensor(labels).long(), values.float()
    if label.shape != score.shape:
        found = f"labels {tuple(label.shape)}, scores {tuple(score.shape)}"
        raise ValueError(f"expected a score for each label, found {found}")
    ignored = (label == IGNORE_INDEX) | score.isnan()
    if bool(score.isinf().any()):
        raise ValueError("expected finite scores, NaN where there is none; found infinite ones")
    if bool(((label != IGNORE_INDEX) & ((label < 0) | (label >> 31 != 0))).any()):
        raise ValueError("expected labels that are token ids or -100; some are negative or hold a score already")
    score = torch.where(score == 0, -0.0, score)
    return ((score.view(torch.int32).long() << 32) | label).masked_fill(ignored, IGNORE_INDEX)


def split_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Plain labels and scores, float32 (NaN where the label is -100), of the labels of `attach_scores`.

    Raises:
        ValueError: a label holds no score.
    """
    ignored = labels == IGNORE_INDEX
    missing = ~ignored & ~_holds_score(labels)
    if bool(missing.any()):
        raise ValueError(
            f"{int(missing.sum())} of {int((~ignored).sum())} labels hold no score: these are plain token ids, or "
            "negative and not -100. Make the labels with rho.attach_scores(labels, ref_loss), and see that nothing "
            "makes them anew from input_ids."
        )
    score = (labels >> 32).int().view(torch.float32).masked_fill(ignored, torch.nan)
    return (labels & 0xFFFFFFFF).masked_fill(ignored, IGNORE_INDEX), score


def is_packed(labels: Tensor) -> bool:
    """Whether any label holds a score."""
    return bool(_holds_score(labels).any())


def _holds_score(labels: Tensor) -> Tensor:
    """Which of them do: a token id has nothing in its upper half, -100 (or another small negative number) all ones."""
    return (labels >> 32 != 0) & (labels >> 32 != -1)
