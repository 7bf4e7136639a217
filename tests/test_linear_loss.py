"""The chunked head against its slow twin in objective.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rho.linear_loss import linear_loss_sum, linear_token_loss
from rho.objective import IGNORE_INDEX, predictors, token_entropy, token_loss


def case(rows: int, vocab: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_token_losses_and_entropies_equal_the_slow_twin(chunk: int, bias: bool) -> None:
    hidden, weight, _ = case(8, 11, 4)
    offset = torch.randn(11, dtype=torch.float64) if bias else None
    labels = torch.tensor([[IGNORE_INDEX, 3, 1, IGNORE_INDEX, 10, 0, 5, 6]])
    logits = hidden[None] @ weight.T + (0 if offset is None else offset)
    loss, entropy = linear_token_loss(predictors(hidden[None])[0], weight, labels[0], offset, entropy=True, chunk=chunk)
    assert entropy is not None
    kept = labels != IGNORE_INDEX  # row 0 of the shifted hidden states is zero, and has no label
    for fast, slow in ((loss, token_loss(logits, labels)[0]), (entropy, token_entropy(logits, labels)[0])):
        assert torch.equal(fast.isnan(), ~kept[0])
        torch.testing.assert_close(fast[kept[0]].float(), slow[kept[0]].float(), rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 13), st.integers(1, 5), st.integers(1, 10))
def test_sum_and_gradients_equal_autograd_on_the_formula(rows: int, vocab: int, width: int, chunk: int) -> None:
    hidden, weight, labels = case(rows, vocab, width)
    bias = torch.randn(vocab, dtype=torch.float64, requires_grad=True)
    slow = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, labels, reduction="sum")
    expected = torch.autograd.grad(3.0 * slow, (hidden, weight, bias))
    fast, per_token = linear_loss_sum(hidden, weight, labels, bias, chunk=chunk)
    found = torch.autograd.grad(3.0 * fast, (hidden, weight, bias))
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(per_token.sum(), slow, rtol=1e-10, atol=1e-10)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradcheck_passes() -> None:
    hidden, weight, labels = case(5, 6, 3)
    assert torch.autograd.gradcheck(lambda h, w: linear_loss_sum(h, w, labels, chunk=2)[0], (hidden, weight))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, labels = case(5, 6, 3)
    linear_loss_sum(hidden, weight.detach(), labels)[0].backward()
    assert hidden.grad is not None and weight.grad is None


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, labels = case(4, 5, 3, torch.float32)
    loss, _ = linear_loss_sum(1e4 * hidden, weight, labels)
    slow = torch.nn.functional.cross_entropy(1e4 * hidden @ weight.T, labels, reduction="sum")
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, slow)


def test_no_rows_give_zero_loss_and_zero_gradient() -> None:
    hidden, weight, labels = case(4, 5, 3)
    loss, _ = linear_loss_sum(hidden[:0], weight, labels[:0])
    loss.backward()
    assert loss.item() == 0 and weight.grad is not None and weight.grad.abs().sum() == 0


def test_an_ignored_label_is_refused() -> None:
    hidden, weight, _ = case(2, 5, 3)
    with pytest.raises(ValueError, match="IGNORE_INDEX"):
        linear_loss_sum(hidden, weight, torch.tensor([1, IGNORE_INDEX]))


def test_bfloat16_is_no_worse_than_the_naive_bfloat16_loss() -> None:
    hidden, weight, labels = case(64, 50, 16)
    exact = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    grad_exact = torch.autograd.grad(exact, weight)[0]
    h, w = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    naive = torch.nn.functional.cross_entropy((h @ w.T).float(), labels, reduction="sum")
    grad_naive = torch.autograd.grad(naive, w)[0]
    ours, _ = linear_loss_sum(h, w, labels, chunk=16)
    grad_ours = torch.autograd.grad(ours, w)[0]
    assert grad_ours.dtype == torch.bfloat16
    assert (ours - exact).abs() <= (naive - exact).abs() + 0.05
    assert (grad_ours - grad_exact).norm() <= 1.05 * (grad_naive - grad_exact).norm()


def test_autocast_decides_the_precision_of_the_products() -> None:
    hidden, weight, labels = case(8, 9, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_loss_sum(hidden, weight, labels)
    loss.backward()
    half = (hidden.detach().bfloat16() @ weight.detach().bfloat16().T).float()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(half, labels, reduction="sum"))
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
