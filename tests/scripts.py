"""Calling the scripts' main functions in this process, since starting a process takes seconds."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from common.cli import run
from common.parser import Parser

ROOT = Path(__file__).resolve().parent.parent


class _Captured(Exception):
    """Carries the parser out of a function that would go on to parse."""


def parser_of(parse_args: Callable) -> argparse.ArgumentParser:
    """The parser that `parse_args` builds."""

    def capture(self, *_, **__):
        raise _Captured(self)

    with mock.patch.object(Parser, "parse_args", capture):
        try:
            parse_args()
        except _Captured as captured:
            return captured.args[0]
    raise AssertionError(f"{parse_args} parsed nothing")


def with_words(function: Callable, *words: object):
    """Call `function` with `words` as its command line."""
    with mock.patch.object(sys, "argv", ["script.py", *map(str, words)]):
        return function()


def call(main: Callable[[], None], *words: object) -> None:
    """Run a script's main."""
    with_words(main, *words)


def fails(capsys: pytest.CaptureFixture, main: Callable[[], Any], *words: object) -> str:
    """Run a script's main; assert that it exits with code 2 and one line on stderr, and return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        with_words(lambda: run(main), *words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    return error.removeprefix("error: ").rstrip("\n")


def read_samples(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's samples.jsonl."""
    path = Path(run) / "samples.jsonl"
    # Not splitlines, which also ends a line at characters that JSON leaves as they are.
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines if line]
