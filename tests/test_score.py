"""Scoring: the reference's losses, at the right index, independent of everything but the text before a token."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import rho.score
from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.errors import DataError, MismatchError, UnscorableError
from rho.models import ModelConfig, make_model, save_model
from rho.objective import IGNORE_INDEX, token_entropy, token_labels, token_loss
from rho.references.api import ApiConfig, ApiReference
from rho.references.model import load_reference, mean_loss, score_batch
from rho.score import ScoreConfig, score_corpus
from rho.store import ScoreStore
from rho.tables import summary, token_rows
from rho.tokenizer import Tokenizer, train_tokenizer

COLUMNS = ("ref_loss", "ref_entropy")


def batch_of(corpus: Corpus, rows: range) -> dict[str, torch.Tensor]:
    inputs = [corpus.inputs(corpus.row(row, ("input_ids", "document"))) for row in rows]
    return {name: torch.stack([one[name] for one in inputs]) for name in inputs[0]}


def test_stored_scores_are_the_reference_s_losses_and_entropies_on_full_logits(
    corpus: Path, reference: Path, scores: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference / "model").eval()
    store = ScoreStore(scores)
    for row in (0, 1, len(store) - 1):
        batch = batch_of(Corpus(corpus), range(row, row + 1))
        labels = token_labels(batch["input_ids"], batch["position_ids"])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits
        stored = store.row(row, COLUMNS)
        for name, expected in (("ref_loss", token_loss), ("ref_entropy", token_entropy)):
            np.testing.assert_allclose(stored[name], expected(logits, labels)[0].numpy(), rtol=1e-4, atol=1e-5)
        assert math.isnan(stored["ref_loss"][0]) and np.isfinite(stored["ref_loss"][1:]).all()


def test_a_score_does_not_depend_on_its_neighbours_in_the_batch(corpus: Path, reference: Path) -> None:
    text = Corpus(corpus)
    model = load_reference(ModelConfig(path=str(reference)), text)
    together = score_batch(model, batch_of(text, range(8)))[0]
    alone = torch.cat([score_batch(model, batch_of(text, range(row, row + 1)))[0] for row in range(8)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5, equal_nan=True)


def test_isolated_documents_score_as_if_each_stood_alone(
    text_file: Path, tokenizer_folder: Path, architecture: dict, tmp_path: Path
) -> None:
    settings = CorpusConfig(sources=[str(text_file)], block_length=64, isolated=True)
    build_corpus(settings, Tokenizer.load(tokenizer_folder), tmp_path)
    text = Corpus(tmp_path)
    model = make_model(ModelConfig(architecture={**architecture, "initializer_range": 0.5}), text.vocab_size).eval()
    batch = batch_of(text, range(24))
    packed = score_batch(model, batch)[0]
    checked = 0
    for ids, positions, found in zip(batch["input_ids"], batch["position_ids"], packed, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, stop in itertools.pairwise(starts):
            labels = ids[None, start:stop].clone()
            labels[0, 0] = IGNORE_INDEX
            with torch.no_grad():
                alone = token_loss(model(input_ids=ids[None, start:stop], use_cache=False).logits, labels)
            torch.testing.assert_close(found[start:stop], alone[0], rtol=1e-4, atol=1e-4, equal_nan=True)
            checked += 1
    assert checked > 20
    # The guard: with attention across the boundary the losses are others.
    across = {**batch, "position_ids": torch.arange(64).expand_as(batch["position_ids"])}
    assert (score_batch(model, across)[0] - packed).nan_to_num().abs().max() > 0.1


def test_float16_columns_are_the_float32_ones_rounded(
    corpus: Path, reference: Path, scores: Path, tmp_path: Path
) -> None:
    score_corpus(ScoreConfig(), Corpus(corpus), ModelConfig(path=str(reference)), tmp_path / "half")
    half, full = ScoreStore(tmp_path / "half").row(3, COLUMNS), ScoreStore(scores).row(3, COLUMNS)
    for name in COLUMNS:
        assert half[name].dtype == np.float16
        np.testing.assert_array_equal(half[name], full[name].astype(np.float16))


def test_without_entropies_the_losses_are_the_same(corpus: Path, reference: Path, scores: Path, tmp_path: Path) -> None:
    config = ScoreConfig(dtype="float32", entropy=False)
    score_corpus(config, Corpus(corpus), ModelConfig(path=str(reference)), tmp_path)
    found, known = ScoreStore(tmp_path), ScoreStore(scores)
    assert found.columns == ["ref_loss"]
    for block in range(len(found)):
        one, other = (store.row(block, ("ref_loss",))["ref_loss"] for store in (found, known))
        np.testing.assert_array_equal(one, other)


def test_the_reference_is_scored_frozen_and_in_eval_mode(corpus: Path, architecture: dict, tmp_path: Path) -> None:
    text = Corpus(corpus)
    noisy = make_model(ModelConfig(architecture={**architecture, "attention_dropout": 0.5}), text.vocab_size)
    save_model(noisy.train(), tmp_path / "reference")
    model = load_reference(ModelConfig(path=str(tmp_path / "reference")), text)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    batch = batch_of(text, range(2))
    assert torch.equal(score_batch(model, batch)[0][:, 1:], score_batch(model, batch)[0][:, 1:])


def test_an_interrupted_job_redoes_no_finished_shard_and_ends_with_the_same_bytes(
    corpus: Path, reference: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, model, target = Corpus(corpus), ModelConfig(path=str(reference)), Corpus(corpus, "validation")
    written: list[str] = []
    real = rho.score.write_shard

    def counted(path: Path, columns: dict) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, columns)

    with monkeypatch.context() as patch:
        patch.setattr(rho.score, "write_shard", counted)
        with pytest.raises(KeyboardInterrupt):
            score_corpus(ScoreConfig(dtype="float32"), text, model, tmp_path, target)
    with pytest.raises(DataError, match="not finished"):
        ScoreStore(tmp_path)
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in written}
    score_corpus(ScoreConfig(dtype="float32"), text, model, tmp_path, target)
    assert kept == {name: (tmp_path / name).stat().st_mtime_ns for name in written}
    for shard in ScoreStore(scores).shards:
        assert (tmp_path / shard["file"]).read_bytes() == (scores / shard["file"]).read_bytes()
    assert ScoreStore(tmp_path).manifest.fingerprint == ScoreStore(scores).manifest.fingerprint


def test_a_reference_with_another_tokenizer_is_refused_and_both_are_named(
    corpus: Path, reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference / "model", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    changed = json.loads(file.read_text())
    vocab = changed["model"]["vocab"]
    a, b = list(vocab)[50:52]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(changed))
    with pytest.raises(MismatchError, match=rf"tokenizers differ: .*packed.*{tmp_path / 'other'}"):
        score_corpus(ScoreConfig(), Corpus(corpus), ModelConfig(path=str(tmp_path / "other")), tmp_path / "out")


def test_a_reference_whose_tokenizer_lacks_the_corpus_s_end_token_is_refused(
    corpus: Path, architecture: dict, tmp_path: Path
) -> None:
    save_model(make_model(ModelConfig(architecture=architecture), 300), tmp_path / "other")
    renamed = (corpus / "tokenizer" / "tokenizer.json").read_text().replace("<|endoftext|>", "</s>")
    (tmp_path / "other" / "tokenizer.json").write_text(renamed)
    with pytest.raises(MismatchError, match=r"tokenizers differ: .*other does not know the end token <\|endoftext\|>"):
        score_corpus(ScoreConfig(), Corpus(corpus), ModelConfig(path=str(tmp_path / "other")), tmp_path / "out")


def test_a_target_of_another_tokenizer_is_refused_and_one_of_other_blocks_is_read_as_it_is(
    text_file: Path, corpus: Path, reference: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(reference))
    settings = CorpusConfig(sources=[str(text_file)], block_length=64, isolated=True, heldout_fraction=0.5)
    build_corpus(settings, Tokenizer.load(tokenizer_folder), tmp_path / "wide")
    wide = Corpus(tmp_path / "wide", "validation")
    made = score_corpus(ScoreConfig(), Corpus(corpus), model, tmp_path / "s", wide)
    expected = mean_loss(load_reference(model, wide), wide).nats_per_token
    assert made.facts["target_loss"] == pytest.approx(expected, rel=1e-6)
    train_tokenizer([str(text_file)], 280, tmp_path / "tokenizer")
    build_corpus(settings, Tokenizer.load(tmp_path / "tokenizer" / "tokenizer"), tmp_path / "other")
    with pytest.raises(MismatchError, match=rf"tokenizers differ: {corpus} .*the target {tmp_path / 'other'}"):
        score_corpus(ScoreConfig(), Corpus(corpus), model, tmp_path / "x", Corpus(tmp_path / "other", "validation"))


def test_the_advice_to_read_in_windows_may_be_followed_in_the_same_folder(
    corpus: Path, architecture: dict, tmp_path: Path
) -> None:
    short = {**architecture, "max_position_embeddings": 8}
    save_model(make_model(ModelConfig(architecture=short), 300), tmp_path / "short")
    model = ModelConfig(path=str(tmp_path / "short"))
    with pytest.raises(MismatchError, match="in windows with --context 8"):
        score_corpus(ScoreConfig(), Corpus(corpus), model, tmp_path / "out")
    score_corpus(ScoreConfig(context=8), Corpus(corpus), model, tmp_path / "out")
    assert np.isfinite(ScoreStore(tmp_path / "out").row(0, ("ref_loss",))["ref_loss"][1:]).all()


def test_two_jobs_with_other_settings_never_share_a_store(
    corpus: Path, reference: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins before the first has finished anything: the manifest is the second's from then on."""
    model, real = ModelConfig(path=str(reference)), rho.score.load_scorer

    def second_begins(*args: Any) -> Any:
        monkeypatch.setattr(rho.score, "load_scorer", real)
        (tmp_path / "manifest.json").unlink()
        score_corpus(ScoreConfig(dtype="float32"), Corpus(corpus), model, tmp_path, task=(1, 2))
        return real(*args)

    monkeypatch.setattr(rho.score, "load_scorer", second_begins)
    with pytest.raises(MismatchError, match="another job, with other settings, writes here now"):
        score_corpus(ScoreConfig(dtype="float16"), Corpus(corpus), model, tmp_path)
    score_corpus(ScoreConfig(dtype="float32"), Corpus(corpus), model, tmp_path)
    for shard in ScoreStore(tmp_path).shards:
        assert (tmp_path / shard["file"]).read_bytes() == (scores / shard["file"]).read_bytes()


def test_a_reference_with_too_small_a_vocabulary_is_refused(corpus: Path, architecture: dict, tmp_path: Path) -> None:
    save_model(make_model(ModelConfig(architecture=architecture), 100), tmp_path / "small")
    with pytest.raises(MismatchError, match=r"token ids up to 299.*has 100 embeddings"):
        score_corpus(ScoreConfig(), Corpus(corpus), ModelConfig(path=str(tmp_path / "small")), tmp_path / "out")


def test_scores_of_another_corpus_are_refused_and_both_are_named(
    text_file: Path, tokenizer_folder: Path, scores: Path, tmp_path: Path
) -> None:
    settings = CorpusConfig(sources=[str(text_file)], block_length=16, seed=9, heldout_fraction=0.2)
    build_corpus(settings, Tokenizer.load(tokenizer_folder), tmp_path / "other")
    with pytest.raises(MismatchError, match=rf"scores of another corpus.*{tmp_path / 'other'}"):
        ScoreStore(scores).check_corpus(Corpus(tmp_path / "other"))


def test_a_reference_that_gives_no_number_is_an_error(corpus: Path, reference: Path, tmp_path: Path) -> None:
    broken = make_model(ModelConfig(path=str(reference)), 300)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    save_model(broken, tmp_path / "broken")
    with pytest.raises((DataError, MismatchError)):
        score_corpus(ScoreConfig(), Corpus(corpus), ModelConfig(path=str(tmp_path / "broken")), tmp_path / "out")


@pytest.mark.parametrize(("bad", "stops"), [({5: (3, 5)}, False), ({5: (3, 5), 6: (0, 9)}, True)])
def test_a_block_without_a_score_is_put_into_quarantine_and_too_many_end_the_job(
    bad: dict, stops: bool, corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def some_bad(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, entropy = score_batch(*args, **kwargs)
        if (call := next(calls)) in bad:  # of 8 blocks each; shards have 40
            loss[bad[call]] = torch.inf
        return loss, entropy

    def scored() -> None:
        score_corpus(ScoreConfig(), Corpus(corpus), ModelConfig(path=str(reference)), tmp_path)

    monkeypatch.setattr(rho.score, "score_batch", some_bad)
    if stops:
        named = rf"block 48 of {corpus}/train-00001.parquet \(documents doc-.*none of token 9 .*and 2 blocks of this"
        with pytest.raises(DataError, match=named):
            scored()
        assert (tmp_path / "train-00000.parquet").exists()  # what was finished is kept
        return
    scored()
    [listed] = json.loads((tmp_path / "train-00001.quarantine.json").read_text())
    assert (listed["block"], listed["tokens"]) == (43, [5]) and "finite" in listed["reason"]
    assert listed["where"].startswith(f"block 43 of {corpus}/train-00001.parquet (documents doc-")
    store = ScoreStore(tmp_path)
    assert [shard["quarantined"] for shard in store.shards] == [0, 1, *[0] * (len(store.shards) - 2)]
    assert summary(store)["quarantined_blocks"] == 1
    assert np.isnan(store.row(43, ("ref_loss",))["ref_loss"]).tolist() == [n in (0, 5) for n in range(16)]
    assert not np.isnan(store.row(42, ("ref_loss",))["ref_loss"][1:]).any()
    # The list is part of the store: without it the shard is scored anew.
    (tmp_path / "train-00001.quarantine.json").unlink()
    scored()
    assert ScoreStore(tmp_path).shards[1]["quarantined"] == 0
    assert not np.isnan(ScoreStore(tmp_path).row(43, ("ref_loss",))["ref_loss"][1:]).any()


def test_a_text_that_a_server_refuses_is_put_into_quarantine_alone(
    corpus: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, text = ScoreStore(scores), Corpus(corpus)
    blocks = [text.row(block, ("input_ids",))["input_ids"] for block in range(len(text))]
    bad = max(range(40, 80), key=lambda block: -sum(np.array_equal(blocks[block], other) for other in blocks))
    refused = blocks[bad]  # one that stands there once

    of_ids = {ids.tobytes(): known.row(block, ("ref_loss",))["ref_loss"] for block, ids in enumerate(blocks)}

    def served(self: ApiReference, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor) -> torch.Tensor:
        rows = [ids.numpy().astype(refused.dtype).tobytes() for ids in input_ids_BT]
        if refused.tobytes() in rows:
            raise UnscorableError("HTTP 400 no such text")
        self.meter.tokens += input_ids_BT.numel()
        return torch.from_numpy(np.stack([of_ids[row] for row in rows]))

    monkeypatch.setattr(ApiReference, "probe", lambda self: setattr(self, "known", [1.0, 2.0]))
    monkeypatch.setattr(ApiReference, "score", served)
    api = ApiConfig(url="http://127.0.0.1:1", model="served", price=2.0)
    score_corpus(ScoreConfig(dtype="float32"), text, api, tmp_path)
    store = ScoreStore(tmp_path)
    for block in range(len(store)):
        expected = known.row(block, ("ref_loss",))["ref_loss"]
        expected = np.full_like(expected, np.nan) if block == bad else expected
        np.testing.assert_array_equal(store.row(block, ("ref_loss",))["ref_loss"], expected)
    (tmp_path / "train-00001.parquet").unlink()
    monkeypatch.setattr(ApiReference, "probe", lambda self: setattr(self, "known", [1.0, 2.5]))
    with pytest.raises(MismatchError, match=r"expected served as it was before, .* differ by up to 0.5000"):
        score_corpus(ScoreConfig(dtype="float32"), text, api, tmp_path)
    [listed] = json.loads((tmp_path / "train-00001.quarantine.json").read_text())
    assert (listed["block"], listed["tokens"], listed["reason"]) == (bad, [*range(1, 16)], "HTTP 400 no such text")


def test_bad_documents_are_scored_or_listed_and_never_stop_a_job(
    reference: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    good = "The cats sat on the mat. "
    lines = [
        json.dumps({"text": text}).encode()
        for text in (good * 4, "", "a", good * 4000, "<|endoftext|>" * 20, "\ud800 surrogate", good)
    ]
    lines.insert(3, b'{"text": "not UTF-8: \xff"}')
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    settings = CorpusConfig(sources=[str(tmp_path / "bad.jsonl")], block_length=16, shard_blocks=1000)
    with pytest.raises(DataError, match=r"bad.jsonl:4: expected UTF-8.*--skip-bad-records"):
        build_corpus(settings, Tokenizer.load(tokenizer_folder), tmp_path / "corpus")
    passing = settings.model_copy(update={"skip_bad_records": True})  # the same folder goes on
    made = build_corpus(passing, Tokenizer.load(tokenizer_folder), tmp_path / "corpus")
    listed = json.loads((tmp_path / "corpus" / "skipped.json").read_text())
    assert [Path(entry["where"]).name for entry in listed] == ["bad.jsonl:4", "bad.jsonl:7"]
    assert "UTF-8" in listed[0]["reason"] and "lone surrogate" in listed[1]["reason"]
    assert made.facts["splits"]["train"]["documents"] == 5 and made.facts["splits"]["train"]["empty_documents"] == 1
    score_corpus(ScoreConfig(), Corpus(tmp_path / "corpus"), ModelConfig(path=str(reference)), tmp_path / "scores")
    store = ScoreStore(tmp_path / "scores")
    assert sum(shard["quarantined"] for shard in store.shards) == 0
    for block in range(len(store)):
        assert np.isfinite(store.row(block, ("ref_loss",))["ref_loss"][1:]).all()


def test_a_set_without_any_labelled_token_is_an_error(reference: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "1"}\n' * 8)
    settings = CorpusConfig(sources=[str(tmp_path / "x.jsonl")], block_length=2, isolated=True, heldout_fraction=1.0)
    build_corpus(settings, Tokenizer.load(tokenizer_folder), tmp_path / "x")
    held_out = Corpus(tmp_path / "x", "validation")
    model = load_reference(ModelConfig(path=str(reference)), held_out)
    with pytest.raises(DataError, match="no token of the validation split has a label"):
        mean_loss(model, held_out)


def test_mean_loss_counts_labelled_tokens_and_their_bytes(corpus: Path, reference: Path) -> None:
    text = Corpus(corpus, "validation")
    model = load_reference(ModelConfig(path=str(reference)), text)
    nats = tokens = size = 0.0
    for number in range(len(text)):
        row = text.row(number, ("input_ids", "document", "num_bytes"))
        inputs = text.inputs(row)
        loss = score_batch(model, {name: tensor[None] for name, tensor in inputs.items()})[0][0]
        kept = inputs["labels"] != IGNORE_INDEX
        nats, tokens, size = (
            nats + float(loss[kept].sum()),
            tokens + int(kept.sum()),
            size + row["num_bytes"][kept].sum(),
        )
    found = mean_loss(model, text, batch_size=3)
    assert (found.tokens, found.bytes) == (tokens, size)
    assert found.nats_per_token == pytest.approx(nats / tokens)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size)


def test_scores_of_an_api_are_stored_without_an_entropy_and_a_score_that_needs_one_is_refused(
    corpus: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ScoreStore(scores)
    asked = iter(range(len(known)))

    def served(self: ApiReference, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor) -> torch.Tensor:
        rows = [known.row(next(asked), ("ref_loss",))["ref_loss"] for _ in input_ids_BT]
        return torch.from_numpy(np.stack(rows))

    monkeypatch.setattr(ApiReference, "probe", lambda self: setattr(self, "known", [1.0, 2.0]))
    monkeypatch.setattr(ApiReference, "score", served)
    api = ApiConfig(url="http://127.0.0.1:1", model="served")
    manifest = score_corpus(ScoreConfig(dtype="float32"), Corpus(corpus), api, tmp_path / "api")
    assert manifest.facts["reference"] == "served"
    store = ScoreStore(tmp_path / "api")
    for block in range(len(store)):
        np.testing.assert_array_equal(
            store.row(block, ("ref_loss",))["ref_loss"], known.row(block, ("ref_loss",))["ref_loss"]
        )
    assert np.isnan(token_rows(store, Corpus(corpus), 0)["ref_entropy"]).all()
    with pytest.raises(DataError, match="has no column ref_entropy, only ref_loss"):
        store.row(0, ("ref_loss", "ref_entropy"))
    moved = api.model_copy(update={"url": "http://127.0.0.1:2"})
    assert score_corpus(ScoreConfig(dtype="float32"), Corpus(corpus), moved, tmp_path / "api").status == "complete"
    other = api.model_copy(update={"model": "another"})
    with pytest.raises(MismatchError, match=r"inputs\.reference"):
        score_corpus(ScoreConfig(dtype="float32"), Corpus(corpus), other, tmp_path / "api")
