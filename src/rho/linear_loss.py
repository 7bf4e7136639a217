"""Head and token losses without a full-logits tensor, and a backward over the kept rows only.

`objective.py` says what is computed; here the logits exist only for `chunk` rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rho.objective import IGNORE_INDEX

CHUNK = 512  # rows of logits alive at once; smaller chunks rewrite the head's gradient more often
CPU_CHUNK = 128  # without a gradient: these logits fit the cache, and are small beside a small model's weights


@torch.no_grad()
def linear_token_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Eq. 1 from hidden states: loss_N (and entropy_N, Eq. 8), nats, NaN where the label is ignored.

    float32, or float64 for float64 hidden states. Equals `token_loss` of the rows' logits, `hidden @ weight.T + bias`,
    for rows that are aligned already (`predictors`). No gradient.
    """
    dtype = _compute_dtype(hidden_ND)
    weight = weight_VD.to(dtype)
    loss_N = torch.full(labels_N.shape, torch.nan, dtype=_accumulate(hidden_ND), device=hidden_ND.device)
    entropy_N = loss_N.clone() if entropy else None
    rows_K = (labels_N != IGNORE_INDEX).nonzero().squeeze(-1)
    for rows in rows_K.split(chunk or (CPU_CHUNK if hidden_ND.device.type == "cpu" else CHUNK)):
        logits = _logits(hidden_ND[rows].to(dtype), weight, bias_V)
        target = logits.gather(-1, labels_N[rows, None]).squeeze(-1)
        top = logits.amax(-1, keepdim=True)
        logits -= top
        exp = logits.exp() if entropy else logits.exp_()
        total = exp.sum(-1)
        loss_N[rows] = total.log() + top.squeeze(-1) - target
        if entropy_N is not None:
            entropy_N[rows] = total.log() - exp.mul_(logits).sum(-1) / total
        del logits, exp  # before the next chunk's are made
    return loss_N, entropy_N


def linear_loss_sum(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    labels_K: Tensor,
    bias_V: Tensor | None = None,
    row_weight_K: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Sum of the (weighted) losses of K rows, differentiable, and loss_K (no gradient): the numerator of Eq. 4.

    The gradients are formed in the forward, chunk by chunk, while the logits are at hand: the head is passed three
    times (one forward, two backward products), as in plain training, and its logits are never kept. Gradients of the
    weight are summed in float32. Every label must be a token id.
    """
    if labels_K.numel() and bool((labels_K == IGNORE_INDEX).any()):
        raise ValueError("linear_loss_sum takes rows with a label only, found IGNORE_INDEX: select the rows first")
    return _LinearLossSum.apply(hidden_KD, weight_VD, bias_V, labels_K, row_weight_K, chunk)


class _LinearLossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_K: Tensor,
        row_weight_K: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = _compute_dtype(hidden_KD)
        weight = weight_VD.to(dtype)
        loss_K = torch.empty(labels_K.shape, dtype=_accumulate(hidden_KD), device=hidden_KD.device)
        grad_hidden = torch.empty_like(hidden_KD) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=_accumulate(weight_VD)) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=_accumulate(bias_V)) if need_bias and bias_V is not None else None
        for start in range(0, len(labels_K), chunk):
            part = slice(start, start + chunk)
            hidden, labels = hidden_KD[part].to(dtype), labels_K[part, None]
            logits = _logits(hidden, weight, bias_V)
            target = logits.gather(-1, labels).squeeze(-1)
            top = logits.amax(-1, keepdim=True)
            logits.sub_(top).exp_()
            total = logits.sum(-1, keepdim=True)
            loss_K[part] = (total.log() + top).squeeze(-1) - target
            # d loss / d logits = softmax - onehot, in place of the logits.
            grad = logits.div_(total).scatter_add_(-1, labels, torch.full_like(total, -1.0))
            if row_weight_K is not None:
                grad *= row_weight_K[part, None]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(dtype)
            with torch.autocast(hidden_KD.device.type, enabled=False):
                if grad_hidden is not None:
                    grad_hidden[part] = (grad @ weight).to(grad_hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad.T @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(loss_K)
        total = loss_K if row_weight_K is None else loss_K * row_weight_K
        return total.sum(), loss_K

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else (g * grad_sum).to(d) for g, d in _with_dtypes(ctx)]
        return (*grads, None, None, None)


def _with_dtypes(ctx: Any) -> list[tuple[Tensor | None, torch.dtype]]:
    grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
    hidden_dtype = ctx.weight_dtype if grad_hidden is None else grad_hidden.dtype
    return [(grad_hidden, hidden_dtype), (grad_weight, ctx.weight_dtype), (grad_bias, ctx.weight_dtype)]


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The precision of the head's products: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _accumulate(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _logits(hidden_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits of a chunk: product in the compute precision, everything after it in float32 (float64 stays)."""
    with torch.autocast(hidden_KD.device.type, enabled=False):
        logits = (hidden_KD @ weight_VD.T).to(_accumulate(hidden_KD))
    return logits if bias_V is None else logits + bias_V
