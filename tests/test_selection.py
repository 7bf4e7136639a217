"""The Selector: eligibility, scopes, the random control, and the statistics that refuse a silent no-op."""

from __future__ import annotations

import math

import pytest
import torch

from rho.errors import RhoError
from rho.selection import SelectionStats, Selector, random_score

NAN = math.nan
LABELS = torch.tensor([[-100, 1, 2, 3, 4, 5, 6, 7], [-100, 1, 2, 3, -100, -100, -100, -100]])
LOSS = torch.tensor([[NAN, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], [NAN, 2.0, 2.5, 1.0, NAN, NAN, NAN, NAN]])
REF = torch.tensor([[NAN, 1.0, 1.0, NAN, 1.0, 1.0, 1.0, 1.0], [NAN, 0.0, 0.0, 0.0, NAN, NAN, NAN, NAN]])
BLOCK = torch.tensor([0, 1])


def pick(selector: Selector) -> torch.Tensor:
    eligible = selector.eligible(LABELS, REF)
    return selector.select(eligible, LOSS, REF, BLOCK, draw=0)


def test_tokens_without_label_or_score_are_neither_selected_nor_counted() -> None:
    selector = Selector("excess", 1 / 3)
    eligible = selector.eligible(LABELS, REF)
    assert eligible.sum(1).tolist() == [6, 3]  # token 3 of row 0 has no reference loss
    assert pick(selector).nonzero().tolist() == [[0, 1], [0, 2], [1, 2]]


def test_sequence_scope_ranks_each_row_alone_and_batch_scope_all_rows_together() -> None:
    assert pick(Selector("excess", 0.5, "sequence")).sum(1).tolist() == [3, 2]
    assert pick(Selector("excess", 0.5, "batch")).nonzero().tolist() == [[0, 1], [0, 2], [0, 4], [0, 5]]


def test_sequence_scope_does_not_depend_on_the_batch_and_batch_scope_does() -> None:
    for scope, same in (("sequence", True), ("batch", False)):
        selector = Selector("excess", 0.5, scope)  # type: ignore[arg-type]
        together = pick(selector)
        alone = [
            selector.select(selector.eligible(LABELS[[b]], REF[[b]]), LOSS[[b]], REF[[b]], BLOCK[[b]], 0)
            for b in (0, 1)
        ]
        assert torch.equal(torch.cat(alone), together) is same


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("score", ["excess", "random"])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6, 1.0])
def test_the_count_is_known_before_the_selection(score: str, scope: str, ratio: float) -> None:
    selector = Selector(score, ratio, scope)  # type: ignore[arg-type]
    assert pick(selector).sum() == selector.num_selected(selector.eligible(LABELS, REF))


def test_ratio_one_needs_no_reference_and_selects_every_label() -> None:
    selector = Selector(ratio=1.0)
    assert torch.equal(selector.eligible(LABELS, None), LABELS != -100)
    assert torch.equal(pick(selector), LABELS != -100)


def test_excess_without_reference_losses_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs the reference's losses"):
        Selector("excess", 0.6).eligible(LABELS, None)


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5, NAN])
def test_a_ratio_out_of_range_is_refused_at_once(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
        Selector(ratio=ratio)


def test_random_scores_depend_on_seed_draw_and_block_but_not_on_the_batch() -> None:
    both = random_score(torch.tensor([3, 11]), 8, seed=0, draw=5)
    assert torch.equal(both[1:], random_score(torch.tensor([11]), 8, seed=0, draw=5))
    for other in ({"seed": 1, "draw": 5}, {"seed": 0, "draw": 6}):
        assert not torch.equal(both, random_score(torch.tensor([3, 11]), 8, **other))
    assert not torch.equal(both[0], both[1])


def test_random_selection_is_fair_over_positions_and_draws() -> None:
    eligible = torch.ones(64, 32, dtype=torch.bool)
    picked = [Selector("random", 0.25).select(eligible, None, None, torch.arange(64), draw) for draw in range(40)]
    share = torch.stack(picked).double().mean((0, 1))
    assert share.mean() == 0.25
    assert (share - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / (64 * 40))


def stats(
    selector: Selector, selected: torch.Tensor, loss: torch.Tensor = LOSS, ref: torch.Tensor | None = REF
) -> dict:
    counted = SelectionStats(selector, ["prose", "code"])
    label = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, 1], [-1, 0, 1, 1, -1, -1, -1, -1]])
    counted.add(loss, selector.eligible(LABELS, ref), selected, ref, label)
    return counted.record(counted.sums())


def test_the_record_holds_means_over_selected_unselected_and_all() -> None:
    selector = Selector("excess", 0.5)
    record = stats(selector, pick(selector))
    assert (record["eligible"], record["selected"], record["ratio"]) == (9, 5, 5 / 9)
    assert record["loss_selected"] == pytest.approx((9 + 8 + 6 + 2 + 2.5) / 5)
    assert record["loss_unselected"] == pytest.approx((5 + 4 + 3 + 1) / 4)
    assert record["loss_all"] == pytest.approx(40.5 / 9)
    assert record["labels"] == {
        "prose": {"eligible": 3, "selected": 3},
        "code": {"eligible": 6, "selected": 2},
    }
    assert record["excess"]["p50"] == pytest.approx(3.0)  # of 8 7 5 4 3 2 and 2 2.5 1


def test_a_selection_that_keeps_everything_by_mistake_stops_the_training() -> None:
    selector = Selector("excess", 0.5)
    with pytest.raises(RhoError, match=r"9 of 9 eligible tokens were selected, ratio 0.5 asks for 5"):
        stats(selector, selector.eligible(LABELS, REF))


def test_a_reference_equal_to_the_model_stops_the_training_even_after_float16() -> None:
    selector = Selector("excess", 0.5)
    same = LOSS.half().float()
    mask = selector.select(selector.eligible(LABELS, same), LOSS, same, BLOCK, 0)
    with pytest.raises(RhoError, match="excess loss is zero for every token"):
        stats(selector, mask, ref=same)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    selector = Selector("excess", 0.5)
    with pytest.raises(RhoError, match="training loss is inf"):
        stats(selector, pick(selector), loss=LOSS.masked_fill(LOSS == 9.0, math.inf))
