"""The tokenizer of a corpus: loaded from Hugging Face files, or a byte-level BPE trained here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rho.errors import ConfigError, DataError, check_path_or_name, unless_here
from rho.progress import Advance, say, track
from rho.runs import Manifest, hash_json, open_stage
from rho.sources import SkippedRecord, TextField, read_documents, source_hashes

EOS = "<|endoftext|>"
KNOWN_EOS = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with what a corpus needs to know of it.

    Attributes:
        backend: the `tokenizers` object.
        eos: the token that ends a document.
        chat_template: Jinja template of a chat, where it comes with one.
        bos: the token that begins a text in that template, empty without.
    """

    backend: tokenizers.Tokenizer
    eos: str
    chat_template: str | None = None
    bos: str = ""

    @classmethod
    def load(cls, path: str | os.PathLike[str], eos: str | None = None) -> Tokenizer:
        """Load a `tokenizer.json`, a folder (of a tokenizer or model, or of a stage), or a Hugging Face name.

        Args:
            path: where it is.
            eos: the end-of-document token, for a bare tokenizer.json with an unusual one.

        Raises:
            ConfigError: nothing loadable there, or no end-of-document token known.
        """
        file = Path(path)
        stages = (file, file / "model", file / "tokenizer")  # where rho's own folders hold it
        folder = next((folder for folder in stages if (folder / "tokenizer.json").is_file()), None)
        named: dict[str, str] = {}
        if file.is_file():
            backend = _from_file(file)
        elif folder is not None:  # the file itself, not what a model's tokenizer class makes of it
            backend, named = _from_file(folder / "tokenizer.json"), _named(folder)
        else:
            backend, named = _from_pretrained(str(path))
        backend.no_truncation()  # some files carry the settings of somebody's last batch
        backend.no_padding()
        known = (named["eos_token"],) if "eos_token" in named else ()
        for token in (eos,) if eos else (*known, *KNOWN_EOS):
            if backend.token_to_id(token) is not None:
                backend.add_special_tokens([token])  # it keeps its id; saving would do so too
                special = {added.content for added in backend.get_added_tokens_decoder().values() if added.special}
                bos = named.get("bos_token", "")
                return cls(backend, token, named.get("chat_template"), bos if bos in special else "")
        known_eos = ", ".join(KNOWN_EOS)
        raise ConfigError(
            f"{path}: no end-of-document token: its vocabulary has {f'no {eos}' if eos else 'none of ' + known_eos}. "
            "Name one that it has with --eos (tokenizer.eos in a config)."
        )

    @property
    def eos_id(self) -> int:
        """Id of the end-of-document token."""
        found = self.backend.token_to_id(self.eos)
        assert found is not None, "load() made sure"
        return found

    @property
    def special_ids(self) -> list[int]:
        """Ids that stand for no text: never eligible for selection."""
        added = self.backend.get_added_tokens_decoder()
        return sorted({self.eos_id, *(i for i, token in added.items() if token.special)})

    @property
    def vocab_size(self) -> int:
        """Number of rows an embedding needs: the largest id + 1."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Content hash of what makes ids of text; what decodes, or adds special tokens around a text, is no part."""
        parts = json.loads(self.backend.to_str())
        return hash_json([parts["normalizer"], parts["pre_tokenizer"], parts["model"], parts["added_tokens"], self.eos])

    def encode(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text: ids_T (int32) and end_T, the character at which each token ends. No special tokens."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [(np.asarray(e.ids, np.int32), np.asarray(e.offsets, np.int64).reshape(-1, 2)[:, 1]) for e in encodings]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each single token (a token that holds a part of a character shows as U+FFFD)."""
        return [self.backend.decode([int(i)], skip_special_tokens=False) for i in ids]

    def save(self, folder: Path) -> None:
        """Write Hugging Face tokenizer files that `AutoTokenizer.from_pretrained` reads."""
        from transformers import PreTrainedTokenizerFast

        folder.mkdir(parents=True, exist_ok=True)
        named = {"bos_token": self.bos} if self.bos else {}
        made = PreTrainedTokenizerFast(tokenizer_object=self.backend, eos_token=self.eos, **named)
        made.chat_template = self.chat_template
        made.save_pretrained(folder)


def token_bytes(text: str, ends: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of text that each token stands for; they add up to the bytes of the text.

    Args:
        text: the document.
        ends: the character at which each of its tokens ends. Where several tokens share one character, the first
            gets its bytes; what lies behind the last token's end goes to the last token.
    """
    if text.isascii():
        position = np.arange(len(text) + 1)
    else:
        code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        position = np.concatenate([[0], np.cumsum(1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000))])
    reached = np.maximum.accumulate(ends)
    reached[-1] = len(text)
    return np.diff(position[reached], prepend=0).astype(np.int32)


def _from_file(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise ConfigError(f"{file}: not a tokenizer.json ({error}).") from error


def _named(folder: Path) -> dict[str, str]:
    """What the files of a tokenizer beside its tokenizer.json name: eos_token, bos_token, chat_template."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_bytes())
        found = dict(found) if isinstance(found, dict) else {}
    except (OSError, ValueError):
        found = {}
    template = folder / "chat_template.jinja"
    if template.is_file():
        found["chat_template"] = template.read_text(encoding="utf-8")
    return _strings(found)


def _strings(found: dict[str, Any]) -> dict[str, str]:
    """Tokens and template as text, in whatever form a config has them; those that are there."""
    named = {}
    for name in ("eos_token", "bos_token", "chat_template"):
        value = found.get(name)
        if isinstance(value, list):  # several templates, the older form
            value = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        if isinstance(value, dict):
            value = value.get("content", value.get("default"))
        if isinstance(value, str):
            named[name] = value
    return named


def _from_pretrained(name: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    from transformers import AutoTokenizer

    check_path_or_name(name)
    try:
        loaded: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{name}: no tokenizer could be loaded from here ({str(error).splitlines()[0]})." + unless_here(name)
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"{name}: a slow tokenizer without character offsets. A tokenizer.json is needed.")
    return backend, _strings({n: getattr(loaded, n, None) for n in ("eos_token", "bos_token", "chat_template")})


def train_tokenizer(
    sources: Sequence[str],
    vocab_size: int,
    out: str | os.PathLike[str],
    text_fields: Sequence[TextField] = ("text",),
    max_characters: int = 20_000_000,
    skip_bad_records: bool = False,
) -> Manifest:
    """Train a byte-level BPE on (the first `max_characters` of) some text and write it to the stage folder `out`.

    Args:
        sources: as `rho.sources.read_documents` takes them; each gives an equal share of the characters.
        vocab_size: tokens in the vocabulary.
        out: the stage folder.
        text_fields: `text_field` of each source, or one for all.
        max_characters: read of all sources together.
        skip_bad_records: pass over unreadable records.

    Raises:
        ConfigError: the vocabulary is smaller than the bytes and the end token.
        DataError: a source or record can't be read, or there is too little text for the vocabulary.
    """
    least = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocab_size < least:
        raise ConfigError(
            f"a vocabulary of {vocab_size}: expected {least} or more, one for each byte and one for a document's end."
        )
    fields = list(text_fields) * (len(sources) if len(text_fields) == 1 else 1)
    config = {
        "sources": [list(pair) for pair in zip(sources, fields, strict=True)],
        "vocab_size": vocab_size,
        "max_characters": max_characters,
        "skip_bad_records": skip_bad_records,
    }
    skipped: list[SkippedRecord] = []
    on_bad = skipped.append if skip_bad_records else None
    with open_stage(out, "tokenizer", config, source_hashes(sources)) as stage:
        if stage.fresh:
            return stage.manifest
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        with track("tokenizer", None, unit="characters") as advance:
            share = max_characters // len(sources)  # so that a large source does not crowd out the others
            texts = (
                text
                for source, field in zip(sources, fields, strict=True)
                for text in _texts(source, field, on_bad, share, advance)
            )
            backend.train_from_iterator(texts, trainer)
        tokenizer = Tokenizer(backend, EOS)
        if tokenizer.vocab_size != vocab_size:
            raise DataError(
                f"{', '.join(sources)}: too little text for a vocabulary of {vocab_size} "
                f"(reached {tokenizer.vocab_size}). Ask for a smaller vocabulary or give more text."
            )
        tokenizer.save(stage.folder / "tokenizer")
        stage.add_folder("tokenizer")
        for record in skipped:
            say(f"tokenizer: passed over {record.where} ({record.reason})")
        return stage.finish(fingerprint=tokenizer.fingerprint, skipped_records=len(skipped))


def _texts(
    source: str,
    text_field: TextField,
    on_bad: Callable[[SkippedRecord], None] | None,
    characters: int,
    advance: Advance,
) -> Iterable[str]:
    for _, document in read_documents([source], text_field, on_bad):
        yield document.text
        advance(len(document.text))
        characters -= len(document.text)
        if characters <= 0:
            break
