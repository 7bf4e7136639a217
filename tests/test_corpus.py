"""Text to packed blocks: literal streams, splits, labels, bytes, laziness and resuming."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import example_records, write_jsonl
from rho import corpus as module
from rho.corpus import MAX_LABELS, Corpus, CorpusConfig, build_corpus, positions
from rho.errors import DataError, MismatchError
from rho.objective import IGNORE_INDEX
from rho.runs import Manifest, read_manifest
from rho.tokenizer import Tokenizer

COLUMNS = ("input_ids", "document", "num_bytes", "label", "document_id", "source")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture
def build(tmp_path, tokenizer):
    """Build a corpus of some records (or texts) in a new folder."""
    made = []

    def build_one(records: list, **settings) -> Path:
        folder = tmp_path / f"built-{len(made)}"
        made.append(folder)
        records = [{"text": record} if isinstance(record, str) else record for record in records]
        source = write_jsonl(tmp_path / f"{folder.name}.jsonl", records)
        build_corpus(CorpusConfig(**{"sources": [str(source)], "block_length": 8} | settings), tokenizer, folder)
        return folder

    return build_one


def column(folder: Path, name: str, split: str = "train") -> list:
    blocks = Corpus(folder, split)
    return [blocks.row(row, (name,))[name].tolist() for row in range(len(blocks))]


def stream(folder: Path, name: str, split: str = "train") -> list:
    return [value for row in column(folder, name, split) for value in row]


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "manifest.json"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# Packing


def test_blocks_are_the_documents_joined_by_the_end_token(build, tokenizer):
    texts = ["abc", "The shift", "x", "one function of tokens"]
    folder = build(texts)
    expected = []
    for text in texts:
        expected += [*tokenizer.encode([text])[0][0].tolist(), tokenizer.eos_id]
    whole = len(expected) // 8 * 8
    assert stream(folder, "input_ids") == expected[:whole]
    assert {len(row) for row in column(folder, "input_ids")} == {8}
    counts = read_manifest(folder).facts["splits"]["train"]
    assert counts["tokens"] == len(expected)
    assert counts["dropped_tokens"] == len(expected) - whole
    assert counts["blocks"] == whole // 8


def test_the_manifest_counts_what_the_shards_hold(corpus):
    facts = read_manifest(corpus, "corpus").facts
    for split in ("train", "validation"):
        rows = [shard["rows"] for shard in facts["shards"] if shard["split"] == split]
        assert sum(rows) == facts["splits"][split]["blocks"] == len(Corpus(corpus, split))
    assert sum(facts["splits"][split]["documents"] for split in facts["splits"]) == 60


def test_two_documents_in_one_block_are_told_apart(build):
    # '1', '2' ... are one token each: digits are split and are in the byte alphabet
    folder = build(
        [{"text": "123", "id": "a", "source": "web"}, {"text": "4567", "id": "b", "source": "code"}], block_length=9
    )
    row = Corpus(folder).row(0, COLUMNS)
    assert row["document"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert row["num_bytes"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 0]
    assert row["document_id"].tolist() == ["a", "b"]
    assert row["source"].tolist() == ["web", "code"]


def test_a_document_longer_than_a_block_goes_on_in_the_next(build):
    folder = build([{"text": "1" * 20, "id": "long"}, {"text": "2" * 10, "id": "next"}])
    assert column(folder, "document") == [[0] * 8, [0] * 8, [0] * 5 + [1] * 3, [1] * 8]
    assert column(folder, "document_id") == [["long"], ["long"], ["long", "next"], ["next"]]


def test_packed_positions_run_over_the_block_and_isolated_ones_restart(build):
    texts = ["123", "4567", "12"]
    packed, isolated = build(texts), build(texts, isolated=True)
    assert Corpus(packed).row(0, ("input_ids",))["input_ids"].tolist() == stream(isolated, "input_ids")
    ids = []
    for folder in (packed, isolated):
        blocks = Corpus(folder)
        ids.append(blocks.inputs(blocks.row(0, ("input_ids", "document")))["position_ids"].tolist())
    assert ids == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 0, 1, 2, 3]]


def test_positions_of_a_literal_block():
    document = np.array([3, 3, 3, 5, 6, 6, 6, 6])
    assert positions(document, isolated=False).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert positions(document, isolated=True).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


@pytest.mark.parametrize(("isolated", "without"), [(False, [0, 3]), (True, [0, 3, 4])])
def test_first_and_special_tokens_have_no_label(build, isolated, without):
    blocks = Corpus(build(["123", "4567"], isolated=isolated))
    inputs = blocks.inputs(blocks.row(0, ("input_ids", "document")))
    expected = [IGNORE_INDEX if t in without else token for t, token in enumerate(inputs["input_ids"].tolist())]
    assert inputs["labels"].tolist() == expected


def test_a_text_file_that_spells_the_end_token_gets_no_label_for_it(build, tokenizer):
    blocks = Corpus(build([f"12{tokenizer.eos}3456789"]))
    labels = blocks.inputs(blocks.row(0, ("input_ids", "document")))["labels"].tolist()
    assert labels[2] == IGNORE_INDEX


# Bytes and labels of tokens


def test_a_corpus_knows_the_bytes_of_its_text(build):
    folder = build(["naïve 東京 🙂", "plain ascii text"])
    assert read_manifest(folder).facts["splits"]["train"]["bytes"] == len("naïve 東京 🙂plain ascii text".encode())


def test_labels_of_spans_fall_on_the_tokens_that_end_in_them(build):
    folder = build([{"text": "12345678", "spans": [[1, 3, "code"], [3, 4, "prose"], [6, 8, "code"]]}], block_length=9)
    assert Corpus(folder).labels == ["code", "prose"]
    assert stream(folder, "label") == [-1, 0, 0, 1, -1, -1, 0, 0, -1]


def test_spans_in_any_order_and_empty_ones_do_no_harm(build):
    spans = [[6, 8, "b"], [2, 2, "nothing"], [1, 3, "a"]]
    folder = build([{"text": "12345678", "spans": spans}, {"text": "1234567", "spans": [[2, 2, "nothing"]]}])
    assert Corpus(folder).labels == ["b", "a"]
    assert stream(folder, "label")[:9] == [-1, 1, 1, -1, -1, -1, 0, 0, -1]


def test_the_label_of_nested_spans_is_the_innermost(build):
    spans = [[2, 4, "inner"], [1, 7, "outer"], [3, 4, "innermost"]]
    folder = build([{"text": "12345678", "spans": spans}], block_length=9)
    labels = ["inner", "outer", "innermost"]
    assert Corpus(folder).labels == labels
    expected = [None, "outer", "inner", "innermost", "outer", "outer", "outer", None, None]
    assert stream(folder, "label") == [labels.index(label) if label else -1 for label in expected]


def test_more_labels_than_a_byte_holds_are_an_error(build):
    records = [{"text": "12345678", "spans": [[0, 1, f"label {n}"]]} for n in range(MAX_LABELS + 1)]
    with pytest.raises(DataError, match=f"jsonl:{MAX_LABELS + 1}: expected at most {MAX_LABELS} different span labels"):
        build(records)
    assert len(Corpus(build(records[:-1])).labels) == MAX_LABELS


# Splits


def heldout_ids(folder: Path) -> set[str]:
    return {name for names in column(folder, "document_id", "validation") for name in names}


def test_the_held_out_split_is_chosen_by_content(build):
    records = [record | {"text": record["text"] + "\n" + "x y z " * 5} for record in example_records()]
    copies = [record | {"id": f"copy-{n}"} for n, record in enumerate(records)]
    folder = build(records + copies, heldout_fraction=0.3)
    train = {name for names in column(folder, "document_id") for name in names}
    validation = heldout_ids(folder)
    assert not train & validation
    for n, record in enumerate(records):
        assert (record["id"] in validation) == (f"copy-{n}" in validation)
    assert 0.1 < len(validation) / len(train | validation) < 0.5


def test_the_held_out_split_depends_on_the_seed_and_not_on_the_order(build):
    records = [record | {"text": record["text"] + "\n" + "x y z " * 5} for record in example_records()]
    same, turned = build(records, heldout_fraction=0.3), build(records[::-1], heldout_fraction=0.3)
    other = build(records, heldout_fraction=0.3, seed=1)
    assert heldout_ids(same) == heldout_ids(turned) != heldout_ids(other)


def test_everything_or_nothing_can_be_held_out(build):
    everything, nothing = build(["12345678"], heldout_fraction=1.0), build(["12345678"])
    assert len(Corpus(everything, "validation")) == len(Corpus(nothing, "train")) == 1
    for folder, split in ((everything, "train"), (nothing, "validation")):
        with pytest.raises(DataError, match=f"the {split} split is empty"):
            Corpus(folder, split)


# Small and odd input


def test_a_document_of_one_token_is_kept(build):
    folder = build(["1", "2", "3", "4"])
    assert Corpus(folder).row(0, ("document",))["document"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_empty_documents_are_counted_and_leave_no_trace(build):
    folder = build(["", "1234567", ""])
    counts = read_manifest(folder).facts["splits"]["train"]
    assert (counts["documents"], counts["empty_documents"], counts["tokens"]) == (1, 2, 8)
    assert len(Corpus(folder)) == 1


def test_text_shorter_than_a_block_is_an_error_with_both_lengths(build):
    with pytest.raises(DataError, match="4 tokens in 1 documents are shorter than one block of 8"):
        build(["123"])


def test_documents_of_some_sources_only_can_be_kept(build):
    sources = ["a", "book-1", "b", "book-2"]
    records = [{"text": f"text number {n}", "id": str(n), "source": source} for n, source in enumerate(sources)]
    kept = build(records, only_sources=["b*", "c"])
    named = [name for row in range(len(Corpus(kept))) for name in Corpus(kept).row(row, ("source",))["source"].tolist()]
    assert set(named) == {"book-1", "b", "book-2"}
    assert content(kept) == content(build([record for record in records if record["source"] != "a"]))
    with pytest.raises(DataError, match=r"0 tokens in 0 documents.*or look at only_sources \(c, d\)"):
        build(records, only_sources=["c", "d"])


def test_bad_records_are_listed_where_asked(tmp_path, tokenizer):
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "1234567"}\nnot json\n{"body": "x"}\n{"text": "1234567"}\n')
    config = CorpusConfig(sources=[str(source)], block_length=8, skip_bad_records=True)
    manifest = build_corpus(config, tokenizer, tmp_path / "out")
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [entry["where"] for entry in skipped] == [f"{source}:2", f"{source}:3"]
    assert manifest.facts["skipped_records"] == 2
    assert manifest.facts["splits"]["train"]["documents"] == 2


def test_a_model_with_too_few_embeddings_or_positions_is_refused_with_both_sizes(corpus):
    blocks = Corpus(corpus)
    blocks.check_model(SimpleNamespace(vocab_size=300, max_position_embeddings=16), "right")
    blocks.check_model(SimpleNamespace(vocab_size=512), "padded")
    with pytest.raises(MismatchError, match="token ids up to 299, model small has 256 embeddings"):
        blocks.check_model(SimpleNamespace(vocab_size=256), "small")
    with pytest.raises(MismatchError, match="expected a model that reads 16 tokens at once, short reads at most 8"):
        blocks.check_model(SimpleNamespace(vocab_size=300, max_position_embeddings=8), "short")


# Laziness


class Endless:
    """Documents that never end; `read` counts how many were asked for."""

    def __init__(self, text: str) -> None:
        self.text, self.read = text, 0

    def __call__(self, sources, text_field, on_bad, start):
        for number in range(start, 1_000_000):
            self.read += 1
            yield number, module.Document(self.text, str(number), "endless", "nowhere")


def test_documents_are_read_only_as_far_as_tokens_are_wanted(tmp_path, monkeypatch, tokenizer, text_file):
    endless = Endless("1234567")
    monkeypatch.setattr(module, "read_documents", endless)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 70)  # 10 documents
    config = CorpusConfig(sources=[str(text_file)], block_length=8, max_tokens=200)
    manifest = build_corpus(config, tokenizer, tmp_path / "out")
    assert manifest.facts["splits"]["train"]["tokens"] == 200
    assert endless.read == 30  # three batches, though 25 documents are enough


def test_what_waits_in_memory_is_bounded_by_a_shard_and_a_batch(tmp_path, monkeypatch, tokenizer, text_file):
    waiting = []
    monkeypatch.setattr(module, "read_documents", Endless("1234567"))
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 70)
    write = module._Build.write_shards

    def spy(self, at_least):
        waiting.append((self.waiting("train"), len(self.names["train"])))
        return write(self, at_least)

    monkeypatch.setattr(module._Build, "write_shards", spy)
    config = CorpusConfig(sources=[str(text_file)], block_length=8, max_tokens=4000, shard_blocks=4)
    build_corpus(config, tokenizer, tmp_path / "out")
    assert max(tokens for tokens, _ in waiting) < (4 + 10) * 8
    assert max(names for _, names in waiting) <= 4 + 10


def test_max_tokens_ends_with_the_document_that_reaches_it(build):
    folder = build(["1234567"] * 9, max_tokens=20)
    assert read_manifest(folder).facts["splits"]["train"]["tokens"] == 24


def test_a_mix_takes_of_each_source_what_it_is_asked_for(tmp_path, tokenizer):
    """Documents of 8 tokens with their ends: 24 of a, 16 of b, whose text is in two other fields, all of c."""
    for name, record in {"a": {"text": "1234567"}, "b": {"q": "123", "a": "567"}, "c": {"text": "7654321"}}.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 5)
    sources = [
        {"source": str(tmp_path / "a.jsonl"), "max_tokens": 17},
        {"source": str(tmp_path / "b.jsonl"), "max_tokens": 16, "text_field": ["q", "a"]},
        str(tmp_path / "c.jsonl"),
    ]
    config = CorpusConfig(sources=sources, block_length=8)
    manifest = build_corpus(config, tokenizer, tmp_path / "mix")
    mix = Corpus(tmp_path / "mix")
    read = [mix.row(block, ("input_ids", "source")) for block in range(len(mix))]
    texts = [tokenizer.backend.decode(row["input_ids"][:-1].tolist()) for row in read]
    assert texts == ["1234567"] * 3 + ["123\n567"] * 2 + ["7654321"] * 5
    assert [str(row["source"][0]) for row in read] == ["a"] * 3 + ["b"] * 2 + ["c"] * 5
    assert {Path(name).name for name in manifest.inputs if name != "tokenizer"} == {"a.jsonl", "b.jsonl", "c.jsonl"}
    whole = config.model_copy(update={"max_tokens": 30})
    assert build_corpus(whole, tokenizer, tmp_path / "less").facts["splits"]["train"]["tokens"] == 32


# Reproducing and resuming

INTERRUPTED = {"block_length": 8, "heldout_fraction": 0.3, "shard_blocks": 20, "skip_bad_records": True}


@pytest.fixture
def long_source(tmp_path, monkeypatch) -> Path:
    """Records with bad and blank lines between them, read in many batches."""
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 500)
    lines = [json.dumps(record) for record in example_records(80)]
    lines[10:10] = ["not json", ""]
    lines[50:50] = ['{"no": "text"}']
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_same_build_gives_the_same_bytes(tmp_path, tokenizer, long_source):
    config = CorpusConfig(sources=[str(long_source)], **INTERRUPTED)
    made = [build_corpus(config, tokenizer, tmp_path / name) for name in "ab"]
    assert made[0].fingerprint == made[1].fingerprint
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("max_tokens", [None, 2000, "of each"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_build_that_is_interrupted_at_every_shard_ends_in_the_same_bytes(
    tmp_path, monkeypatch, tokenizer, long_source, when, max_tokens
):
    of_each = max_tokens == "of each"
    sources = [{"source": str(long_source), "max_tokens": 1500}] * 2 if of_each else [str(long_source)]
    config = CorpusConfig(sources=sources, max_tokens=None if of_each else max_tokens, **INTERRUPTED)
    whole = build_corpus(config, tokenizer, tmp_path / "whole")
    original, folder = module.write_shard, tmp_path / "interrupted"
    interruptions: list[Path] = []

    def write_and_stop(path: Path, columns) -> None:
        if path in interruptions:
            original(path, columns)
            return
        interruptions.append(path)
        if when == "after":
            original(path, columns)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_shard", write_and_stop)
    manifest: Manifest | None = None
    while manifest is None:
        try:
            manifest = build_corpus(config, tokenizer, folder)
        except KeyboardInterrupt:
            assert not list(folder.rglob("*.partial"))
    assert len(interruptions) == len(whole.facts["shards"]) > 5
    assert content(folder) == content(tmp_path / "whole")
    assert manifest.fingerprint == whole.fingerprint


def test_a_resumed_build_starts_behind_the_records_that_are_in_shards(tmp_path, monkeypatch, tokenizer, long_source):
    config = CorpusConfig(sources=[str(long_source)], **INTERRUPTED)
    starts: list[int] = []
    read, write = module.read_documents, module.write_shard

    def spy(sources, text_field, on_bad, start):
        starts.append(start)
        return read(sources, text_field, on_bad, start)

    def stop_late(path: Path, columns) -> None:
        if path.name == "train-00005.parquet" and len(starts) == 1:
            raise KeyboardInterrupt
        write(path, columns)

    monkeypatch.setattr(module, "read_documents", spy)
    monkeypatch.setattr(module, "write_shard", stop_late)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(config, tokenizer, tmp_path / "out")
    first = tmp_path / "out" / "train-00000.parquet"
    written = first.stat().st_mtime_ns
    build_corpus(config, tokenizer, tmp_path / "out")
    assert starts[0] == 0 < starts[1]
    assert first.stat().st_mtime_ns == written


def test_a_build_stopped_when_it_had_all_its_tokens_reads_no_further(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 7)
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "1234567"}\n' * 2 + "not json\n")
    config = CorpusConfig(sources=[str(source)], block_length=8, shard_blocks=1, max_tokens=16)
    save = module._Build.save_progress

    def stop_when_full(self) -> None:
        save(self)
        if self.full(config.parts[0]):
            raise KeyboardInterrupt

    monkeypatch.setattr(module._Build, "save_progress", stop_when_full)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(config, tokenizer, tmp_path / "out")
    assert build_corpus(config, tokenizer, tmp_path / "out").facts["splits"]["train"]["tokens"] == 16


def test_a_finished_corpus_is_left_alone(corpus, text_file, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "read_documents", None)
    config = CorpusConfig(**read_manifest(corpus).config)
    assert build_corpus(config, tokenizer, corpus).fingerprint == read_manifest(corpus).fingerprint


def test_a_corpus_with_a_removed_shard_is_made_whole_again(build, tokenizer):
    folder = build(["1234567"] * 4, shard_blocks=2)
    before = content(folder)
    (folder / "train-00001.parquet").unlink()
    build_corpus(CorpusConfig(**read_manifest(folder).config), tokenizer, folder)
    assert content(folder) == before


# Other readers


def test_datasets_reads_a_corpus_as_it_is(corpus, tmp_path):
    import datasets

    blocks, cache = Corpus(corpus), str(tmp_path / "cache")
    files = {split: str(corpus / f"{split}-*.parquet") for split in ("train", "validation")}
    for loaded in (
        datasets.load_dataset("parquet", data_files=files, cache_dir=cache),
        datasets.load_dataset(str(corpus), cache_dir=cache),
    ):
        assert len(loaded["train"]) == len(blocks)
        assert len(loaded["validation"]) == len(Corpus(corpus, "validation"))
        for row in (0, len(blocks) - 1):
            assert loaded["train"][row]["input_ids"] == blocks.row(row, ("input_ids",))["input_ids"].tolist()
        assert loaded["train"][0]["document_id"][0].startswith("doc-")


def test_transformers_loads_the_tokenizer_from_the_corpus_folder(corpus):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    ours = Corpus(corpus).tokenizer
    assert (
        loaded("The shift by one", add_special_tokens=False)["input_ids"]
        == ours.encode(["The shift by one"])[0][0].tolist()
    )
    assert loaded.eos_token == ours.eos
