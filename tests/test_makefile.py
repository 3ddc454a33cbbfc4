"""The Makefile: a Python that will not do is named in one line, and nothing in it is newer than macOS's make 3.81."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
PYTHONS = {
    "too old": ('*version_info*) exit 1;; --version) echo "Python 3.9.6";;', "3.9.6, but 3.11 or newer is needed"),
    "Intel or Rosetta": (
        "*platform*) exit 1;;",
        "is an Intel build or runs under Rosetta, and mlx needs one for",
    ),
    "without venv": ('"-m venv .venv") exit 1;;', "cannot make a virtual environment"),
}
NEWER = {  # than 3.81, by the release notes of 3.82 to 4.4
    "private": r"^\s*private\s",
    "undefine": r"^\s*undefine\s",
    ".ONESHELL": r"\.ONESHELL",
    "!=": r"^[A-Za-z_]+\s*!=",
    "::=": r"::=",
    "$(file": r"\$\(file ",
    "$(guile": r"\$\(guile ",
    "$(let": r"\$\(let ",
    "grouped targets": r"&:",
    "define with =": r"^define .*=",
}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("case", [*PYTHONS, "not there"])
def test_a_python_that_will_not_do_is_one_line(case, tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "requirements.txt").touch()
    python, says = tmp_path / "python", "is not found; install Python 3.11 or newer"
    if case in PYTHONS:
        cases, says = PYTHONS[case]
        python.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\n', encoding="utf-8")
        python.chmod(0o755)
    made = subprocess.run(
        ["make", "-s", f"PYTHON={python}", "setup"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    first, *rest = made.stderr.splitlines()
    assert made.returncode == 2 and first.startswith("error: ") and says in first and str(python) in first
    assert all(line.startswith("make") for line in rest)  # its own last word
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("feature", NEWER)
def test_nothing_is_newer_than_make_3_81(feature):
    assert not re.search(NEWER[feature], MAKEFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
