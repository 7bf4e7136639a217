"""`rho.selective_loss`, its count, and its twin on logits; what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rho
from rho.linear_loss import Head
from rho.objective import IGNORE_INDEX, excess_loss, next_labels, predictors, select_top, slm_loss, token_loss
from rho.selection import Schedule, Selector
from rho.selective import check_one_pass, logits_loss, select_and_sum

VOCABULARY, WIDTH = 23, 6


def inputs(rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCABULARY, (rows, length), generator=draw)
    labels[:, 0] = labels[1, 4] = IGNORE_INDEX
    ref_loss = 4 * torch.rand(rows, length, generator=draw)
    ref_loss[2, 5] = torch.nan
    return {
        "hidden": torch.randn(rows, length, WIDTH, generator=draw, dtype=torch.float64).requires_grad_(),
        "weight": torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64).requires_grad_(),
        "bias": torch.randn(VOCABULARY, generator=draw, dtype=torch.float64).requires_grad_(),
        "labels": labels,
        "ref_loss": ref_loss,
    }


def gradients(loss: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [given[name] for name in ("hidden", "weight", "bias")]))


def test_labels_and_scores_in_each_others_place_are_an_error() -> None:
    labels, ref_loss = torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4)
    with pytest.raises(ValueError, match="are labels and scores swapped"):
        rho.selective_loss(torch.zeros(1, 4, 2), torch.zeros(3, 2), ref_loss, labels, rho.Selector("excess", 0.6))


def test_it_is_eq_4_of_the_formula() -> None:
    given = inputs()
    selector, bias = Selector("excess", 0.6), given["bias"]
    out = rho.selective_loss(
        given["hidden"], given["weight"], given["labels"], given["ref_loss"], selector, bias_V=bias
    )
    logits = given["hidden"] @ given["weight"].T + given["bias"]
    loss = token_loss(logits, given["labels"])
    eligible = (given["labels"] != IGNORE_INDEX) & given["ref_loss"].isfinite()
    selected = select_top(excess_loss(loss.detach(), given["ref_loss"]), eligible, 0.6)
    expected = slm_loss(loss, selected, selected.sum())
    assert torch.equal(out.selected_BT, selected) and out.num_selected == selected.sum() == 13
    torch.testing.assert_close(out.loss.float(), expected, rtol=1e-6, atol=0.0)  # token_loss is float32
    for a, b in zip(gradients(out.loss, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert torch.equal(out.token_loss_BT.isnan(), ~eligible) and not out.token_loss_BT.requires_grad


@pytest.mark.parametrize(
    "selector",
    [
        Selector("excess", 0.5),
        Selector("loss", 0.5, "batch"),
        Selector("ref_loss", 0.4, "step"),
        Selector("excess", 0.6, weighting="softmax"),
        Selector("excess", 0.7, second=Selector("ref_loss", 0.7)),
        Selector("excess", 0.5, retention=0.5),
        Selector(weighting="loss_weights"),
        Selector(),
    ],
    ids=str,
)
def test_from_logits_and_from_hidden_states_are_the_same(selector: Selector) -> None:
    given = inputs()
    columns = {"ref_loss": given["ref_loss"], "loss_weights": given["ref_loss"].nan_to_num()}
    rest = torch.tensor(0.3) if selector.retention else None
    head = Head(given["weight"], given["bias"])
    aligned = predictors(given["hidden"])
    fast = select_and_sum(selector, aligned, head, given["labels"], columns, rest_weight=rest)
    slow = select_and_sum(selector, head.logits(aligned), None, given["labels"], columns, logits_loss, rest_weight=rest)
    assert torch.equal(fast["selected"], slow["selected"]) and torch.equal(fast["eligible"], slow["eligible"])
    torch.testing.assert_close(fast["loss"], slow["loss"], rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(fast["loss"], given), gradients(slow["loss"], given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cut", [(3,), (1, 2), (1, 1, 1)])
def test_micro_batches_that_divide_by_one_count_add_up(cut: tuple[int, ...]) -> None:
    given, selector = inputs(), Selector("excess", 0.6)
    whole = rho.selective_loss(given["hidden"], given["weight"], given["labels"], given["ref_loss"], selector)
    parts = list(zip(*(given[name].split(cut) for name in ("hidden", "labels", "ref_loss")), strict=True))
    total = sum(rho.count_selected(labels, ref_loss, selector) for _, labels, ref_loss in parts)
    assert total == whole.num_selected
    losses = [
        rho.selective_loss(hidden, given["weight"], labels, ref_loss, selector, num_selected=total).loss
        for hidden, labels, ref_loss in parts
    ]
    found, expected = (torch.autograd.grad(loss, given["weight"])[0] for loss in (sum(losses), whole.loss))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_schedule_goes_by_the_step() -> None:
    given = inputs()
    selector = Selector("excess", schedule=Schedule(((0, 1.0), (5, 0.5))))
    for step, expected in ((0, 22), (5, 11)):
        found = rho.count_selected(given["labels"], given["ref_loss"], selector, step=step)
        out = rho.selective_loss(
            given["hidden"], given["weight"], given["labels"], given["ref_loss"], selector, step=step
        )
        assert out.num_selected == found == pytest.approx(expected, abs=1)


def test_a_part_of_a_step_may_select_nothing_but_a_step_may_not() -> None:
    given = inputs()
    nothing = torch.full_like(given["labels"], IGNORE_INDEX)
    out = rho.selective_loss(
        given["hidden"], given["weight"], nothing, given["ref_loss"], Selector("excess", 0.5), num_selected=7
    )
    assert out.loss == 0 and out.num_selected == 0
    assert not any(grad.any() for grad in torch.autograd.grad(out.loss, [given["hidden"], given["weight"]]))
    with pytest.raises(ValueError, match="no token was selected: 0 have a label"):
        rho.selective_loss(given["hidden"], given["weight"], nothing, given["ref_loss"], Selector("excess", 0.5))
    with pytest.raises(ValueError, match=r"no token was selected.*num_selected 0"):  # else 0 / 0
        none = rho.count_selected(nothing, given["ref_loss"], Selector("excess", 0.5))
        rho.selective_loss(
            given["hidden"], given["weight"], nothing, given["ref_loss"], Selector("excess", 0.5), num_selected=none
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, 8, dtype=torch.int64)}, r"labels \(3, 8\)"),
        ({"ref_loss": torch.zeros(3)}, r"ref_loss \(3,\)"),
        ({"weight": torch.zeros(VOCABULARY, 5)}, r"weight \(23, 5\)"),
        ({"hidden": torch.zeros(27, WIDTH)}, r"hidden \(27, 6\)"),
        ({"ref_loss": None}, "needs the reference's ref_loss, found none"),
    ],
)
def test_wrong_shapes_are_not_broadcast(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = inputs() | change
    with pytest.raises(ValueError, match=message):
        rho.selective_loss(
            given["hidden"], given["weight"], given["labels"], given["ref_loss"], Selector("excess", 0.5)
        )


def test_the_head_of_a_sharded_model_is_refused() -> None:
    given = inputs()
    given["weight"].placements = ("Shard(0)",)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="spread over devices: make the loss inside the model's forward"):
        rho.selective_loss(
            given["hidden"], given["weight"], given["labels"], given["ref_loss"], Selector("excess", 0.5)
        )


def test_what_needs_more_than_a_micro_batch_is_refused() -> None:
    given = inputs()
    for selector in (Selector("excess", 0.5, "running"), Selector("ref_loss", 0.5, "dataset")):
        with pytest.raises(ValueError, match=f"scope {selector.scope} needs the whole step or past ones"):
            check_one_pass(selector)
    with pytest.raises(ValueError, match="retention needs the whole step"):
        check_one_pass(Selector("excess", 0.5, retention=0.1))
    with pytest.raises(ValueError, match="known before the forward only for one selection of scope sequence or batch"):
        rho.count_selected(given["labels"], given["ref_loss"], Selector("excess", 0.5, "step"))
    with pytest.raises(ValueError, match="needs the rows' loss_weights, found none"):
        rho.count_selected(given["labels"], None, Selector(weighting="loss_weights"))


def test_labels_shifted_in_the_data_are_predicted_by_the_same_rows() -> None:
    labels = torch.tensor([[IGNORE_INDEX, 5, 6], [IGNORE_INDEX, 7, 8]])
    assert next_labels(labels).tolist() == [[5, 6, IGNORE_INDEX], [7, 8, IGNORE_INDEX]]
    states = torch.arange(6.0).view(2, 3, 1)
    pairs = {(float(s), int(t)) for s, t in zip(states.flatten(), next_labels(labels).flatten(), strict=True) if t > 0}
    ours = zip(predictors(states).flatten(), labels.flatten(), strict=True)
    assert {(float(s), int(t)) for s, t in ours if t > 0} == pairs


def test_what_the_package_exports_is_there_and_nothing_else() -> None:
    assert all(getattr(rho, name) is not None for name in rho.__all__)
    with pytest.raises(AttributeError, match="module 'rho' has no attribute 'selective_los'"):
        _ = rho.selective_los
