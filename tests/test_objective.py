"""Eq. 1-5 by hand on eight tokens, and by property on random ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss

from rho.objective import (
    IGNORE_INDEX,
    clm_loss,
    excess_loss,
    num_to_select,
    predicted,
    predictors,
    select_top,
    slm_loss,
    token_entropy,
    token_labels,
    token_loss,
)

NAN = math.nan
# Eight tokens; the first is predicted from nothing.
LOSS = torch.tensor([[NAN, 4.0, 1.0, 3.0, 2.0, 5.0, 0.5, 2.0]])
REF_LOSS = torch.tensor([[NAN, 3.5, 1.5, 1.0, 0.5, 4.5, 0.25, 0.5]])
EXCESS = [0.5, -0.5, 2.0, 1.5, 0.5, 0.25, 1.5]
ELIGIBLE = torch.tensor([[False, True, True, True, True, True, True, True]])


def test_eq_3_is_the_signed_difference() -> None:
    assert excess_loss(LOSS, REF_LOSS)[0, 1:].tolist() == EXCESS


def test_eq_5_selects_the_rounded_share_by_rank_and_ties_go_to_the_earlier_token() -> None:
    excess = excess_loss(LOSS, REF_LOSS)
    # round(0.6 * 7) = 4: 2.0 at 3, 1.5 at 4 and 7, then 0.5 ties at 1 and 5: position 1 wins.
    assert select_top(excess, ELIGIBLE, 0.6).nonzero()[:, 1].tolist() == [1, 3, 4, 7]
    # round(0.3 * 7) = 2: 2.0 at 3, then 1.5 ties at 4 and 7.
    assert select_top(excess, ELIGIBLE, 0.3).nonzero()[:, 1].tolist() == [3, 4]


def test_eq_4_divides_the_selected_sum_by_the_selected_count() -> None:
    selected = select_top(excess_loss(LOSS, REF_LOSS), ELIGIBLE, 0.6)
    assert slm_loss(LOSS, selected, selected.sum()).item() == pytest.approx((4.0 + 3.0 + 2.0 + 2.0) / 4)


def test_eq_2_is_the_mean_over_eligible_tokens_and_equals_ratio_one() -> None:
    everything = select_top(excess_loss(LOSS, REF_LOSS), ELIGIBLE, 1.0)
    assert clm_loss(LOSS, ELIGIBLE).item() == pytest.approx(17.5 / 7)
    assert torch.equal(slm_loss(LOSS, everything, 7), clm_loss(LOSS, ELIGIBLE))


def test_eq_1_scores_token_t_by_the_logits_before_it_and_stores_it_at_t() -> None:
    # A model that is certain that token t+1 follows token t has no loss on 0 1 2 3 and much on 0 2 1 3.
    certain = 50.0 * torch.nn.functional.one_hot(torch.arange(1, 5), 5).float()[None]
    in_order = torch.tensor([[IGNORE_INDEX, 1, 2, 3]])
    assert token_loss(certain, in_order)[0, 1:].max() < 1e-6
    swapped = token_loss(certain, torch.tensor([[IGNORE_INDEX, 2, 2, 3]]))[0]
    assert swapped[1] > 49 and swapped[2] < 1e-6 and math.isnan(swapped[0])


def test_losses_are_log_probabilities_not_logits() -> None:
    logits = torch.zeros(1, 3, 7)
    labels = torch.tensor([[IGNORE_INDEX, 4, 6]])
    assert token_loss(logits, labels)[0, 1:].tolist() == pytest.approx([math.log(7)] * 2)
    assert token_loss(logits + 3.0, labels)[0, 1:].tolist() == pytest.approx([math.log(7)] * 2)
    assert token_entropy(logits, labels)[0, 1:].tolist() == pytest.approx([math.log(7)] * 2)


def test_the_one_shift_moves_every_row_one_down_and_nothing_predicts_a_first_token() -> None:
    states = torch.arange(8.0).view(1, 4, 2)
    assert predictors(states)[0].tolist() == [[0, 0], [0, 1], [2, 3], [4, 5]]


def test_first_and_special_and_ignored_tokens_have_no_label() -> None:
    ids = torch.tensor([[5, 6, 0, 7, 8, 9, 1, 4]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    ignore = torch.tensor([[False] * 5 + [True] + [False] * 2])
    assert token_labels(ids, positions).tolist() == [[-100, 6, 0, -100, 8, 9, 1, 4]]
    assert token_labels(ids, positions, torch.tensor([0, 1])).tolist() == [[-100, 6, -100, -100, 8, 9, -100, 4]]
    assert token_labels(ids, positions, None, ignore).tolist() == [[-100, 6, 0, -100, 8, -100, 1, 4]]


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, NAN])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        select_top(LOSS, ELIGIBLE, ratio)


def test_the_count_rounds_as_python_does_and_is_no_float_trap() -> None:
    assert num_to_select(torch.tensor([100, 5, 1, 0]), 0.29).tolist() == [29, 1, 0, 0]
    assert num_to_select(torch.tensor([5, 15]), 0.1).tolist() == [round(0.5), round(1.5)]


def test_an_ineligible_token_never_takes_the_place_of_an_eligible_one_scored_minus_infinity() -> None:
    score = torch.tensor([[-math.inf, -math.inf, 1.0, -math.inf]])
    eligible = torch.tensor([[False, True, True, True]])
    assert select_top(score, eligible, 0.7).tolist() == [[False, True, True, False]]


def test_gradients_reach_selected_tokens_only_and_no_nan_leaks() -> None:
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss = token_loss(logits, torch.tensor([[IGNORE_INDEX, 1, 2, 3]]))
    selected = torch.tensor([[False, False, True, False]])
    slm_loss(loss, selected, 1).backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().sum(-1).gt(0).tolist() == [False, True, False, False]  # row 1 predicts token 2


def slow_selection(score: list[float], eligible: list[bool], ratio: float) -> list[bool]:
    ranked = sorted((i for i, e in enumerate(eligible) if e), key=lambda i: (-score[i], i))
    chosen = set(ranked[: round(ratio * len(ranked))])
    return [i in chosen for i in range(len(score))]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0]), st.booleans()), min_size=1, max_size=24),
    st.floats(0.01, 1.0),
)
def test_selection_equals_sorting_by_score_then_position(tokens: list[tuple[float, bool]], ratio: float) -> None:
    score, eligible = [s for s, _ in tokens], [e for _, e in tokens]
    mask = select_top(torch.tensor([score]), torch.tensor([eligible]), ratio)
    assert mask[0].tolist() == slow_selection(score, eligible, ratio)


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(8)), st.floats(0.01, 1.0))
def test_selection_moves_with_the_tokens(order: list[int], ratio: float) -> None:
    score = torch.tensor([[3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0, 5.0]])
    eligible = torch.tensor([[True] * 6 + [False, True]])
    mask = select_top(score, eligible, ratio)
    assert torch.equal(select_top(score[:, order], eligible[:, order], ratio), mask[:, order])


def test_a_label_of_a_first_token_is_passed_over_as_transformers_does() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    ours = predicted(labels)
    assert ours.tolist() == [[IGNORE_INDEX, *row[1:]] for row in labels.tolist()]
    for measure in (token_loss, token_entropy):
        assert measure(logits, labels)[:, 0].isnan().all()
        torch.testing.assert_close(measure(logits, labels), measure(logits, ours), equal_nan=True)
    theirs = ForCausalLMLoss(logits, labels, vocab_size=7)
    torch.testing.assert_close(token_loss(logits, labels).nanmean(), theirs)
