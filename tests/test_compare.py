"""The paired bootstrap, and what it is used on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rho.compare import RESAMPLES, Interval, compare, paired_bootstrap, read_blocks, table
from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.errors import DataError, MismatchError
from rho.evaluate import Checkpoint, EvaluateConfig, evaluate
from rho.models import ModelConfig, make_model
from rho.runs import read_manifest
from rho.tokenizer import Tokenizer


def test_two_blocks_have_three_resamples() -> None:
    """The differences 1 and 3 of 10 tokens each: means 0.1, 0.2 and 0.3, in a quarter, half and quarter of them."""
    first, second, tokens = np.array([6.0, 8.0]), np.array([5.0, 5.0]), np.array([10, 10])
    assert paired_bootstrap(first, second, tokens) == Interval(0.2, pytest.approx(0.1), pytest.approx(0.3))
    assert paired_bootstrap(first, second, tokens, level=0.4) == Interval(0.2, pytest.approx(0.2), pytest.approx(0.2))


def test_long_blocks_weigh_more() -> None:
    found = paired_bootstrap(np.array([10.0, 300.0]), np.array([0.0, 0.0]), np.array([10, 100]))
    assert found == Interval(pytest.approx(310 / 110), pytest.approx(1.0), pytest.approx(3.0))


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50), st.integers(0, 100))
def test_a_model_does_not_differ_from_itself(losses: list[float], seed: int) -> None:
    values = np.array(losses)
    assert paired_bootstrap(values, values, np.ones(len(values)), resamples=20, seed=seed) == Interval(0.0, 0.0, 0.0)


def test_pairing_takes_out_how_hard_a_block_is() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(300, 100, 200)  # far more than the models differ by
    found = paired_bootstrap(hard + random.normal(2, 1, 200), hard, np.full(200, 100))
    assert 0 < found.low < found.difference < found.high and found.high - found.low < 0.005


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    tokens = np.full(100, 10)
    held = 0
    for seed in range(200):
        found = paired_bootstrap(random.normal(1.0, 5.0, 100), np.zeros(100), tokens, resamples=400, seed=seed)
        held += found.low <= 0.1 <= found.high
    assert 0.90 <= held / 200 <= 0.99


def test_blocks_that_are_like_their_neighbours_are_drawn_with_them() -> None:
    random, tokens, held = np.random.default_rng(3), np.full(240, 10), {1: 0, 16: 0}
    for seed in range(100):
        documents = np.repeat(random.normal(1.0, 5.0, 30), 8)
        for stretch in held:
            found = paired_bootstrap(documents, np.zeros(240), tokens, resamples=400, seed=seed, stretch=stretch)
            held[stretch] += found.low <= 0.1 <= found.high
    assert held[1] < 60 and held[16] > 84


@pytest.mark.parametrize("number", [2, 7])
def test_a_stretch_of_all_blocks_holds_each_once(number: int) -> None:
    values = np.arange(number) ** 2.0
    found = paired_bootstrap(values, np.zeros(number), np.arange(number) + 1, stretch=number)
    assert found.low == pytest.approx(found.difference) and found.high == pytest.approx(found.difference)


def test_the_seed_decides_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    first, second, tokens = random.normal(size=30), random.normal(size=30), np.full(30, 4)
    once = paired_bootstrap(first, second, tokens, seed=5)
    assert once == paired_bootstrap(first, second, tokens, seed=5) != paired_bootstrap(first, second, tokens, seed=6)
    monkeypatch.setattr("rho.compare.CHUNK", 100)
    assert once == paired_bootstrap(first, second, tokens, seed=5)
    assert RESAMPLES % 3 != 0  # so that the last chunk was a short one


@pytest.mark.parametrize(
    "first, second, tokens",
    [([1.0], [1.0], [1]), ([1.0, 2.0], [1.0, 2.0, 3.0], [1, 1]), ([1.0, np.nan], [1.0, 1.0], [1, 1])],
)
def test_what_can_not_be_compared_is_refused(first: list, second: list, tokens: list) -> None:
    with pytest.raises(DataError, match="paired_bootstrap: expected"):
        paired_bootstrap(np.array(first), np.array(second), np.array(tokens))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, corpus: Path, reference: Path, architecture: dict) -> Path:
    """The reference and an untrained model, in one folder and in one each."""
    out = tmp_path_factory.mktemp("evaluated")
    text = Corpus(corpus, "validation")
    make_model(ModelConfig(architecture=architecture), text.vocab_size).save_pretrained(out / "model")
    trained, new = Checkpoint(str(reference), "trained"), Checkpoint(str(out / "model"), "new")
    for name, models in {"both": [trained, new], "trained": [trained], "new": [new]}.items():
        evaluate(EvaluateConfig(), models, {"held-out": text}, out / name)
    return out


def test_models_of_one_folder_and_of_two_are_compared_alike(evaluated: Path) -> None:
    [one] = compare([evaluated / "both"])
    [two] = compare([evaluated / "trained", evaluated / "new"])
    assert one.interval == two.interval and (one.first.arm, one.second.arm) == ("new", "trained")
    assert one.interval.difference == pytest.approx(one.first.loss - one.second.loss)
    assert 0 < one.interval.low < one.interval.difference < one.interval.high  # the untrained model is worse
    [line] = table([one]).splitlines()
    assert line.startswith("held-out: ") and f"the first less the second {one.interval.difference:+.4f} (95 %: " in line


def test_the_blocks_are_those_of_the_losses(evaluated: Path) -> None:
    found = read_blocks(evaluated / "both", read_manifest(evaluated / "both"))
    assert [(row.arm, row.set) for row in found] == [("trained", "held-out"), ("new", "held-out")]
    assert len(found[0].nats_B) > 2 and (found[0].tokens_B == found[1].tokens_B).all()


def test_another_text_of_the_same_name_is_refused(
    evaluated: Path, text_file: Path, tokenizer_folder: Path, reference: Path, tmp_path: Path
) -> None:
    config = CorpusConfig(sources=[str(text_file)], block_length=16, heldout_fraction=0.5)
    build_corpus(config, Tokenizer.load(tokenizer_folder), tmp_path / "other")
    other = {"held-out": Corpus(tmp_path / "other", "validation")}
    evaluate(EvaluateConfig(), [Checkpoint(str(reference))], other, tmp_path / "out")
    with pytest.raises(MismatchError, match="held-out is another text"):
        compare([evaluated / "new", tmp_path / "out"])


def test_nothing_to_compare_and_old_or_damaged_folders_are_errors(evaluated: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no two models"):
        compare([evaluated / "new"])
    shutil.copytree(evaluated / "new", tmp_path / "changed")
    (tmp_path / "changed" / "blocks.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="changed since"):
        compare([tmp_path / "changed", evaluated / "new"])
    (tmp_path / "changed" / "blocks.parquet").unlink()
    with pytest.raises(DataError, match="Evaluate again"):
        compare([tmp_path / "changed", evaluated / "new"])
