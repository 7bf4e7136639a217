"""Losses mapped from one tokenization to another: literal spans, real tokenizers on mixed scripts, recovered text."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from conftest import example_records
from rho.corpus import Corpus
from rho.references.align import BYTE_OF, byte_spans, map_losses, recover_text, spelled
from rho.tokenizer import EOS, Tokenizer

NAN = math.nan
CHUNKS = (
    *("The", " cats", " sat.", "  ", " " * 9, "\n", "\r\n\t", "naïve", " It's", "12"),
    *("東京", "，日本語", "🙂", "👨‍👩‍👧", "👍🏽", "🇩🇪", "e\u0301", "o\u0323\u0302", "ﬁ", "½", "…", "ﷺ"),
    *("שלום", " مرحبا", "\u200f", "\x00", "\x07", "\u200b", "\u00a0", "\ufeff", "Å", "ß", "\ufffd", "▁", "##", EOS),
)
TRAINED_ON = "".join(CHUNKS[:-1]) + " The cats sat on the mat. Straße 東京 🙂 naïve cafe\u0301 שלום 日本語の文\n" * 3
texts = st.lists(st.sampled_from(CHUNKS) | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)
many = settings(max_examples=60, deadline=None)


# Literal spans


def mapped(losses: list[float], ref_spans: list, spans: list) -> list[float]:
    return [round(float(loss), 6) for loss in map_losses(np.array(losses), np.array(ref_spans), np.array(spans))]


def test_a_groups_loss_is_shared_out_by_bytes():
    #  T  h  e  _  c  a  t  s  _  s  a  t
    # |  0.9   |  2.0   | 0.4 |    1.5    |
    # | 0.6 |.3|     2.4      |    1.5    |
    ref_spans, spans = [(0, 3), (3, 6), (6, 8), (8, 12)], [(0, 2), (2, 3), (3, 8), (8, 12)]
    assert mapped([0.9, 2.0, 0.4, 1.5], ref_spans, spans) == [0.6, 0.3, 2.4, 1.5]
    # |  0.6   |     1.3      |    1.5    |    and back: 0.6 + 0.3; 2.4 as 3 : 2
    assert mapped([0.6, 0.3, 2.4, 1.5], spans, ref_spans) == [0.9, 1.44, 0.96, 1.5]


def test_a_boundary_of_one_side_alone_is_no_cut():
    #  a  b  c  d  e
    # | 1.0 |  4.0   |
    # |  3.0   | 2.0 |    5.0 as 3 : 2
    assert mapped([1.0, 4.0], [(0, 2), (2, 5)], [(0, 3), (3, 5)]) == [3.0, 2.0]


def test_gaps_count_to_the_token_behind_them_and_the_last_to_the_last():
    #  H  i  _  _  y  o  u  _
    # | 1.0 |.1|.2|  5.0   |.4|
    # | 1.0 |     |  5.7   |  |    the model has no token for white space
    whole, gappy = [(0, 2), (2, 3), (3, 4), (4, 7), (7, 8)], [(0, 2), (4, 7)]
    assert mapped([1.0, 0.1, 0.2, 5.0, 0.4], whole, gappy) == [1.0, 5.7]
    # | 1.0 |     |  6.0   |  |    the reference has none
    # | 1.0 | 1| 1|  3.0   | 1|
    assert mapped([1.0, 6.0], gappy, whole) == [1.0, 1.0, 1.0, 3.0, 1.0]
    # |           8.0         |
    # | 2.0 |     |  5.0   | 1|    and so do the bytes
    assert mapped([8.0], [(0, 8)], [(0, 2), (4, 7), (7, 8)]) == [2.0, 5.0, 1.0]


def test_a_gap_in_front_counts_to_the_first_token():
    #  _  _  a  b
    # |.5|.5|  2  |
    # |     |  3  |
    assert mapped([0.5, 0.5, 2.0], [(0, 1), (1, 2), (2, 4)], [(2, 4)]) == [3.0]


def test_tokens_that_share_a_character_stay_together():
    #  a  F0 9F 99 82 b
    # |1.|  2.0, 1.0  |4.|    two tokens of the reference, each with the emoji's span
    # |1.| 1., 1., 1. |4.|    three of the model
    emoji = (1, 5)
    spans = [(0, 1), emoji, emoji, emoji, (5, 6)]
    assert mapped([1.0, 2.0, 1.0, 4.0], [(0, 1), emoji, emoji, (5, 6)], spans) == [1.0, 1.0, 1.0, 1.0, 4.0]
    # The model's second token holds the end of the emoji and the b: 3.0 + 4.0 as 4 : 5.
    assert mapped([1.0, 2.0, 1.0, 4.0], [(0, 1), emoji, emoji, (5, 6)], [(0, 1), emoji, (1, 6)]) == [
        1.0,
        3.111111,
        3.888889,
    ]


def test_the_same_spans_are_mapped_one_to_one_even_if_they_overlap():
    spans = [(0, 1), (1, 5), (1, 5), (1, 6), (6, 6), (6, 6)]
    losses = [NAN, 2.0, NAN, 0.5, 0.25, 3.0]
    np.testing.assert_array_equal(mapped(losses, spans, spans), losses)


def test_a_zero_width_token_of_the_reference_gives_its_loss_to_the_group_behind():
    #  (0.5) T  h  e (0.25) _  c (2.0)
    #       |  1.0   |     | 4.0 |
    #       |  1.5   |     | 6.25|
    ref_spans = [(0, 0), (0, 3), (3, 3), (3, 5), (0, 0)]  # added specials have the offset 0 anywhere
    assert mapped([0.5, 1.0, 0.25, 4.0, 2.0], ref_spans, [(0, 3), (3, 5)]) == [1.5, 6.25]


def test_a_zero_width_token_of_the_model_without_a_counterpart_gets_nothing():
    spans = [(0, 0), (0, 3), (3, 3), (3, 5), (5, 5)]
    assert mapped([1.0, 4.0], [(0, 3), (3, 5)], spans) == [0.0, 1.0, 0.0, 4.0, 0.0]


def test_zero_width_tokens_of_both_sides_answer_each_other():
    #       |  1.0   (2.0)
    #       |  1.0   (1.0)(1.0)
    assert mapped([1.0, 2.0], [(0, 3), (3, 3)], [(0, 3), (3, 3), (3, 3)]) == [1.0, 1.0, 1.0]
    assert mapped([1.0, 2.0], [(0, 3), (0, 0)], [(0, 3), (3, 3)]) == [1.0, 2.0]
    assert mapped([3.0, 2.0], [(0, 0), (0, 0)], [(0, 0)]) == [5.0]  # no text at all


def test_a_zero_width_token_inside_a_group_belongs_to_it():
    #  a  b  c  d
    # |    4.0    |
    # | 2.0 (0) 2.0|
    assert mapped([4.0], [(0, 4)], [(0, 2), (2, 2), (2, 4)]) == [2.0, 0.0, 2.0]
    assert mapped([1.0, 2.0, 1.0], [(0, 2), (2, 2), (2, 4)], [(0, 4)]) == [4.0]


def test_tokens_that_all_stand_for_no_text_share_what_there_is():
    assert mapped([1.0, 2.0], [(0, 2), (2, 4)], [(0, 0), (0, 0)]) == [1.5, 1.5]
    assert mapped([1.0, 2.0, 3.0], [(0, 0), (0, 0), (0, 0)], [(0, 0), (0, 3)]) == [0.0, 6.0]
    assert mapped([1.0, 2.0, 3.0], [(0, 0), (0, 2), (2, 4)], [(0, 0), (0, 0)]) == [3.0, 3.0]


def test_a_missing_score_reaches_its_own_group_only():
    #  T  h  e  _  c  a  t
    # | ?? |1.|  2.0 | 3.0 |
    # |  ?? ??|2.0| 0 | 3.0 |
    ref_spans = [(0, 2), (2, 3), (3, 5), (5, 7)]
    found = mapped([NAN, 1.0, 2.0, 3.0], ref_spans, [(0, 1), (1, 3), (3, 5), (5, 5), (5, 7)])
    np.testing.assert_array_equal(found, [NAN, NAN, 2.0, 0.0, 3.0])


def test_an_added_first_token_without_score_takes_no_text_with_it():
    assert mapped([NAN, 1.0, 2.0], [(0, 0), (0, 3), (3, 5)], [(0, 3), (3, 5)]) == [1.0, 2.0]
    found = mapped([NAN, 1.0, 2.0], [(0, 0), (0, 3), (3, 5)], [(0, 0), (0, 3), (3, 5)])
    np.testing.assert_array_equal(found, [NAN, 1.0, 2.0])


def test_without_reference_tokens_nothing_has_a_score():
    found = map_losses(np.zeros(0), np.zeros((0, 2)), np.array([(0, 1), (1, 2)]))
    np.testing.assert_array_equal(found, np.array([NAN, NAN], np.float32))
    assert map_losses(np.ones(1), np.array([(0, 1)]), np.zeros((0, 2))).shape == (0,)


def test_small_losses_after_large_ones_are_not_lost():
    number = 20_000
    losses = np.where(np.arange(number) % 2, 1e-3, 12345.678).astype(np.float32)
    pairs = np.stack([np.arange(0, number, 2), np.arange(2, number + 2, 2)], axis=1)
    singles = np.stack([np.arange(number), np.arange(1, number + 1)], axis=1)
    back = map_losses(map_losses(losses, singles, pairs), pairs, singles)
    np.testing.assert_allclose(back, (12345.678 + 1e-3) / 2, rtol=1e-7)
    assert back.dtype == np.float32


@pytest.mark.parametrize(
    ("ref_spans", "spans", "message"),
    [
        ([(0, 1)], [(0, 2)], r"found \(2,\) losses for 1 spans"),
        ([(0, 1), (1, 2)], [(0, 2), (2, 1)], r"found \[2, 1\] at token 1"),
        ([(-1, 1), (1, 2)], [(0, 2)], r"found \[-1, 1\] at token 0"),
    ],
)
def test_impossible_spans_are_an_error(ref_spans, spans, message):
    with pytest.raises(ValueError, match=message):
        map_losses(np.ones(2), np.array(ref_spans), np.array(spans))


# Any spans whatever

any_spans = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=8).map(
    lambda pairs: np.array([(start, start + size) for start, size in pairs])
)
seeds = st.integers(0, 2**32 - 1)


def random_losses(number: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).exponential(3.0, number).astype(np.float32)


@given(any_spans, any_spans, seeds)
@settings(max_examples=100, deadline=None)
def test_of_any_spans_no_loss_and_no_token_is_lost(ref_spans, spans, seed):
    losses = random_losses(len(ref_spans), seed)
    found = map_losses(losses, ref_spans, spans)
    assert found.shape == (len(spans),)
    assert (found >= 0).all()
    assert found.sum(dtype=np.float64) == pytest.approx(losses.sum(dtype=np.float64), abs=1e-4)
    np.testing.assert_array_equal(map_losses(losses, ref_spans, ref_spans), losses)


@given(any_spans, any_spans, seeds)
@settings(max_examples=100, deadline=None)
def test_of_any_spans_a_missing_score_takes_what_depends_on_it_and_leaves_the_rest(ref_spans, spans, seed):
    losses = random_losses(len(ref_spans), seed)
    token = seed % len(losses)
    plain = map_losses(losses, ref_spans, spans)
    more, missing = losses.copy(), losses.copy()
    more[token], missing[token] = 100.0, NAN
    found = map_losses(missing, ref_spans, spans)
    scored = ~np.isnan(found)
    depends = map_losses(more, ref_spans, spans) != plain
    if ref_spans[token, 0] < ref_spans[token, 1]:
        assert not (depends & scored).any()
    independent = scored & ~depends
    np.testing.assert_array_equal(found[independent], plain[independent])


# Tokenizers


def byte_level(vocab_size: int) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        [TRAINED_ON] * 2,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return backend


def prefixed() -> Backend:
    backend = byte_level(270)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", EOS]
    backend.train_from_iterator(
        [TRAINED_ON],
        trainers.UnigramTrainer(vocab_size=110, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    return backend


def byte_fallback() -> Backend:
    letters = ["▁", *"Thecatsnom", "▁c", "▁ca", "▁cat", "Th"]
    vocab = ["<unk>", EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("T", "h")]
    backend = Backend(
        models.BPE({token: n for n, token in enumerate(vocab)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([EOS])
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        [TRAINED_ON], trainers.WordPieceTrainer(vocab_size=130, special_tokens=["[UNK]", EOS], show_progress=False)
    )
    return backend


def nfkc() -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(
        [TRAINED_ON], trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", EOS], show_progress=False)
    )
    return backend


KINDS = {
    "byte-level, small": lambda: byte_level(260),
    "byte-level, large": lambda: byte_level(330),
    "byte-level, prefix space": prefixed,
    "unigram": unigram,
    "byte fallback": byte_fallback,
    "word piece": word_piece,
    "nfkc": nfkc,
}
EXACT = ("byte-level, small", "byte-level, large")
kinds = st.sampled_from(sorted(KINDS))


@cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind](), EOS)


def aligned_places(ref_spans: np.ndarray, spans: np.ndarray) -> list[int]:
    """Slowly: where tokens of both sides end that no token reaches over. What is behind a last token belongs to it."""
    places = {0, *ref_spans[:, 1].tolist()} & {0, *spans[:, 1].tolist()}
    both = [*ref_spans, *spans]
    last = min(ref_spans[:, 1].max(), spans[:, 1].max())
    return [p for p in sorted(places) if p < last and not any(start < p < end for start, end in both)]


@given(kinds, kinds, texts, seeds)
@many
def test_the_loss_of_every_aligned_span_is_preserved(model, reference, text, seed):
    ref_ids, ref_spans = byte_spans(tokenizer(reference), text)
    ids, spans = byte_spans(tokenizer(model), text)
    losses = random_losses(len(ref_ids), seed)
    found = map_losses(losses, ref_spans, spans)
    assert found.shape == ids.shape
    if len(ref_ids) == 0:
        assert np.isnan(found).all()
    elif len(ids):
        assert found.sum(dtype=np.float64) == pytest.approx(losses.sum(dtype=np.float64), abs=1e-4)
        for place in aligned_places(ref_spans, spans):
            before = losses[ref_spans[:, 1] <= place].sum(dtype=np.float64)
            assert found[spans[:, 1] <= place].sum(dtype=np.float64) == pytest.approx(before, abs=1e-4)


@given(kinds, texts, seeds)
@many
def test_with_equal_tokenizers_it_is_the_identity(kind, text, seed):
    ids, spans = byte_spans(tokenizer(kind), text)
    losses = random_losses(len(ids) + 1, seed)
    losses[:: 1 + seed % 5] = NAN
    spans = np.concatenate([spans, [[len(text.encode())] * 2]])  # the end token
    found = map_losses(losses, byte_spans(tokenizer(kind), text, ended=True)[1], spans)
    np.testing.assert_array_equal(found, losses)


@given(kinds, kinds, texts, seeds)
@many
def test_a_first_token_without_score_spoils_the_first_group_only(model, reference, text, seed):
    ref_ids, ref_spans = byte_spans(tokenizer(reference), text)
    _, spans = byte_spans(tokenizer(model), text)
    if len(ref_ids) == 0 or len(spans) == 0:
        return
    losses = random_losses(len(ref_ids), seed)
    losses[0] = NAN
    found = map_losses(losses, ref_spans, spans)
    places = [place for place in aligned_places(ref_spans, spans) if place >= ref_spans[0, 1]]
    first_cut = places[0] if places else len(text.encode())
    scored = ~np.isnan(found)
    assert scored[spans[:, 0] >= first_cut].all()
    assert not scored.all()
    behind = losses[ref_spans[:, 0] >= first_cut].sum(dtype=np.float64)
    assert behind - 1e-4 <= found[scored].sum(dtype=np.float64) <= np.nansum(losses, dtype=np.float64) + 1e-4


@given(kinds, texts)
@many
def test_spans_lie_in_the_text_at_whole_characters_or_byte_for_byte(kind, text):
    ids, spans = byte_spans(tokenizer(kind), text)
    raw = text.encode()
    assert ids.dtype == np.int32
    assert spans.shape == (len(ids), 2)
    assert ((spans >= 0) & (spans <= len(raw))).all()
    if kind in EXACT:
        assert b"".join(raw[start:end] for start, end in spans) == raw
        assert (spans[1:, 0] == spans[: len(spans) - 1, 1]).all()
    elif not kind.startswith("byte-level"):
        for start, end in spans:
            raw[start:end].decode()


def test_byte_pieces_of_a_character_have_their_own_bytes():
    plain = byte_level(0)  # no merges: a token a byte
    assert byte_spans(Tokenizer(plain, EOS), "aß🙃")[1].tolist() == [[n, n + 1] for n in range(7)]
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a byte that is not in the text
    spans = [[0, 1], [0, 1], [1, 3], [1, 3], *[[3, 7]] * 4]
    assert byte_spans(Tokenizer(plain, EOS), "aß🙃")[1].tolist() == spans


def test_the_end_of_a_document_is_each_tokenizers_own():
    reference, text = tokenizer("unigram"), "The cats"
    own = reference.backend.encode(text, add_special_tokens=False).ids
    ids, spans = byte_spans(reference, text, ended=True)
    assert ids.tolist() == [*own, reference.eos_id] and spans[-1].tolist() == [8, 8]
    losses = np.arange(len(ids), dtype=np.float32)
    number = len(own)
    assert map_losses(losses, spans, np.array([(0, 8), (8, 8)])).tolist() == [number * (number - 1) / 2, number]
    assert byte_spans(reference, "", ended=True)[0].tolist() == [reference.eos_id]


# Text of rows


@given(st.sampled_from(EXACT), texts)
@many
def test_a_byte_level_tokenizer_gives_the_text_back(kind, text):
    made = tokenizer(kind)
    ids, spans = byte_spans(made, text)
    found, found_spans = recover_text(made, np.append(ids, made.eos_id), np.append(np.diff(spans).ravel(), 0))
    assert found == text
    assert found_spans.tolist() == [*spans.tolist(), [len(text.encode())] * 2]


@given(st.sampled_from(EXACT), texts, st.integers(0, 20), st.integers(0, 20))
@many
def test_a_cut_character_becomes_one_replacement_that_its_tokens_share(kind, text, front, back):
    made = tokenizer(kind)
    ids, spans = byte_spans(made, text)
    part = slice(front, max(front, len(ids) - back))
    found, found_spans = recover_text(made, ids[part], np.ones(len(ids[part])))
    kept = spans[part]
    raw = text.encode()[kept[0, 0] : kept[-1, 1]] if len(kept) else b""
    assert found == raw.decode(errors="replace")
    check_spans(found, found_spans)


def check_spans(text: str, spans: np.ndarray) -> None:
    """In order, within the text, and covering all of it."""
    assert (np.diff(spans, axis=0) >= 0).all()
    assert (spans[:, 0] <= spans[:, 1]).all()
    covered = {place for start, end in spans for place in range(start, end)}
    assert covered == set(range(len(text.encode())))


@given(kinds, st.data(), seeds)
@many
def test_any_ids_give_a_text_that_can_be_scored(kind, data, seed):
    made = tokenizer(kind)
    ids = np.array(data.draw(st.lists(st.integers(0, made.vocab_size + 1), max_size=12)), np.int32)
    num_bytes = np.random.default_rng(seed).integers(0, 3, len(ids))
    text, spans = recover_text(made, ids, num_bytes)
    check_spans(text, spans)
    _, ref_spans = byte_spans(tokenizer("byte-level, small"), text)
    losses = map_losses(np.ones(len(ref_spans)), ref_spans, spans)
    assert len(losses) == len(ids)
    if text and len(ids):
        assert losses.sum() == pytest.approx(len(ref_spans), abs=1e-4)


def test_a_token_without_text_amid_a_cut_character_has_its_span():
    made = tokenizer("byte-level, large")
    pieces = spelled(made, range(made.vocab_size))
    first, second = (pieces.index(byte) for byte in (b"\xe2", b"\x82"))  # of three bytes, the third is cut off
    text, spans = recover_text(made, np.array([first, made.eos_id, second, made.eos_id]), np.array([1, 0, 1, 0]))
    assert text == "\ufffd" and spans.tolist() == [[0, 3], [0, 3], [0, 3], [3, 3]]


def recovered(kind: str, text: str) -> str:
    made = tokenizer(kind)
    ids, spans = byte_spans(made, text)
    return recover_text(made, ids, np.diff(spans).ravel())[0]


def test_a_lossy_tokenizer_gives_back_what_it_keeps():
    assert recovered("unigram", "The cats  sat") == "The cats  sat"
    assert recovered("byte fallback", "The cat 🙂ß") == "The cat 🙂ß"
    assert recovered("word piece", "The  Cats\n sat.") == "the cats sat."
    assert recovered("word piece", "cats Ж") == "cats [UNK]"
    assert recovered("nfkc", "ﬁ") in ("fi", "f i")


def test_spans_follow_what_is_kept():
    made = tokenizer("word piece")
    ids, spans = byte_spans(made, "The  CATS")
    text, found = recover_text(made, ids, np.diff(spans).ravel())
    words = [text.encode()[start:end].decode() for start, end in found]
    assert text == "the cats" == "".join(words)
    assert len(words) == len(ids)


def test_an_end_token_in_the_text_is_text():
    made = tokenizer("byte-level, small")
    ids, spans = byte_spans(made, f"a{EOS}b")
    assert made.eos_id in ids
    text, found = recover_text(made, np.append(ids, made.eos_id), np.append(np.diff(spans).ravel(), 0))
    assert text == f"a{EOS}b"
    assert found.tolist() == [[0, 1], [1, 1 + len(EOS)], [1 + len(EOS), 2 + len(EOS)], [2 + len(EOS)] * 2]


def test_tokens_spell_what_they_add_between_others():
    made = tokenizer("byte fallback")
    backend = made.backend
    tokens = ["▁cat", "Th", "<0xF0>", "▁", EOS]
    assert spelled(made, [backend.token_to_id(token) for token in tokens]) == [
        b" cat",
        b"Th",
        b"\xf0",
        b" ",
        EOS.encode(),
    ]
    backend = Backend(models.WordPiece({"it": 0, "##s": 1, ".": 2, "[UNK]": 3, EOS: 4}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    assert spelled(Tokenizer(backend, EOS), [0, 1, 2, 0, 9]) == [b" it", b"s", b".", b" it", b""]
    backend = Backend(models.BPE({"it</w>": 0, "s": 1}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder("</w>")
    assert spelled(Tokenizer(backend, EOS), [0, 1]) == [b"it ", b"s"]
    undecoded = Backend(models.BPE({"it</w>": 0, "s": 1}, [], end_of_word_suffix="</w>"))
    assert spelled(Tokenizer(undecoded, EOS), [1]) == [b" s"]
    backend = byte_level(0)
    backend.add_tokens(["naïve"])
    assert spelled(Tokenizer(backend, EOS), backend.encode("naïve").ids) == ["naïve".encode()]


def test_the_byte_alphabet_is_the_librarys():
    assert set(BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())
    decoder = decoders.ByteLevel()
    assert all(decoder.decode([character]) == chr(byte) for character, byte in BYTE_OF.items() if byte < 0x80)
    pairs = [
        (a, b) for a, b in itertools.product(BYTE_OF.items(), repeat=2) if 0xC2 <= a[1] < 0xE0 and 0x80 <= b[1] < 0xC0
    ]
    assert all(decoder.decode([a[0] + b[0]]) == bytes([a[1], b[1]]).decode() for a, b in pairs)


def test_documents_of_a_corpus_are_recovered_stretch_by_stretch(corpus):
    documents = {record["id"]: record["text"] for record in example_records()}
    blocks = Corpus(corpus)
    for block in range(10):
        row = blocks.row(block, ("input_ids", "num_bytes", "document", "document_id"))
        for number, name in zip(dict.fromkeys(row["document"].tolist()), row["document_id"], strict=True):
            stretch = row["document"] == number
            text, spans = recover_text(blocks.tokenizer, row["input_ids"][stretch], row["num_bytes"][stretch])
            check_spans(text, spans)
            assert text.strip("\ufffd") in documents[name]
