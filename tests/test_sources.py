"""Reading documents from files, folders, Parquet, `datasets` and installed packages."""

import gzip
import json
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rho import sources
from rho.errors import DataError
from rho.sources import Document, SkippedRecord, read_documents, source_hashes


def read(*names: object, **options) -> list[Document]:
    return [document for _, document in read_documents([str(name) for name in names], **options)]


def texts(*names: object, **options) -> list[str]:
    return [document.text for document in read(*names, **options)]


def failure(*names: object, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(*names, **options)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


TWO = b'{"text": "one", "id": 7, "source": "web"}\n{"text": "two", "id": true, "source": 3}\n'


def test_a_record_without_id_and_source_gets_its_place_and_the_files_stem(tmp_path):
    path = write(tmp_path / "a.b.jsonl", TWO)
    assert read(path) == [
        Document("one", "7", "web", f"{path}:1"),
        Document("two", f"{path}:2", "a.b", f"{path}:2"),
    ]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".ndjson", ".JSONL"])
@pytest.mark.parametrize(("compression", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_json_lines_read_the_same_under_every_ending_and_compression(tmp_path, ending, compression, pack):
    documents = read(write(tmp_path / f"a.b{ending}{compression}", pack(TWO)))
    assert [(d.text, d.source) for d in documents] == [("one", "web"), ("two", "a.b")]


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_compressed_files_that_were_joined_are_read_to_the_last(tmp_path, pack):
    path = write(tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst"), pack(TWO) + pack(TWO))
    assert texts(path) == ["one", "two", "one", "two"]


@pytest.mark.parametrize(("name", "pack"), [("a.txt", bytes), ("a.md", bytes), ("a.txt.gz", gzip.compress)])
def test_a_text_file_is_one_document_with_its_line_ends_as_they_are(tmp_path, name, pack):
    path = write(tmp_path / name, pack("\ufeffGrüße\r\n\nx".encode()))
    assert read(path) == [Document("Grüße\r\n\nx", str(path), "a", str(path))]


def test_a_folder_gives_its_supported_visible_files_in_sorted_order(tmp_path):
    for name in ("b/z.txt", "a.txt", "c.md", ".hidden.txt", ".git/x.txt", "table.csv", "a.parquet.gz", "d.txt.bz2"):
        write(tmp_path / name, name)
    assert texts(tmp_path) == ["a.txt", "b/z.txt", "c.md"]


def test_a_glob_gives_its_files_in_sorted_order_and_a_name_with_brackets_is_itself(tmp_path):
    for name in ("x2.txt", "x1.txt", "y.txt", "x[3].txt", "deep/er/x4.txt"):
        write(tmp_path / name, name)
    assert texts(tmp_path / "x?.txt") == ["x1.txt", "x2.txt"]
    assert texts(tmp_path / "x[3].txt") == ["x[3].txt"]
    assert texts(tmp_path / "**" / "x4.txt") == ["deep/er/x4.txt"]


def test_a_folder_named_like_a_kind_of_source_is_a_folder(tmp_path, monkeypatch):
    write(tmp_path / "source" / "a.txt", "here")
    monkeypatch.chdir(tmp_path)
    assert texts("source") == ["here"]


def test_record_numbers_count_bad_and_blank_records_and_start_passes_over_that_many(tmp_path):
    first = write(tmp_path / "a.jsonl", '{"text": "r0"}\n\n{"text": 2}\n{"text": "r3"}\n')
    names = [str(first), str(write(tmp_path / "b.txt", "r4")), str(write(tmp_path / "c.jsonl", '{"text": "r5"}'))]
    everything = list(read_documents(names, on_bad=lambda bad: None))
    assert [(number, document.text) for number, document in everything] == [(0, "r0"), (3, "r3"), (4, "r4"), (5, "r5")]
    for start in range(8):
        resumed = list(read_documents(names, on_bad=lambda bad: None, start=start))
        assert resumed == [pair for pair in everything if pair[0] >= start]


def test_records_before_start_are_not_parsed(tmp_path):
    assert texts(write(tmp_path / "a.jsonl", 'not JSON\n{"text": "fine"}\n'), start=1) == ["fine"]


def test_an_empty_text_is_a_document(tmp_path):
    assert texts(write(tmp_path / "a.jsonl", '{"text": ""}')) == [""]


def test_another_field_can_hold_the_text(tmp_path):
    assert texts(write(tmp_path / "a.jsonl", '{"body": "b", "text": 1}'), fields="body") == ["b"]


def test_several_fields_are_joined_by_a_line_end(tmp_path):
    record = {"question": "1 + 1?", "id": "x", "answer": "2"}
    lines = write(tmp_path / "a.jsonl", json.dumps(record))
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    for path in (lines, tmp_path / "a.parquet"):
        assert texts(path, fields=["question", "answer"]) == ["1 + 1?\n2"]
        with pytest.raises(DataError, match="expected the text in fields 'question' and 'hint', found the fields"):
            texts(path, fields=["question", "hint"])


BAD_RECORDS = {
    "not JSON": (b'{"text": "a"', "not JSON"),
    "far too deeply nested": (b"[" * 100_000, "not JSON"),
    "a number": (b"3", "expected a JSON object, found int"),
    "no text": (b'{"body": "a", "n": 1}', "found the fields 'body', 'n'; name the right one with --text-field"),
    "an empty object": (b"{}", "found the fields none"),
    "a text that is null": (b'{"text": null}', "expected a string in field 'text', found NoneType"),
    "invalid UTF-8": (b'{"text": "\xff"}', "expected UTF-8 text, found byte 0xff at 10"),
    "a lone surrogate": (rb'{"text": "ab\ud800"}', "lone surrogate at character 2"),
    "a lone surrogate in the id": (rb'{"text": "ab", "id": "\udfff"}', "lone surrogate at character 0"),
    "a span past the end": (b'{"text": "ab", "spans": [[0, 3, "x"]]}', "0 <= start <= end <= 2, found [0, 3, 'x']"),
    "a span backwards": (b'{"text": "ab", "spans": [[2, 1, "x"]]}', "found [2, 1, 'x']"),
    "a span that starts before the text": (b'{"text": "ab", "spans": [[-1, 1, "x"]]}', "found [-1, 1, 'x']"),
    "a span of floats": (b'{"text": "ab", "spans": [[0.0, 1, "x"]]}', "found [0.0, 1, 'x']"),
    "a span without label": (b'{"text": "ab", "spans": [[0, 1]]}', "found [0, 1]"),
    "spans that are no list": (b'{"text": "ab", "spans": 4}', "found 4"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_a_bad_record_names_its_line_and_reason_and_can_be_passed_over(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    message = failure(path)
    assert message.startswith(f"{path}:2: ")
    assert reason in message
    assert "--skip-bad-records" in message
    skipped: list[SkippedRecord] = []
    assert texts(path, on_bad=skipped.append) == ["before", "after"]
    assert [bad.where for bad in skipped] == [f"{path}:2"]
    assert reason in skipped[0].reason


def test_a_text_file_that_is_empty_or_not_utf8_is_a_bad_record(tmp_path):
    empty, latin = write(tmp_path / "a.txt", b""), write(tmp_path / "b.txt", b"caf\xe9")
    assert "the file is empty" in failure(empty)
    assert f"{latin}: expected UTF-8 text, found byte 0xe9 at 3" in failure(latin)
    skipped: list[SkippedRecord] = []
    assert texts(tmp_path, on_bad=skipped.append) == []
    assert [bad.where for bad in skipped] == [str(empty), str(latin)]


def test_spans_come_along_with_their_text(tmp_path):
    line = json.dumps({"text": "äb c", "spans": [[0, 2, "content"], [2, 4, "markup"], [4, 4, "none"]]})
    [document] = read(write(tmp_path / "a.jsonl", line))
    assert document.spans == [(0, 2, "content"), (2, 4, "markup"), (4, 4, "none")]


def test_a_line_that_is_too_long_is_a_bad_record_and_never_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1000)
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "%s"}\n' % (b"x" * 2**25) + TWO, 1))
    skipped: list[SkippedRecord] = []
    tracemalloc.start()
    found = texts(path, on_bad=skipped.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["one", "two"]
    assert skipped == [SkippedRecord(f"{path}:1", "expected a record of at most 1,000 bytes, found a longer one")]
    assert peak < 2**23


@pytest.mark.parametrize("size", [999, 1000, 1001, 1002])
def test_the_longest_allowed_line_is_exactly_the_limit(tmp_path, monkeypatch, size):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1000)
    line = b'{"text": "%s"}\n' % (b"x" * (size - 13))
    assert len(line) == size
    skipped: list[SkippedRecord] = []
    found = texts(write(tmp_path / "a.jsonl", line + b'{"text": "next"}\n'), on_bad=skipped.append)
    assert (len(found), len(skipped), found[-1]) == ((2, 0, "next") if size <= 1000 else (1, 1, "next"))


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
@pytest.mark.parametrize("cut", [3, -1, -20])
def test_a_truncated_file_is_an_error_even_where_bad_records_are_passed_over(tmp_path, pack, cut):
    ending = ".gz" if pack is gzip.compress else ".zst"
    for name in ("a.jsonl", "a.txt"):
        path = write(tmp_path / (name + ending), pack(TWO * 3)[:cut])
        message = failure(path, on_bad=lambda bad: None)
        assert message.startswith(f"{path}: could not be read to its end")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_not_what_its_ending_says_is_an_error(tmp_path, name):
    assert "truncated or damaged" in failure(write(tmp_path / name, TWO * 3), on_bad=lambda bad: None)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b""), ("a.jsonl.gz", gzip.compress(b"", mtime=0))])
def test_a_file_without_records_is_an_error(tmp_path, name, content):
    assert "found an empty file" in failure(write(tmp_path / name, content), on_bad=lambda bad: None)


def test_what_is_not_there_is_an_error_before_anything_is_read(tmp_path):
    good = write(tmp_path / "a.txt", "text")
    (tmp_path / "empty").mkdir()
    bad = write(tmp_path / "table.csv", "x")
    for name, message in {
        tmp_path / "none.txt": "found nothing there. Check the path",
        tmp_path / "*.none": "found nothing there. Check the path",
        tmp_path / "empty": "found none in this folder",
        bad: "expected a file ending in one of .jsonl",
        "docstrings:no_such_package_here": "found none of this name",
    }.items():
        with pytest.raises(DataError, match=re.escape(message)):
            next(read_documents([str(good), str(name)]))


def test_parquet_rows_are_documents_and_row_numbers_go_on_over_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    rows = {"text": [f"t{i}" for i in range(150)], "id": list(range(150)), "other": [0.5] * 150}
    pq.write_table(pa.table(rows), path, row_group_size=70)
    documents = read(path)
    assert [d.text for d in documents] == rows["text"]
    assert documents[149] == Document("t149", "149", "a", f"{path}:150")
    assert texts(path, start=148) == ["t148", "t149"]


def test_a_bad_parquet_row_can_be_passed_over(tmp_path):
    path = tmp_path / "a.parquet"
    not_utf8 = pa.array([b"ok", None, b"\xff", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": not_utf8}), path)
    skipped: list[SkippedRecord] = []
    assert texts(path, on_bad=skipped.append) == ["ok", "fine"]
    assert [bad.where for bad in skipped] == [f"{path}:2", f"{path}:3"]


def test_parquet_without_the_text_column_or_rows_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a"]}), path)
    assert "found the fields 'body'; name the right one with --text-field" in failure(path, on_bad=lambda bad: None)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "found an empty file" in failure(path)


def test_damaged_parquet_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["word " * 50] * 100}), path, write_page_checksum=True, compression="none")
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"word ") + 7] ^= 1
    assert "truncated or damaged" in failure(write(path, bytes(raw)), on_bad=lambda bad: None)


def test_a_local_data_set_is_streamed_through_datasets(tmp_path):
    write(tmp_path / "train.jsonl", TWO)
    write(tmp_path / "test.jsonl", '{"text": "held out"}\n')
    name = f"hf:{tmp_path}"
    assert [(d.text, d.id) for d in read(name)] == [("one", "7"), ("two", f"{name}:2")]
    where = f"{name}@test:1"
    assert read(f"{name}@test") == [Document("held out", where, tmp_path.name, where)]
    assert "Bad split: nowhere" in failure(f"{name}@nowhere")
    assert "expected a data set that datasets.load_dataset can stream" in failure(f"hf:{tmp_path}/none")


def test_spans_come_through_datasets_too(tmp_path):
    write(tmp_path / "train.jsonl", '{"text": "held out", "spans": [[0, 4, "content"]]}\n{"text": "none"}\n')
    assert [document.spans for document in read(f"hf:{tmp_path}")] == [[(0, 4, "content")], None]


def test_the_hash_of_a_local_data_set_follows_the_content_of_the_split_asked_for(tmp_path):
    write(tmp_path / "train.jsonl", TWO)
    write(tmp_path / "test.jsonl", TWO)
    name = f"hf:{tmp_path}"
    before = source_hashes([name, f"{name}@test"])
    write(tmp_path / "test.jsonl", TWO + TWO)
    after = source_hashes([name, f"{name}@test"])
    assert before[name] == after[name]
    assert before[f"{name}@test"] != after[f"{name}@test"]


def test_hashes_name_each_file_by_its_path_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "a.txt", "a")
    write(tmp_path / "b.txt", "a")
    sha256 = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert source_hashes(["data", "b.txt"]) == {"data/a.txt": sha256, "b.txt": sha256}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of four files that no one may import."""
    monkeypatch.syspath_prepend(tmp_path)
    root = tmp_path / "tiny_corpus_package"
    write(root / "__init__.py", 'raise RuntimeError("imported")\n')
    write(root / "plain.py", '"""One."""\n\n\ndef f():\n    """Two."""  # three\n')
    write(root / "latin.py", b'"""caf\xe9"""\n')
    write(root / "empty.py", b"")
    return root.name


def test_docstrings_of_a_package_give_a_document_per_module_that_has_some(package):
    name = f"docstrings:{package}"
    assert read(name) == [Document("One.\n\nTwo.", "plain.py", name, f"{name}:plain.py")]


def test_the_source_of_a_package_gives_a_document_per_file_that_can_be_read(package):
    name = f"source:{package}"
    documents = {document.id: document for document in read(name)}
    assert set(documents) == {"__init__.py", "plain.py", "empty.py"}
    assert documents["empty.py"].spans == []
    plain = documents["plain.py"]
    assert [(plain.text[start:end], label) for start, end, label in plain.spans] == [
        ('"""One."""', "docstring"),
        ("\n\n\ndef f():\n    ", "code"),
        ('"""Two."""', "docstring"),
        ("  ", "code"),
        ("# three", "comment"),
        ("\n", "code"),
    ]


def test_the_hash_of_a_package_follows_its_files(package, tmp_path):
    names = [f"docstrings:{package}", f"source:{package}"]
    before = source_hashes(names)
    assert list(before) == names
    write(tmp_path / package / "empty.py", "x = 1\n")
    after = source_hashes(names)
    assert all(before[name] != after[name] for name in names)
