"""Scores inside labels: nothing is lost, nothing is taken for something else."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from rho.integrations.labels import attach_scores, is_packed, split_labels

ids = st.integers(0, 2**31 - 1)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(st.none() | ids, st.none() | finite), min_size=1))
def test_every_id_and_every_float32_come_back_to_the_bit(tokens: list) -> None:
    labels = torch.tensor([-100 if token is None else token for token, _ in tokens])
    scores = torch.tensor([float("nan") if score is None else score for _, score in tokens])
    found_labels, found_scores = split_labels(attach_scores(labels, scores))
    kept = (labels != -100) & ~scores.isnan()
    assert torch.equal(found_labels, labels.masked_fill(~kept, -100))
    assert torch.equal(found_scores[kept], scores[kept]) and found_scores[~kept].isnan().all()


def test_the_format_is_as_written() -> None:
    [one, zero, ignored, negative] = attach_scores([7, 7, -100, 7], [1.5, 0.0, 1.5, -1.5]).tolist()
    assert one == 0x3FC00000_00000007 and ignored == -100
    assert zero == -0x80000000_00000000 + 7 and negative == 0xBFC00000_00000007 - 2**64


def test_a_score_of_zero_is_no_missing_score() -> None:
    labels, scores = split_labels(attach_scores([0, 1], [0.0, 2.0]))
    assert labels.tolist() == [0, 1] and scores.tolist() == [0.0, 2.0]


def test_labels_without_scores_are_refused_also_among_others() -> None:
    with pytest.raises(ValueError, match="2 of 2 labels hold no score: these are plain token ids"):
        split_labels(torch.tensor([5, 6, -100]))
    mixed = torch.cat([attach_scores([5], [1.0]), torch.tensor([6])])
    assert is_packed(mixed) and not is_packed(torch.tensor([5, 6, -100])) and not is_packed(torch.tensor([-100]))
    with pytest.raises(ValueError, match="1 of 2 labels hold no score"):
        split_labels(mixed)


def test_another_negative_label_than_minus_100_is_no_score() -> None:
    assert not is_packed(torch.tensor([-1, -100, 5]))
    with pytest.raises(ValueError, match=r"1 of 2 labels hold no score: .* or negative and not -100"):
        split_labels(torch.cat([attach_scores([5], [-1.0]), torch.tensor([-1])]))


def test_a_missing_score_may_be_none_as_data_sets_have_it() -> None:
    assert torch.equal(attach_scores([5, 6], [None, 1.0]), attach_scores([5, 6], [float("nan"), 1.0]))


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([5], [1.0, 2.0], r"labels \(1,\), scores \(2,\)"),
        ([5], [float("inf")], "found infinite ones"),
        ([-1], [1.0], "some are negative or hold a score already"),
        (attach_scores([5], [1.0]), [1.0], "some are negative or hold a score already"),
    ],
)
def test_what_can_not_be_attached_is_refused(labels: list, scores: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_scores(labels, scores)


def test_a_loss_that_does_not_know_of_the_scores_raises() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(torch.zeros(1, 9), attach_scores([5], [1.0]))
