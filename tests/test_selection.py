"""The Selector against explicit, slow formulas: every score, scope, schedule and weighting."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rho.selection import Cut, Schedule, Selector, dataset_cut, random_score

NAN = math.nan
LABELS = torch.tensor([[-100, 1, 2, 3, 4, 5, 6, 7], [-100, 1, 2, 3, -100, -100, -100, -100]])
LOSS = torch.tensor([[NAN, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], [NAN, 2.0, 2.5, 1.0, NAN, NAN, NAN, NAN]])
REF = torch.tensor([[NAN, 1.0, 1.0, NAN, 1.0, 1.0, 1.0, 1.0], [NAN, 0.0, 0.0, 0.0, NAN, NAN, NAN, NAN]])
ENTROPY = torch.tensor([[NAN, 1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0], [NAN, 0.5, 0.5, 0.5, NAN, NAN, NAN, NAN]])
COLUMNS = {"ref_loss": REF, "ref_entropy": ENTROPY}
BLOCK = torch.tensor([0, 1])


def pick(selector: Selector, threshold: float | None = None) -> Tensor:
    eligible = selector.eligible(LABELS, COLUMNS)
    scores = [part.scores(LOSS, COLUMNS, BLOCK, 8, 0) for part in selector.parts]
    if selector.scope == "step":
        return selector.select_step([scores], [eligible])[0]
    return selector.select(scores, eligible, threshold)


def test_tokens_without_label_or_score_are_neither_selected_nor_counted() -> None:
    selector = Selector("excess", 1 / 3)
    eligible = selector.eligible(LABELS, COLUMNS)
    assert eligible.sum(1).tolist() == [6, 3]  # token 3 of row 0 has no reference loss
    assert pick(selector).nonzero().tolist() == [[0, 1], [0, 2], [1, 2]]


def test_each_score_ranks_by_its_own_rule() -> None:
    assert pick(Selector("loss", 0.3, "batch")).nonzero().tolist() == [[0, 1], [0, 2], [0, 3]]
    assert pick(Selector("ref_loss", 0.3, "batch")).nonzero().tolist() == [[1, 1], [1, 2], [1, 3]]  # lowest first
    assert pick(Selector("ref_entropy", 0.4, "batch")).nonzero().tolist() == [[0, 1], [1, 1], [1, 2], [1, 3]]
    assert pick(Selector("excess", 0.3, "batch")).nonzero().tolist() == [[0, 1], [0, 2], [0, 4]]
    assert pick(Selector("retrospective", 0.3, "batch")).nonzero().tolist() == [[0, 7], [1, 1], [1, 3]]


def test_a_score_needs_only_its_own_columns() -> None:
    assert Selector("ref_entropy", 0.5).columns == ("ref_entropy",)
    assert Selector("loss", 0.5).columns == Selector("random", 0.5).columns == Selector(ratio=1.0).columns == ()
    both = Selector("excess", 0.5, second=Selector("ref_entropy", 0.5))
    assert both.columns == ("ref_loss", "ref_entropy")
    with pytest.raises(ValueError, match="needs the reference's ref_entropy, found none"):
        both.eligible(LABELS, {"ref_loss": REF})


def test_intersection_and_union_are_of_two_selections_with_their_own_ratios() -> None:
    low_loss, low_entropy = Selector("ref_loss", 0.5, "batch"), Selector("ref_entropy", 0.3, "batch")
    # Both need both columns, so they share what is eligible.
    eligible = LABELS.ne(-100) & REF.isfinite()
    masks = [s.select([s.scores(None, COLUMNS, BLOCK, 8, 0)], eligible) for s in (low_loss, low_entropy)]
    for combine, expected in (("intersection", masks[0] & masks[1]), ("union", masks[0] | masks[1])):
        both = Selector("ref_loss", 0.5, "batch", second=low_entropy, combine=combine)  # type: ignore[arg-type]
        assert torch.equal(pick(both), expected)
        assert both.num_selected(eligible) is None  # not known before


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("score", ["excess", "retrospective", "loss", "ref_loss", "ref_entropy", "random"])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6, 1.0])
def test_the_count_is_known_before_the_selection(score: str, scope: str, ratio: float) -> None:
    selector = Selector(score, ratio, scope)  # type: ignore[arg-type]
    assert pick(selector).sum() == selector.num_selected(selector.eligible(LABELS, COLUMNS))


def test_sequence_scope_does_not_depend_on_the_batch_and_batch_scope_does() -> None:
    for scope, same in (("sequence", True), ("batch", False)):
        selector = Selector("loss", 0.5, scope)  # type: ignore[arg-type]
        alone = []
        for b in (0, 1):
            eligible = selector.eligible(LABELS[[b]], {})
            alone.append(selector.select([LOSS[[b]]], eligible))
        assert torch.equal(torch.cat(alone), pick(selector)) is same


def test_ratio_one_needs_no_reference_and_selects_every_label() -> None:
    assert torch.equal(pick(Selector(ratio=1.0)), LABELS != -100)
    assert not Selector(ratio=1.0).selective and Selector(ratio=1.0).static


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5, NAN, None, "excess"])
def test_a_ratio_out_of_range_is_refused_at_once(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
        Selector(ratio=ratio)
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
        Schedule(((0, ratio),))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"score": "exces"}, "score: expected one of excess, retrospective, .*; found 'exces'"),
        ({"score": 0.6}, "score: expected one of excess"),
        ({"scope": "rows"}, "scope: expected one of sequence, batch, step, running, dataset; found 'rows'"),
        ({"combine": "and"}, "combine: expected one of intersection, union"),
        ({"weighting": "softmx"}, "weighting: expected one of mask, .*, loss_weights; found 'softmx'"),
        ({"score": "excess", "scope": "dataset"}, "dataset needs a score that does not change"),
        ({"scope": "running", "second": Selector(scope="running", ratio=0.5)}, "combined in one scope"),
        ({"scope": "step", "second": Selector(scope="batch", ratio=0.5)}, "combined in one scope"),
        ({"weighting": "softmax", "scope": "step"}, "soft weights"),
        ({"weighting": "softmax", "retention": 0.1}, "soft weights"),
        ({"weighting": "sigmoid", "temperature": 0.0}, "temperature"),
        ({"retention": -0.1}, "retention"),
        ({"retention": 0.1, "scope": "running"}, "retention"),
        ({"score": "random", "scope": "dataset"}, "dataset needs a score that does not change"),
        ({"score": "ref_loss", "scope": "dataset", "schedule": Schedule(((0, 0.5),))}, "not a schedule"),
        ({"second": Selector(ratio=0.5, retention=0.1)}, "only score, ratio, schedule and seed count"),
        ({"second": Selector(ratio=0.5, second=Selector(ratio=0.5))}, "only score, ratio, schedule and seed count"),
    ],
)
def test_what_does_not_go_together_is_refused(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selector(**{"ratio": 0.5, **settings_})


# --- schedules ---------------------------------------------------------------------------------------------------


def test_schedules_hold_or_move_in_a_line() -> None:
    steps = Schedule(((0, 1.0), (10, 0.8), (20, 0.6)))
    assert [steps.ratio(s) for s in (0, 9, 10, 19, 20, 500)] == [1.0, 1.0, 0.8, 0.8, 0.6, 0.6]
    warm_up = Schedule(((0, 1.0), (4, 0.6)), "linear")
    assert [warm_up.ratio(s) for s in range(6)] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.6])
    assert Selector(schedule=warm_up).at(2).ratio == pytest.approx(0.8)
    assert Selector(schedule=warm_up).selective


@pytest.mark.parametrize("points", [(), ((1, 0.5),), ((0, 0.5), (0, 0.6)), ((0, 0.5), (9, 0.6), (4, 0.7))])
def test_a_schedule_that_does_not_rise_from_zero_is_refused(points: tuple) -> None:
    with pytest.raises(ValueError, match="rise from 0"):
        Schedule(points)


# --- the random control ------------------------------------------------------------------------------------------


def test_random_scores_depend_on_seed_step_and_block_but_not_on_the_batch() -> None:
    both = random_score(torch.tensor([3, 11]), 8, seed=0, draw=5)
    assert torch.equal(both[1:], random_score(torch.tensor([11]), 8, seed=0, draw=5))
    for other in ({"seed": 1, "draw": 5}, {"seed": 0, "draw": 6}):
        assert not torch.equal(both, random_score(torch.tensor([3, 11]), 8, **other))
    assert not torch.equal(both[0], both[1])


def test_random_selection_is_fair_over_positions_and_steps() -> None:
    eligible = torch.ones(64, 32, dtype=torch.bool)
    selector = Selector("random", 0.25)
    scores = [selector.scores(None, {}, torch.arange(64), 32, step) for step in range(40)]
    share = torch.stack([selector.select([score], eligible) for score in scores]).double().mean((0, 1))
    assert share.mean() == 0.25
    assert (share - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / (64 * 40))


# --- scope step --------------------------------------------------------------------------------------------------

tokens = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0, 3.0]), st.booleans()), min_size=8, max_size=8)


def slow_step(rows: list[list[tuple[float, bool]]], ratio: float) -> list[list[bool]]:
    """Rank every eligible token of the step, ties in the order of rows and positions."""
    everyone = [(-s, r, t) for r, row in enumerate(rows) for t, (s, e) in enumerate(row) if e]
    chosen = {(r, t) for _, r, t in sorted(everyone)[: round(ratio * len(everyone))]}
    return [[(r, t) in chosen for t in range(8)] for r in range(len(rows))]


def _next(calls: Iterator[list[Tensor]], _: Tensor) -> list[Tensor]:
    return next(calls)


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(tokens, min_size=8, max_size=8),
    st.floats(0.02, 0.99),
    st.sampled_from([(8, 1), (4, 1), (2, 1), (4, 2), (2, 2)]),
)
def test_step_scope_is_the_exact_ranking_for_any_cut_into_micro_batches_and_ranks(
    rows: list[list[tuple[float, bool]]], ratio: float, cut: tuple[int, int]
) -> None:
    size, ranks = cut
    score = torch.tensor([[s for s, _ in row] for row in rows])
    eligible = torch.tensor([[e for _, e in row] for row in rows])
    selector = Selector("loss", ratio, "step")
    # Row order of a sampler: micro-batch, then rank, then row.
    starts = {r: range(r * size, 8, size * ranks) for r in range(ranks)}
    own = {r: [(score[s : s + size], eligible[s : s + size]) for s in starts[r]] for r in range(ranks)}
    flat = {
        r: (
            torch.cat([s[e] for s, e in own[r]]).double(),
            torch.cat([torch.full((int(e.sum()),), m) for m, (_, e) in enumerate(own[r])]),
        )
        for r in range(ranks)
    }
    found = torch.zeros_like(eligible)
    for r in range(ranks):
        calls = iter([[flat[q][0] for q in range(ranks)], [flat[q][1] for q in range(ranks)]])
        gather = functools.partial(_next, calls)
        masks = selector.select_step([[s] for s, _ in own[r]], [e for _, e in own[r]], gather, r)
        for start, mask in zip(starts[r], masks, strict=True):
            found[start : start + size] = mask
    assert found.tolist() == slow_step(rows, ratio)


def test_ties_of_a_step_go_by_micro_batch_before_rank() -> None:
    # Two ranks, two micro-batches of one row of two tokens, all of one score: five of eight are asked for.
    eligible, score = [torch.ones(1, 2, dtype=torch.bool)] * 2, [[torch.zeros(1, 2)]] * 2
    selector = Selector("loss", 5 / 8, "step")
    for rank, expected in enumerate(([[True, True], [True, False]], [[True, True], [False, False]])):
        masks = selector.select_step(score, eligible, lambda own: [own, own], rank)
        assert torch.cat(masks).tolist() == expected


# --- scope running and dataset -----------------------------------------------------------------------------------


def test_running_scope_selects_from_its_threshold_on() -> None:
    mask = pick(Selector("excess", 0.5, "running"), threshold=4.0)
    assert mask.nonzero().tolist() == [[0, 1], [0, 2], [0, 4], [0, 5]]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from([-2.5, -0.0, 0.0, 1e-30, 0.5, 3.0, 7e4]), st.booleans()), min_size=3, max_size=3
        ),
        min_size=1,
        max_size=6,
    ),
    st.floats(0.02, 1.0),
)
def test_the_cut_of_a_data_set_leaves_exactly_the_asked_number_above_it(
    rows: list[list[tuple[float, bool]]], ratio: float
) -> None:
    score = torch.tensor([[s for s, _ in row] for row in rows])
    eligible = torch.tensor([[e for _, e in row] for row in rows])
    wanted = round(ratio * int(eligible.sum()))
    if wanted == 0:
        with pytest.raises(ValueError, match="selects none"):
            dataset_cut(lambda: iter(zip(score, eligible, strict=True)), ratio)
        return
    cut = dataset_cut(lambda: iter(zip(score, eligible, strict=True)), ratio)
    mask = cut.mask(score, eligible, torch.arange(len(rows)))
    everyone = sorted((-s, r, t) for r, row in enumerate(rows) for t, (s, e) in enumerate(row) if e)
    assert sorted((r, t) for r, t in mask.nonzero().tolist()) == sorted((r, t) for _, r, t in everyone[:wanted])


def test_a_cut_takes_ties_up_to_its_position() -> None:
    score = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 2.0]])
    mask = Cut(1.0, 0, 2).mask(score, torch.ones_like(score, dtype=torch.bool), BLOCK)
    assert mask.tolist() == [[True, True, True], [False, False, True]]


# --- soft weights ------------------------------------------------------------------------------------------------


def soft(selector: Selector) -> Tensor:
    eligible = selector.eligible(LABELS, COLUMNS)
    return selector.soft_weights(selector.scores(LOSS, COLUMNS, BLOCK, 8, 0), eligible)


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid", "exponential"])
@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_soft_weights_have_mean_one_over_the_eligible_and_are_zero_elsewhere(weighting: str, scope: str) -> None:
    selector = Selector("excess", 0.5, scope, weighting=weighting, temperature=2.0)  # type: ignore[arg-type]
    eligible, weight = selector.eligible(LABELS, COLUMNS), soft(selector)
    assert (weight[~eligible] == 0).all() and (weight >= 0).all()
    rows = [0, 1] if scope == "sequence" else [slice(None)]
    for row in rows:
        assert weight[row][eligible[row]].mean().item() == pytest.approx(1.0)
    # The order of the scores is kept.
    scores = selector.scores(LOSS, COLUMNS, BLOCK, 8, 0)[0][eligible[0]]
    assert weight[0][eligible[0]][scores.argsort()].diff().min() >= 0


def test_soft_weights_follow_their_formulas() -> None:
    excess = torch.tensor([8.0, 7.0, 5.0, 4.0, 3.0, 2.0])  # row 0
    eligible = Selector("excess", 0.5).eligible(LABELS, COLUMNS)[0]
    softmax = soft(Selector("excess", 0.5, weighting="softmax", temperature=2.0))[0][eligible]
    torch.testing.assert_close(softmax, 6 * (excess / 2).softmax(-1))
    sigmoid = ((excess - 5.0) / 2.0).sigmoid()  # half of six: the third score is the threshold
    torch.testing.assert_close(
        soft(Selector("excess", 0.5, weighting="sigmoid", temperature=2.0))[0][eligible], sigmoid / sigmoid.mean()
    )
    clipped = excess.exp().clamp(max=1000.0)
    torch.testing.assert_close(
        soft(Selector("excess", 0.5, weighting="exponential", clip=1000.0))[0][eligible], clipped / clipped.mean()
    )


def test_huge_scores_and_empty_rows_give_finite_weights() -> None:
    labels = torch.tensor([[-100, 1, 2], [-100, -100, -100]])
    columns = {"ref_loss": torch.tensor([[NAN, 0.0, 1e4], [NAN] * 3])}
    for weighting in ("softmax", "sigmoid", "exponential"):
        selector = Selector("excess", 0.5, weighting=weighting)  # type: ignore[arg-type]
        eligible = selector.eligible(labels, columns)
        loss = torch.tensor([[NAN, 1e4, 0.0], [NAN] * 3])
        weight = selector.soft_weights(selector.scores(loss, columns, None, 3, 0), eligible)
        assert weight.isfinite().all() and (weight[1] == 0).all()


def test_a_second_selection_that_keeps_all_still_needs_what_its_score_is_made_from():
    selector = Selector("loss", 0.5, second=Selector("ref_entropy", 1.0))
    assert selector.columns == ("ref_entropy",)
    assert Selector("excess", 1.0).columns == ()
