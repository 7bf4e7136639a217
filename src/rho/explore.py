"""Explore: any text as two language models see it, token by token. No corpus, no stage folder.

    a document     t0   t1   t2   t3        the tokens of the model
    what is read  ^t0   t1   t2   t3        ^ is what the model's texts begin with, so t0 has a loss too
    loss           l0   l1   l2   l3        and so has every other token, in windows where the text is longer
    ref_loss       r0   r1   r2   r3        mapped onto the model's tokens where the reference has others

Each document is ranked by itself. A comparison is the same text seen by a second pair of model and reference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rho.errors import ConfigError, DataError, MismatchError
from rho.models import ModelConfig, Precision, check_head, device, make_model, model_folder
from rho.objective import excess_loss, token_labels
from rho.progress import say, track
from rho.references.mapped import mapped, start_of_text
from rho.references.model import score_batch
from rho.references.scorer import Batch, Scorer, in_windows
from rho.rows import TokenRow
from rho.selection import Selector
from rho.sources import read_documents
from rho.tokenizer import Tokenizer, token_bytes

STDIN = "-"


class ExploreConfig(BaseModel):
    """Settings of an exploration.

    Attributes:
        ratio: share of each document's tokens that is selected by excess loss.
        context: tokens that a model reads at once, or fewer where it can't read as many; windows overlap by half.
        max_tokens: the text is cut here.
        precision: of the models' forward.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: float = Field(0.6, gt=0.0, le=1.0)
    context: int = Field(2048, ge=2)
    max_tokens: int = Field(10_000, ge=1)
    precision: Precision = "float32"


class Pair(NamedTuple):
    """A model and the reference that it is compared with: folders of rho or Transformers, or Hugging Face names."""

    model: str
    reference: str


def pairs_of(
    model: str, reference: str, against: str | None = None, against_reference: str | None = None
) -> list[Pair]:
    """One pair; two where there is a second model or reference, whose other half is then that of the first."""
    first, second = Pair(model, reference), Pair(against or model, against_reference or reference)
    return [first] if first == second else [first, second]


@dataclass(frozen=True)
class Text:
    """One document in tokens. `pieces` laid end to end are its text."""

    id: str
    source: str
    input_ids: np.ndarray  # (T,)
    num_bytes: np.ndarray  # (T,), of the UTF-8
    pieces: list[str]


class Seen(NamedTuple):
    """Tokens ranked together, T each: losses in nats, which of them take part, and which are selected."""

    loss_T: Tensor
    ref_loss_T: Tensor
    eligible_T: Tensor
    selected_T: Tensor


def explore(
    config: ExploreConfig,
    source: str,
    pairs: Sequence[Pair],
    text_field: str = "text",
    tokenizer: str | None = None,
) -> list[TokenRow]:
    """The rows of a text, those of one pair after those of the other.

    Args:
        config: how it is read.
        source: as `rho.sources.read_documents` takes it, or `-` for plain text on the standard input.
        pairs: what sees it. All losses stand at the tokens of the first model.
        text_field: the field of a record that holds the text.
        tokenizer: where the first model's tokenizer is, if not in its folder.

    Raises:
        DataError: no text there, or it can't be read.
        ConfigError: a model or tokenizer can't be loaded.
        MismatchError: a tokenizer with more tokens than a model has embeddings.
    """
    own = _own_tokenizer(pairs[0].model, tokenizer)
    texts = read_texts(source, own, config.max_tokens, text_field)
    paths = list(dict.fromkeys(path for pair in pairs for path in pair))
    with track("tokens", len(paths) * sum(len(text.pieces) for text in texts)) as advance:
        losses = {path: _losses(path, own, texts, config, advance) for path in paths}
    for model, reference in pairs:
        if all(torch.equal(a, b) for a, b in zip(losses[model], losses[reference], strict=True)):
            say(f"{model} and {reference} give every token the same loss: nothing sets them apart. Give two models.")
    names = _names(pairs)
    return [
        row
        for name, pair in zip(names, pairs, strict=True)
        for text, *two in zip(texts, *(losses[path] for path in pair), strict=True)
        for row in _rows(config, own, name, text, *two)
    ]


def token_rows(
    arm: str,
    seed: int | None,
    origins: Sequence[tuple[str, str]],
    pieces: Sequence[str],
    seen: Seen,
    labels: Sequence[str | None],
    block: int | None = None,
) -> list[TokenRow]:
    """The rows of tokens ranked together; a rank is the share of the others with a lower excess, ties by position."""
    excess = excess_loss(seen.loss_T, seen.ref_loss_T).masked_fill(~seen.eligible_T, torch.nan)
    scored = excess.isfinite()
    rank = torch.full_like(excess, torch.nan)
    order = excess[scored].argsort(stable=True).argsort()
    rank[scored] = order.float() / max(int(scored.sum()) - 1, 1)
    columns = (column.tolist() for column in (seen.loss_T, seen.ref_loss_T, excess, rank, seen.selected_T))
    found = zip(origins, pieces, *columns, labels, strict=True)
    return [
        TokenRow(
            arm, seed, origin[0], origin[1], position, text, loss, ref_loss, above, place, chosen, label, None, block
        )
        for position, (origin, text, loss, ref_loss, above, place, chosen, label) in enumerate(found)
    ]


def read_texts(source: str, tokenizer: Tokenizer, max_tokens: int, text_field: str = "text") -> list[Text]:
    """The documents of a source in tokens, up to `max_tokens` in all: what comes behind is left out, and said so."""
    texts: list[Text] = []
    room = max_tokens
    for name, origin, text in _documents(source, text_field):
        if room == 0:
            say(f"tokens: the first {max_tokens:,} tokens are shown; --max-tokens shows more")
            break
        part = text[: 512 * room]  # of a long text no more is tokenized than can be shown: no token is so long
        [(ids, ends)] = tokenizer.encode([part])
        if len(ids) == 0:
            continue
        if len(ids) > room or len(part) < len(text):
            say(f"tokens: a document is cut after {min(room, len(ids)):,} tokens; --max-tokens shows more")
        num_bytes, pieces = token_bytes(part, ends), _pieces(part, ends)
        texts.append(Text(name, origin, ids[:room], num_bytes[:room], pieces[:room]))
        room -= len(texts[-1].pieces)
    if not texts:
        raise DataError(f"{source}: expected some text, found no token in it. Give another text.")
    return texts


def _documents(source: str, text_field: str) -> Iterable[tuple[str, str, str]]:
    """(id, source, text) of each document."""
    if source != STDIN:
        return ((found.id, found.source, found.text) for _, found in read_documents([source], text_field))
    try:
        return [("standard input", "", sys.stdin.buffer.read().decode("utf-8-sig"))]
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input: expected UTF-8 text, found byte 0x{error.object[error.start]:02x} at {error.start}. "
            "Convert it."
        ) from error


def _pieces(text: str, ends: np.ndarray) -> list[str]:
    """The characters that each token stands for, from where those before it end; the last one's reach to the end."""
    reached = np.maximum.accumulate(ends)
    reached[-1] = len(text)
    return [text[start:stop] for start, stop in zip([0, *reached.tolist()], reached.tolist(), strict=False)]


def _rows(
    config: ExploreConfig, own: Tokenizer, name: str, text: Text, loss_T: Tensor, ref_loss_T: Tensor
) -> list[TokenRow]:
    selector = Selector("excess", config.ratio, "sequence")
    batch = _batch(text)
    labels_BT = token_labels(batch["input_ids"], batch["position_ids"], torch.tensor(own.special_ids))
    loss_BT, columns = loss_T[None], {"ref_loss": ref_loss_T[None]}
    eligible_BT = selector.eligible(labels_BT, columns) & loss_BT.isfinite() & ref_loss_T.isfinite()
    scores = selector.scores(loss_BT, columns, None, len(loss_T), 0)
    seen = Seen(loss_T, ref_loss_T, eligible_BT[0], selector.select([scores], eligible_BT)[0])
    size = len(text.pieces)
    return token_rows(name, None, [(text.id, text.source)] * size, text.pieces, seen, [None] * size)


def _batch(text: Text) -> Batch:
    """A document as a row that goes on after the start of the text, which stands at position 0."""
    size = len(text.input_ids)
    return {
        "input_ids": torch.from_numpy(text.input_ids.astype(np.int64))[None],
        "position_ids": torch.arange(1, size + 1)[None],
        "document": torch.zeros((1, size), dtype=torch.int64),
        "num_bytes": torch.from_numpy(text.num_bytes)[None],
    }


def _losses(
    path: str, own: Tokenizer, texts: Sequence[Text], config: ExploreConfig, advance: Callable[[int], None]
) -> list[Tensor]:
    """loss_T of every text, at the tokens of `own`."""
    scorer = _scorer(path, own, config)
    losses = []
    for text in texts:
        losses.append(scorer(_batch(text))["ref_loss"][0])
        advance(len(text.pieces))
    return losses


def _scorer(path: str, own: Tokenizer, config: ExploreConfig) -> Scorer:
    tokenizer = _tokenizer(path, own) or own
    model = make_model(ModelConfig(path=path), tokenizer.vocab_size, precision=config.precision)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise MismatchError(
            f"the vocabularies differ: {path} has {model.config.vocab_size} embeddings, its tokenizer has token ids up "
            f"to {tokenizer.vocab_size - 1}. Give a model together with the tokenizer that it was trained with."
        )
    check_head(model)
    model.to(device()).eval()
    context = min(config.context, getattr(model.config, "max_position_embeddings", None) or config.context)

    def scorer(batch: Batch) -> dict[str, Tensor]:
        return {"ref_loss": score_batch(model, batch)[0].cpu()}

    windows = in_windows(scorer, context, context // 2)
    if tokenizer.fingerprint != own.fingerprint:
        return mapped(windows, own, tokenizer, isolated=False)
    return _after(start_of_text(own), windows)


def _after(start_id: int, scorer: Scorer) -> Scorer:
    """The scorer, with the start of a text before each row."""

    def scored(batch: Batch) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        read = torch.cat([torch.full((len(ids), 1), start_id), ids], 1)
        positions = torch.arange(read.shape[1]).expand_as(read)
        columns = scorer({"input_ids": read, "position_ids": positions})
        return {name: column[:, -ids.shape[1] :] for name, column in columns.items()}

    return scored


def _own_tokenizer(path: str, tokenizer: str | None) -> Tokenizer:
    if tokenizer is not None:
        return Tokenizer.load(tokenizer)
    if (found := _tokenizer(path)) is None:
        raise ConfigError(f"{path}: comes without a tokenizer. Say with --tokenizer where the model's tokenizer is.")
    return found


def _tokenizer(path: str, own: Tokenizer | None = None) -> Tokenizer | None:
    """The tokenizer that comes with a model (with a checkpoint: that its training left); None if there is none.

    Where it has the end token of `own` it gets that one too, so that equal tokenizers are known to be equal.
    """
    folder = Path(model_folder(path))
    if folder.is_dir():
        places = [folder, folder.parent.parent / "model"] if folder.parent.name == "checkpoints" else [folder]
        places = [place for place in places if any(place.glob("tokenizer*"))]
        if not places:
            return None
        path = str(places[0])
    if own is not None:
        try:
            return Tokenizer.load(path, own.eos)
        except ConfigError:
            pass  # it has another
    return Tokenizer.load(path)


def _names(pairs: Sequence[Pair]) -> list[str]:
    """What sets the pairs apart, in short; the last parts of paths where that is enough."""
    parts = [Path(path).parts for pair in pairs for path in pair]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    short = {path: "/".join(Path(path).parts[-depth:]) for pair in pairs for path in pair}
    return [f"{short[model]} against {short[reference]}" for model, reference in pairs]
