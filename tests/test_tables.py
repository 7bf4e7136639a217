"""A store as tables: one row a token; and a store that another program wrote from the documentation is read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.errors import MismatchError
from rho.runs import Manifest
from rho.store import ScoreStore
from rho.tables import export, stores_in, summary, token_rows
from rho.tokenizer import Tokenizer


def test_an_export_has_one_row_a_token_with_its_scores(scores: Path, corpus: Path, tmp_path: Path) -> None:
    store, text = ScoreStore(scores), Corpus(corpus)
    assert export(store, text, tmp_path / "tokens.parquet") == len(store) * 16
    table = pq.read_table(tmp_path / "tokens.parquet").to_pydict()
    for block in (0, 77, len(store) - 1):
        of_block = slice(16 * block, 16 * block + 16)
        assert table["block"][of_block] == [block] * 16
        assert table["token"][of_block] == text.row(block, ("input_ids",))["input_ids"].tolist()
        found = store.row(block, ("ref_loss", "ref_entropy"))
        for name, values in found.items():
            np.testing.assert_array_equal(np.array(table[name][of_block], np.float32), values.astype(np.float32))


def test_a_block_is_shown_with_the_text_of_each_token(scores: Path, corpus: Path) -> None:
    rows = token_rows(ScoreStore(scores), Corpus(corpus), 3)
    ids = Corpus(corpus).row(3, ("input_ids",))["input_ids"]
    assert rows["text"] == Corpus(corpus).tokenizer.pieces(ids)
    assert rows["position"] == list(range(16)) and np.isnan(rows["ref_loss"][0])


def test_a_store_of_another_corpus_is_not_exported(
    scores: Path, text_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    settings = CorpusConfig(sources=[str(text_file)], block_length=8)
    build_corpus(settings, Tokenizer.load(tokenizer_folder), tmp_path / "other")
    with pytest.raises(MismatchError, match="scores of another corpus"):
        export(ScoreStore(scores), Corpus(tmp_path / "other"), tmp_path / "tokens.parquet")
    assert not (tmp_path / "tokens.parquet").exists()


def test_stores_are_found_and_described(scores: Path, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(scores, tmp_path / "finished")
    (tmp_path / "unfinished").mkdir()
    Manifest("score", {}, {}).write(tmp_path / "unfinished")
    assert stores_in(tmp_path) == [tmp_path / "finished"]
    found = summary(ScoreStore(scores))
    assert found["reference"] == str(reference) and found["dtype"] == "float32"
    assert found["tokens"] == 16 * found["blocks"]
    assert found["target_loss"] == ScoreStore(scores).manifest.facts["target_loss"]


def test_a_store_written_from_the_documentation_by_plain_pyarrow_is_read(corpus: Path, tmp_path: Path) -> None:
    """docs/store-format.md, and nothing of ours."""
    made = json.loads((corpus / "manifest.json").read_bytes())
    draw, values, shards, outputs = np.random.default_rng(0), [], [], {}
    for shard in (shard for shard in made["facts"]["shards"] if shard["split"] == "train"):
        columns = {}
        for name in ("ref_loss", "ref_entropy"):
            rows = draw.random((shard["rows"], 16)).astype(np.float16)
            rows[:, 0] = np.nan
            columns[name] = pa.array(list(rows), pa.list_(pa.float16()))
            values += [rows] if name == "ref_loss" else []
        pq.write_table(pa.table(columns), tmp_path / shard["file"], write_page_checksum=True)
        content = (tmp_path / shard["file"]).read_bytes()
        outputs[shard["file"]] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        shards.append({**shard, "sha256": outputs[shard["file"]]["sha256"]})
    config = {"dtype": "float16", "precision": "float32", "batch_size": 1}
    inputs = {"corpus": made["fingerprint"], "tokenizer": made["inputs"]["tokenizer"], "reference": "mine, version 1"}
    facts = {"shards": shards, "block_length": 16, "reference": "mine"}
    parts = [1, "score", config, inputs, outputs, facts]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    manifest = dict(zip(("format", "stage", "config", "inputs", "outputs", "facts"), parts, strict=True))
    manifest |= {"status": "complete", "environment": {}, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    store = ScoreStore(tmp_path)
    store.check_corpus(Corpus(corpus))
    read = np.stack([store.row(block, ("ref_loss",))["ref_loss"] for block in range(len(store))])
    np.testing.assert_array_equal(read, np.concatenate(values))
