"""The forward of a selective training: backbone, selection and loss inside the model, whatever wraps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rho.distributed import all_gather, rank
from rho.linear_loss import linear_loss_sum, linear_token_loss
from rho.models import head, hidden_states
from rho.objective import IGNORE_INDEX, predictors
from rho.selection import Selector

CLM = Selector(ratio=1.0)


def selective_forward(selector: Selector) -> Callable[..., dict[str, Tensor]]:
    """A `forward` for a causal language model that returns the numerator of Eq. 4 instead of logits.

    It runs as the model's own, so that the loss is computed inside whatever wraps the model (DDP, FSDP, autocast). Its
    arguments are a batch's tensors: input_ids, position_ids, labels, ref_loss, ref_entropy and the mask `selected`
    (where it is decided already) are BT; `block` (row numbers) is B. `threshold` is that of scope running;
    `rest_weight` what each eligible token that is not selected weighs (retention). In eval mode every label counts.

    It returns by name: `loss`, the sum over the selected tokens (nats, to be divided by their number in the whole
    optimizer step); `token_loss` BT without gradient; masks `eligible` and `selected` BT; for scope running `score` BT.
    """

    def forward(
        model: PreTrainedModel,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        step: int = 0,
        block: Tensor | None = None,
        ref_loss: Tensor | None = None,
        ref_entropy: Tensor | None = None,
        selected: Tensor | None = None,
        threshold: float | None = None,
        rest_weight: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        active = selector.at(step) if model.training else CLM
        columns = {n: v for n, v in (("ref_loss", ref_loss), ("ref_entropy", ref_entropy)) if v is not None}
        hidden_ND = predictors(hidden_states(model, input_ids, position_ids)).flatten(0, 1)
        weight, bias = head(model)
        eligible = active.eligible(labels, columns)

        def losses(where: Tensor) -> Tensor:
            wanted = labels.masked_fill(~where, IGNORE_INDEX).flatten()
            return linear_token_loss(hidden_ND, weight, wanted, bias)[0].view_as(labels)

        loss = None if active.static or selected is not None else losses(eligible)
        out: dict[str, Tensor] = {"eligible": eligible}
        if selected is None and active.selective:
            scores = [part.scores(loss, columns, block, labels.shape[1], step) for part in active.parts]
            if active.weighting != "mask":
                selected = eligible
                row_weight = active.soft_weights(scores[0], eligible)
            elif active.scope == "step" or (active.scope == "running" and threshold is None):
                selected = active.select_step([scores], [eligible], all_gather, rank())[0]
            else:
                selected = active.select(scores, eligible, threshold)
        elif selected is None:
            selected = eligible
        if active.weighting == "mask":
            row_weight = selected.float()
            if rest_weight is not None:
                row_weight = torch.where(eligible & ~selected, rest_weight.float(), row_weight)
        rows = row_weight.flatten().nonzero().squeeze(-1)
        weighted = active.weighting != "mask" or rest_weight is not None
        loss_sum, row_loss = linear_loss_sum(
            hidden_ND.index_select(0, rows),
            weight,
            labels.flatten()[rows],
            bias,
            row_weight.flatten()[rows] if weighted else None,
        )
        if loss is None:  # for the log alone
            loss = losses(eligible & (row_weight == 0))
            loss.view(-1)[rows] = row_loss
        if active.scope == "running" and active.selective:  # what its threshold follows
            out["score"] = active.scores(loss, columns, block, labels.shape[1], step)
        return out | {"loss": loss_sum, "token_loss": loss, "selected": selected}

    return forward
