"""Token pages: the text of held-out documents, each token coloured by its excess loss."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rho.report.data import TokenRow

BINS = 21
MOST_TOKENS = 30_000
_CATEGORIES_SHOWN_AS_ESCAPES = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}
# The ends and the middle of the colour scale, for black text on a light page and white text on a dark one.
_LIGHT = ((0x7F, 0xB4, 0xE6), (0xFF, 0xFF, 0xFF), (0xF7, 0xA6, 0x5B))
_DARK = ((0x1B, 0x64, 0xA5), (0x1D, 0x1F, 0x23), (0x98, 0x4B, 0x0A))


class _Glyphs(dict[int, str]):
    """A `str.translate` table that is filled as characters turn up."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if char in " \n" or unicodedata.category(char) not in _CATEGORIES_SHOWN_AS_ESCAPES:
            self[code] = char
        elif code < 0x20:
            self[code] = "⇥" if char == "\t" else chr(0x2400 + code)
        else:
            self[code] = "␡" if code == 0x7F else char.encode("unicode_escape").decode("ascii")
        return self[code]


_GLYPHS = _Glyphs()


def visible(text: str) -> str:
    """`text` with every control, bidirectional and invisible character as a glyph or escape; line ends stay."""
    return text.translate(_GLYPHS)


@dataclass(frozen=True)
class Token:
    """One coloured token: its CSS classes, what hovering tells, and its text with line ends marked."""

    css: str
    title: str
    text: str


@dataclass(frozen=True)
class View:
    """One document as one trained model sees it."""

    arm: str
    seed: int
    tokens: list[Token]
    selected: float
    mean_excess: float | None


@dataclass(frozen=True)
class Document:
    """A held-out document with a view for each model."""

    name: str
    source: str
    views: list[View]


@dataclass(frozen=True)
class TokenPages:
    """The documents shown, the excess at which colours saturate, and how many tokens were left out."""

    documents: list[Document]
    limit: float
    omitted: int


def token_pages(rows: Sequence[TokenRow]) -> TokenPages:
    """Group token rows, which stand in the order of the text, into documents and views.

    Whole documents are left out once `MOST_TOKENS` is passed.
    """
    by_document: dict[tuple[str, str], dict[tuple[str, int], list[TokenRow]]] = {}
    for row in rows:
        views = by_document.setdefault((row.document, row.source), {})
        views.setdefault((row.arm, row.seed), []).append(row)
    limit = colour_limit([row.excess for row in rows])
    documents: list[Document] = []
    shown = 0
    for (name, source), views in by_document.items():
        count = sum(map(len, views.values()))
        if documents and shown + count > MOST_TOKENS:
            break
        shown += count
        documents.append(Document(name, source, [_view(*key, view, limit) for key, view in views.items()]))
    return TokenPages(documents, limit, len(rows) - shown)


def colour_limit(excess: Sequence[float]) -> float:
    """The absolute excess where the scale saturates: the 95th percentile, rounded up to a tenth of a nat."""
    sizes = sorted(abs(value) for value in excess if math.isfinite(value))
    return math.ceil(sizes[int(0.95 * (len(sizes) - 1))] * 10) / 10 or 0.1 if sizes else 1.0


def colour_bin(excess: float, limit: float) -> int:
    """The bin of an excess loss: 0 at `-limit` and below, the middle one at zero, the last at `limit` and above."""
    half = BINS // 2
    return round(max(-1.0, min(1.0, excess / limit)) * half) + half


def colour_scale(dark: bool) -> list[str]:
    """The background colour of every bin: blue, neutral, orange."""
    low, middle, high = _DARK if dark else _LIGHT
    half = BINS // 2
    colours = []
    for index in range(BINS):
        end, weight = (low if index < half else high), abs(index - half) / half
        mixed = (round(m + weight * (e - m)) for m, e in zip(middle, end, strict=True))
        colours.append("#" + "".join(f"{channel:02x}" for channel in mixed))
    return colours


def _view(arm: str, seed: int, rows: list[TokenRow], limit: float) -> View:
    scored = [row for row in rows if math.isfinite(row.excess)]
    return View(
        arm,
        seed,
        [_token(row, limit) for row in rows],
        sum(row.selected for row in rows) / len(rows),
        statistics.fmean(row.excess for row in scored) if scored else None,
    )


def _token(row: TokenRow, limit: float) -> Token:
    css = "n" if math.isnan(row.excess) else f"b{colour_bin(row.excess, limit)}"
    known = (("loss", row.loss, ".2f"), ("ref", row.ref_loss, ".2f"), ("excess", row.excess, "+.2f"))
    parts = [f"{name} {value:{form}}" for name, value, form in (*known, ("rank", row.rank, ".2f")) if value == value]
    if row.label is not None:
        parts.append(row.label)
    return Token(css + " s" * row.selected, ", ".join(parts) or "no score", row.text.replace("\n", "⏎\n"))
