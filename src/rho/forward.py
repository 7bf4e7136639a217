"""The forward of a selective training: backbone, selection and loss inside the model, whatever wraps it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rho.backends import LinearLoss
from rho.errors import ConfigError
from rho.linear_loss import selective_linear_loss
from rho.models import check_head, check_trainable, head, hidden_states
from rho.objective import predicted, predictors
from rho.selection import COLUMNS, Selector
from rho.selective import CLM, select_and_sum

NO_FILTER = nullcontext()


def selective_forward(
    selector: Selector,
    linear_loss: LinearLoss = selective_linear_loss,
    filtered: AbstractContextManager[None] = NO_FILTER,
) -> Callable[..., dict[str, Tensor]]:
    """A `forward` for a causal language model that returns the numerator of Eq. 4 instead of logits.

    It runs as the model's own, so that the loss is computed inside whatever wraps the model (DDP, FSDP, autocast). Its
    arguments are a batch's tensors: input_ids, position_ids, labels, the columns (`COLUMNS`) and the mask `selected`
    (where it is decided already) are BT; `block` (row numbers) is B. `threshold` is that of scope running;
    `rest_weight` what each eligible token that is not selected weighs (retention). Where `rows` is given, labels and
    columns have its shape, and it says which token of the flat input stands there (padding-free batches: one sequence
    a row). `selective` is `make_selective`'s; all else (an attention mask, lengths for kernels) is the backbone's. In
    eval mode every label counts.

    `linear_loss` makes the loss (`rho.backends`); the backbone is passed inside `filtered` (`rho.filtered`). Returned
    is what `rho.selective.select_and_sum` returns; `loss` is to be divided by the number of tokens that the optimizer
    step selects.
    """

    def forward(
        model: PreTrainedModel,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        step: int = 0,
        block: Tensor | None = None,
        selected: Tensor | None = None,
        threshold: float | None = None,
        rest_weight: Tensor | None = None,
        rows: Tensor | None = None,
        selective: bool = True,
        **others: Any,
    ) -> dict[str, Tensor]:
        active = selector.at(step) if model.training else CLM
        columns = {name: column for name in COLUMNS if (column := others.pop(name, None)) is not None}
        with filtered:
            hidden_BTD = hidden_states(model, input_ids, position_ids, **others)
        if rows is not None:
            hidden_BTD = hidden_BTD.flatten(0, 1)[rows]
        return select_and_sum(
            active,
            predictors(hidden_BTD),
            head(model),
            predicted(labels),
            columns,
            linear_loss,
            step=step,
            block_B=block,
            selected_BT=selected,
            threshold=threshold,
            rest_weight=rest_weight,
        )

    return forward


def make_selective(
    model: PreTrainedModel,
    selector: Selector,
    linear_loss: LinearLoss = selective_linear_loss,
    filtered: AbstractContextManager[None] = NO_FILTER,
) -> PreTrainedModel:
    """The model itself, whose forward is `selective_forward` if called with `selective=True`, and else what it was.

    To be called before the model is wrapped (DDP, FSDP, `accelerator.prepare`). In eval mode the forward is for
    `torch.no_grad()` alone: with gradients it is a `ConfigError`, as it would train on every label.

    Raises:
        ConfigError: adapters or an auxiliary loss that would be passed by (`rho.models.check_trainable`).
        MismatchError: its head makes other logits than rho knows (`rho.models.check_head`).
    """
    check_trainable(model)
    check_head(model)
    ours, bound = selective_forward(selector, linear_loss, filtered), model.forward
    # Not bound to this model: a copy of it (`copy.deepcopy`, averaged weights) has to pass through its own weights.
    theirs = getattr(bound, "__func__", lambda _own, *args, **kwargs: bound(*args, **kwargs))

    def forward(own: PreTrainedModel, *args: Any, selective: bool = False, **kwargs: Any) -> Any:
        if selective and not own.training and torch.is_grad_enabled():
            raise ConfigError(
                "the model is in eval mode, as from_pretrained leaves it, where every label counts and nothing is "
                "selected: call model.train() before training, or evaluate under torch.no_grad()."
            )
        return ours(own, **kwargs) if selective else theirs(own, *args, **kwargs)

    # `Trainer` reads from the signature which columns a model takes.
    asked = inspect.signature(bound)
    own = inspect.Parameter("own", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = asked.replace(parameters=[own, *asked.parameters.values()])  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)
    return model
