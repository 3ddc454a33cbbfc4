"""Progress: a bar on a terminal that is gone in the end, plain lines elsewhere."""

import io
import sys

import pytest

from common import progress as module
from common.progress import PlainProgress, duration, end_bars, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    """In the test itself: pytest sets stderr anew after the fixtures."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    return terminal


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_plain_line_now_and_then(clock, capsys):
    with progress(600, "SFT", "step", done=100) as bar:
        assert isinstance(bar, PlainProgress)
        for _ in range(120):
            clock[0] += 1.0
            bar.update()
            bar.set_postfix_str("9 tokens/s")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "SFT: 160 of 600 steps, 7 min left, 9 tokens/s", "SFT: 220 of 600 steps, 6 min left, 9 tokens/s",
    ]  # fmt: skip


def test_nothing_is_said_of_the_time_left_by_the_first_of_many_done_side_by_side(clock, capsys):
    with progress(200, "base model", "rollout") as bar:
        for seconds, count in ((120.0, 1), (60.0, 4)):
            clock[0] += seconds
            bar.update(count)
    assert capsys.readouterr().err.splitlines() == [
        "base model: 1 of 200 rollouts", "base model: 5 of 200 rollouts, 1 h 57 min left",
    ]  # fmt: skip


def test_a_terminal_gets_a_bar_that_leaves_nothing(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with progress(3, "verify", "answer") as bar:
        bar.update(3)
    said = terminal.getvalue()
    assert "verify: 0 of 3 answers |" in said and "\n" not in said
    assert said.rpartition("\r")[0].rpartition("\r")[2].strip() == ""  # the last that was drawn is blank


def test_where_a_run_fails_the_bar_ends_where_it_stands(monkeypatch):
    terminal = open_terminal(monkeypatch)
    bar = progress(10, "SFT", "step")
    assert not isinstance(bar, PlainProgress)
    bar.update(4)
    bar.refresh()
    end_bars()
    print("error: a mistake", file=sys.stderr)
    last, error = terminal.getvalue().rsplit("\r", 1)[-1].split("\n")[:2]
    assert last.startswith("SFT: 4 of 10 steps |") and error == "error: a mistake"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99.4, "99 s"), (119, "2 min"), (3599, "1 h 00 min"), (3900, "1 h 05 min")]
)
def test_durations_are_said_as_a_person_says_them(seconds, text):
    assert duration(seconds) == text
