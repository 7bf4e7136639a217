"""Evaluation: losses of every checkpoint on every set, and the text token by token."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import rho.evaluate
from rho.corpus import Corpus
from rho.errors import DataError
from rho.evaluate import Checkpoint, EvaluateConfig, Exploration, checkpoints_of, evaluate, finished
from rho.losses import block_losses
from rho.models import ModelConfig, make_model
from rho.references.model import mean_loss
from rho.score import Source
from rho.selection import Selector


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_every_checkpoint_is_listed_with_the_tokens_it_had_seen(reference: Path) -> None:
    [last] = checkpoints_of(reference, "reference")
    assert (last.arm, last.seed, last.step) == ("reference", 0, 12)
    assert last.tokens_seen == 12 * 8 * 16
    assert 0 < last.tokens_selected < last.tokens_seen  # first and special tokens have no label


def test_a_line_for_each_model_and_set_with_the_mean_loss(corpus: Path, reference: Path, tmp_path: Path) -> None:
    text = Corpus(corpus, "validation")
    models = [*checkpoints_of(reference, "reference"), Checkpoint(str(reference))]
    evaluate(EvaluateConfig(), models, {"a": text, "b": text}, tmp_path)
    rows = rows_of(tmp_path)
    assert [(row["arm"], row["set"]) for row in rows] == [(m.arm, s) for m in models for s in ("a", "b")]
    expected = mean_loss(make_model(ModelConfig(path=str(reference)), text.vocab_size), text)
    for row in rows:
        assert row["loss"] == pytest.approx(expected.nats_per_token, rel=1e-12)
        assert row["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-12)
        assert (row["tokens"], row["bytes"]) == (expected.tokens, expected.bytes)


def test_an_interrupted_evaluation_goes_on_after_the_last_line(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Corpus(corpus, "validation")
    models = [Checkpoint(str(reference)), *checkpoints_of(reference, "reference")]
    calls = 0

    def counted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return block_losses(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(rho.evaluate, "block_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(EvaluateConfig(), models, {"a": text}, tmp_path)
    [unfinished] = tmp_path.glob(".losses-*.jsonl")
    with unfinished.open("a") as file:
        file.write('{"cut": ')  # as a kill would leave it
    evaluate(EvaluateConfig(), models, {"a": text}, tmp_path)
    assert calls == 3 and len(rows_of(tmp_path)) == 2


def test_the_explored_text_holds_every_token_with_both_losses_and_the_selection(
    corpus: Path, reference: Path, architecture: dict, tmp_path: Path
) -> None:
    text = Corpus(corpus, "validation")
    make_model(ModelConfig(architecture=architecture), text.vocab_size).save_pretrained(tmp_path / "model")
    explore = Exploration(text, {"reference": Source(ModelConfig(path=str(reference)))}, Selector("excess", 0.5))
    models = [Checkpoint(str(tmp_path / "model"), "slm", 1, 2)]
    evaluate(EvaluateConfig(token_blocks=2), models, {"a": text}, tmp_path / "out", explore)
    table = pq.read_table(tmp_path / "out" / "tokens.parquet").to_pydict()
    blocks = [text.row(block, ("input_ids", "document", "label")) for block in (0, 1)]
    assert "".join(table["text"]) == text.tokenizer.backend.decode(
        np.concatenate([b["input_ids"] for b in blocks]).tolist(), skip_special_tokens=False
    )
    assert table["position"] == [*range(16)] * 2
    assert set(table["arm"]) == {"slm"} and set(table["seed"]) == {1}
    excess, selected = np.array(table["excess"]), np.array(table["selected"])
    np.testing.assert_allclose(excess, np.array(table["loss"]) - np.array(table["ref_loss"]), rtol=1e-5)
    for block in (slice(0, 16), slice(16, 32)):
        scored = np.isfinite(excess[block])
        assert selected[block].sum() == round(0.5 * scored.sum()) and not selected[block][~scored].any()
        assert excess[block][selected[block]].min() >= excess[block][scored & ~selected[block]].max()
        rank = np.array(table["rank"])[block][scored]
        assert (rank.argmax(), rank.max(), rank.min()) == (excess[block][scored].argmax(), 1.0, 0.0)
    assert set(table["label"]) <= {"code", None}


def test_nothing_to_evaluate_is_an_error(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 models, 1 sets"):
        evaluate(EvaluateConfig(), [], {"a": Corpus(corpus, "validation")}, tmp_path)


def test_a_finished_stage_is_evaluated_with_the_tokens_it_was_trained_on(reference: Path) -> None:
    [last] = checkpoints_of(reference, "arm")
    for folder in (reference, reference / "model", reference / "checkpoints" / "checkpoint-12"):
        assert finished(str(folder)) == replace(last, model=str(folder), arm="model", content=None)
    other = reference.parent / "somebody's"  # a manifest.json that is none of ours
    (other / "weights").mkdir(parents=True, exist_ok=True)
    (other / "manifest.json").write_text("{}")
    for folder in (other, other / "weights"):
        assert finished(str(folder)).step is None
    assert finished("somebody/model", "plain") == Checkpoint("somebody/model", "plain", step=None)


def test_a_finished_evaluation_is_fresh_where_its_models_were_moved_or_deleted(
    corpus: Path, reference: Path, tmp_path: Path
) -> None:
    held_out = {"held-out": Corpus(corpus, "validation")}
    for name in ("a", "b"):
        shutil.copytree(reference, tmp_path / name)
    evaluate(EvaluateConfig(), checkpoints_of(tmp_path / "a", "arm"), held_out, tmp_path / "out")
    before = (tmp_path / "out" / "losses.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    evaluate(EvaluateConfig(), checkpoints_of(tmp_path / "b", "arm"), held_out, tmp_path / "out")
    assert (tmp_path / "out" / "losses.jsonl").read_bytes() == before
