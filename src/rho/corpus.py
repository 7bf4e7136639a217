"""Text -> packed token blocks: Parquet shards that a model trains on and a reference scores.

    documents   [a a a a a] [b b] [c c c c c c c]
    stream       a a a a a  |  b b |  c c c c c c c |        | = end-of-document token
    blocks      [a a a a a |] [b b | c c c] [c c c c | ...]  block_length 6

In `packed` corpora (the paper's way) attention runs over the whole block, so position_ids are 0 1 2 3 4 5. In
`isolated` ones they start again at each document, which cuts attention at the boundary, and a document's first token
has no loss. A document that reaches into the next block goes on there as if new.

Of conversations (`rho.conversations`) the answers alone are trained on; they are isolated, and kept whole:

    blocks      [q q a a | p] [q a a | p p]                  q prompt, a answer, p padding
    loss_mask    0 0 1 1 1 0   0 1 1 1 0 0
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rho.conversations import loss_mask, with_template
from rho.corpus_config import CorpusConfig, SourceConfig
from rho.errors import DataError, MismatchError
from rho.objective import token_labels
from rho.progress import Advance, say, track
from rho.runs import Manifest, Stage, atomic_write, hash_file, hash_json, open_stage, write_json
from rho.sources import Document, Fields, SkippedRecord, read_documents, source_hashes
from rho.store import Shards, write_shard
from rho.tokenizer import Tokenizer, token_bytes

BATCH_CHARACTERS = 1 << 18  # text tokenized at once
SPLITS = ("train", "validation")
TOKEN_COLUMNS = ("input_ids", "document", "num_bytes", "label")
LOSS_MASK = "loss_mask"
PADDING = "padding"  # id and source of what fills a block
NO_LABEL = -1
MAX_LABELS = 127  # int8
NOTHING_YET = {"documents": 0, "empty_documents": 0, "tokens": 0, "bytes": 0, "blocks": 0, "dropped_tokens": 0}
NOTHING_YET |= {"padding_tokens": 0}


def build_corpus(config: CorpusConfig, tokenizer: Tokenizer, out: str | os.PathLike[str]) -> Manifest:
    """Tokenize and pack documents into the stage folder `out`: `train-*.parquet`, `validation-*.parquet`, tokenizer.

    Columns, one row a block: `input_ids`; token-aligned `document` (its number), `num_bytes` (UTF-8 bytes of text that
    the token stands for) and `label` (index into the manifest's label names, -1 without); of conversations `loss_mask`
    (whether it is trained on); and for the documents in the block, in order, `document_id` and `source`. An interrupted
    run continues after its last shard.

    Raises:
        DataError: unreadable input (see `rho.sources`), less text than one block, or a conversation that is longer.
        ConfigError: a chat template that does not say which part of a chat is the answer.
    """
    inputs = {"tokenizer": tokenizer.fingerprint, **source_hashes([part.source for part in config.parts])}
    if config.messages_field is not None:
        tokenizer = with_template(tokenizer)
        inputs["chat_template"] = hash_json([tokenizer.chat_template, tokenizer.bos])
    with open_stage(out, "corpus", config.settings, inputs) as stage:
        if stage.fresh:
            return stage.manifest
        build = _Build(config, stage)
        build.load_progress()
        build.run(tokenizer)
        tokenizer.save(stage.folder / "tokenizer")
        stage.add_folder("tokenizer")
        for shard in build.shards:
            stage.add_output(shard["file"], shard["sha256"])
        if build.skipped:
            write_json(stage.folder / "skipped.json", build.skipped)
            stage.add_output("skipped.json")
            say(f"corpus {stage.folder.name}: {len(build.skipped)} records passed over, in {stage.folder}/skipped.json")
        build.progress_file.unlink(missing_ok=True)
        return stage.finish(
            shards=build.shards,
            splits=build.counts,
            labels=build.labels,
            skipped_records=len(build.skipped),
            vocab_size=tokenizer.vocab_size,
            special_ids=tokenizer.special_ids,
        )


@dataclass
class _Build:
    """A corpus being built. All but `config` and `stage` is what a rerun needs to go on after the last shard."""

    config: CorpusConfig
    stage: Stage
    shards: list[dict[str, Any]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=lambda: {split: dict(NOTHING_YET) for split in SPLITS})
    part: int = 0  # the source that is being read,
    before: int = 0  # the tokens of those before it,
    records: int = 0  # and its records read
    documents: int = 0  # documents so far; the next one's number
    # What does not fill a shard yet: token columns, and (number, id, source) of the documents they come from.
    rest: dict[str, dict[str, list[np.ndarray]]] = field(
        default_factory=lambda: {split: {c: [] for c in (*TOKEN_COLUMNS, LOSS_MASK)} for split in SPLITS}
    )
    names: dict[str, list[list[Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    SAVED = ("shards", "labels", "skipped", "counts", "part", "before", "records", "documents", "names")

    @property
    def progress_file(self) -> Path:
        return self.stage.folder / "progress.npz"

    def load_progress(self) -> None:
        """Take up the state after the last shard of an interrupted run, if there is one."""
        if not self.progress_file.is_file():
            return
        with np.load(self.progress_file, allow_pickle=False) as saved:
            for name, value in json.loads(bytes(saved["state"])).items():
                setattr(self, name, value)
            self.rest = {split: {c: [saved[f"{split}.{c}"]] for c in self.token_columns} for split in SPLITS}

    @property
    def token_columns(self) -> tuple[str, ...]:
        return (*TOKEN_COLUMNS, LOSS_MASK) if self.config.conversations else TOKEN_COLUMNS

    def save_progress(self) -> None:
        state = np.frombuffer(json.dumps({name: getattr(self, name) for name in self.SAVED}).encode(), np.uint8)
        arrays = {f"{split}.{c}": _join(self.rest[split][c]) for split in SPLITS for c in self.token_columns}
        with atomic_write(self.progress_file) as file:
            np.savez(file, allow_pickle=False, state=state, **arrays)

    def run(self, tokenizer: Tokenizer) -> None:
        """Read, tokenize and pack everything that is left, committing shard after shard."""
        with track(f"corpus {self.stage.folder.name}", self.config.max_tokens, self.tokens()) as advance:
            for part in self.config.parts[self.part :]:
                self.read(part, tokenizer, advance)
                self.part, self.before, self.records = self.part + 1, self.tokens(), 0
        for split in SPLITS if self.config.conversations else ():
            self.fill(split, tokenizer.eos_id)
        self.write_shards(1)
        for split in SPLITS:
            self.counts[split]["dropped_tokens"] = self.waiting(split)
        if not self.shards:
            names = ", ".join(part.source for part in self.config.parts)
            raise DataError(
                f"{names}: {self.tokens()} tokens in {self.documents} documents are "
                f"shorter than one block of {self.config.block_length}. Give more text or a smaller --block-length"
                + (f", or look at only_sources ({', '.join(only)})." if (only := self.config.only_sources) else ".")
            )

    def read(self, part: SourceConfig, tokenizer: Tokenizer, advance: Advance) -> None:
        """Read what is left of one source."""
        fields = self.config.fields(tokenizer, part.text_field)
        for last_record, batch in () if self.full(part) else self.batches(part, fields):
            before = self.tokens()
            for document, (ids, ends) in zip(batch, tokenizer.encode([d.text for d in batch]), strict=True):
                if not self.full(part):
                    self.add(document, ids, ends, tokenizer.eos_id)
            self.records = last_record + 1
            advance(self.tokens() - before)
            if self.write_shards(self.config.shard_blocks):
                self.save_progress()
            if self.full(part):
                break

    def tokens(self) -> int:
        return sum(count["tokens"] for count in self.counts.values())

    def full(self, part: SourceConfig) -> bool:
        """Whether there is enough of this source, or of all."""
        limits = ((self.config.max_tokens, self.tokens()), (part.max_tokens, self.tokens() - self.before))
        return any(limit is not None and tokens >= limit for limit, tokens in limits)

    def batches(self, part: SourceConfig, fields: Fields) -> Iterator[tuple[int, list[Document]]]:
        """Documents of a source in batches of about `BATCH_CHARACTERS`, each with the number of its last record."""
        on_bad = self.skip if self.config.skip_bad_records else None
        batch: list[Document] = []
        characters = number = 0
        for number, document in read_documents([part.source], fields, on_bad, self.records):
            if not self.is_wanted(document):
                continue
            batch.append(document)
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS:
                yield number, batch
                batch, characters = [], 0
        if batch:
            yield number, batch

    def is_wanted(self, document: Document) -> bool:
        only = self.config.only_sources
        return only is None or any(fnmatchcase(document.source, pattern) for pattern in only)

    def skip(self, record: SkippedRecord) -> None:
        self.skipped.append({"where": record.where, "reason": record.reason})

    def add(self, document: Document, ids: np.ndarray, ends: np.ndarray, eos_id: int) -> None:
        """Append one document and its end token to its split."""
        split = "validation" if self.is_heldout(document.text) else "train"
        count = self.counts[split]
        if len(ids) == 0:
            count["empty_documents"] += 1
            return
        columns = {
            "input_ids": np.append(ids, np.int32(eos_id)),
            "num_bytes": np.append(token_bytes(document.text, ends), np.int32(0)),
            "label": np.append(self.token_labels(document, ends), np.int32(NO_LABEL)),
        }
        if self.config.conversations:
            try:
                columns[LOSS_MASK] = self.whole_answers(document, ends)
            except ValueError as error:
                if not self.config.skip_bad_records:
                    raise DataError(f"{document.where}: {error}, or pass it over with --skip-bad-records.") from error
                self.skip(SkippedRecord(document.where, str(error)))
                return
            if len(ids) + 1 > self.room(split):
                self.fill(split, eos_id)
        self.append(split, columns, document.id, document.source)
        count["documents"] += 1
        count["tokens"] += len(ids) + 1
        count["bytes"] += int(columns["num_bytes"].sum())

    def whole_answers(self, document: Document, ends: np.ndarray) -> np.ndarray:
        """The loss mask of a conversation, which must fit into a block: cut, an answer would lose its question."""
        if len(ends) + 1 > self.config.block_length:
            raise ValueError(
                f"expected a conversation of at most the {self.config.block_length} tokens of a block, found "
                f"{len(ends) + 1}. Ask for longer blocks with --block-length"
            )
        return loss_mask(document, ends)

    def room(self, split: str) -> int:
        """Tokens that the block begun has room for."""
        begun = self.counts[split]["tokens"] + self.counts[split]["padding_tokens"]
        return -begun % self.config.block_length

    def fill(self, split: str, eos_id: int) -> None:
        """Complete the block begun, with end tokens that are a document of their own and not trained on."""
        room = self.room(split)
        if room:
            values = {"input_ids": eos_id, "num_bytes": 0, "label": NO_LABEL, LOSS_MASK: False}
            columns = {name: np.full(room, value, np.int32) for name, value in values.items()}
            self.append(split, columns, PADDING, PADDING)
            self.counts[split]["padding_tokens"] += room

    def append(self, split: str, columns: dict[str, np.ndarray], name: str, source: str) -> None:
        """Append the tokens of a document."""
        columns["document"] = np.full(len(columns["input_ids"]), self.documents, np.int32)
        for column, values in columns.items():
            self.rest[split][column].append(values)
        self.names[split].append([self.documents, name, source])
        self.documents += 1

    def is_heldout(self, text: str) -> bool:
        """By content: copies of a document fall on the same side."""
        digest = blake2b(f"{self.config.seed}\n{text}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.config.heldout_fraction * 2**64

    def token_labels(self, document: Document, ends: np.ndarray) -> np.ndarray:
        """The label of each token: that of the shortest span which holds its last character."""
        spans = [span for span in document.spans or () if span[1] > span[0]]
        if not spans:
            return np.full(len(ends), NO_LABEL, np.int32)
        for _, _, label in spans:
            if label not in self.labels:
                self.labels.append(label)
        if len(self.labels) > MAX_LABELS:
            raise DataError(f"{document.where}: expected at most {MAX_LABELS} different span labels, found more.")
        label_of = np.full(len(document.text) + 1, NO_LABEL, np.int32)  # of each character; none of what ends at 0
        for start, end, label in sorted(spans, key=lambda span: span[0] - span[1]):  # inner ones over outer ones
            label_of[start + 1 : end + 1] = self.labels.index(label)
        return label_of[ends]

    def waiting(self, split: str) -> int:
        return sum(len(part) for part in self.rest[split]["input_ids"])

    def write_shards(self, at_least: int) -> bool:
        """Write shards of up to `shard_blocks` blocks while `at_least` blocks are waiting."""
        written = False
        for split in SPLITS:
            while (blocks := self.waiting(split) // self.config.block_length) >= at_least:
                self.write_shard(split, min(blocks, self.config.shard_blocks))
                written = True
        return written

    def write_shard(self, split: str, blocks: int) -> None:
        tokens = {name: _join(self.rest[split][name]) for name in self.token_columns}
        size = blocks * self.config.block_length
        rows = {name: values[:size].reshape(blocks, -1) for name, values in tokens.items()}
        names = {number: (name, source) for number, name, source in self.names[split]}
        in_block = [[names[number] for number in dict.fromkeys(row.tolist())] for row in rows["document"]]
        number = sum(shard["split"] == split for shard in self.shards)
        file = f"{split}-{number:05d}.parquet"
        write_shard(
            self.stage.folder / file,
            {
                **rows,
                "label": rows["label"].astype(np.int8),
                **({LOSS_MASK: rows[LOSS_MASK].astype(bool)} if LOSS_MASK in rows else {}),
                "document_id": [np.array([name for name, _ in block], dtype=object) for block in in_block],
                "source": [np.array([source for _, source in block], dtype=object) for block in in_block],
            },
        )
        sha256 = hash_file(self.stage.folder / file)
        self.shards.append({"file": file, "split": split, "rows": blocks, "sha256": sha256})
        self.counts[split]["blocks"] += blocks
        self.rest[split] = {name: [values[size:]] for name, values in tokens.items()}
        left = set(self.rest[split]["document"][0].tolist())
        self.names[split] = [entry for entry in self.names[split] if entry[0] in left]


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


class Corpus(Shards):
    """One split of a corpus folder, row by row, ready for a model."""

    def __init__(self, folder: str | os.PathLike[str], split: str = "train") -> None:
        super().__init__(folder, split, "corpus")
        facts = self.manifest.facts
        self.vocab_size: int = facts["vocab_size"]
        self.labels: list[str] = facts["labels"]
        made = self.manifest.config
        self.conversations: bool = any(made.get(name) for name in ("completion_field", "messages_field"))
        self.isolated: bool = made["isolated"] or self.conversations
        self.block_length: int = made["block_length"]
        self.special_ids = torch.tensor(facts["special_ids"])
        if not self.shards:
            raise DataError(
                f"{self.folder}: the {split} split is empty. For held-out text build the corpus with a "
                "--heldout-fraction above 0 (1.0 for a set that is only evaluated)."
            )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with."""
        return Tokenizer.load(self.folder / "tokenizer")

    @property
    def fingerprint(self) -> str:
        """Content hash of the corpus."""
        return self.manifest.fingerprint

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns that `inputs` needs of a row."""
        return ("input_ids", "document", LOSS_MASK) if self.conversations else ("input_ids", "document")

    def inputs(self, row: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """What a model reads of one row: input_ids_T, position_ids_T and labels_T (`token_labels`).

        Of conversations the answers alone have labels, with the end token of an answer.
        """
        input_ids = torch.from_numpy(row["input_ids"].astype(np.int64))
        position_ids = torch.from_numpy(positions(row["document"], self.isolated))
        if self.conversations:
            labels = token_labels(input_ids, position_ids, ignore=torch.from_numpy(~row[LOSS_MASK]))
        else:
            labels = token_labels(input_ids, position_ids, self.special_ids)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}

    @staticmethod
    def origins(row: dict[str, np.ndarray]) -> list[tuple[str, str]]:
        """(document id, source) of each token of a row with the columns document, document_id and source."""
        place = {number: n for n, number in enumerate(dict.fromkeys(row["document"].tolist()))}
        named = list(zip(map(str, row["document_id"]), map(str, row["source"]), strict=True))
        return [named[place[number]] for number in row["document"].tolist()]

    def describe(self, block: int) -> str:
        """Where a block's text comes from, for messages."""
        names = ", ".join(dict.fromkeys(self.row(block, ("document_id",))["document_id"].tolist()))
        return f"block {block} of {self.folder / self.locate(block)[0]['file']} (documents {names})"

    def check_model(
        self, config: Any, name: str, context: int | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        """Refuse a model that can't read the corpus: too few embeddings, or positions, for it; both sides are named.

        Args:
            config: the model's Transformers config.
            name: of the model, for the message.
            context: tokens that it reads at once; a block, if not given.
            tokenizer: the model's own, where it reads the text in other tokens.
        """
        length, vocab_size = context or self.block_length, (tokenizer or self).vocab_size
        if config.vocab_size < vocab_size:
            what = self.folder if tokenizer is None else "the reference's tokenizer"
            raise MismatchError(
                f"the vocabularies differ: {what} has token ids up to {vocab_size - 1}, model {name} has "
                f"{config.vocab_size} embeddings. Use the model's own tokenizer, or a model with this one."
            )
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and most < length:
            raise MismatchError(
                f"{self.folder}: expected a model that reads {length} tokens at once, {name} reads at most {most}. "
                "Build the corpus with a smaller --block-length, take another model, or (a reference only) have it "
                f"read in windows with --context {most}."
            )


def positions(document_T: np.ndarray, isolated: bool) -> np.ndarray:
    """position_ids_T (int64): 0, 1, 2 ... over the block, or from the start of each document where isolated."""
    index = np.arange(len(document_T))
    if not isolated:
        return index
    first = np.diff(document_T, prepend=-1) != 0
    return index - np.maximum.accumulate(np.where(first, index, 0))
