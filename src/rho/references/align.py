"""The losses of a reference with another tokenizer, mapped onto the model's tokens.

    text          T  h  e  _  c  a  t  s  _  s  a  t      bytes; _ is a space
    reference   |  0.9   |  2.0   | 0.4 |    1.5    |     losses of "The" "_ca" "ts" "_sat"
    cuts        ^        ^              ^           ^     where both have a boundary
    model       | 0.6 |.3|     2.4      |    1.5    |     mapped onto "Th" "e" "_cats" "_sat"

Between two neighbouring cuts lies a group: the sum of its reference losses is given out to its model tokens in
proportion to the bytes that each covers. So the loss of the text between any two cuts is the same under both
tokenizations. Equal tokenizations are mapped token by token: the identity.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import numpy as np

from rho.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how a tokenizer with byte fallback writes a single byte


def map_losses(ref_loss_M: np.ndarray, ref_spans_M2: np.ndarray, spans_T2: np.ndarray) -> np.ndarray:
    """The reference's loss of each of the model's tokens: every group's sum, shared out (see the module).

    What real tokenizers do besides, and what comes of it:

        gap          [cat]_ _[sat]    covered by no token: counts to the token behind it, at the text's end to the last
        overlap      [F0 9F][99 82]   byte pieces of one character all have its span: they stay in one group
        zero width   [] The []        an added special, a dropped character: stands where it comes in the order

    Zero-width tokens at a cut are a group of their own, with equal shares, if both sides have some there. Else they
    belong to the group behind (the last ones to the last): the reference's give their loss to it, the model's get 0.
    In a group with the same spans on both sides each loss, NaN as well, goes to the token with its span.

    Args:
        ref_loss_M: nats; NaN where a reference token has no score: all model tokens of its group then get NaN. Only a
            zero-width one that no zero-width model token answers is passed over: it is no text's.
        ref_spans_M2: start and end of the reference's tokens, in order, in bytes (or characters) of the text.
        spans_T2: those of the model's tokens, in the same unit.

    Returns:
        loss_T, float32. All NaN where the reference has no token at all.

    Raises:
        ValueError: the reference's losses and spans differ in number, or a span is negative or ends before it starts.
    """
    ref_loss_M = np.asarray(ref_loss_M, np.float64)
    ref_spans_M2, spans_T2 = _checked(ref_spans_M2), _checked(spans_T2)
    if ref_loss_M.shape != ref_spans_M2.shape[:1]:
        raise ValueError(f"found {ref_loss_M.shape} losses for {len(ref_spans_M2)} spans of the reference's tokens")
    if len(ref_spans_M2) == 0 or len(spans_T2) == 0:
        return np.full(len(spans_T2), np.nan, np.float32)
    length = int(max(ref_spans_M2.max(), spans_T2.max()))
    ref_spans_M2, spans_T2 = _tiled(ref_spans_M2, length), _tiled(spans_T2, length)
    cuts = np.intersect1d(_boundaries(ref_spans_M2), _boundaries(spans_T2))
    at_cut_M, at_cut_T = _groups(ref_spans_M2, cuts), _groups(spans_T2, cuts)
    group_M, alone_M = _joined(at_cut_M, at_cut_T, len(cuts))
    group_T, _ = _joined(at_cut_T, at_cut_M, len(cuts))
    ref_loss_M = np.where(alone_M & np.isnan(ref_loss_M), 0.0, ref_loss_M)  # no text, no loss: an added first token

    loss_T = np.bincount(group_M, ref_loss_M, minlength=2 * len(cuts))[group_T] * _shares(spans_T2, group_T)
    partner_T = _partners(ref_spans_M2, group_M, spans_T2, group_T)
    return np.where(partner_T >= 0, ref_loss_M[partner_T], loss_T).astype(np.float32)


def _checked(spans_N2: np.ndarray) -> np.ndarray:
    spans_N2 = np.asarray(spans_N2, np.int64).reshape(-1, 2)
    bad = (spans_N2[:, 0] < 0) | (spans_N2[:, 1] < spans_N2[:, 0])
    if bad.any():
        token = int(bad.argmax())
        raise ValueError(f"expected spans with 0 <= start <= end, found {spans_N2[token].tolist()} at token {token}")
    return spans_N2


def _tiled(spans_N2: np.ndarray, length: int) -> np.ndarray:
    """The spans without gaps, all of [0, length): a token starts where those before it ended, or sooner.

    [cat]_ _[sat]_  ->  [cat][_ _sat_]. A zero-width token goes where those before it ended, whatever its offset says
    (added specials have 0). Tokens that all stand for no text share all of it.
    """
    start, end = spans_N2.T
    wide = end > start
    if not wide.any():
        return np.tile([0, length], (len(spans_N2), 1))
    end = np.where(wide, end, 0)
    end[np.flatnonzero(wide)[-1]] = length
    before = np.concatenate([[0], np.maximum.accumulate(end)[:-1]])
    return np.stack([np.where(wide, np.minimum(start, before), before), np.where(wide, end, before)], axis=1)


def _boundaries(spans_N2: np.ndarray) -> np.ndarray:
    """Places of a tiled text that no token straddles: where some token ends, later than all before it, and none of
    those behind it starts sooner."""
    reached = np.maximum.accumulate(spans_N2[:, 1])
    first_start = np.minimum.accumulate(spans_N2[::-1, 0])[::-1]  # of a token and all behind it
    behind = np.append(first_start[1:], reached[-1])
    return np.append(0, reached[behind >= reached])


def _groups(spans_N2: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Group of each token: 2k of the zero-width ones at cut k, 2k + 1 between the cuts k and k + 1."""
    start, end = spans_N2.T
    cut_N = np.searchsorted(cuts, start, side="right") - 1
    return 2 * cut_N + ((end > start) | (start > cuts[cut_N]))


def _joined(group_N: np.ndarray, others: np.ndarray, num_cuts: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups in which zero-width tokens that the other side doesn't answer have joined a neighbour; which these are."""
    alone = (group_N % 2 == 0) & ~np.isin(group_N, others)
    return np.where(alone, np.minimum(group_N + 1, 2 * num_cuts - 3), group_N), alone


def _shares(spans_T2: np.ndarray, group_T: np.ndarray) -> np.ndarray:
    """Each token's part of its group's bytes; equal parts where the group has no bytes."""
    width_T = (spans_T2[:, 1] - spans_T2[:, 0]).astype(np.float64)
    width_T[np.bincount(group_T, width_T)[group_T] == 0] = 1.0
    return width_T / np.bincount(group_T, width_T)[group_T]


def _partners(ref_spans_M2: np.ndarray, group_M: np.ndarray, spans_T2: np.ndarray, group_T: np.ndarray) -> np.ndarray:
    """In groups with the same spans on both sides, the reference token of each model token; else -1."""
    size = int(max(group_M.max(), group_T.max())) + 1
    order_M, order_T = np.argsort(group_M, kind="stable"), np.argsort(group_T, kind="stable")
    count_M, count_T = np.bincount(group_M, minlength=size), np.bincount(group_T, minlength=size)
    group = group_T[order_T]
    rank = np.arange(len(group)) - (np.cumsum(count_T) - count_T)[group]
    candidate = order_M[np.minimum((np.cumsum(count_M) - count_M)[group] + rank, len(order_M) - 1)]
    same = (ref_spans_M2[candidate] == spans_T2[order_T]).all(axis=1)
    matched = (np.bincount(group, same, minlength=size) == count_T) & (count_M == count_T)
    partner_T = np.empty(len(group), np.int64)
    partner_T[order_T] = np.where(matched[group], candidate, -1)
    return partner_T


def byte_spans(tokenizer: Tokenizer, text: str, ended: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A text's ids_T (int32, no special tokens added) and the bytes of its UTF-8 that each stands for, spans_T2.

    Exact with a byte-level tokenizer that changes nothing in the text. Others know characters only: tokens that share
    one all have its span. With `ended` the document ends here, and the tokenizer's end token follows.
    """
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids_T = np.asarray(encoding.ids, np.int32)
    raw = text.encode()
    pieces = spelled(tokenizer, encoding.ids) if _is_byte_level(tokenizer) else []
    if b"".join(pieces) == raw:
        spans_T2 = _laid_end_to_end(pieces)
    else:
        starts = np.flatnonzero((np.frombuffer(raw, np.uint8) & 0xC0) != 0x80)  # bytes that start a character
        spans_T2 = np.append(starts, len(raw))[np.asarray(encoding.offsets, np.int64).reshape(-1, 2)]
    if ended:
        ids_T = np.append(ids_T, np.int32(tokenizer.eos_id))
        spans_T2 = np.concatenate([spans_T2, [[len(raw)] * 2]])
    return ids_T, spans_T2


def recover_text(tokenizer: Tokenizer, ids_T: np.ndarray, num_bytes_T: np.ndarray) -> tuple[str, np.ndarray]:
    """The text of a document's stretch in a block, and the bytes of its UTF-8 that each token stands for, spans_T2.

        ids      ca   t    _s   at   F0 9F  <end>      one document's in a row
        text    "ca   t    _s   at   U+FFFD"
        spans    0 2  2 3  3 5  5 7  7 10   10 10

    It is the document's own text if the tokenizer is a byte-level BPE without normaliser (and with the space in front,
    if it adds one). Otherwise it is what the tokenizer keeps of it: WordPiece's lower case and single spaces, "[UNK]"
    for what it doesn't know; one space in front is dropped, as most such tokenizers put one there themselves. Bytes
    that are no whole character, because the block's edge cuts it, become U+FFFD, and the tokens with a part of it all
    get its span. (A reference finds U+FFFD improbable: by excess loss, such a token is not selected.)

    Args:
        tokenizer: the corpus's.
        ids_T: the stretch's `input_ids`.
        num_bytes_T: its `num_bytes`. A special token with 0 was added by the corpus and stands for no text; one with
            more is written in the document.
    """
    added = np.isin(ids_T, tokenizer.special_ids) & (np.asarray(num_bytes_T) == 0)
    pieces = [b"" if no_text else piece for piece, no_text in zip(spelled(tokenizer, ids_T), added, strict=True)]
    raw_spans_T2 = _laid_end_to_end(pieces)
    text, start_B, end_B = _repaired(b"".join(pieces))
    wide = raw_spans_T2[:, 1] > raw_spans_T2[:, 0]
    spans_T2 = np.stack([np.append(start_B, len(text.encode()))[raw_spans_T2[:, 0]]] * 2, axis=1)
    spans_T2[wide, 1] = end_B[raw_spans_T2[wide, 1] - 1]
    spans_T2[:, 1] = np.maximum.accumulate(spans_T2[:, 1])  # no text amid a cut character: its span
    if text.startswith(" ") and not _is_byte_level(tokenizer):
        return text[1:], np.maximum(spans_T2 - 1, 0)
    return text, spans_T2


def _laid_end_to_end(pieces: Sequence[bytes]) -> np.ndarray:
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return np.stack([np.append(0, ends)[: len(ends)], ends], axis=1)


def _repaired(raw: bytes) -> tuple[str, np.ndarray, np.ndarray]:
    """Bytes as text, with U+FFFD for what is no character, and where in the text's UTF-8 each of them starts and ends.

    The bytes that became one U+FFFD all have its place, so that tokens which share them overlap.
    """
    parts: list[str] = []
    start_B, end_B = np.zeros(len(raw), np.int64), np.zeros(len(raw), np.int64)
    done = size = 0  # bytes of `raw` read, bytes of text written
    while done < len(raw):
        try:
            part, stop, broken = raw[done:].decode(), len(raw), len(raw)
        except UnicodeDecodeError as error:
            stop, broken = done + error.end, done + error.start
            part = raw[done:broken].decode() + REPLACEMENT
        start_B[done:broken] = size + np.arange(broken - done)
        end_B[done:broken] = start_B[done:broken] + 1
        size += len(part.encode())
        start_B[broken:stop], end_B[broken:stop] = size - len(REPLACEMENT.encode()), size
        parts.append(part)
        done = stop
    return "".join(parts), start_B, end_B


def spelled(tokenizer: Tokenizer, ids_T: Sequence[int] | np.ndarray) -> list[bytes]:
    """The bytes that each token adds to a text, as the tokenizer's own decoder would have it between two other tokens.

    Byte pieces are the bytes themselves, "▁cat" and WordPiece's "cat" are " cat", "##s" is "s", special tokens are
    their names.
    """
    spell = _speller(tokenizer)
    return [spell(int(i)) for i in ids_T]


@lru_cache(maxsize=8)
def _speller(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """The bytes of a token by its id, remembered."""
    backend = tokenizer.backend
    decoder = backend.decoder
    # Decoders treat the first and the last token of a text in their own ways, so each stands between two others.
    joint = decoder.decode(["a", "a"])[1:-1] if decoder is not None else ""
    byte_level = _is_byte_level(tokenizer)
    added = backend.get_added_tokens_decoder().keys()  # written as they are

    @cache
    def spell(token_id: int) -> bytes:
        token = backend.id_to_token(token_id)
        if token is None:  # a vocabulary with holes
            return b""
        if byte_level:
            in_bytes = token_id not in added and BYTE_OF.keys() >= set(token)
            return bytes(BYTE_OF[character] for character in token) if in_bytes else str(token).encode()
        if byte := BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        if decoder is None:  # the library then puts a space between all tokens
            return f" {token}".encode()
        return str(decoder.decode(["a", token, "a"])[1:-1]).removesuffix(joint).encode()

    return spell


@lru_cache(maxsize=8)
def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether its tokens are written in the byte-level alphabet."""
    parts = (tokenizer.backend.pre_tokenizer, tokenizer.backend.decoder)
    return any(part is not None and b'"ByteLevel"' in part.__getstate__() for part in parts)  # the part as JSON


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: a byte that prints is its own character, the others are the characters from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
