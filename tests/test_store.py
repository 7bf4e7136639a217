"""Token-aligned columns on disk: what is written is read, and damage never goes unseen."""

import errno
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rho import store as store_module
from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.errors import DataError, MismatchError, RhoError
from rho.runs import hash_file, open_stage
from rho.store import ROW_GROUP, ScoreStore, Shards, write_shard
from rho.tokenizer import Tokenizer

COLUMNS = ("ids", "loss", "source")
ROWS = (ROW_GROUP + 8, 8)  # of the two shards: the first has two row groups


def columns(rows: int, seed: int) -> dict:
    draw = np.random.default_rng(seed)
    return {
        "ids": draw.integers(0, 300, (rows, 8), dtype=np.int32),
        "loss": np.where(np.arange(8) == 0, np.nan, draw.random((rows, 8))).astype(np.float16),
        "source": [np.array(["web", "code"][: 1 + n % 2], dtype=object) for n in range(rows)],
    }


def make_store(folder: Path) -> Path:
    with open_stage(folder, "toy", {}, {}) as stage:
        shards = []
        for number, rows in enumerate(ROWS):
            file = f"train-{number}.parquet"
            write_shard(folder / file, columns(rows, number))
            stage.add_output(file)
            shards.append({"file": file, "split": "train", "rows": rows, "sha256": hash_file(folder / file)})
        stage.finish(shards=shards)
    return folder


def read(folder: Path) -> list[dict]:
    store = Shards(folder, "train", "toy")
    rows = [store.row(row, COLUMNS) for row in range(len(store))]
    return [{name: value.tolist() for name, value in row.items()} for row in rows]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "store")


def test_every_row_is_read_as_it_was_written(store):
    rows = read(store)
    written = [columns(n, seed) for seed, n in enumerate(ROWS)]
    assert len(rows) == sum(ROWS)
    for name in COLUMNS:
        expected = [value.tolist() for shard in written for value in shard[name]]
        np.testing.assert_equal([row[name] for row in rows], expected)


def test_values_keep_their_type(store):
    row = Shards(store, "train", "toy").row(0, COLUMNS)
    assert (row["ids"].dtype, row["loss"].dtype) == (np.int32, np.float16)


def test_rows_read_one_by_one_and_by_shard_are_the_same(store):
    shards = Shards(store, "train", "toy")
    whole = [shards.read_shard(shard, COLUMNS) for shard in shards.shards]
    by_shard = [value.tolist() for part in whole for value in part["ids"]]
    assert by_shard == [row["ids"] for row in read(store)]


def test_a_row_is_found_in_its_shard(store):
    shards = Shards(store, "train", "toy")
    located = [(shard["file"], local) for shard, local in map(shards.locate, (0, 39, 40, 47))]
    assert located == [("train-0.parquet", 0), ("train-0.parquet", 39), ("train-1.parquet", 0), ("train-1.parquet", 7)]
    for row in (-1, 48):
        with pytest.raises(IndexError, match=f"row {row} of 48"):
            shards.locate(row)


def test_rows_of_different_lengths_keep_their_lengths(tmp_path):
    rows = [np.arange(n, dtype=np.int32) for n in (3, 0, 5)]
    write_shard(tmp_path / "a.parquet", {"ids": rows})
    assert pq.read_table(tmp_path / "a.parquet")["ids"].to_pylist() == [[0, 1, 2], [], [0, 1, 2, 3, 4]]


def test_the_same_rows_make_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shard(tmp_path / name, columns(40, 0))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_was_read_can_not_be_changed_for_the_next_reader(store):
    with pytest.raises(ValueError, match="read-only"):
        Shards(store, "train", "toy").row(0, ("ids",))["ids"][0] = 7


def test_a_store_can_be_sent_to_a_worker_process(store):
    first = Shards(store, "train", "toy")
    first.row(0, ("ids",))
    assert pickle.loads(pickle.dumps(first)).row(5, ("ids",))["ids"].tolist() == first.row(5, ("ids",))["ids"].tolist()


def test_a_flipped_bit_anywhere_in_a_shard_is_noticed(tmp_path, store):
    raw = (store / "train-0.parquet").read_bytes()
    draw = random.Random(0)
    footer = int.from_bytes(raw[-8:-4], "little") + 8
    bits = [draw.randrange(len(raw) * 8) for _ in range(100)]
    bits += [8 * (len(raw) - footer) + draw.randrange(footer * 8) for _ in range(100)]  # no page checksum there
    for number, bit in enumerate(bits):
        copy = shutil.copytree(store, tmp_path / str(number))  # a new path: what was verified is not verified again
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        (copy / "train-0.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-0\.parquet: damaged shard"):
            Shards(copy, "train", "toy").row(0, COLUMNS)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_noticed(tmp_path, store, keep):
    copy = shutil.copytree(store, tmp_path / "copy")
    path = copy / "train-1.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train-1\.parquet: damaged shard"):
        read(copy)


def test_pages_are_checked_at_every_read_not_only_when_the_file_is_opened(tmp_path):
    store = make_store(tmp_path / "store")
    path = store / "train-0.parquet"
    shards = Shards(store, "train", "toy")
    shards.row(0, ("ids",))  # opened and verified
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    end = chunk.dictionary_page_offset + chunk.total_compressed_size
    for place in range(end - 24, end):
        with path.open("r+b") as file:
            raw = file.read()
            file.seek(place)
            file.write(bytes([raw[place] ^ 1]))
        with pytest.raises(DataError, match="damaged shard, row group 1"):
            shards.row(ROW_GROUP, ("ids",))
        path.write_bytes(raw)
    assert shards.row(ROW_GROUP, ("ids",))["ids"].tolist() == columns(ROWS[0], 0)["ids"][ROW_GROUP].tolist()


def test_a_shard_that_the_system_refuses_to_open_is_not_called_damaged(tmp_path, store, monkeypatch):
    def refuse(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    copy = shutil.copytree(store, tmp_path / "copy")
    monkeypatch.setattr(store_module, "hash_file", refuse)
    with pytest.raises(RhoError, match=r"train-0\.parquet: Too many open files"):
        read(copy)
    monkeypatch.undo()
    assert len(read(copy)) == sum(ROWS)


def test_a_missing_shard_is_named(tmp_path, store):
    copy = shutil.copytree(store, tmp_path / "copy")
    (copy / "train-1.parquet").unlink()
    with pytest.raises(DataError, match=r"train-1\.parquet: this shard is missing"):
        read(copy)


def test_a_shard_that_was_made_anew_is_read_anew(tmp_path):
    store = make_store(tmp_path / "store")
    before = read(store)
    shutil.rmtree(store)
    with open_stage(store, "toy", {}, {}) as stage:
        write_shard(store / "train-0.parquet", columns(8, seed=9))
        sha256 = hash_file(store / "train-0.parquet")
        stage.finish(shards=[{"file": "train-0.parquet", "split": "train", "rows": 8, "sha256": sha256}])
    after = read(store)
    assert after[0]["ids"] == columns(8, seed=9)["ids"][0].tolist() != before[0]["ids"]


def test_scores_have_a_value_for_every_token_and_nan_only_where_nothing_predicts(scores, corpus):
    store, blocks = ScoreStore(scores), Corpus(corpus)
    assert [s["rows"] for s in store.shards] == [s["rows"] for s in blocks.shards]
    for row in (0, len(store) - 1):
        loss = store.row(row, ("ref_loss",))["ref_loss"]
        assert np.isnan(loss).tolist() == [True] + [False] * (blocks.block_length - 1)


def test_scores_of_this_corpus_are_accepted(scores, corpus):
    ScoreStore(scores).check_corpus(Corpus(corpus))


def test_scores_of_another_corpus_are_refused_with_both_named(tmp_path, scores, text_file, tokenizer_folder):
    config = CorpusConfig(sources=[str(text_file)], block_length=16)
    build_corpus(config, Tokenizer.load(tokenizer_folder), tmp_path / "other")
    other = Corpus(tmp_path / "other")
    with pytest.raises(MismatchError, match="scores of another corpus") as caught:
        ScoreStore(scores).check_corpus(other)
    for named in (
        str(scores),
        str(other.folder),
        other.fingerprint[:12],
        ScoreStore(scores).manifest.inputs["corpus"][:12],
    ):
        assert named in str(caught.value)


def test_scores_with_another_tokenizer_are_refused_with_both_named(tmp_path, scores, text_file, tokenizer_folder):
    backend = Tokenizer.load(tokenizer_folder).backend
    backend.add_tokens(["shift"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = CorpusConfig(sources=[str(text_file)], block_length=16)
    build_corpus(config, Tokenizer.load(tmp_path / "tokenizer.json"), tmp_path / "other")
    with pytest.raises(MismatchError, match="scores of another tokenizer") as caught:
        ScoreStore(scores).check_corpus(Corpus(tmp_path / "other"))
    assert Tokenizer.load(tokenizer_folder).fingerprint[:12] in str(caught.value)


def test_an_unfinished_store_is_refused(tmp_path):
    with open_stage(tmp_path / "half", "score", {}, {}) as stage:
        stage.checkpoint()
    with pytest.raises(DataError, match="'score' was not finished"):
        ScoreStore(tmp_path / "half")


def test_columns_are_plain_parquet_lists(store):
    schema = pq.read_schema(store / "train-0.parquet")
    assert schema.field("ids").type == pa.list_(pa.int32())
    assert schema.field("loss").type == pa.list_(pa.float16())


def test_half_precision_losses_take_no_more_than_they_are(tmp_path):
    losses = np.random.default_rng(0).gamma(1.5, 2.0, (256, 256)).astype(np.float16)
    write_shard(tmp_path / "a.parquet", {"ref_loss": losses})
    assert (tmp_path / "a.parquet").stat().st_size <= losses.nbytes
