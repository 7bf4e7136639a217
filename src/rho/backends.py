"""Whose code makes the loss from hidden states: our one pass, or another library's fused loss of the selected rows.

Another library's loss can't select: the losses of all tokens come first, from a pass of ours without gradients, then
its `sum` over the selected rows. That is the one way in which all of them are right (a loss for each token times a mask
is not: some give every token the first one's gradient), and costs the head 1 + 3k of its forward where one pass costs
1 + 2k. `rho` was the fastest in every row measured so far (docs/results.md), so it is taken unless another is named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rho.errors import ConfigError
from rho.linear_loss import Choose, Head, compute_dtype, default_chunk, linear_token_loss, selective_linear_loss
from rho.objective import IGNORE_INDEX

Backend = Literal["rho", "torch", "liger", "cce"]
SumLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden_KD, weight_VD, labels_K) -> sum of losses, nats
LinearLoss = Callable[..., tuple[Tensor, Tensor, Tensor]]  # takes and returns what `selective_linear_loss` does
MODULES = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}


def linear_loss(backend: Backend) -> LinearLoss:
    """The implementation of a name.

    Raises:
        ConfigError: there is no such name, its library is not installed, or has no such loss.
    """
    if backend == "rho":
        return selective_linear_loss
    sums = {"torch": torch_sum, "liger": liger_sum, "cce": cce_sum}
    if backend not in sums:
        raise ConfigError(f"backend {backend}: no such loss. Take rho, or one of {', '.join(sums)}.")
    if (module := MODULES.get(backend)) and find_spec(module) is None:
        raise ConfigError(f"backend {backend}: needs the library {module}, which is not installed. Take backend rho.")
    if backend == "torch" and not hasattr(F, "linear_cross_entropy"):
        raise ConfigError(f"backend torch: needs torch 2.13 or later, found {torch.__version__}. Take backend rho.")
    return partial(_two_passes, sums[backend])


def torch_sum(hidden_KD: Tensor, weight_VD: Tensor, labels_K: Tensor) -> Tensor:
    """torch's chunked loss with our number of rows: its own choice is slow at small widths and large vocabularies."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=default_chunk(hidden_KD))
    return F.linear_cross_entropy(hidden_KD, weight_VD, labels_K, reduction="sum", options=options)


def liger_sum(hidden_KD: Tensor, weight_VD: Tensor, labels_K: Tensor) -> Tensor:
    """Liger-Kernel's fused loss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight_VD, hidden_KD, labels_K)


def cce_sum(hidden_KD: Tensor, weight_VD: Tensor, labels_K: Tensor) -> Tensor:
    """Cut Cross-Entropy, in the variant whose gradients are made for pre-training."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce_kahan_full_c" if hidden_KD.is_cuda else "torch_compile"
    return linear_cross_entropy(hidden_KD, weight_VD, labels_K, reduction="sum", impl=impl)


def _two_passes(
    sum_loss: SumLoss,
    hidden_BTD: Tensor,
    head: Head,
    labels_BT: Tensor,
    choose: Choose,
    ranked: Literal["sequence", "batch"] = "sequence",
    rest_weight: Tensor | float = 0.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.is_grad_enabled():
        return selective_linear_loss(hidden_BTD, head, labels_BT, choose, ranked, rest_weight, chunk)
    if head.bias_V is not None or head.scale != 1.0 or head.cap is not None:
        raise ConfigError("backend: only rho's own knows heads with a bias, a scale or a soft cap. Take backend rho.")
    flat_ND = hidden_BTD.flatten(0, 1)
    loss_N, _ = linear_token_loss(flat_ND, head, labels_BT.flatten(), chunk=chunk)
    loss_BT = loss_N.view_as(labels_BT)
    chosen_BT = choose(slice(0, len(labels_BT)), loss_BT, labels_BT != IGNORE_INDEX, True)
    if chosen_BT.dtype != torch.bool or not isinstance(rest_weight, float) or rest_weight != 0.0:
        raise ConfigError("backend: only rho's own knows soft weights and retention. Take backend rho.")
    kept_K, dtype = chosen_BT.flatten().nonzero().squeeze(-1), compute_dtype(hidden_BTD)
    if not len(kept_K):
        return (hidden_BTD.sum() + head.weight_VD.sum()) * 0.0, loss_BT, chosen_BT
    rows_KD, labels_K = flat_ND[kept_K].to(dtype), labels_BT.flatten()[kept_K]
    found = sum_loss(rows_KD, head.weight_VD.to(dtype), labels_K).to(loss_BT.dtype)
    # Its gradient, and our sum: a library's may come in the precision of the rows.
    return loss_BT[chosen_BT].sum() + (found - found.detach()), loss_BT, chosen_BT
