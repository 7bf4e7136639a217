"""Text documents from anywhere, one at a time: memory grows with the largest record, never with the corpus."""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rho.errors import DataError
from rho.pysource import Span, docstrings, label_spans, package_digest, package_files
from rho.runs import hash_file, hash_json

MAX_RECORD_BYTES = 256 * 2**20
JSON_LINES = (".jsonl", ".json", ".ndjson")
WHOLE_TEXT = (".txt", ".md")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUPPORTED = "one of .jsonl .json .ndjson .txt .md (each also .gz or .zst) or .parquet"


CharacterRange = tuple[int, int]  # start and end, in characters of a text
TextField = str | list[str]  # the field that holds the text, or several that hold its parts


@dataclass(frozen=True)
class Document:
    """One text and where it comes from.

    `where` ('path:line') is for messages. `spans` are `(start, end, label)` character ranges of the text, where the
    source has them; `answers` the only ones that are to be learned, where not all of it is.
    """

    text: str
    id: str
    source: str
    where: str
    spans: list[Span] | None = None
    answers: list[CharacterRange] | None = None


@dataclass
class SkippedRecord:
    """A record that could not be used, and why."""

    where: str
    reason: str


class _BadRecord(Exception):
    """What is wrong with the record being made; whoever reads knows where it is."""


@dataclass(frozen=True)
class Fields:
    """The fields of a record that hold its text.

    Attributes:
        names: of the fields.
        make: the text of their values, and which of its characters are to be learned (None: all); a ValueError says
            what is wrong with them.
        option: what names them on the command line, for messages.
    """

    names: tuple[str, ...]
    make: Callable[..., tuple[str, list[CharacterRange] | None]]
    option: str


def whole_text(text_field: TextField = "text") -> Fields:
    """One field that holds all of it, or several that hold its parts, which a line end joins."""
    names = (text_field,) if isinstance(text_field, str) else tuple(text_field)

    def make(*parts: Any) -> tuple[str, None]:
        for name, part in zip(names, parts, strict=True):
            expect_string(name, part, "--text-field")
        return "\n".join(parts), None

    others = "of answers to be learned: --prompt-field and --completion-field, or --messages-field"
    return Fields(names, make, f"--text-field ({others})")


def expect_string(name: str, value: Any, option: str) -> None:
    """A ValueError if the value of a field is none."""
    if not isinstance(value, str):
        raise ValueError(
            f"expected a string in field '{name}', found {type(value).__name__}; {option} names another field"
        )


# A record that was found, with where it is, but not yet parsed, so that a resumed job passes over it cheaply.
# None stands for nothing at all: a blank line, a module without docstrings.
Record = tuple[str, Callable[[], Document | None]]


def read_documents(
    sources: Sequence[str],
    fields: TextField | Fields = "text",
    on_bad: Callable[[SkippedRecord], None] | None = None,
    start: int = 0,
) -> Iterator[tuple[int, Document]]:
    """Read the documents of all sources in order, with their record numbers.

    Every record counts, bad and blank ones too, so a job that finished record N continues with `start=N + 1`.

    Args:
        sources: files, folders (everything supported below, sorted), globs, `hf:NAME_OR_PATH[:CONFIG][@SPLIT]`,
            `docstrings:PACKAGE` or `source:PACKAGE`.
        fields: what holds the text of a record: a field's name, several that a line end joins, or more than names.
        on_bad: called with each record that can't be used, instead of raising an error.
        start: the number of records to pass over.

    Raises:
        DataError: a source is missing, damaged or of an unknown kind, or a record is bad and there is no `on_bad`.
    """
    fields = fields if isinstance(fields, Fields) else whole_text(fields)
    streams = [_records(source, fields) for source in sources]
    for number, (where, make) in enumerate(chain.from_iterable(streams)):
        if number < start:
            continue
        try:
            document = make()
        except _BadRecord as error:
            if on_bad is None:
                raise DataError(
                    f"{where}: {error}. Correct it, or pass it over with --skip-bad-records "
                    "(skip_bad_records: true in a config)."
                ) from error
            on_bad(SkippedRecord(where, str(error)))
        else:
            if document is not None:
                yield number, document


def source_hashes(sources: Sequence[str]) -> dict[str, str]:
    """Name -> content hash of everything that `read_documents` would read: what a manifest lists as inputs."""
    hashes = {}
    for source in sources:
        kind, name = _kind(source)
        if kind == "hf:":
            hashes[source] = _hub_digest(source)
        elif kind:
            hashes[source] = package_digest(name)
        else:
            for path in _files(source):
                with _reading(path):
                    hashes[str(path)] = hash_file(path)
    return hashes


def _kind(source: str) -> tuple[str, str]:
    """The prefix of a source, empty for files, and what follows it."""
    prefix = next((known for known in ("hf:", "docstrings:", "source:") if source.startswith(known)), "")
    return prefix, source.removeprefix(prefix)


def _records(source: str, fields: Fields) -> Iterator[Record]:
    """The records of one source. A source that isn't there is an error now, not when its turn comes."""
    kind, name = _kind(source)
    if kind == "hf:":
        return _hub_records(source, fields)
    if kind:
        return _python_records(source, package_files(name))
    return chain.from_iterable(_file_records(path, fields) for path in _files(source))


def _files(source: str) -> list[Path]:
    """The supported files that a path, folder or glob stands for, in a fixed order."""
    place = Path(source)
    # Path.glob takes no absolute pattern.
    places = [place] if place.exists() else [Path(name) for name in sorted(glob.glob(source, recursive=True))]
    if not places:
        here = "" if place.is_absolute() else f" (seen from {Path.cwd()})"
        raise DataError(f"{source}: expected a file, folder or glob, found nothing there{here}. Check the path.")
    files = []
    for place in places:
        if place.is_dir():
            inner = sorted(p for p in place.rglob("*") if p.is_file() and _format(p))
            # Hidden files are the copies that editors and file systems keep.
            files += [p for p in inner if not any(part.startswith(".") for part in p.relative_to(place).parts)]
        elif _format(place):
            files.append(place)
        else:
            raise DataError(f"{place}: expected a file ending in {SUPPORTED}. Convert or rename it, or leave it out.")
    if not files:
        raise DataError(f"{source}: expected files ending in {SUPPORTED}, found none in this folder. Check the path.")
    return files


def _format(path: Path) -> str:
    """The ending that tells what a file holds, without its compression ('.jsonl' for 'a.jsonl.gz'), '' if unknown."""
    ending = path.suffix.lower()
    if ending in COMPRESSIONS:
        ending = Path(path.stem).suffix.lower()
        return ending if ending in JSON_LINES + WHOLE_TEXT else ""
    return ending if ending in (*JSON_LINES, *WHOLE_TEXT, ".parquet") else ""


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSIONS else path.stem


def _file_records(path: Path, fields: Fields) -> Iterator[Record]:
    if _format(path) in WHOLE_TEXT:
        yield str(path), partial(_text_file, path)
        return
    records = _parquet_records if _format(path) == ".parquet" else _json_records
    empty = True
    with _reading(path):
        for record in records(path, fields):
            empty = False
            yield record
    if empty:
        raise DataError(f"{path}: expected at least one record, found an empty file. Fetch it again or leave it out.")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in what the file system, a decompressor or Parquet reports."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: could not be read to its end; it is unreadable, truncated or damaged ({error}). Fetch it again."
        ) from error


def _open(path: Path) -> io.BufferedReader:
    """A file's decompressed bytes. Arrow's decompressors, unlike others, report a truncated file."""
    import pyarrow as pa

    stream = pa.input_stream(str(path), compression=COMPRESSIONS.get(path.suffix.lower()))
    return io.BufferedReader(stream, buffer_size=2**20)


def _text_file(path: Path) -> Document:
    with _reading(path), _open(path) as file:
        raw = file.read(MAX_RECORD_BYTES + 1)
    if not raw:
        raise _BadRecord("the file is empty")
    return _document({"text": _decode(raw)}, whole_text(), str(path), _stem(path))


def _json_records(path: Path, fields: Fields) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in enumerate(_lines(file), 1):
            where = f"{path}:{number}"
            yield where, partial(_json_line, line, fields, where, _stem(path))


def _lines(file: io.BufferedReader) -> Iterator[bytes]:
    """The lines of a file. Of one that is too long only the beginning is kept: a small file can inflate to anything."""
    while line := file.readline(MAX_RECORD_BYTES + 1):
        rest = line
        while len(line) > MAX_RECORD_BYTES and rest and not rest.endswith(b"\n"):
            rest = file.readline(2**20)
        yield line


def _json_line(line: bytes, fields: Fields, where: str, source: str) -> Document | None:
    text = _decode(line)
    if not text.strip():
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadRecord(f"expected one JSON object a line, found something that is not JSON ({error})") from error
    return _document(record, fields, where, source)


def _decode(raw: bytes) -> str:
    if len(raw) > MAX_RECORD_BYTES:
        raise _BadRecord(f"expected a record of at most {MAX_RECORD_BYTES:,} bytes, found a longer one")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _BadRecord(f"expected UTF-8 text, found byte 0x{raw[error.start]:02x} at {error.start}") from error


def _parquet_records(path: Path, fields: Fields) -> Iterator[Record]:
    import pyarrow.parquet as pq

    # Buffered without pre-buffering: memory is a page a column, not a row group.
    options = {"pre_buffer": False, "buffer_size": 2**20, "page_checksum_verification": True}
    with pq.ParquetFile(path, **options) as file:
        names = file.schema_arrow.names
        if not set(fields.names) <= set(names):
            raise DataError(f"{path}: {_no_field(fields, names)}.")
        columns = [name for name in names if name in (*fields.names, "id", "source", "spans")]
        row = 0
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for place in range(len(batch)):
                row += 1
                where = f"{path}:{row}"
                yield where, partial(_parquet_row, batch, place, fields, where, path.stem)


def _parquet_row(batch: Any, place: int, fields: Fields, where: str, source: str) -> Document:
    try:
        record = batch.slice(place, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise _BadRecord(f"expected UTF-8 text, found something else ({error.reason})") from error
    return _document(record, fields, where, source)


def _document(record: object, fields: Fields, where: str, source: str) -> Document:
    """Check a record and make a document of it."""
    if not isinstance(record, dict):
        raise _BadRecord(f"expected a JSON object, found {type(record).__name__}")
    if not set(fields.names) <= record.keys():
        raise _BadRecord(_no_field(fields, list(record)))
    try:
        text, answers = fields.make(*(record[name] for name in fields.names))
    except ValueError as error:
        raise _BadRecord(str(error)) from error
    name, given_source = record.get("id"), record.get("source")
    name = str(name) if isinstance(name, (str, int)) and not isinstance(name, bool) else where
    source = given_source if isinstance(given_source, str) else source
    spans = _spans(record.get("spans"), len(text))
    for string in (text, name, source, *(label for _, _, label in spans or ())):
        try:
            string.encode()
        except UnicodeEncodeError as error:
            raise _BadRecord(f"expected Unicode text, found a lone surrogate at character {error.start}") from error
    return Document(text, name, source, where, spans, answers)


def _no_field(fields: Fields, found: list[str]) -> str:
    there = ", ".join(repr(name) for name in found[:20]) or "none"
    wanted = f"field{'s' if len(fields.names) > 1 else ''} {' and '.join(map(repr, fields.names))}"
    return f"expected the text in {wanted}, found the fields {there}; name the right one with {fields.option}"


def _spans(value: Any, length: int) -> list[Span] | None:
    if value is None:
        return None
    spans = []
    for span in value if isinstance(value, list) else [value]:
        match span:
            case [int(start), int(end), str(label)] if 0 <= start <= end <= length:
                spans.append((start, end, label))
            case _:
                raise _BadRecord(
                    f"expected spans [start, end, label] with 0 <= start <= end <= {length}, found {str(span)[:80]}"
                )
    return spans


def _python_records(source: str, files: dict[str, Path]) -> Iterator[Record]:
    for name, path in files.items():
        yield f"{source}:{name}", partial(_python_file, source, name, path)


def _python_file(source: str, name: str, path: Path) -> Document | None:
    with _reading(path):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    where = f"{source}:{name}"
    if source.startswith("docstrings:"):
        text = docstrings(text) or ""
        return Document(text, name, source, where) if text else None
    spans = label_spans(text)
    return None if spans is None else Document(text, name, source, where, spans)


def _hub_address(source: str) -> tuple[str, str | None, str]:
    """The name, config and split of `hf:NAME_OR_PATH[:CONFIG][@SPLIT]`."""
    address, _, split = source.removeprefix("hf:").partition("@")
    name, _, config = address.partition(":")
    return name, config or None, split or "train"


@contextmanager
def _asking_hub(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # anything: the library, its file systems and the network each have their own
        raise DataError(
            f"{source}: expected a data set that datasets.load_dataset can stream as hf:NAME_OR_PATH[:CONFIG][@SPLIT], "
            f"found {type(error).__name__}: {error}. Check the name, config and split, and the network."
        ) from error


def _hub_records(source: str, fields: Fields) -> Iterator[Record]:
    import datasets

    name, config, split = _hub_address(source)
    with _asking_hub(source):
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    return _hub_rows(source, rows, fields)


def _hub_rows(source: str, rows: Any, fields: Fields) -> Iterator[Record]:
    default_source = Path(_hub_address(source)[0]).name
    with _asking_hub(source):
        for number, row in enumerate(rows, 1):
            where = f"{source}:{number}"
            yield where, partial(_document, row, fields, where, default_source)


def _hub_digest(source: str) -> str:
    """Content hashes of local files; of those on the Hub their addresses, which hold the revision."""
    import datasets

    name, config, split = _hub_address(source)
    with _asking_hub(source):
        files = datasets.load_dataset_builder(name, config).config.data_files[split]
        return hash_json([name, config, split, [hash_file(Path(f)) if Path(f).is_file() else f for f in files]])
