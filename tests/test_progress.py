"""Progress: a plain line log without a terminal, a bar with one."""

import pytest

from rho import progress
from rho.progress import say, track


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_messages_go_to_stderr_and_leave_stdout_to_results(capsys):
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_without_a_terminal_plain_lines_tell_share_rate_and_time_left(clock, capsys):
    with track("score", total=1000, done=200) as advance:
        clock(10)
        advance(400)
        clock(1)
        advance(40)
        clock(1)
    assert capsys.readouterr().err.splitlines() == [
        "score ...",
        "score: 60% of 1,000 tokens, 40 tokens/s, 10 s left",
        "score: done, 640 tokens, 37 tokens/s, 12.0 s",
    ]


def test_an_unknown_total_is_counted_without_time_left(clock, capsys):
    with track("read", total=None, unit="characters") as advance:
        clock(10)
        advance(50)
    assert "read: 50 characters, 5 characters/s\n" in capsys.readouterr().err


def test_an_error_inside_is_not_reported_as_done(capsys):
    with pytest.raises(KeyboardInterrupt), track("train", total=10):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "train ...\n"


@pytest.mark.parametrize("total", [10, None])
def test_on_a_terminal_a_bar_shows_the_rate(monkeypatch, capsys, total):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with track("train", total, done=2) as advance:
        advance(8)
    shown = capsys.readouterr().err
    assert "train" in shown
    assert "tokens/s" in shown
