"""Progress with rate and time left: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 5.0  # between two plain lines

Advance = Callable[[int], None]


@contextmanager
def track(
    what: str, total: int | None, done: int = 0, unit: str = "tokens", note: Callable[[], str] = str
) -> Iterator[Advance]:
    """Show how `what` gets on; call the result with each finished number of units.

    Args:
        what: a few words for the user.
        total: units in all; None where it is not known.
        done: units that an earlier, interrupted run finished.
        unit: what is counted.
        note: gives a few words more, asked for every few seconds.
    """
    show = _bar if sys.stderr.isatty() else _lines
    with show(what, total, done, unit, note) as advance:
        yield advance


@contextmanager
def _bar(what: str, total: int | None, done: int, unit: str, note: Callable[[], str]) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total, completed=done, rate="", note="")
        started = last = time.monotonic()
        since = 0

        def advance(units: int) -> None:
            nonlocal since, last
            since += units
            progress.update(task, advance=units, rate=f"{_rate(since, started):,.0f} {unit}/s")
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                progress.update(task, note=note())

        yield advance


@contextmanager
def _lines(what: str, total: int | None, done: int, unit: str, note: Callable[[], str]) -> Iterator[Advance]:
    started = last = time.monotonic()
    since = 0
    say(f"{what} ...")

    def advance(units: int) -> None:
        nonlocal since, last
        since += units
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            parts = (_amount(done + since, total, unit), _left(since, started, total, done, unit), note())
            say(f"{what}: {', '.join(filter(None, parts))}")

    yield advance
    rate, seconds = f"{_rate(since, started):,.0f} {unit}/s", f"{time.monotonic() - started:.1f} s"
    parts = ("done", f"{done + since:,} {unit}", rate, seconds, note())
    say(f"{what}: {', '.join(filter(None, parts))}")


def say(line: str) -> None:
    """A line for the user, on stderr: stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def _rate(units: int, started: float) -> float:
    return units / max(time.monotonic() - started, 1e-9)


def _amount(units: int, total: int | None, unit: str) -> str:
    return f"{units:,} {unit}" if total is None else f"{units / max(total, 1):.0%} of {total:,} {unit}"


def _left(since: int, started: float, total: int | None, done: int, unit: str) -> str:
    rate = _rate(since, started)
    text = f"{rate:,.0f} {unit}/s"
    return text if total is None or rate == 0 else f"{text}, {max(total - done - since, 0) / rate:.0f} s left"
