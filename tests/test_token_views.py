"""A text in colours: which colour a token gets, what stands beside it, and the same in the terminal."""

from __future__ import annotations

import io
import re
import unicodedata
from dataclasses import replace

import pytest
from rich.console import Console

from hostile import HOSTILE
from rho.errors import DataError
from rho.report.terminal import show
from rho.report.tokens import (
    DYNAMICS,
    Scale,
    by_class,
    by_difference,
    by_quantity,
    colours,
    documents,
    highest,
    sections,
    shown,
    totals,
)
from rho.rows import TokenRow

STYLES = re.compile(r"\x1b\[[\d;]*m")


def row(text: str, excess: float = 1.0, rank: float = 0.5, **more: object) -> TokenRow:
    """A token of one document; the reference's loss is 1."""
    known = {"arm": "model", "seed": None, "document": "doc", "source": "src", "position": 0}
    numbers = {"loss": 1.0 + excess, "ref_loss": 1.0, "excess": excess, "rank": rank, "selected": excess > 0}
    return TokenRow(**{**known, **numbers, "text": text, **more})  # type: ignore[arg-type]


def printed(rows: list[TokenRow], colour: str = "excess", terminal: bool = True, width: int = 100) -> str:
    """What the terminal, or a pipe, gets."""
    file = io.StringIO()
    system = "truecolor" if terminal else None
    show(rows, colour, Console(file=file, force_terminal=terminal, color_system=system, width=width, highlight=False))  # type: ignore[arg-type]
    return file.getvalue()


ROWS = [row("The", -2.0, 0.0), row(" shift", 2.0, 1.0), row("\n", 0.0), row("x", float("nan"), float("nan"))]


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        ("excess", ["b0", "b20", "b10", "n"]),  # -2, 2, 0 nats on a scale from -2 to 2
        ("rank", ["b10", "b20", "b15", "n"]),
    ],
)
def test_colours_are_the_literal_ones(quantity: str, expected: list[str]) -> None:
    [(_, [panel])] = by_quantity(quantity, documents(ROWS)[0]).documents
    assert [token.colour for token in panel.tokens] == expected
    assert [token.underlined for token in panel.tokens] == [False, True, False, False]
    assert set(expected) - {"n"} <= colours(dark=False).keys() == colours(dark=True).keys()


def test_both_losses_have_one_scale() -> None:
    found, _ = documents([row("a")] * 3)  # losses of 2 nats, the reference's are 1
    loss, reference = (by_quantity(name, found) for name in ("loss", "reference"))
    assert loss.key == reference.key == Scale("0 nats", [f"b{n}" for n in range(10, 21)], "2.0 nats")
    assert [one.documents[0][1][0].tokens[0].colour for one in (loss, reference)] == ["b20", "b15"]


def test_classes_have_a_colour_each_and_their_section_only_where_they_are_known() -> None:
    assert [one.name for one in sections(documents(ROWS)[0])] == ["excess", "loss", "reference", "rank"]
    known = [row("a", dynamics=name) for name in (*DYNAMICS, None)]
    section = by_class(documents(known)[0])
    assert [token.colour for token in section.documents[0][1][0].tokens] == ["d0", "d1", "d2", "d3", "n"]
    assert section.documents[0][1][0].tokens[2].title.endswith("selected, H->L")
    assert "dynamics" in [one.name for one in sections(documents(known)[0])]


def test_a_difference_is_the_first_ones_excess_minus_the_seconds() -> None:
    second = [replace(one, arm="other", excess=one.excess + 1.0, selected=True) for one in ROWS]
    found, _ = documents([*ROWS, *second])
    assert [one.name for one in sections(found)][-1] == "difference"
    section = by_difference(found)
    [(_, [panel])] = section.documents
    assert [token.colour for token in panel.tokens] == ["b0", "b0", "b0", "n"]
    assert [token.underlined for token in panel.tokens] == [True, False, True, True]
    assert panel.tokens[0].title == "excess -2.00 and -1.00, difference -1.00, selected by the second only"
    assert panel.tokens[1].title == "excess +2.00 and +3.00, difference -1.00, selected by both"


def test_a_difference_of_two_texts_is_refused() -> None:
    found, _ = documents([row("a"), row("b", arm="other")])
    with pytest.raises(DataError, match="found other tokens in model than in other"):
        by_difference(found)


def test_totals_and_peaks_are_of_the_scored_tokens() -> None:
    found = totals(ROWS)
    assert (found.tokens, found.scored, found.loss, found.ref_loss, found.excess) == (4, 3, 1.0, 1.0, 0.0)
    assert found.selected == pytest.approx(1 / 3)
    assert totals([ROWS[3]]).loss is None
    assert [peak.row.text for peak in highest(ROWS)] == [" shift", "\n", "The"]
    assert (highest(ROWS)[0].before, highest(ROWS)[0].after) == ("The", "\nx")
    other = [replace(one, document="another") for one in ROWS]
    assert highest([*other, *ROWS], 2)[1].before == "The"  # no text of another document


def test_documents_are_left_out_whole() -> None:
    rows = [*ROWS, *(replace(one, document="second") for one in ROWS)]
    assert [len(found) for found, _ in (documents(rows, 4), documents(rows, 8))] == [1, 2]
    assert documents(rows, 7)[1] == 4
    assert len(documents(rows, 1)[0]) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "⁺"), (" ", "·"), ("   ", "···"), (" a", " a"), ("\n", "⏎\n"), ("\t\x1b", "⇥␛"), ("\ufdd0", "\\ufdd0")],
)
def test_no_token_is_without_a_trace(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_the_terminal_shows_colours_underlines_a_legend_and_the_numbers() -> None:
    out = printed(ROWS)
    assert "\x1b[4;38;2;230;231;233;48;2;152;75;10m shift" in out
    assert "\x1b[38;2;230;231;233;48;2;27;100;165mThe" in out
    plain = STYLES.sub("", out)
    assert "The shift⏎\nx" in plain and "⟦" not in plain.split("highest")[0]
    assert "Excess loss: −2.0 nats" in plain
    assert re.search(r"model +1\.000 +1\.000 +\+0\.000 +33\.3 % +3", plain)


def test_a_light_terminal_gets_the_light_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLORFGBG", "0;15")
    assert "\x1b[4;38;2;28;30;33;48;2;247;166;91m shift" in printed(ROWS)


def test_a_pipe_gets_brackets_and_no_colour_code_and_no_line_is_broken() -> None:
    out = printed([*ROWS, row("word " * 60, selected=True)], terminal=False, width=20)
    assert "\x1b" not in out
    assert out.startswith("The⟦ shift⟧⏎\nx⟦word word ") and "⟦" + "word " * 60 + "⟧" in out


def test_two_views_stand_side_by_side() -> None:
    rows = [*ROWS, *(replace(one, arm="other") for one in ROWS)]
    lines = STYLES.sub("", printed(rows)).splitlines()
    assert lines[0].split() == ["model", "other"] and lines[1].split() == ["The", "shift⏎", "The", "shift⏎"]
    assert "Difference" in printed(rows, "difference")


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_hostile_reaches_the_terminal(terminal: bool) -> None:
    hostile = [row(text, document=text, source=text, arm=text, label=text, dynamics=text) for text in HOSTILE]
    rows = [*hostile, *(replace(one, arm=f"another {one.arm}") for one in hostile)]  # two views of each
    for colour in ("excess", "dynamics"):
        out = printed(rows, colour, terminal)
        left = {character for character in STYLES.sub("", out) if unicodedata.category(character) in ("Cc", "Cf", "Cs")}
        assert left == {"\n"}
    assert "[link=https://example.invalid]" in out.replace("\n", "")  # no mark-up either
    assert ":smile:" in out.replace("\n", "")


def test_a_style_is_never_a_texts() -> None:
    """The escape sequences that are printed are those of the same rows with harmless text."""
    harmless = STYLES.findall(printed([row("abc")]))
    assert set(STYLES.findall(printed([row("\x1b[5mabc\x1b[0m")]))) == set(harmless)
