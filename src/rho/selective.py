"""Selection and loss of a micro-batch from hidden states or logits: what every trainer and integration calls."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rho.backends import LinearLoss
from rho.distributed import all_gather, rank
from rho.linear_loss import Choose, Head, selective_linear_loss
from rho.objective import IGNORE_INDEX, predicted, predictors
from rho.selection import COLUMNS, Selector

CLM = Selector(ratio=1.0)


class SelectiveLoss(NamedTuple):
    """What `selective_loss` returns.

    Attributes:
        loss: Eq. 4, nats, differentiable: the sum over the selected tokens / `num_selected`, or the count given.
        num_selected: how many tokens were selected here, int64 (with soft weights: how many have one).
        selected_BT: the mask of them.
        token_loss_BT: every token's loss without gradient, nats, NaN where the label is ignored.
    """

    loss: Tensor
    num_selected: Tensor
    selected_BT: Tensor
    token_loss_BT: Tensor


def selective_loss(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    ref_loss_BT: Tensor | None,
    selector: Selector,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    ref_entropy_BT: Tensor | None = None,
    loss_weights_BT: Tensor | None = None,
    block_B: Tensor | None = None,
    step: int = 0,
    num_selected: Tensor | int | None = None,
) -> SelectiveLoss:
    """The loss of Selective Language Modeling (Eq. 4) from hidden states, without a tensor of all logits.

    With one micro-batch an optimizer step, `.loss.backward()` is all there is to do. With several, or on several
    devices, all of them divide by the number of tokens that the whole step selects, known before the first backward:

        total = sum(count_selected(labels, ref_loss, selector) for labels, ref_loss in micro_batches)
        for ...:
            selective_loss(hidden, weight, labels, ref_loss, selector, num_selected=total).loss.backward()

    On several devices `total` is summed over them, and where gradients are averaged over devices (DDP, FSDP) the loss
    is multiplied by their number. A wrapped model's head must not be used outside its forward: see
    `rho.forward.make_selective`.

    Args:
        hidden_BTD: the head's input as the model gives it; row t is what predicts token t+1.
        weight_VD: the head's weight (`lm_head.weight`).
        labels_BT: as in Transformers, `labels[t]` is token t, not shifted; `IGNORE_INDEX` (-100) where a token takes no
            part (prompts, padding, and the first token of an isolated document); that of a row never does. Labels of
            `attach_scores` are not meant: take them apart with `split_labels` first.
        ref_loss_BT: the reference's losses, nats, NaN where there is none; None if the selector needs none.
        selector: of scope sequence or batch, or step where one micro-batch is the whole step of this device.
        bias_V, scale, cap: the head's bias, what it multiplies logits by (Cohere, Granite) and their soft limit
            (Gemma 2): `rho.models.head(model)` finds them in a model.
        ref_entropy_BT: for score `ref_entropy`.
        loss_weights_BT: for weighting `loss_weights`: what each token's loss is multiplied by.
        block_B: rows' numbers in the corpus, for score `random`.
        step: the optimizer step, for score `random` and ratio schedules.
        num_selected: the selected tokens of the whole optimizer step; None for those of this call.

    Raises:
        ValueError: a column that the selector needs is missing, shapes differ, the weight is a shard, the selector
            needs a trainer's memory, or no token was selected, here or (num_selected) in the whole step.
    """
    given = _given(ref_loss_BT, ref_entropy_BT, loss_weights_BT)
    check_one_pass(selector)
    _check_shapes(hidden_BTD, weight_VD, labels_BT, given)
    head = Head(weight_VD, bias_V, scale, cap)
    active, labels_BT = selector.at(step), predicted(labels_BT)
    found = select_and_sum(active, predictors(hidden_BTD), head, labels_BT, given, step=step, block_B=block_B)
    own = found["selected"].sum()
    count = own if num_selected is None else num_selected
    if count == 0:  # 0 / 0 would be a NaN, and after the update every weight
        raise ValueError(
            f"no token was selected: {int((labels_BT != IGNORE_INDEX).sum())} have a label, "
            f"{int(found['eligible'].sum())} of them also what is needed ({', '.join(active.columns) or 'nothing'}), "
            f"ratio {active.ratio}, num_selected {num_selected}. Check labels and scores, or pass num_selected of the "
            "whole step; leave a step out that has none."
        )
    return SelectiveLoss(found["loss"] / count, own, found["selected"], found["token_loss"])


def count_selected(
    labels_BT: Tensor,
    ref_loss_BT: Tensor | None,
    selector: Selector,
    *,
    ref_entropy_BT: Tensor | None = None,
    loss_weights_BT: Tensor | None = None,
    step: int = 0,
) -> Tensor:
    """How many tokens `selective_loss` selects of a micro-batch, int64, before any forward; add up over the step.

    All arguments are as there.

    Raises:
        ValueError: a column is missing, or it is not known before the forward (two selections combined, scope step).
    """
    active = selector.at(step)
    eligible_BT = active.eligible(predicted(labels_BT), _given(ref_loss_BT, ref_entropy_BT, loss_weights_BT))
    count = active.num_selected(eligible_BT)
    if count is None:
        raise ValueError(
            "how many tokens are selected is known before the forward only for one selection of scope sequence or "
            f"batch; found scope {selector.scope}{' and two selections' if selector.second else ''}"
        )
    return count


def check_one_pass(selector: Selector) -> None:
    """Refuse what needs more than one micro-batch, or a memory of past steps: a trainer has both.

    Raises:
        ValueError: naming the setting.
    """
    memory = selector.scope in ("running", "dataset")
    if memory or selector.retention:
        wrong = f"scope {selector.scope}" if memory else "retention"
        raise ValueError(f"{wrong} needs the whole step or past ones: take rho.trainer.SelectiveTrainer, or another")


def select_and_sum(
    active: Selector,
    hidden_BTX: Tensor,
    head: Head | None,
    labels_BT: Tensor,
    columns: dict[str, Tensor],
    linear_loss: LinearLoss = selective_linear_loss,
    *,
    step: int = 0,
    block_B: Tensor | None = None,
    selected_BT: Tensor | None = None,
    threshold: float | None = None,
    rest_weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """The numerator of Eq. 4 for a micro-batch, and what was selected.

    Args:
        active: the selector of this step (`Selector.at`).
        hidden_BTX: row t predicts label t (`predictors`); what `linear_loss` takes with `head`.
        columns: those of `COLUMNS` that are there, BT each.
        linear_loss: makes the loss (`rho.backends`), or `logits_loss`.
        step, block_B: for score `random`.
        selected_BT: the mask, where it is decided already.
        threshold: of scope running.
        rest_weight: what each eligible token that is not selected weighs (retention).

    Returns:
        By name: `loss`, the sum over the selected tokens (nats); `token_loss` BT without gradient; masks `eligible` and
        `selected` BT; for scope running `score` BT.
    """
    eligible_BT = active.eligible(labels_BT, columns)

    def scores(loss: Tensor | None, part: slice = slice(None)) -> list[Tensor]:
        own = {name: column[part] for name, column in columns.items()}
        blocks = None if block_B is None else block_B[part]
        return [one.scores(loss, own, blocks, labels_BT.shape[1], step) for one in active.parts]

    def choose(part: slice, loss: Tensor | None, seen: Tensor, everything: bool) -> Tensor:
        if active.weighting == "loss_weights":
            return columns["loss_weights"][part].masked_fill(~seen, 0.0)
        if active.weighting != "mask":
            if not everything:  # the weights of a few tokens say nothing about those of all
                return torch.zeros(seen.shape, device=seen.device)
            return active.soft_weights(scores(loss, part)[0], seen)
        if everything and (active.scope == "step" or (active.scope == "running" and threshold is None)):
            return active.select_step([scores(loss)], [seen], all_gather, rank())[0]
        return active.select(scores(loss, part), seen, threshold)

    if selected_BT is None and not active.selective:
        selected_BT = eligible_BT
    elif selected_BT is None and active.static and active.weighting == "mask":
        selected_BT = choose(slice(None), None, eligible_BT, True)
    decided = selected_BT
    loss_sum, loss_BT, chosen_BT = linear_loss(
        hidden_BTX,
        head,
        labels_BT.masked_fill(~eligible_BT, IGNORE_INDEX),
        choose if decided is None else lambda part, _loss, seen, _all: decided[part] & seen,
        "sequence" if active.scope == "sequence" or decided is not None else "batch",
        0.0 if rest_weight is None else rest_weight,
    )
    out = {"loss": loss_sum, "token_loss": loss_BT, "eligible": eligible_BT}
    out["selected"] = chosen_BT if chosen_BT.dtype == torch.bool else eligible_BT
    if active.scope == "running" and active.selective:  # what its threshold follows
        out["score"] = scores(loss_BT)[0]
    return out


def logits_loss(
    logits_BTV: Tensor,
    head: Head | None,
    labels_BT: Tensor,
    choose: Choose,
    ranked: Literal["sequence", "batch"] = "sequence",
    rest_weight: Tensor | float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`selective_linear_loss` for a framework that has made the logits already: there is nothing left to save.

    Args:
        logits_BTV: in the place of hidden states; row t predicts label t.
        head: none is needed.
        labels_BT, choose, ranked, rest_weight: as there.
    """
    wide_BTV = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    found_N = F.cross_entropy(wide_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    labelled_BT = labels_BT != IGNORE_INDEX
    differentiable_BT = found_N.view(labels_BT.shape)
    loss_BT = differentiable_BT.detach().masked_fill(~labelled_BT, torch.nan)
    chosen_BT = choose(slice(0, len(labels_BT)), loss_BT, labelled_BT, True)
    weight_BT = chosen_BT.to(loss_BT.dtype)
    if chosen_BT.dtype == torch.bool:
        weight_BT = weight_BT + (labelled_BT & ~chosen_BT) * rest_weight
    return (differentiable_BT * weight_BT).sum(), loss_BT, chosen_BT


def _given(*columns: Tensor | None) -> dict[str, Tensor]:
    """Those of `COLUMNS` that are there, by name."""
    return {name: column for name, column in zip(COLUMNS, columns, strict=True) if column is not None}


def _check_shapes(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, columns: dict[str, Tensor]) -> None:
    """Broadcasting would make something of almost any shapes."""
    if hasattr(weight_VD, "placements"):
        raise ValueError(
            "the head's weight is spread over devices: make the loss inside the model's forward, with "
            "rho.forward.make_selective before the model is wrapped"
        )
    if labels_BT.is_floating_point():
        raise ValueError(f"expected labels that are token ids, found {labels_BT.dtype}: are labels and scores swapped?")
    found = {"labels": labels_BT.shape, **{name: column.shape for name, column in columns.items()}}
    wrong = [f"{name} {tuple(shape)}" for name, shape in found.items() if shape != hidden_BTD.shape[:2]]
    if hidden_BTD.dim() != 3 or wrong or weight_VD.shape[1:] != hidden_BTD.shape[2:]:
        raise ValueError(
            "expected hidden states (B, T, D), a weight (V, D), and labels and columns (B, T); found hidden "
            f"{tuple(hidden_BTD.shape)}, weight {tuple(weight_VD.shape)}, "
            f"{', '.join(wrong) or f'labels {tuple(labels_BT.shape)}'}"
        )
