"""The forward of a selective training: backbone, selection and loss inside the model, whatever wraps it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rho.backends import LinearLoss
from rho.distributed import all_gather, rank
from rho.linear_loss import selective_linear_loss
from rho.models import head, hidden_states
from rho.objective import IGNORE_INDEX, predictors
from rho.selection import Selector

CLM = Selector(ratio=1.0)
NO_FILTER = nullcontext()


def selective_forward(
    selector: Selector,
    linear_loss: LinearLoss = selective_linear_loss,
    filtered: AbstractContextManager[None] = NO_FILTER,
) -> Callable[..., dict[str, Tensor]]:
    """A `forward` for a causal language model that returns the numerator of Eq. 4 instead of logits.

    It runs as the model's own, so that the loss is computed inside whatever wraps the model (DDP, FSDP, autocast). Its
    arguments are a batch's tensors: input_ids, position_ids, labels, ref_loss, ref_entropy and the mask `selected`
    (where it is decided already) are BT; `block` (row numbers) is B. `threshold` is that of scope running;
    `rest_weight` what each eligible token that is not selected weighs (retention). In eval mode every label counts.

    `linear_loss` makes the loss (`rho.backends`); the backbone is passed inside `filtered` (`rho.filtered`). By name
    are returned: `loss`, the sum over the selected tokens (nats, to be divided by their number in the optimizer step);
    `token_loss` BT without gradient; masks `eligible` and `selected` BT; for scope running `score` BT.
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
        with filtered:
            hidden_BTD = predictors(hidden_states(model, input_ids, position_ids))
        eligible = active.eligible(labels, columns)

        def scores(loss: Tensor | None, part: slice = slice(None)) -> list[Tensor]:
            own = {name: column[part] for name, column in columns.items()}
            blocks = None if block is None else block[part]
            return [one.scores(loss, own, blocks, labels.shape[1], step) for one in active.parts]

        def choose(part: slice, loss: Tensor | None, seen: Tensor, everything: bool) -> Tensor:
            if active.weighting != "mask":
                if not everything:  # the weights of a few tokens say nothing about those of all
                    return torch.zeros(seen.shape, device=seen.device)
                return active.soft_weights(scores(loss, part)[0], seen)
            if everything and (active.scope == "step" or (active.scope == "running" and threshold is None)):
                return active.select_step([scores(loss)], [seen], all_gather, rank())[0]
            return active.select(scores(loss, part), seen, threshold)

        if selected is None and not active.selective:
            selected = eligible
        elif selected is None and active.static and active.weighting == "mask":
            selected = choose(slice(None), None, eligible, True)
        loss_sum, loss, chosen = linear_loss(
            hidden_BTD,
            head(model),
            labels.masked_fill(~eligible, IGNORE_INDEX),
            choose if selected is None else lambda part, _loss, seen, _all: selected[part] & seen,
            "sequence" if active.scope == "sequence" or selected is not None else "batch",
            0.0 if rest_weight is None else rest_weight,
        )
        out = {"loss": loss_sum, "token_loss": loss, "eligible": eligible}
        out["selected"] = chosen if chosen.dtype == torch.bool else eligible
        if active.scope == "running" and active.selective:  # what its threshold follows
            out["score"] = scores(loss)[0]
        return out

    return forward
