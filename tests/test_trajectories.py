"""The mathematics of token dynamics: the paper's rule on literal trajectories, and slow twins on random ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import rho.trajectories
from rho.errors import DataError
from rho.trajectories import (
    CLASSES,
    PREFERENCES,
    UNCLASSIFIED,
    class_shares,
    fit_accuracy,
    group_means,
    losses_of_selected,
    preferences,
    token_dynamics,
)

# The mean of the last losses of these is 2.5.
TRAJECTORIES = {
    "H->H": [4.0, 4.1, 3.9, 4.0],
    "L->H": [1.0, 2.0, 3.0, 4.0],
    "H->L": [4.0, 3.0, 2.0, 1.0],
    "L->L": [1.0, 0.9, 1.1, 1.0],
}


def names(class_N: np.ndarray) -> list[str | None]:
    return [None if code == UNCLASSIFIED else CLASSES[code] for code in class_N]


def test_one_trajectory_of_each_class() -> None:
    found = token_dynamics(np.array(list(TRAJECTORIES.values()), np.float32))
    assert names(found.class_N) == list(TRAJECTORIES)
    assert found.border == pytest.approx(2.5)
    np.testing.assert_allclose(found.change_N, [-0.06, 3.0, -3.0, 0.06], atol=1e-6)
    np.testing.assert_allclose(found.fluctuation_N[1:3], 0, atol=1e-6)


def test_a_change_of_just_the_threshold_is_no_change_and_a_loss_of_just_the_border_is_low() -> None:
    least = np.spacing(np.float32(2.0))
    losses = np.array([[2.25, 2.0], [2.0, 2.25], [2.25 + least, 2.0], [2.0 - least, 2.25]], np.float32)
    found = token_dynamics(losses, threshold=0.25, border=2.0)
    assert names(found.class_N) == ["L->L", "H->H", "H->L", "L->H"]
    at_border = np.array([[2.0, 2.0], [2.0, 2.0 + least]], np.float32)
    assert names(token_dynamics(at_border, border=2.0).class_N) == ["L->L", "H->H"]
    assert names(token_dynamics(np.array([[3.0, 3.0], [3.0, 3.0]])).class_N) == ["L->L", "L->L"]  # the mean itself


def test_the_papers_threshold_is_a_fifth_of_a_nat_of_the_line_not_of_the_ends() -> None:
    ends_differ = [2.0, 2.15, 2.15, 2.15, 2.3]  # the line rises by 0.24
    line_does_not = [2.0, 2.3, 2.15, 2.0, 2.3]  # the ends by 0.3, the line by 0.12
    found = token_dynamics(np.array([ends_differ, line_does_not]), border=3.0)
    assert names(found.class_N) == ["L->H", "L->L"]
    np.testing.assert_allclose(found.change_N, [0.24, 0.12], atol=1e-6)


def test_the_mean_is_that_of_the_last_checkpoint() -> None:
    losses = np.array([[9.0, 9.0], [1.0, 1.1], [1.0, 0.9], [11.0, 1.0]])  # the last losses' mean is 3, that of all 4.3
    found = token_dynamics(losses)
    assert found.border == 3.0
    assert names(found.class_N) == ["H->H", "L->L", "L->L", "H->L"]


def test_the_mean_is_not_rounded_to_the_precision_of_the_losses() -> None:
    losses = np.full((2000, 2), 2.0, np.float16)
    losses[0] = 1.5  # the mean is 1.99975, to which the nearest float16 is 2
    assert names(token_dynamics(losses).class_N) == ["L->L"] + ["H->H"] * 1999


def test_tokens_without_a_loss_are_left_out_of_everything() -> None:
    with_first = np.array([[np.nan] * 3, [1.0, 1.0, 1.0], [np.inf, 1.0, 50.0], [3.0, 3.0, 3.0]], np.float16)
    found = token_dynamics(with_first)
    assert names(found.class_N) == [None, "L->L", None, "H->H"]
    assert found.border == 2.0
    assert np.isnan(found.change_N).tolist() == np.isnan(found.fluctuation_N).tolist() == [True, False, True, False]
    assert class_shares(found.class_N) == {"H->H": 0.5, "L->H": 0.0, "H->L": 0.0, "L->L": 0.5}


def test_fluctuation_is_the_deviation_around_the_line() -> None:
    [around_a_mean, around_a_slope] = token_dynamics(
        np.array([[1.0, 3.0, 3.0, 1.0], [1.0, 4.0, 5.0, 4.0]])
    ).fluctuation_N
    assert around_a_mean == around_a_slope == 1.0  # the second is the first plus 0, 1, 2, 3


def test_a_checkpoint_between_two_others_does_not_bend_the_line() -> None:
    steady = np.array([[3.0, 2.9, 2.0, 1.0]])
    found = token_dynamics(steady, at_C=[0, 10, 100, 200])
    assert found.change_N == pytest.approx(-2.0)
    assert found.fluctuation_N == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(token_dynamics(steady, at_C=[5, 6, 7, 8]).change_N, token_dynamics(steady).change_N)
    for wrong in ([0, 1, 2], [0, 2, 2, 3]):
        with pytest.raises(DataError, match="rising places of 4 checkpoints, found"):
            token_dynamics(steady, at_C=wrong)


def slow(losses: np.ndarray, threshold: float) -> tuple[list[str | None], list[float], list[float]]:
    """The rule as the paper tells it, a token at a time."""
    good = [row for row in losses if np.isfinite(row).all()]
    mean = math.fsum(float(row[-1]) for row in good) / len(good)
    classes: list[str | None] = []
    changes, deviations = [], []
    x = np.arange(losses.shape[1])
    for row in losses:
        if not np.isfinite(row).all():
            classes.append(None)
            changes.append(math.nan)
            deviations.append(math.nan)
            continue
        a, b = np.polyfit(x, row.astype(np.float64), 1)
        start, end = b, a * x[-1] + b
        changes.append(end - start)
        deviations.append(np.std(row - (a * x + b)))
        if end - start < -threshold:
            classes.append("H->L")
        elif end - start > threshold:
            classes.append("L->H")
        else:
            classes.append("L->L" if row[-1] <= mean else "H->H")
    return classes, changes, deviations


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        st.tuples(st.integers(1, 40), st.integers(2, 9)),
        elements=st.one_of(st.floats(0, 20, width=16), st.just(math.nan)),
        fill=st.nothing(),
    ),
    st.sampled_from([0.0, 0.2, 1.0]),
)
def test_it_agrees_with_a_slow_loop(losses: np.ndarray, threshold: float) -> None:
    if not np.isfinite(losses).all(1).any():
        with pytest.raises(DataError, match="none of"):
            token_dynamics(losses, threshold)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rho.trajectories, "CHUNK", 7)
        found = token_dynamics(losses, threshold)
    classes, changes, deviations = slow(losses, threshold)
    np.testing.assert_allclose(found.change_N, changes, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.fluctuation_N, deviations, rtol=1e-4, atol=1e-5)
    for name, twin, change, last in zip(names(found.class_N), classes, changes, losses[:, -1], strict=True):
        rounding = abs(abs(change) - threshold) < 1e-9 or abs(last - found.border) < 1e-9
        assert rounding or name == twin


def test_a_line_needs_two_checkpoints() -> None:
    with pytest.raises(DataError, match="two checkpoints or more, found 1"):
        token_dynamics(np.zeros((3, 1)))


def test_means_by_group() -> None:
    values = np.array([[True, False], [False, False], [True, True], [True, True]])
    found = group_means(values, np.array([0, 0, 2, -1]), 3)
    np.testing.assert_array_equal(found, [[0.5, 0.0], [np.nan, np.nan], [1.0, 1.0]])


def test_losses_at_each_checkpoint_of_what_each_selects() -> None:
    losses = np.array([[1.0, 2.0], [3.0, 5.0], [7.0, 9.0]], np.float32)
    selected = np.array([[True, False], [True, False], [False, False]])
    np.testing.assert_array_equal(losses_of_selected(losses, selected), [[2.0, 3.5], [np.nan, np.nan]])
    np.testing.assert_array_equal(losses_of_selected(losses, ~selected)[0], [7.0, 9.0])


def test_when_tokens_are_selected() -> None:
    rows = {
        "000000": "never",
        "110000": "early",
        "100000": "early",
        "011100": "middle",
        "000001": "late",
        "111111": "even",
        "110011": "even",  # two parts alike: neither is preferred
        "111001": "early",
    }
    found = preferences(np.array([[digit == "1" for digit in row] for row in rows]))
    assert [PREFERENCES[code] for code in found] == list(rows.values())
    unequal = preferences(np.array([[True, False, True, False]]))  # parts of 2, 1 and 1 checkpoints
    assert PREFERENCES[unequal[0]] == "middle"
    with pytest.raises(DataError, match="three checkpoints or more, found 2"):
        preferences(np.ones((1, 2), bool))


@pytest.mark.parametrize(("a", "c"), [(0.3, 0.6), (-0.4, 2.5), (0.0, 1.3)])
def test_pairs_on_the_curve_give_it_back_with_either_sign(a: float, c: float) -> None:
    loss = np.array([2.0, 1.9, 1.7, 1.6, 1.55])
    found = fit_accuracy(loss, np.log(a * loss + c))
    assert (found.a, found.c) == (pytest.approx(a, abs=1e-9), pytest.approx(c, abs=1e-9))
    if a:
        assert found.r2 == pytest.approx(1.0)


@given(hnp.arrays(float, 6, elements=st.floats(0, 1), unique=True))
def test_no_other_curve_nearby_fits_better(accuracy: np.ndarray) -> None:
    loss = np.array([2.0, 1.9, 1.7, 1.6, 1.55, 1.2])
    found = fit_accuracy(loss, accuracy)

    def error(a: float, c: float) -> float:
        return float(((np.log(a * loss + c) - accuracy) ** 2).sum())

    spread = ((accuracy - accuracy.mean()) ** 2).sum()
    assert found.r2 == pytest.approx(1 - error(found.a, found.c) / spread)
    for da, dc in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (1e-3, -1.6e-3), (-1e-3, 1.6e-3)):
        if ((found.a + da) * loss + found.c + dc).min() > 0:
            assert error(found.a, found.c) <= error(found.a + da, found.c + dc) + 1e-12


def test_what_is_no_set_of_points_is_refused() -> None:
    three = np.array([1.0, 2.0, 3.0])
    for loss, accuracy in ((three[:2], three[:2] / 10), (np.ones(3), three / 10), (three, np.ones(2))):
        with pytest.raises(DataError, match="three or more different losses"):
            fit_accuracy(loss, accuracy)
    for loss, accuracy in ((three, three * 10), (np.array([1.0, 2.0, np.inf]), three / 10)):
        with pytest.raises(DataError, match="finite losses, and accuracies as shares"):
            fit_accuracy(loss, accuracy)
