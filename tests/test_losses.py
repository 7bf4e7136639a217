"""Losses by block, source and label."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.losses import block_losses, by_domain, total
from rho.models import ModelConfig, make_model
from rho.objective import IGNORE_INDEX
from rho.references.model import mean_loss, score_batch
from rho.references.scorer import MeanLoss, as_batch
from rho.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Corpus:
    """Two sources by turns, the second with labelled spans; several documents in most blocks."""
    out = tmp_path_factory.mktemp("mixed")
    words = ("alpha", "beta gamma", "delta", "one two three", "Straße", "東京", "x")
    with (out / "text.jsonl").open("w") as file:
        for n in range(40):
            text, source = " ".join(words[k % 7] for k in range(n, n + 2 + n % 5)), ("books", "web")[n % 2]
            spans = [[0, 2, "content"], [2, len(text), "markup"]] if source == "web" else []
            file.write(json.dumps({"id": str(n), "source": source, "text": text, "spans": spans}) + "\n")
    config = CorpusConfig(sources=[str(out / "text.jsonl")], block_length=32, heldout_fraction=1.0, shard_blocks=5)
    build_corpus(config, Tokenizer.load(tokenizer_folder), out / "corpus")
    return Corpus(out / "corpus", "validation")


def test_each_token_counts_once_in_its_block_source_and_label(mixed: Corpus, architecture: dict) -> None:
    model = make_model(ModelConfig(architecture=architecture), mixed.vocab_size)
    expected: dict[tuple[int, str, str | None], list[float]] = {}
    for block in range(len(mixed)):
        row = mixed.row(block, ("input_ids", "document", "num_bytes", "label", "document_id", "source"))
        batch = as_batch(mixed, [row])
        losses = score_batch(model, batch)[0][0].tolist()
        for t, (_, source) in enumerate(mixed.origins(row)):
            if batch["labels"][0, t] != IGNORE_INDEX:
                label = mixed.labels[row["label"][t]] if row["label"][t] >= 0 else None
                sums = expected.setdefault((block, source, label), [0.0, 0, 0])
                for k, value in enumerate((losses[t], 1, int(row["num_bytes"][t]))):
                    sums[k] += value
    table = block_losses(model, mixed, batch_size=3)
    found = {(r["block"], r["source"], r["label"]): [r["nats"], r["tokens"], r["bytes"]] for r in table.to_pylist()}
    assert found.keys() == expected.keys() and len(found) == len(table)
    assert {key[1:] for key in found} == {("books", None), ("web", "content"), ("web", "markup")}
    for key, sums in expected.items():
        assert found[key] == pytest.approx(sums, rel=1e-5), key


def test_the_domains_add_up_to_the_whole(mixed: Corpus, architecture: dict) -> None:
    model = make_model(ModelConfig(architecture=architecture), mixed.vocab_size)
    table, whole = block_losses(model, mixed), mean_loss(model, mixed)
    assert total(table) == MeanLoss(pytest.approx(whole.nats), whole.tokens, whole.bytes)
    domains = by_domain(table)
    assert [(by, name) for by, name, _ in domains] == [
        ("source", "books"),
        ("source", "web"),
        ("label", "content"),
        ("label", "markup"),
        ("label", None),
    ]
    for column in ("source", "label"):
        parts = [loss for by, _, loss in domains if by == column]
        assert math.isclose(sum(loss.nats for loss in parts), whole.nats)
        assert sum(loss.tokens for loss in parts) == whole.tokens
        assert sum(loss.bytes for loss in parts) == whole.bytes
    web, unlabelled = domains[1][2], domains[-1][2]
    assert web.tokens + unlabelled.tokens == whole.tokens  # only the web's tokens have labels
    assert np.isfinite(web.bits_per_byte)
