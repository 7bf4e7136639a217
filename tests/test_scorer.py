"""Windows over what a reference can't read at once: every token scored exactly once, with all the context there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rho.corpus import Corpus
from rho.errors import DataError
from rho.models import ModelConfig, make_model
from rho.references.model import score_batch
from rho.references.scorer import in_windows, mean_of, windows


def test_the_windows_of_seven_tokens_are_those_of_the_drawing() -> None:
    assert list(windows(7, 4, 2)) == [(0, 0, 4), (2, 4, 6), (4, 6, 7)]
    assert list(windows(4, 4, 2)) == list(windows(4, 9, 2)) == [(0, 0, 4)]
    assert list(windows(0, 4, 2)) == []


@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_each_token_is_scored_once_with_as_much_context_as_was_asked_for(length: int, context: int, data) -> None:
    overlap = data.draw(st.integers(1, context - 1))
    found = list(windows(length, context, overlap))
    assert [token for _, first, stop in found for token in range(first, stop)] == list(range(length))
    for start, first, stop in found:
        assert 0 <= start <= first < stop <= length
        assert stop - start <= context
        assert first - start == min(overlap, first)
    assert list(windows(length + 1, context, overlap))[: len(found) - 1] == found[:-1]  # whatever follows


def context_sizes(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A scorer: how many tokens stand before each in its document, as its window has it."""
    return {"ref_loss": batch["position_ids"].float()}


def test_a_document_that_is_cut_by_a_window_begins_anew_there() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 0]])
    found = in_windows(context_sizes, 4, 2)({"input_ids": positions, "position_ids": positions})["ref_loss"]
    # Windows: 0-3, 2-5 (scores 4 5), 4-7 (scores 6 7).
    assert found.tolist() == [[0, 1, 2, 3, 2, 3, 2, 3], [0, 1, 2, 0, 1, 2, 2, 0]]


@pytest.mark.parametrize("isolated", [False, True])
def test_a_token_in_a_window_scores_as_if_its_window_were_all(isolated: bool, architecture: dict) -> None:
    model = make_model(ModelConfig(architecture={**architecture, "initializer_range": 0.5}), 50).eval()
    ids = torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]) if isolated else torch.arange(11)
    batch = {"input_ids": ids, "position_ids": positions.expand(2, -1)}
    found = in_windows(lambda part: {"ref_loss": score_batch(model, part)[0]}, 4, 3)(batch)["ref_loss"]
    for token in range(11):
        start = max(token - 3, 0)  # context 4, overlap 3: each window scores one new token
        if isolated:
            start = max(start, token - int(positions[token]))
        alone = {"input_ids": ids[:, start : token + 1], "position_ids": torch.arange(token + 1 - start).expand(2, -1)}
        expected = score_batch(model, alone)[0][:, -1]
        torch.testing.assert_close(found[:, token], expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found[:, 0].isnan().all() and (found[:, 4].isnan().all() == isolated)


def test_a_mean_with_a_loss_that_is_no_number_is_an_error(corpus) -> None:
    held_out = Corpus(corpus, "validation")
    with pytest.raises(DataError, match="expected a finite loss of every token of the validation split, found nan"):
        mean_of(lambda batch: {"ref_loss": torch.full(batch["input_ids"].shape, torch.nan)}, held_out, 4)
