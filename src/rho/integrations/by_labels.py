"""A loss for frameworks that hand a loss nothing but logits, labels and a count of labels (docs/integrations.md)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rho.integrations.labels import is_packed, split_labels
from rho.objective import predicted, predictors
from rho.selection import Selector
from rho.selective import CLM, check_one_pass, logits_loss, select_and_sum


class LabelLoss:
    """Eq. 4 as a `compute_loss_func` of `transformers.Trainer`: scores come inside the labels (`rho.attach_scores`).

    Such a function is told how many labels the optimizer step has, not how many tokens it selects. So it divides by
    `ratio` times that number: Eq. 4 to the last digit where each sequence's share of its labels is a whole number, else
    off by one factor for all tokens of a step (a sequence selects half a token more or less than its share at most).
    `rho.mixin.SelectiveMixin` counts what is selected, and makes no logits.

    Args:
        selector: one selection of scope sequence or batch, whose score or weights one column of floats can carry.

    Raises:
        ValueError: another selector.
    """

    def __init__(self, selector: Selector) -> None:
        check_one_pass(selector)
        if selector.scope not in ("sequence", "batch") or selector.second or selector.schedule:
            raise ValueError(
                "a loss that sees one micro-batch and no step number takes one selection of scope sequence or batch "
                f"without a schedule; found {selector}"
            )
        if selector.selective and selector.weighting != "loss_weights" and selector.score == "random":
            raise ValueError("score 'random' needs the rows' block numbers, which labels don't carry")
        self.selector = selector

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a micro-batch, nats; in evaluation (no gradient) of every label.

        Args:
            outputs: the model's, with `logits` BTV (row t predicts token t+1).
            labels: BT, of `rho.attach_scores`.
            num_items_in_batch: labels of the optimizer step over all ranks; None for those of this call.

        Raises:
            ValueError: labels without scores, where the selector needs scores.
        """
        return self.of_aligned(predictors(outputs.logits), predicted(labels), num_items_in_batch)

    def of_aligned(self, logits_BTV: Tensor, labels_BT: Tensor, num_labels: Tensor | int | None = None) -> Tensor:
        """As the call, for logits whose row t predicts label t."""
        active = self.selector if logits_BTV.requires_grad else CLM
        columns = {}
        if active.columns or is_packed(labels_BT):
            labels_BT, score_BT = split_labels(labels_BT)
            columns = dict.fromkeys(active.columns, score_BT)
        found = select_and_sum(active, logits_BTV, None, labels_BT, columns, logits_loss)
        if num_labels is None:
            return found["loss"] / found["selected"].sum().clamp(min=1)
        share = active.ratio if active.weighting == "mask" else 1.0
        return found["loss"] / num_labels / share
