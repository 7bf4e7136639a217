"""A text in the terminal: each token on the colour of one of its quantities, the selected ones underlined."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from rich.console import Console
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from rho.report.html import count, excess, loss, percent
from rho.report.tokens import (
    Panel,
    Scale,
    Section,
    colours,
    documents,
    highest,
    in_line,
    section,
    totals,
)
from rho.rows import TokenRow

OPEN, CLOSE = "⟦", "⟧"  # around what would be underlined, where there is no colour


def show(rows: Sequence[TokenRow], colour: str = "excess", console: Console | None = None) -> None:
    """Print the text, its legend and a summary. No character of the text that controls a terminal gets through.

    Args:
        rows: of one pair of model and reference, or of several, which are shown side by side.
        colour: one of `QUANTITIES`, `dynamics`, or `difference` of two.
        console: where to; standard output if not given. Without a terminal there are no colours, and brackets stand
            for underlines.
    """
    console = console or Console(highlight=False)
    found, _ = documents(rows, len(rows))
    shown = section(colour, found)
    style = _Styles(console)
    for document, panels in shown.documents:
        if len(shown.documents) > 1:
            name = " ".join(filter(None, (document.name, document.source)))
            console.print(Text(in_line(name), "bold"), soft_wrap=True)
        _side_by_side(panels, style, console)
        console.print()
    console.print(_legend(shown, style))
    console.print()
    _summary(rows, console)


class _Styles:
    """How tokens look: on a terminal with the light background that its COLORFGBG tells of, or on a dark one."""

    def __init__(self, console: Console) -> None:
        dark = os.environ.get("COLORFGBG", "").rpartition(";")[2] not in ("7", "15")
        ink = "#e6e7e9" if dark else "#1c1e21"
        self.plain = not console.is_terminal or console.no_color
        neutral = "b10"
        self.of = {
            name: Style() if name == neutral else Style.parse(f"{ink} on {colour}")
            for name, colour in colours(dark).items()
        } | {"n": Style(dim=True)}

    def text(self, panel: Panel) -> Text:
        """A coloured text."""
        text = Text()
        inside = False
        for token in panel.tokens:
            if self.plain and token.underlined != inside:
                text.append(CLOSE if inside else OPEN)
                inside = token.underlined
            text.append(token.text, None if self.plain else self.of[token.colour] + Style(underline=token.underlined))
        return text.append(CLOSE) if inside else text


def _side_by_side(panels: Sequence[Panel], style: _Styles, console: Console) -> None:
    texts = [style.text(panel) for panel in panels]
    names = [Text(in_line(panel.view.name), "bold") for panel in panels if panel.view]
    if len(panels) == 1 or style.plain:
        for number, text in enumerate(texts):
            if len(panels) > 1:
                console.print(names[number], soft_wrap=True)
            console.print(text, soft_wrap=style.plain)
        return
    columns = [Column(name, ratio=1, overflow="fold") for name in names]
    table = Table(*columns, box=None, padding=(0, 1), expand=True)
    table.add_row(*texts)
    console.print(table)


def _legend(shown: Section, style: _Styles) -> Text:
    text = Text(shown.title)
    if not style.plain:
        text.append(": ")
        if isinstance(shown.key, Scale):
            text.append(f"{shown.key.low} ")
            for name in shown.key.colours:
                text.append(" ", style.of[name])
            text.append(f" {shown.key.high}")
        else:
            text.append_text(Text(" ").join(Text(f" {name} ", style.of[key]) for name, key in shown.key.items()))
    text.append(", ")
    text.append(
        f"{OPEN}{shown.underlined}{CLOSE}" if style.plain else shown.underlined, Style(underline=not style.plain)
    )
    return text.append(". ⏎ line end, ⇥ tab, ⁺ same character")


def _summary(rows: Sequence[TokenRow], console: Console) -> None:
    views = {name: [row for row in rows if row.view == name] for name in dict.fromkeys(row.view for row in rows)}
    table = _table("nats per token", "model", "reference", "excess", "selected", "tokens")
    for name, of_view in views.items():
        found = totals(of_view)
        losses = (loss(found.loss), loss(found.ref_loss), excess(found.excess))
        table.add_row(Text(in_line(name)), *losses, percent(found.selected), count(found.scored))
    console.print(table)
    for name, of_view in views.items():
        console.print()
        table = _table(f"highest excess, {in_line(name)}", "model", "reference", "excess")
        for peak in highest(of_view):
            context = Text(_around(peak.before)[-24:].rjust(24), "dim", no_wrap=True, overflow="ellipsis")
            context.append(f"{OPEN}{in_line(peak.row.text)}{CLOSE}", "not dim bold").append(_around(peak.after)[:24])
            table.add_row(context, loss(peak.row.loss), loss(peak.row.ref_loss), excess(peak.row.excess))
        console.print(table)


def _around(text: str) -> str:
    """What stands around a token, with indentation cut short."""
    return re.sub(" {2,}", " ", in_line(text))


def _table(first: str, *numbers: str) -> Table:
    # As `Text`, for in a plain string square brackets would be mark-up.
    columns = [Column(Text(first)), *(Column(name, justify="right", no_wrap=True) for name in numbers)]
    return Table(*columns, box=None, padding=(0, 2, 0, 0))
