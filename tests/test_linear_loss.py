"""The chunked head against its slow twin: the formulas of objective.py on full logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rho.linear_loss import Choose, Head, linear_token_loss, selective_linear_loss
from rho.objective import IGNORE_INDEX, excess_loss, predictors, slm_loss, token_entropy, token_loss
from rho.selection import Selector

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "cap": {"cap": 2.0},
    "all": {"bias": True, "scale": 1.7, "cap": 3.0},
}


class Case:
    """Hidden states, head, labels and reference losses; labels and scores tie and are missing here and there."""

    def __init__(
        self, rows: int = 3, length: int = 7, vocab: int = 11, width: int = 4, seed: int = 0, *, bias: bool = False,
        scale: float = 1.0, cap: float | None = None, ignored: float = 0.2,
    ) -> None:  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(rows, length, width, generator=draw, dtype=torch.float64)
        self.weight = torch.randn(vocab, width, generator=draw, dtype=torch.float64)
        self.bias = torch.randn(vocab, generator=draw, dtype=torch.float64) if bias else None
        self.scale, self.cap = scale, cap
        labels = torch.randint(vocab, (rows, length), generator=draw)
        self.labels = labels.masked_fill(torch.rand(rows, length, generator=draw) < ignored, IGNORE_INDEX)
        self.ref_loss = torch.randint(4, (rows, length), generator=draw).double()

    def leaves(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        given = (self.hidden, self.weight, self.bias)
        return [tensor.detach().to(dtype).requires_grad_() for tensor in given if tensor is not None]

    def head(self, weight: Tensor, bias: Tensor | None = None) -> Head:
        return Head(weight, bias, self.scale, self.cap)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = hidden @ weight.T
        logits = self.scale * (logits if bias is None else logits + bias)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def naive_losses(self, *leaves: Tensor) -> Tensor:
        logits = self.logits(*leaves)
        accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
        loss = F.cross_entropy(logits.to(accumulate).flatten(0, 1), self.labels.flatten(), reduction="none")
        return loss.view_as(self.labels)

    def choose(self, selector: Selector, threshold: float | None = None) -> Choose:
        def choose(part: slice, loss: Tensor, seen: Tensor, everything: bool) -> Tensor:
            score = excess_loss(loss, self.ref_loss[part])
            if selector.weighting != "mask":
                return selector.soft_weights(score, seen) if everything else torch.zeros_like(loss)
            return selector.select([score] * len(selector.parts), seen, threshold)

        return choose

    def fast(
        self, selector: Selector, chunk: int | None, threshold: float | None = None, rest: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """Sum, losses, what was chosen, and the gradients of 3 times the sum."""
        hidden, *rest_of_leaves = leaves = self.leaves(dtype)
        ranked: Any = "sequence" if selector.scope == "sequence" else "batch"
        total, loss, chosen = selective_linear_loss(
            hidden, self.head(*rest_of_leaves), self.labels, self.choose(selector, threshold), ranked, rest, chunk
        )
        return total, loss, chosen, list(torch.autograd.grad(3.0 * total, leaves))

    def slow(
        self, selector: Selector, threshold: float | None = None, rest: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The same from full logits, each token by itself."""
        leaves, labelled = self.leaves(), self.labels != IGNORE_INDEX
        loss = self.naive_losses(*leaves)
        chosen = self.choose(selector, threshold)(slice(None), loss.detach(), labelled, True)
        weight = torch.where(chosen, 1.0, rest) if chosen.dtype == torch.bool else chosen
        total = (loss * weight)[labelled].sum()
        return total, loss.detach(), chosen, list(torch.autograd.grad(3.0 * total, leaves))


@pytest.mark.parametrize("chunk", [1, 3, 8, None])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_token_losses_and_entropies_equal_the_slow_twin(chunk: int | None, head: dict) -> None:
    case = Case(1, 8, **head)
    labels = torch.tensor([[IGNORE_INDEX, 3, 1, IGNORE_INDEX, 10, 0, 5, 6]])
    hidden, *rest = (leaf.detach() for leaf in case.leaves())
    logits = case.logits(hidden, *rest)
    torch.testing.assert_close(case.head(*rest).logits(hidden), logits, rtol=1e-12, atol=1e-12)
    loss, entropy = linear_token_loss(predictors(hidden)[0], case.head(*rest), labels[0], entropy=True, chunk=chunk)
    assert entropy is not None
    kept = labels[0] != IGNORE_INDEX  # row 0 of the shifted hidden states is zero, and has no label
    for fast, slow in ((loss, token_loss(logits, labels)[0]), (entropy, token_entropy(logits, labels)[0])):
        assert torch.equal(fast.isnan(), ~kept)
        torch.testing.assert_close(fast[kept].float(), slow[kept].float(), rtol=1e-6, atol=1e-6)


SELECTIONS = {
    "clm": (Selector("excess", 1.0), None, 0.0),
    "sequence": (Selector("excess", 0.5), None, 0.0),
    "batch": (Selector("excess", 0.5, "batch"), None, 0.0),
    "running": (Selector("excess", 0.5, "running"), 1.0, 0.0),
    "nothing": (Selector("excess", 0.5, "running"), 1e9, 0.0),
    "one token": (Selector("excess", 0.01, "batch"), None, 0.0),
    "retention": (Selector("excess", 0.5, "batch"), None, 0.25),
    "softmax": (Selector("excess", 0.5, weighting="softmax"), None, 0.0),
    "sigmoid of the batch": (Selector("excess", 0.5, "batch", weighting="sigmoid"), None, 0.0),
    "union": (Selector("excess", 0.3, second=Selector("loss", 0.3), combine="union"), None, 0.0),
}


def compare(case: Case, selection: tuple[Selector, float | None, float], chunk: int | None) -> None:
    selector, threshold, rest = selection
    fast, slow = case.fast(selector, chunk, threshold, rest), case.slow(selector, threshold, rest)
    labelled = case.labels != IGNORE_INDEX
    assert fast[2].dtype == slow[2].dtype
    if fast[2].dtype == torch.bool:
        assert torch.equal(fast[2], slow[2])
    assert torch.equal(fast[1].isnan(), ~labelled)
    for a, b in zip([fast[0], fast[1][labelled], *fast[3]], [slow[0], slow[1][labelled], *slow[3]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if not rest and selector.weighting == "mask":
        assert not fast[3][0][~fast[2]].any(), "what is left out has no gradient, not even by rounding"


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_loss_mask_and_gradients_equal_the_formula(selection: tuple, head: dict) -> None:
    for chunk in (1, 2, 5, 8, 100, None):
        compare(Case(seed=chunk or 0, **head), selection, chunk)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(SELECTIONS.values())),
    st.sampled_from(list(HEADS.values())),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 13), st.integers(1, 5)),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.integers(0, 10**6),
)
def test_loss_mask_and_gradients_of_any_shape_equal_the_formula(
    selection: tuple, head: dict, shape: tuple, chunk: int, ignored: float, seed: int
) -> None:
    compare(Case(*shape, seed, ignored=ignored, **head), selection, chunk)


@pytest.mark.parametrize("ranked", ["sequence", "batch"])
def test_a_guess_may_be_as_wrong_as_it_likes(ranked: Any) -> None:
    case, selector = Case(2, 9, bias=True, cap=2.0), Selector("excess", 0.5)
    right = case.choose(selector)
    draw = torch.Generator().manual_seed(1)

    def misled(part: slice, loss: Tensor, seen: Tensor, everything: bool) -> Tensor:
        assert torch.equal(seen, ~loss.isnan())
        return right(part, loss, seen, True) if everything else seen & (torch.rand(seen.shape, generator=draw) < 0.5)

    hidden, *rest = leaves = case.leaves()
    total, _, chosen = selective_linear_loss(hidden, case.head(*rest), case.labels, misled, ranked, chunk=3)
    expected = case.slow(selector)
    assert torch.equal(chosen, expected[2])
    torch.testing.assert_close(total, expected[0], rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(3.0 * total, leaves), expected[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_whole_batch_is_chosen_from_once_whatever_the_labels() -> None:
    calls: list[slice] = []

    def choose(part: slice, loss: Tensor, seen: Tensor, everything: bool) -> Tensor:
        calls.extend([part] * everything)
        return seen

    for ignored in (0.0, 1.0):  # ranks that gather in `choose` must all do so
        case = Case(3, 7, ignored=ignored)
        hidden, weight = case.leaves()
        calls.clear()
        selective_linear_loss(hidden, Head(weight), case.labels, choose, "batch", chunk=5)[0].backward()
        assert calls == [slice(0, 3)]
        assert hidden.grad is not None and weight.grad is not None
        assert bool(weight.grad.any()) == (ignored == 0.0)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("ranked", ["sequence", "batch"])
def test_gradcheck_passes(head: dict, ranked: Any) -> None:
    case = Case(2, 4, 6, 3, **head)
    mask = torch.arange(8).view(2, 4) % 3 != 0

    def total(hidden: Tensor, *rest: Tensor) -> Tensor:
        return selective_linear_loss(hidden, case.head(*rest), case.labels, lambda p, _l, s, _e: mask[p] & s, ranked,
                                     chunk=3)[0]  # fmt: skip

    assert torch.autograd.gradcheck(total, tuple(case.leaves()))


def everything_seen(part: slice, loss: Tensor, seen: Tensor, everything: bool) -> Tensor:
    return seen


def test_clm_is_the_mean_of_all_labelled_tokens_and_slm_that_of_the_selected() -> None:
    case = Case(2, 8)
    states, weight = (leaf.detach().float() for leaf in case.leaves())
    loss = token_loss(states @ weight.T, case.labels)
    labels = case.labels.clone()
    labels[:, 0] = IGNORE_INDEX
    for selector in (Selector("loss", 1.0), Selector("loss", 0.5)):
        choose = case.choose(Selector("loss", selector.ratio))
        total, _, mask = selective_linear_loss(predictors(states), Head(weight), labels, choose)
        torch.testing.assert_close(total / mask.sum(), slm_loss(loss, mask, mask.sum()))


def test_huge_logits_do_not_overflow() -> None:
    case = Case()
    for dtype, factor in ((torch.float32, 1e4), (torch.float64, 1e30)):
        hidden, weight = (leaf.detach().to(dtype) for leaf in case.leaves())
        hidden = (factor * hidden).requires_grad_()
        total, _, _ = selective_linear_loss(hidden, Head(weight), case.labels, everything_seen, chunk=4)
        slow = case.naive_losses(hidden, weight)[case.labels != IGNORE_INDEX].sum()
        torch.testing.assert_close(total, slow)
        found, expected = (torch.autograd.grad(loss, hidden)[0] for loss in (total, slow))
        torch.testing.assert_close(found, expected)


def test_a_capped_head_far_beyond_its_cap_has_no_gradient_and_no_nan() -> None:
    case = Case(cap=2.0)
    hidden, weight = (leaf.detach().float() for leaf in case.leaves())
    hidden = (1e4 * hidden).requires_grad_()
    selective_linear_loss(hidden, case.head(weight), case.labels, everything_seen)[0].backward()
    assert hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_float32_errs_no_more_than_twice_what_the_naive_formula_does(selection: tuple) -> None:
    case = Case(4, 60, 300, 24, scale=0.3)
    selector, threshold, rest = selection
    exact, ours = case.slow(selector, threshold, rest), case.fast(selector, 50, threshold, rest, torch.float32)
    chosen = ours[2]  # the same for all, whatever rounding makes of near ties
    labelled = case.labels != IGNORE_INDEX
    weight = torch.where(chosen, 1.0, rest) if chosen.dtype == torch.bool else chosen

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = case.leaves(dtype)
        return list(torch.autograd.grad((3.0 * case.naive_losses(*leaves) * weight)[labelled].sum(), leaves))

    for best, naive, fast in zip(gradients(torch.float64), gradients(torch.float32), ours[3], strict=True):
        assert fast.dtype == torch.float32
        assert (fast - best).norm() <= 2.0 * (naive - best).norm()
    torch.testing.assert_close(ours[1], exact[1].float().masked_fill(~labelled, torch.nan), equal_nan=True)


@pytest.mark.parametrize("chunk", [16, 100])
def test_bfloat16_is_no_worse_than_the_naive_bfloat16_loss(chunk: int) -> None:
    case = Case(4, 30, 200, 16, scale=0.5, ignored=0.0)
    mask = case.slow(Selector("excess", 0.6))[2]  # by float64 losses, for all

    def naive(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = case.leaves(dtype)
        loss = slm_loss(case.naive_losses(*leaves), mask, 1)
        return loss, list(torch.autograd.grad(loss, leaves))

    hidden, weight = leaves = case.leaves(torch.bfloat16)
    exact, half = naive(torch.float64), naive(torch.bfloat16)
    total, _, _ = selective_linear_loss(
        hidden, case.head(weight), case.labels, lambda part, _l, seen, _e: mask[part] & seen, chunk=chunk
    )
    assert (total - exact[0]).abs() <= (half[0] - exact[0]).abs() + 0.05
    for ours, naive_half, best in zip(torch.autograd.grad(total, leaves), half[1], exact[1], strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - best).norm() <= 1.05 * (naive_half - best).norm()


def test_autocast_decides_the_precision_of_the_products() -> None:
    case = Case()
    hidden, weight = leaves = case.leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _, _ = selective_linear_loss(hidden, Head(weight), case.labels, everything_seen)
    total.backward()
    naive = case.naive_losses(*(leaf.detach().bfloat16() for leaf in leaves))
    torch.testing.assert_close(total, naive[case.labels != IGNORE_INDEX].sum())
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


def test_backward_may_run_twice_but_not_be_differentiated() -> None:
    case = Case()
    hidden, weight = case.leaves()
    total, _, _ = selective_linear_loss(hidden, Head(weight), case.labels, everything_seen)
    first = torch.autograd.grad(total, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, weight, retain_graph=True)[0])
    again = torch.autograd.grad(total, hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        again.sum().backward()


# --- cost: how much is multiplied, how large a tensor gets -------------------------------------------------------


class Cost(TorchDispatchMode):
    """The largest tensor that an operation made, and the multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
        return out


def cost(run: Callable[[], Any]) -> Cost:
    with Cost() as found:
        run()
    return found


WIDE: dict[str, Any] = {"rows": 8, "length": 64, "vocab": 400, "width": 4, "ignored": 0.0}
HEAD_PASS = 8 * 64 * 400 * 4


@pytest.mark.parametrize("head", [{}, {"cap": 2.0}], ids=["plain", "cap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_no_tensor_grows_with_rows_times_vocabulary(selection: tuple, dtype: torch.dtype, head: dict) -> None:
    case, (selector, threshold, rest) = Case(**WIDE, **head), selection
    for chunk in (64, 40):
        assert cost(lambda: case.fast(selector, chunk, threshold, rest, dtype)).largest == chunk * 400  # noqa: B023
    hidden, weight = case.leaves(dtype)
    assert cost(lambda: linear_token_loss(hidden[0], Head(weight), case.labels[0], True, 16)).largest == 16 * 400


def test_the_head_costs_one_forward_and_two_backward_products_of_the_kept_rows() -> None:
    case = Case(**WIDE)

    def passes(selector: Selector, threshold: float | None = None, chunk: int = 128) -> float:
        return cost(lambda: case.fast(selector, chunk, threshold, dtype=torch.float32)).products / HEAD_PASS

    assert passes(Selector("excess", 1.0)) == 3.0
    for share in (0.25, 0.5):
        assert passes(Selector("excess", share)) == 1 + 2 * share
        assert passes(Selector("excess", share, "batch"), chunk=512) == 1 + 2 * share
        assert passes(Selector("excess", share, "batch")) == pytest.approx(1 + 2 * share, abs=0.1)
        case.ref_loss += torch.arange(8)[:, None]  # sequences differ: each chunk has to hold some of all
        assert passes(Selector("excess", share, "batch")) == pytest.approx(1 + 2 * share, abs=0.1)
        assert passes(Selector("excess", share), chunk=32) < 1 + 2 * share + 0.35  # sequences longer than a chunk
    assert passes(Selector("excess", 0.5, "running"), 1e9) == 1.0


def test_nothing_is_multiplied_for_a_gradient_that_nobody_wants() -> None:
    case = Case(**WIDE)
    hidden, weight = case.leaves(torch.float32)

    def products(hidden: Tensor, weight: Tensor) -> float:
        run = cost(lambda: selective_linear_loss(hidden, Head(weight), case.labels, case.choose(Selector("loss", 0.5))))
        return run.products / HEAD_PASS

    assert products(hidden, weight.detach()) == 1.5  # a frozen head, as under LoRA
    assert products(hidden.detach(), weight) == 1.5
    with torch.no_grad():
        assert products(hidden, weight) == 1.0
        bias = torch.zeros(400, requires_grad=True)
        run = partial(selective_linear_loss, hidden, Head(weight, bias), case.labels, everything_seen)
        assert cost(run).products / HEAD_PASS == 1.0
    selective_linear_loss(hidden, Head(weight.detach()), case.labels, everything_seen)[0].backward()
    assert hidden.grad is not None and weight.grad is None
