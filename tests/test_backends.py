"""The loss by other libraries against our one pass."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from rho import backends
from rho.backends import linear_loss
from rho.errors import ConfigError
from rho.linear_loss import Head
from rho.objective import IGNORE_INDEX, excess_loss
from rho.selection import Selector

DRAW = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(3, 7, 8, generator=DRAW), torch.randn(11, 8, generator=DRAW)
LABELS = torch.randint(11, (3, 7), generator=DRAW)
LABELS[:, 0] = IGNORE_INDEX
REF_LOSS = torch.rand(3, 7, generator=DRAW) * 4


def found(
    backend: Any, selector: Selector, labels: Tensor = LABELS, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> list[Tensor]:
    """Sum, losses, mask, and both gradients."""
    hidden, weight = (tensor.to(dtype).clone().requires_grad_() for tensor in (HIDDEN, WEIGHT))

    def choose(part: slice, loss: Tensor, seen: Tensor, _: bool) -> Tensor:
        return selector.select([excess_loss(loss, REF_LOSS[part])], seen)

    total, loss, chosen = linear_loss(backend)(hidden, Head(weight), labels, choose, selector.scope, **kwargs)
    total.backward()
    return [total.detach(), loss, chosen, hidden.grad, weight.grad]


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("ratio", [0.4, 1.0])
@pytest.mark.parametrize("backend", ["torch", "liger", "cce"])
def test_it_equals_our_one_pass(backend: Any, ratio: float, scope: Any) -> None:
    if (module := backends.MODULES.get(backend)) and not (find_spec(module) and torch.cuda.is_available()):
        pytest.skip(f"{module} is not installed, or has no GPU to run on")
    selector = Selector("excess", ratio, scope)
    for one, other in zip(found(backend, selector), found("rho", selector), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_only_the_selected_rows_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = []

    def watched(hidden_KD: Tensor, weight_VD: Tensor, labels_K: Tensor) -> Tensor:
        passed.append(len(labels_K))
        return torch_sum(hidden_KD, weight_VD, labels_K)

    torch_sum = backends.torch_sum
    monkeypatch.setattr(backends, "torch_sum", watched)
    found("torch", Selector("excess", 0.5))
    assert passed == [9]  # three of six in each of three sequences


def test_the_sum_is_that_of_the_token_losses_in_low_precision_too() -> None:
    total, loss, chosen, grad, _ = found("torch", Selector("excess", 0.5), dtype=torch.bfloat16)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(total, loss[chosen].sum())


def test_with_nothing_to_train_on_gradients_are_zero_and_no_library_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "torch_sum", None)
    total, _, chosen, *grads = found("torch", Selector("excess", 0.5), torch.full_like(LABELS, IGNORE_INDEX))
    assert total == 0.0 and not chosen.any() and not any(grad.any() for grad in grads)


def test_what_another_library_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="soft weights and retention"):
        found("torch", Selector("excess", 0.5), rest_weight=0.1)
    with pytest.raises(ConfigError, match="soft cap"):
        linear_loss("torch")(HIDDEN.clone().requires_grad_(), Head(WEIGHT, cap=3.0), LABELS, lambda *_: LABELS > 3)


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger_kernel is installed")
def test_a_library_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match="liger_kernel, which is not installed"):
        linear_loss("liger")


def test_a_name_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backend ligre: no such loss\. Take rho, or one of torch, liger, cce"):
        linear_loss("ligre")  # type: ignore[arg-type]
