"""Selective Language Modeling, Eq. 1-5 of Rho-1 (arXiv 2404.07965, section 2.2) as pure tensor functions.

Convention of the whole project: **token t's loss is the loss of predicting token t, and stands at index t.** The first
token of a block (or of an isolated document) is predicted from nothing: its label is `IGNORE_INDEX` and its loss NaN.
`predictors` is the one place where anything is shifted, and `next_labels` the same shift on the side of the labels, for
frameworks that have it there. `predicted` leaves out the label that the shift leaves without a prediction.

Shape suffixes: B sequences, T positions, N flat tokens, V vocabulary, D hidden. Losses and entropies are nats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def predictors(states_BTX: Tensor) -> Tensor:
    """The one shift: row t of the result is what predicts token t, that is, the model's row t-1.

    Works on hidden states (X = D) and on logits (X = V). Row 0 is zero: nothing predicts a first token.
    """
    return F.pad(states_BTX[:, :-1], (0, 0, 1, 0))


def predicted(labels_BT: Tensor) -> Tensor:
    """The labels without the first of each row, which nothing predicts: Transformers passes it over as well."""
    return labels_BT.masked_fill(torch.arange(labels_BT.shape[1], device=labels_BT.device) == 0, IGNORE_INDEX)


def next_labels(labels_BT: Tensor) -> Tensor:
    """The one shift, of labels instead of states: entry t is what the model's row t predicts, that is, label t+1.

    For frameworks that compare row t with label t. The last row has nothing to predict.
    """
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)


def token_labels(
    input_ids_BT: Tensor, position_ids_BT: Tensor, special_ids: Tensor | None = None, ignore: Tensor | None = None
) -> Tensor:
    """Label t is token t, or `IGNORE_INDEX` where there is no loss to speak of.

    No label: tokens at position 0 (first of a block or of an isolated document), special tokens (the ids in
    `special_ids`: end of document, padding ...), and wherever the boolean `ignore` is set.
    """
    without = position_ids_BT == 0
    if special_ids is not None:
        without = without | torch.isin(input_ids_BT, special_ids)
    if ignore is not None:
        without = without | ignore
    return input_ids_BT.masked_fill(without, IGNORE_INDEX)


def token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Eq. 1: `-log P(x_t | x_<t)` of every token, float32 nats at index t, NaN for the first and `IGNORE_INDEX`.

    `logits_BTV` is the model's output as it comes (row t predicts token t+1). The same function gives the reference
    loss (with the reference's logits) and the current loss (with the model's).
    """
    aligned_BTV, labels_BT = predictors(logits_BTV).float(), predicted(labels_BT)
    loss = F.cross_entropy(aligned_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    return loss.view(labels_BT.shape).masked_fill(labels_BT == IGNORE_INDEX, torch.nan)


def token_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Eq. 8: entropy of the distribution that predicts token t, float32 nats, NaN where the label is ignored."""
    log_p = predictors(logits_BTV).float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).masked_fill(predicted(labels_BT) == IGNORE_INDEX, torch.nan)


def clm_loss(loss_BT: Tensor, eligible_BT: Tensor) -> Tensor:
    """Eq. 2: the mean loss of the eligible tokens (causal language modeling). Equals `slm_loss` at ratio 1."""
    return slm_loss(loss_BT, eligible_BT, eligible_BT.sum())


def excess_loss(loss_BT: Tensor, ref_loss_BT: Tensor) -> Tensor:
    """Eq. 3: how much worse the model predicts a token than the reference does. Signed: no abs, no clip."""
    return loss_BT - ref_loss_BT


def slm_loss(loss_BT: Tensor, selected_BT: Tensor, num_selected: Tensor | int) -> Tensor:
    """Eq. 4: sum of the selected tokens' losses / number of selected tokens.

    `num_selected` is N * k% of the *whole optimizer step* (all micro-batches, all ranks): sums over one known count,
    never a mean of means. With one micro-batch on one device it is `selected_BT.sum()`.
    """
    return loss_BT.masked_fill(~selected_BT, 0.0).sum() / num_selected


def num_to_select(num_eligible: Tensor, ratio: float) -> Tensor:
    """N * k% of Eq. 4: `round(ratio * n)` as Python rounds, elementwise, int64."""
    return torch.round(num_eligible.double() * ratio).long()


def select_top(score_RN: Tensor, eligible_RN: Tensor, ratio: float) -> Tensor:
    """Eq. 5, the indicator I_k%: in each row the `round(ratio * n)` best-scored of its n eligible tokens.

    Args:
        score_RN: the score S, higher is wanted (R rows are ranked independently: a row is a sequence, or a batch).
        eligible_RN: boolean; a token that is not eligible is never selected and not counted in n. A score that is NaN
            at an eligible token is an error of the caller.
        ratio: k%, in (0, 1].

    Returns:
        Boolean mask_RN with exactly the asked number of True in each row; ties go to the earlier position.
    """
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"the selection ratio must be in (0, 1], found {ratio}")
    order = score_RN.masked_fill(~eligible_RN, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    eligible_in_order = eligible_RN.gather(-1, order)
    # Rank among the eligible alone: an ineligible token may tie with an eligible score of -inf.
    wanted = num_to_select(eligible_RN.sum(-1, keepdim=True), ratio)
    chosen = eligible_in_order & (eligible_in_order.cumsum(-1) <= wanted)
    return torch.zeros_like(eligible_RN).scatter(-1, order, chosen)
