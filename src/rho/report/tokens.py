"""Token views: a text token by token, coloured by what is known of each. For the report, the explorer, the terminal."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rho.errors import DataError
from rho.rows import TokenRow

BINS = 21
MOST_TOKENS = 30_000
CONTINUES = "⁺"  # a token that only goes on with the character which the one before it began
_CATEGORIES_SHOWN_AS_ESCAPES = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}
# The ends and the middle of the colour scale, for black text on a light page and white text on a dark one.
_LIGHT = ((0x7F, 0xB4, 0xE6), (0xFF, 0xFF, 0xFF), (0xF7, 0xA6, 0x5B))
_DARK = ((0x1B, 0x64, 0xA5), (0x1D, 0x1F, 0x23), (0x98, 0x4B, 0x0A))
# The classes of token dynamics (paper, section 2.1), with colours that colour-blind eyes tell apart, light and dark.
DYNAMICS = {
    "H->H": ("#f7a65b", "#984b0a"),
    "L->H": ("#f9dc3c", "#695a3c"),
    "H->L": ("#7fb4e6", "#1b64a5"),
    "L->L": ("#e6e8eb", "#34383e"),
}


class _Glyphs(dict[int, str]):
    """A `str.translate` table that is filled as characters turn up."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        is_no_character = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
        escaped = is_no_character or unicodedata.category(char) in _CATEGORIES_SHOWN_AS_ESCAPES
        if char in " \n" or not escaped:
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


def shown(text: str) -> str:
    """A token's text as it stands in a view: `visible`, line ends marked, and no token without a trace."""
    if not text:
        return CONTINUES
    return visible(text if text.strip(" ") else "·" * len(text)).replace("\n", "⏎\n")


def in_line(text: str) -> str:
    """Text as it stands in a table: `visible`, in one line."""
    return visible(text).replace("\n", "⏎")


@dataclass(frozen=True)
class Quantity:
    """Something that a text can be coloured by.

    Attributes:
        title, note: a heading, and what the colours say.
        value: of a token; NaN where it has none.
        diverging: 0 is the neutral middle of the scale; otherwise its lower end.
        limit: where colours saturate; None: at the 95th percentile of what is shown.
        unit: stands behind its numbers.
    """

    title: str
    note: str
    value: Callable[[TokenRow], float]
    diverging: bool = False
    limit: float | None = None
    unit: str = " nats"


QUANTITIES = {
    "excess": Quantity(
        "Excess loss",
        "The model's loss minus the reference's: orange where the model does worse, blue where it does better.",
        lambda row: row.excess,
        diverging=True,
    ),
    "loss": Quantity(
        "Model loss", "How little the model expected the token: −log of its probability.", lambda row: row.loss
    ),
    "reference": Quantity(
        "Reference loss", "How little the reference expected the token, on the same scale.", lambda row: row.ref_loss
    ),
    "rank": Quantity(
        "Rank",
        "Place by excess loss among the tokens ranked together: 0 is the lowest, 1 the highest.",
        lambda row: row.rank,
        limit=1.0,
        unit="",
    ),
}
DIFFERENCE, CLASSES = "difference", "dynamics"


@dataclass(frozen=True)
class Token:
    """One coloured token: the name of its colour, whether it is underlined, its numbers in words, and its text."""

    colour: str
    underlined: bool
    title: str
    text: str

    @property
    def css(self) -> str:
        """Its CSS classes."""
        return self.colour + " s" * self.underlined


@dataclass(frozen=True)
class View:
    """One document as one pair of model and reference sees it."""

    name: str
    rows: list[TokenRow]

    @property
    def arm(self) -> str:
        """What the model is called."""
        return self.rows[0].arm

    @property
    def totals(self) -> Totals:
        """Its numbers."""
        return totals(self.rows)


@dataclass(frozen=True)
class Document:
    """A document with a view for each pair that sees it, all of the same tokens."""

    name: str
    source: str
    views: list[View]


@dataclass(frozen=True)
class Totals:
    """Means over the scored tokens, those with an excess loss: nats, and a share; None where there are none."""

    tokens: int
    scored: int
    loss: float | None
    ref_loss: float | None
    excess: float | None
    selected: float | None


@dataclass(frozen=True)
class Peak:
    """A token and the text around it."""

    row: TokenRow
    before: str
    after: str


@dataclass(frozen=True)
class Panel:
    """One coloured copy of a document's text."""

    view: View | None  # None: the difference of two
    tokens: list[Token]


@dataclass(frozen=True)
class Scale:
    """The colours of a scale by name, and what its ends stand for; what lies beyond an end has its colour."""

    low: str
    colours: list[str]
    high: str


@dataclass(frozen=True)
class Section:
    """All documents coloured by one quantity.

    Attributes:
        name: of the quantity.
        title, note: as in `Quantity`.
        key: a scale, or the colour of each class.
        documents: each with its panels.
        underlined: what an underline says.
    """

    name: str
    title: str
    note: str
    key: Scale | dict[str, str]
    documents: list[tuple[Document, list[Panel]]]
    underlined: str = "selected"


def documents(rows: Sequence[TokenRow], most: int = MOST_TOKENS) -> tuple[list[Document], int]:
    """Token rows, which stand in the order of the text, as documents; and how many rows are left out.

    Whole documents are left out once `most` rows are passed.
    """
    grouped: dict[tuple[str, str], dict[str, list[TokenRow]]] = {}
    for row in rows:
        grouped.setdefault((row.document, row.source), {}).setdefault(row.view, []).append(row)
    found: list[Document] = []
    taken = 0
    for (name, source), views in grouped.items():
        count = sum(map(len, views.values()))
        if found and taken + count > most:
            break
        taken += count
        found.append(Document(name, source, [View(*view) for view in views.items()]))
    return found, len(rows) - taken


def sections(found: Sequence[Document]) -> list[Section]:
    """A section for each thing that is known of the documents' tokens."""
    made = [by_quantity(name, found) for name in QUANTITIES]
    if any(row.dynamics is not None for row in _rows(found)):
        made.append(by_class(found))
    if any(len(one.views) == 2 for one in found):
        made.append(by_difference(found))
    return made


def section(name: str, found: Sequence[Document]) -> Section:
    """The section of one name.

    Raises:
        DataError: nothing of the kind is known of these documents.
    """
    made = {one.name: one for one in sections(found)}
    if name not in made:
        advice = "Give a second model or reference" if name == DIFFERENCE else "Take a run that knows them"
        raise DataError(f"colour: expected one of {', '.join(made)} for this text, found {name}. {advice}.")
    return made[name]


def by_quantity(name: str, found: Sequence[Document]) -> Section:
    """The documents coloured by one of `QUANTITIES`."""
    quantity = QUANTITIES[name]
    # Both losses have one scale, so that they can be compared.
    alike = ("loss", "reference") if name in ("loss", "reference") else (name,)
    limit = quantity.limit or colour_limit([QUANTITIES[one].value(row) for row in _rows(found) for one in alike])
    panels = _panels(found, lambda row: _colour(quantity.value(row), limit))
    return Section(name, quantity.title, quantity.note, _scale(limit, quantity.diverging, quantity.unit), panels)


def by_class(found: Sequence[Document]) -> Section:
    """The documents coloured by the class of each token's dynamics."""
    colour_of = {name: f"d{index}" for index, name in enumerate(DYNAMICS)}
    note = "How the token's loss went over the checkpoints: H is high, L is low, first at the start, then at the end."
    panels = _panels(found, lambda row: colour_of.get(row.dynamics or "", "n"))
    return Section(CLASSES, "Dynamics", note, colour_of, panels)


def by_difference(found: Sequence[Document]) -> Section:
    """The documents seen by two, coloured by the first one's excess loss minus the second's.

    Raises:
        DataError: the two do not see the same tokens.
    """
    pairs = [(one, one.views[0], one.views[1]) for one in found if len(one.views) == 2]
    for one, first, second in pairs:
        if [row.text for row in first.rows] != [row.text for row in second.rows]:
            raise DataError(
                f"{visible(one.name)}: expected one text, found other tokens in {visible(first.name)} than in "
                f"{visible(second.name)}. Compare two that were evaluated on the same corpus."
            )
    tokens = [list(zip(first.rows, second.rows, strict=True)) for _, first, second in pairs]
    limit = colour_limit([a.excess - b.excess for of_one in tokens for a, b in of_one])
    note = (
        "The first one's excess loss minus the second's: orange where the first is further above its reference. With "
        "one reference for both this is the difference of the models' losses."
    )
    panels = [
        (one, [Panel(None, [_difference(a, b, limit) for a, b in of_one])])
        for (one, _, _), of_one in zip(pairs, tokens, strict=True)
    ]
    return Section(DIFFERENCE, "Difference", note, _scale(limit, True, " nats"), panels, "selected by one of the two")


def _rows(found: Sequence[Document]) -> Iterator[TokenRow]:
    return (row for one in found for view in one.views for row in view.rows)


def _panels(found: Sequence[Document], colour: Callable[[TokenRow], str]) -> list[tuple[Document, list[Panel]]]:
    def tokens(view: View) -> list[Token]:
        return [Token(colour(row), row.selected, _title(row), shown(row.text)) for row in view.rows]

    return [(one, [Panel(view, tokens(view)) for view in one.views]) for one in found]


def _difference(first: TokenRow, second: TokenRow, limit: float) -> Token:
    change = first.excess - second.excess
    chosen = {(True, True): "both", (True, False): "the first only", (False, True): "the second only"}
    title = "selected by " + chosen.get((first.selected, second.selected), "neither")
    if math.isfinite(change):
        title = f"excess {first.excess:+.2f} and {second.excess:+.2f}, difference {change:+.2f}, {title}"
    return Token(_colour(change, limit), first.selected != second.selected, title, shown(first.text))


def _scale(limit: float, diverging: bool, unit: str) -> Scale:
    low = f"−{limit:.1f}{unit}" if diverging else f"0{unit}"
    first = 0 if diverging else BINS // 2
    return Scale(low, [f"b{index}" for index in range(first, BINS)], f"{'+' * diverging}{limit:.1f}{unit}")


def totals(rows: Sequence[TokenRow]) -> Totals:
    """Means and counts of some tokens."""
    scored = [row for row in rows if math.isfinite(row.excess)]
    means: list[float | None] = [None] * 4
    if scored:
        columns = zip(*((row.loss, row.ref_loss, row.excess, row.selected) for row in scored), strict=True)
        means = [statistics.fmean(column) for column in columns]
    return Totals(len(rows), len(scored), *means)


def highest(rows: Sequence[TokenRow], number: int = 10, around: int = 8) -> list[Peak]:
    """The tokens with the highest excess loss, each with the text of the `around` tokens before and after it."""
    order = sorted((n for n, row in enumerate(rows) if math.isfinite(row.excess)), key=lambda n: -rows[n].excess)
    return [
        Peak(rows[n], _joined(rows, n, range(n - around, n)), _joined(rows, n, range(n + 1, n + 1 + around)))
        for n in order[:number]
    ]


def _joined(rows: Sequence[TokenRow], of: int, places: range) -> str:
    def same(row: TokenRow) -> bool:
        return (row.document, row.view) == (rows[of].document, rows[of].view)

    return "".join(rows[n].text for n in places if 0 <= n < len(rows) and same(rows[n]))


def colour_limit(values: Sequence[float]) -> float:
    """The absolute value where the scale saturates: the 95th percentile, rounded up to a tenth of a nat."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    return math.ceil(sizes[int(0.95 * (len(sizes) - 1))] * 10) / 10 or 0.1 if sizes else 1.0


def colour_bin(value: float, limit: float) -> int:
    """The bin of a value: 0 at `-limit` and below, the middle one at zero, the last at `limit` and above."""
    half = BINS // 2
    return round(max(-1.0, min(1.0, value / limit)) * half) + half


def colours(dark: bool) -> dict[str, str]:
    """The background of every named colour: the scale `b0` to `b20`, blue, neutral, orange; and the classes `d0` ..."""
    low, middle, high = _DARK if dark else _LIGHT
    half = BINS // 2
    found = {}
    for index in range(BINS):
        end, weight = (low if index < half else high), abs(index - half) / half
        mixed = (round(m + weight * (e - m)) for m, e in zip(middle, end, strict=True))
        found[f"b{index}"] = "#" + "".join(f"{channel:02x}" for channel in mixed)
    return found | {f"d{index}": pair[dark] for index, pair in enumerate(DYNAMICS.values())}


def _colour(value: float, limit: float) -> str:
    return "n" if math.isnan(value) else f"b{colour_bin(value, limit)}"


def _title(row: TokenRow) -> str:
    known = (("loss", row.loss, ".2f"), ("ref", row.ref_loss, ".2f"), ("excess", row.excess, "+.2f"))
    parts = [f"{name} {value:{form}}" for name, value, form in (*known, ("rank", row.rank, ".2f")) if value == value]
    parts.append("selected" if row.selected else "not selected" if parts else "no score")
    return ", ".join([*parts, *filter(None, (row.dynamics, row.label))])
