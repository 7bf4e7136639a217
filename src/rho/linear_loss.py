"""Head, token losses, selection and gradients in one pass over the head: no tensor of logits for all rows, ever.

`objective.py` says what is computed; here the logits exist for a chunk of rows at a time, in one buffer. A chunk's
losses are known before its gradients are formed, so a selection that ranks tokens within a chunk costs nothing, and
only the rows it keeps are passed backward: with a share k of them kept, the head costs 1 + 2k of its forward, where
plain training costs 3.

Where tokens of several chunks are ranked together, each chunk's selection is guessed from the chunks seen so far, and
the few rows guessed wrong are passed once more when all losses are known: as exact, at little more cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rho.objective import IGNORE_INDEX

# Rows of logits alive at once. Every chunk rewrites the head's gradient, so few rows cost more than they save.
CHUNK_CPU, CHUNK = 384, 4096
CHUNK_CPU_SCORING = 128  # without a gradient: small beside a small model's weights
CACHED = 1 << 17  # logits that a CPU core's cache holds: what is done to them element by element is done in such blocks


class Head(NamedTuple):
    """What makes logits of hidden states: `cap * tanh(scale * (hidden @ weight.T + bias) / cap)`.

    Attributes:
        weight_VD: may be the embedding as well.
        bias_V: None for none.
        scale: factor of the logits (Cohere's logit_scale; Granite divides by its logits_scaling).
        cap: soft limit of the logits (Gemma's final_logit_softcapping); None for none.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """logits_NV, float32 (or float64): the whole tensor, which nothing that has to be fast makes."""
        bias = 0.0 if self.bias_V is None else self.bias_V
        logits_NV = self.scale * (hidden_ND @ self.weight_VD.T + bias).to(_accumulate(hidden_ND))
        return logits_NV if self.cap is None else self.cap * (logits_NV / self.cap).tanh()


# (which sequences, their loss_bT so far, seen_bT: which tokens have one, whether all have) -> the selection among the
# seen: a boolean mask_bT, or weights_bT.
Choose = Callable[[slice, Tensor, Tensor, bool], Tensor]


@torch.no_grad()
def linear_token_loss(
    hidden_ND: Tensor, head: Head, labels_N: Tensor, entropy: bool = False, chunk: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Eq. 1 from hidden states: loss_N (and entropy_N, Eq. 8), nats, NaN where the label is ignored. No gradient.

    float32, or float64 for float64 hidden states. Equals `token_loss` of the rows' logits for rows that are aligned
    already (`predictors`). `chunk` is the number of rows whose logits are alive at once.
    """
    chunk = chunk or (CHUNK_CPU_SCORING if hidden_ND.device.type == "cpu" else CHUNK)
    loss_N = hidden_ND.new_full(labels_N.shape, torch.nan, dtype=_accumulate(hidden_ND))
    entropy_N = loss_N.clone() if entropy else None
    rows_K = (labels_N != IGNORE_INDEX).nonzero().squeeze(-1)
    head_pass = _HeadPass(hidden_ND, head, labels_N, min(chunk, len(rows_K)))
    for rows in rows_K.split(chunk):
        loss_N[rows] = head_pass.losses(rows, entropy_N)
    return loss_N, entropy_N


def selective_linear_loss(
    hidden_BTD: Tensor,
    head: Head,
    labels_BT: Tensor,
    choose: Choose,
    ranked: Literal["sequence", "batch"] = "sequence",
    rest_weight: Tensor | float = 0.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The numerator of Eq. 4 from hidden states, differentiable, the loss of every token, and the selection.

    Equals `(token_loss(logits, labels) * weight).sum()` on the logits of aligned rows, where `weight` is what `choose`
    makes of all losses. Gradients are formed in the forward while the logits are at hand, and summed in float32;
    the head's only if it is to be trained, none without autograd.

    Args:
        hidden_BTD: row t is what predicts token t (`predictors`).
        head: weight and bias may require gradients.
        labels_BT: `IGNORE_INDEX` where a token takes no part: it has no loss and is never chosen.
        choose: called with a slice of sequences, their losses (NaN where not known yet), a mask of the tokens known,
            and whether these are all; returns a mask of the chosen among the known, or their weights. What it says
            with all known counts; before, it is a guess that saves work where it is right, and zeros are allowed.
        ranked: `sequence` if `choose` judges each sequence by itself, `batch` if it needs all of them at once; it is
            then told `all` exactly once, whatever the labels.
        rest_weight: what a labelled token weighs that a mask leaves out (retention).
        chunk: rows of logits alive at once; None for what suits the device.

    Returns:
        The weighted sum of losses (nats); loss_BT without gradient, NaN where ignored; what `choose` returned.
    """
    chunk = chunk or default_chunk(hidden_BTD)
    wanted: tuple[Tensor | None, ...] = (hidden_BTD, head.weight_VD, head.bias_V)
    if not torch.is_grad_enabled():  # a Function would still be told that parameters need gradients
        wanted = tuple(None if tensor is None else tensor.detach() for tensor in wanted)
    return _LinearLoss.apply(*wanted, head, labels_BT, choose, ranked, rest_weight, chunk)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        labels_BT: Tensor,
        choose: Choose,
        ranked: str,
        rest_weight: Tensor | float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        labelled_BT = labels_BT != IGNORE_INDEX
        most = min(chunk, int(labelled_BT.sum()))
        head_pass = _HeadPass(hidden_BTD.flatten(0, 1), head, labels_BT.flatten(), most, ctx.needs_input_grad[:3])
        loss_BT = head_pass.exp_RV.new_full(labels_BT.shape, torch.nan)
        weight_BT, used_BT = torch.zeros_like(loss_BT), torch.zeros_like(loss_BT)
        seen_BT = torch.zeros_like(labelled_BT)
        weight_N, used_N = weight_BT.view(-1), used_BT.view(-1)
        chosen = []
        for part in _ranked_parts(labelled_BT, ranked, chunk):
            rows = labelled_BT[part].flatten().nonzero().squeeze(-1) + part.start * labels_BT.shape[1]
            cut = max(1, -(-len(rows) // chunk))
            for number in range(cut):
                some = rows[number::cut]  # spread over the part, so that they speak for the rest of it
                loss_BT.view(-1)[some] = head_pass.losses(some)
                seen_BT.view(-1)[some] = True
                found = choose(part, loss_BT[part], seen_BT[part], number == cut - 1)
                weight_BT[part] = found.to(loss_BT.dtype)
                if found.dtype == torch.bool:
                    weight_BT[part] += (seen_BT[part] & ~found) * rest_weight
                used_N[some] = weight_N[some]
                kept = used_N[some].nonzero().squeeze(-1)
                head_pass.gradients(kept, used_N[some], used_N[some])
            chosen.append(found)
            if cut > 1:
                for some in rows[weight_N[rows] != used_N[rows]].split(chunk):
                    head_pass.losses(some)
                    every = torch.arange(len(some), device=some.device)
                    head_pass.gradients(every, weight_N[some] - used_N[some], weight_N[some])
        ctx.save_for_backward(head_pass.grad_hidden_ND, head_pass.grad_weight_VD, head_pass.grad_bias_V)
        ctx.like = [(t.shape, t.dtype) if t is not None else None for t in (hidden_BTD, weight_VD, bias_V)]
        total = (loss_BT * weight_BT).masked_fill(weight_BT == 0, 0.0).sum()
        chosen_BT = torch.cat(chosen)
        ctx.mark_non_differentiable(loss_BT, chosen_BT)
        return total, loss_BT, chosen_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        found = zip(ctx.saved_tensors, ctx.like, strict=True)
        grads = [None if grad is None else (grad * grad_sum).to(like[1]).view(like[0]) for grad, like in found]
        return (*grads, None, None, None, None, None, None)


class _HeadPass:
    """The head, forward and backward, for a chunk of rows at a time.

    Args:
        hidden_ND, labels_N: all rows.
        head: see `Head`.
        chunk: rows at most.
        needs: whether hidden states, weight and bias need gradients.
    """

    def __init__(
        self, hidden_ND: Tensor, head: Head, labels_N: Tensor, chunk: int, needs: tuple[bool, ...] = (False,) * 3
    ) -> None:
        self.hidden_ND, self.labels_N, self.head = hidden_ND, labels_N, head
        self.dtype = compute_dtype(hidden_ND)
        self.weight_VD = head.weight_VD.detach().to(self.dtype)
        self.exp_RV = hidden_ND.new_empty(chunk, len(self.weight_VD), dtype=_accumulate(hidden_ND))
        # d capped / d logit, which the capped logits alone do not give back
        self.slope_RV = torch.empty_like(self.exp_RV) if any(needs) and head.cap is not None else None
        self.scratch_RV: Tensor | None = None
        wide = self.exp_RV.dtype
        self.grad_hidden_ND = torch.zeros_like(hidden_ND) if needs[0] else None
        self.grad_weight_VD = torch.zeros_like(head.weight_VD, dtype=wide) if needs[1] else None
        self.grad_bias_V = torch.zeros_like(head.bias_V, dtype=wide) if needs[2] and head.bias_V is not None else None

    def losses(self, rows_R: Tensor, entropy_N: Tensor | None = None) -> Tensor:
        """loss_R of these rows. What `gradients` needs of them stays in the buffer: exp(logit - largest logit)."""
        self.rows_R, logits_RV = rows_R, self.exp_RV[: len(rows_R)]
        with torch.autocast(rows_R.device.type, enabled=False):
            if self.dtype == logits_RV.dtype:
                torch.mm(self.hidden_ND[rows_R], self.weight_VD.T, out=logits_RV)
            else:
                logits_RV.copy_(self.hidden_ND[rows_R].to(self.dtype) @ self.weight_VD.T)
        labels_R1 = self.labels_N[rows_R, None]
        self.total_R1 = logits_RV.new_empty(len(rows_R), 1)
        loss_R = logits_RV.new_empty(len(rows_R))
        for part in _blocks(logits_RV):
            logits = self._finish(logits_RV[part], part)
            target = logits.gather(-1, labels_R1[part])
            top = logits.amax(-1, keepdim=True)
            exp = torch.exp(logits.sub_(top), out=logits if entropy_N is None else self._scratch(logits))
            total = exp.sum(-1, keepdim=True)
            self.total_R1[part] = total
            loss_R[part] = (total.log() + (top - target)).squeeze(-1)
            if entropy_N is not None:
                entropy_N[rows_R[part]] = (total.log() - exp.mul_(logits).sum(-1, keepdim=True) / total).squeeze(-1)
        return loss_R

    def _scratch(self, like: Tensor) -> Tensor:
        """Room for as many logits, used again: on a CPU, new memory costs more than what is done in it."""
        if self.scratch_RV is None:
            self.scratch_RV = torch.empty_like(like)
        return self.scratch_RV[: len(like)]

    def _finish(self, product: Tensor, part: slice) -> Tensor:
        """Logits, in place of `hidden @ weight.T`."""
        _, bias_V, scale, cap = self.head
        if bias_V is not None:
            product += bias_V
        if cap is None:
            return product if scale == 1.0 else product.mul_(scale)
        product.mul_(scale / cap).tanh_()
        if self.slope_RV is not None:
            torch.mul(product, product, out=self.slope_RV[part]).neg_().add_(1.0)
        return product.mul_(cap)

    def gradients(self, kept_K: Tensor, weight_R: Tensor, hidden_weight_R: Tensor) -> None:
        """Add the gradients of `losses` of some of the rows last passed.

        Args:
            kept_K: their places among those rows.
            weight_R: what each of those rows weighs in the gradients of weight and bias.
            hidden_weight_R: and in that of their hidden states, which is set, not added to.
        """
        if self.grad_hidden_ND is None and self.grad_weight_VD is None and self.grad_bias_V is None:
            return
        grad_KV, kept_K = _to_front(self.exp_RV[: len(self.rows_R)], kept_K)
        rows_K, total_K1, weight_K = self.rows_R[kept_K], self.total_R1[kept_K], weight_R[kept_K]
        # softmax - onehot, but for the division by the total: that is left to the narrow factors of the products.
        grad_KV.scatter_add_(-1, self.labels_N[rows_K, None], -total_K1)
        if self.slope_RV is not None:
            grad_KV *= self.slope_RV[kept_K]
        factor_K1 = self.head.scale / total_K1
        if self.grad_bias_V is not None:
            self.grad_bias_V.addmv_(grad_KV.T, factor_K1.squeeze(-1) * weight_K)
        with torch.autocast(rows_K.device.type, enabled=False):
            half_KV, half_factor_K1 = grad_KV, factor_K1
            if grad_KV.dtype != self.dtype:  # it is copied anyway, and in low precision each rounding counts
                half_KV = torch.mul(grad_KV, factor_K1, out=torch.empty_like(grad_KV, dtype=self.dtype))
                half_factor_K1 = torch.ones_like(factor_K1)
            if self.grad_hidden_ND is not None:
                grad_KD = (half_KV @ self.weight_VD) * (half_factor_K1 * hidden_weight_R[kept_K, None])
                self.grad_hidden_ND[rows_K] = grad_KD.to(self.grad_hidden_ND.dtype)
            if self.grad_weight_VD is not None and half_KV.is_cuda and half_KV is not grad_KV:
                hidden_KD = (self.hidden_ND[rows_K] * weight_K[:, None]).to(self.dtype)
                self.grad_weight_VD += torch.mm(half_KV.T, hidden_KD, out_dtype=self.grad_weight_VD.dtype)
            elif self.grad_weight_VD is not None:  # only CUDA adds products of low precision in float32
                hidden_KD = self.hidden_ND[rows_K].to(self.dtype) * (factor_K1 * weight_K[:, None])
                self.grad_weight_VD.addmm_(grad_KV.T, hidden_KD)


def _ranked_parts(labelled_BT: Tensor, ranked: str, chunk: int) -> Iterator[slice]:
    """The sequences that are chosen from together: all, or whole ones of up to `chunk` labelled tokens."""
    if ranked == "batch":
        yield slice(0, len(labelled_BT))
        return
    start = size = 0
    for number, count in enumerate(labelled_BT.sum(-1).tolist()):
        if size and size + count > chunk:
            yield slice(start, number)
            start, size = number, 0
        size += count
    yield slice(start, len(labelled_BT))


def _to_front(values_RV: Tensor, kept_K: Tensor) -> tuple[Tensor, Tensor]:
    """values_KV of the kept rows, in place, and where each was: those beyond the first K move into the gaps."""
    place_K = torch.arange(len(kept_K), device=kept_K.device)
    if len(kept_K) < len(values_RV):
        gap_K = torch.ones_like(place_K, dtype=torch.bool)
        stays = kept_K < len(kept_K)
        gap_K[kept_K[stays]] = False
        gaps, beyond = gap_K.nonzero().squeeze(-1), kept_K[~stays]
        place_K[gaps] = beyond
        for part in _blocks(values_RV[: len(gaps)]):
            values_RV.index_copy_(0, gaps[part], values_RV[beyond[part]])
    return values_RV[: len(kept_K)], place_K


def _blocks(values_RV: Tensor) -> Iterator[slice]:
    """Rows that fit a CPU's cache together; elsewhere all at once."""
    rows = max(1, CACHED // values_RV.shape[1]) if values_RV.device.type == "cpu" else len(values_RV)
    for start in range(0, len(values_RV), max(1, rows)):
        yield slice(start, min(start + rows, len(values_RV)))


def default_chunk(hidden: Tensor) -> int:
    """Rows of logits alive at once, on this device."""
    return CHUNK_CPU if hidden.device.type == "cpu" else CHUNK


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The precision of the head's products: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _accumulate(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
