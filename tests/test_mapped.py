"""A reference that reads the text in tokens of its own: nothing of its loss is lost on the way to the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from torch import Tensor

from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.errors import MismatchError
from rho.models import ModelConfig, make_model, save_model
from rho.references.align import byte_spans
from rho.references.mapped import mapped, start_of_text
from rho.references.model import score_batch
from rho.references.scorer import in_windows
from rho.runs import hash_json
from rho.score import ScoreConfig, score_corpus
from rho.store import ScoreStore
from rho.tokenizer import Tokenizer
from test_align import EOS, EXACT, KINDS, byte_level, tokenizer

BYTES = Tokenizer(byte_level(0), EOS)  # a token a byte
kinds = st.sampled_from(sorted(KINDS))
many = settings(max_examples=60, deadline=None)
texts = st.lists(st.text("The cats_ \n1ß東🙂é", max_size=12), min_size=1, max_size=4)


def row_of(model: Tokenizer, documents: list[str]) -> dict[str, Tensor]:
    """A row of a corpus, as packing makes it: each document with its end token."""
    ids, document, num_bytes = [], [], []
    for number, text in enumerate(documents):
        own, spans = byte_spans(model, text)
        sizes = [*np.diff(spans).ravel().tolist(), 0]
        ids += [*own.tolist(), model.eos_id]
        document += [number] * len(sizes)
        num_bytes += sizes
    columns = {"input_ids": ids, "document": document, "num_bytes": num_bytes, "position_ids": range(len(ids))}
    return {name: torch.tensor([list(values)]) for name, values in columns.items()}


def by_id(seen: list[dict[str, Tensor]]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A scorer whose loss depends on the token alone, NaN where nothing predicts it."""

    def scorer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(batch)
        loss = (batch["input_ids"] * 7919 % 101 / 50).float()
        return {"ref_loss": loss.masked_fill(batch["position_ids"] == 0, torch.nan)}

    return scorer


def test_a_row_is_read_in_the_reference_s_tokens_with_its_own_ends_and_start() -> None:
    model, reference = tokenizer("byte-level, small"), BYTES
    seen: list[dict[str, Tensor]] = []
    row = row_of(model, ["The cats", "sat"])
    for isolated in (False, True):
        found = mapped(by_id(seen), model, reference, isolated)(row)["ref_loss"]
        first, second = (byte_spans(reference, text, ended=True)[0].tolist() for text in ("The cats", "sat"))
        start = reference.eos_id
        expected = [start, *first, start, *second] if isolated else [start, *first, *second]
        assert seen[-1]["input_ids"].tolist() == [expected]
        positions = [*range(len(first) + 1), *range(len(second) + 1)] if isolated else list(range(len(expected)))
        assert seen[-1]["position_ids"].tolist() == [positions]
        assert found.shape == row["input_ids"].shape
        assert found.isnan().tolist() == [[n == 0 for n in range(found.shape[1])]]


@given(kinds, kinds, texts, st.booleans())
@many
def test_the_loss_of_every_document_is_preserved(model: str, reference: str, documents: list[str], isolated) -> None:
    row = row_of(tokenizer(model), documents)
    row["position_ids"] += 1  # so that the first token's share counts too
    seen: list[dict[str, Tensor]] = []
    found = mapped(by_id(seen), tokenizer(model), tokenizer(reference), isolated)(row)["ref_loss"]
    read = by_id([])(seen[0])["ref_loss"].nan_to_num()
    assert found.double().nan_to_num().sum().item() == pytest.approx(read.double().sum().item(), abs=1e-4)


@given(st.sampled_from(EXACT), texts, st.booleans())
@many
def test_with_equal_tokens_each_keeps_its_own_loss(kind: str, documents: list[str], isolated: bool) -> None:
    row = row_of(tokenizer(kind), documents)
    row["position_ids"] += 1
    seen: list[dict[str, Tensor]] = []
    found = mapped(by_id(seen), tokenizer(kind), tokenizer(kind), isolated)(row)["ref_loss"]
    np.testing.assert_array_equal(found.numpy(), by_id([])(row)["ref_loss"].numpy())


def test_rows_of_a_batch_don_t_change_each_other(architecture: dict) -> None:
    model, reference = tokenizer("byte-level, small"), BYTES
    network = make_model(ModelConfig(architecture={**architecture, "initializer_range": 0.5}), reference.vocab_size)
    rows = [row_of(model, ["The cats sat 東", "a"]), row_of(model, ["aaaa 🙂 11", "The"])]
    length = min(row["input_ids"].shape[1] for row in rows)
    rows = [{name: column[:, :length] for name, column in row.items()} for row in rows]
    for isolated in (False, True):
        scorer = mapped(
            in_windows(lambda part: {"ref_loss": score_batch(network.eval(), part)[0]}, 16, 8),
            model,
            reference,
            isolated,
        )
        together = scorer({name: torch.cat([row[name] for row in rows]) for name in rows[0]})["ref_loss"]
        alone = torch.cat([scorer(row)["ref_loss"] for row in rows])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5, equal_nan=True)
        assert together[:, 2:].isfinite().all()


def test_text_that_the_reference_knows_nothing_of_is_told_apart() -> None:
    model, reference = tokenizer("byte-level, small"), tokenizer("word piece")
    row = row_of(model, ["\n\n The"])
    row = {name: column[:, :2] for name, column in row.items()}  # the block's edge: only line ends are left of it
    found = mapped(by_id([]), model, reference, False)(row)
    assert found["unread"].tolist() == [[True, True]] and found["ref_loss"].isnan().all()


def test_what_a_tokenizer_puts_before_a_text_begins_what_is_read() -> None:
    plain = Tokenizer(byte_level(0), EOS)
    assert start_of_text(plain) == plain.eos_id
    plain.backend.add_special_tokens(["<s>"])
    begin = plain.backend.token_to_id("<s>")
    plain.backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    assert start_of_text(plain) == begin


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, text_file: Path, architecture: dict) -> Path:
    """A model that comes with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("other")
    build_corpus(CorpusConfig(sources=[str(text_file)], block_length=16), BYTES, folder / "c")
    text = Corpus(folder / "c")
    save_model(make_model(ModelConfig(architecture=architecture), text.vocab_size, seed=3), folder / "model")
    text.tokenizer.save(folder / "model")
    return folder / "model"


def test_a_reference_with_another_tokenizer_scores_a_corpus(corpus: Path, other: Path, tmp_path: Path) -> None:
    text, model = Corpus(corpus), ModelConfig(path=str(other))
    with pytest.raises(MismatchError, match=rf"tokenizers differ.*--reference-tokenizer {other}"):
        score_corpus(ScoreConfig(), text, model, tmp_path / "refused")
    made = score_corpus(
        ScoreConfig(dtype="float32", context=12), text, model, tmp_path / "s", Corpus(corpus, "validation"), str(other)
    )
    own = Tokenizer.load(other)
    assert made.inputs["reference_tokenizer"] == hash_json([own.fingerprint, own.eos_id])
    assert (made.config["context"], made.config["overlap"]) == (12, 6)
    store = ScoreStore(tmp_path / "s")
    store.check_corpus(text)
    for block in range(len(store)):
        columns = store.row(block, ("ref_loss", "ref_entropy"))
        for values in columns.values():
            assert np.isnan(values[0]) and np.isfinite(values[1:]).all()
    assert [shard["quarantined"] for shard in store.shards] == [0] * len(store.shards)
    # An untrained model gives each of its tokens, bytes here, about the same loss.
    row = text.row(5, ("num_bytes", "input_ids", "document"))
    values = store.row(5, ("ref_loss",))["ref_loss"]
    one = np.log(Tokenizer.load(other).vocab_size)
    np.testing.assert_allclose(values[1:], np.maximum(row["num_bytes"], 1)[1:] * one, rtol=0.1)


def test_the_corpus_s_own_tokenizer_given_by_name_changes_nothing(
    corpus: Path, reference: Path, scores: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    config, target = ScoreConfig(dtype="float32"), Corpus(corpus, "validation")
    model = ModelConfig(path=str(reference))
    made = score_corpus(config, Corpus(corpus), model, tmp_path, target, str(tokenizer_folder))
    assert made.fingerprint == ScoreStore(scores).manifest.fingerprint


def test_a_tokenizer_that_is_not_the_reference_s_is_refused(
    corpus: Path, reference: Path, other: Path, tmp_path
) -> None:
    with pytest.raises(MismatchError, match=r"the reference is said to read .*Give --reference-tokenizer"):
        score_corpus(ScoreConfig(), Corpus(corpus), ModelConfig(path=str(reference)), tmp_path, None, str(other))
