"""The README against the code: its flag tables, and the flags, files and commands that it names."""

import importlib
import re
import shlex
import sys

from tests.flag_tables import PARSERS, README, with_tables

import pytest

TEXT = README.read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ +python (\S+\.py .*)$", TEXT, flags=re.MULTILINE)


def test_the_flag_tables_are_those_of_the_parsers():
    assert with_tables(TEXT) == TEXT, "run: python -m tests.flag_tables"
    assert set(re.findall(r"<!-- flags: (\S+) -->", TEXT)) == set(PARSERS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_its_script_takes(command, monkeypatch):
    script, *words = shlex.split(command, comments=True)
    assert (README.parent / script).is_file()
    if script.startswith("benchmarks/"):
        monkeypatch.setattr(sys, "argv", [script, *words])
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_args()
        return
    if script == "pytorch_ppo_training.py":
        words = [word for word in words if word not in ("--device", "cuda")]
        script = "ppo_training.py"
    PARSERS[script]().parse_args(words)


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 10
