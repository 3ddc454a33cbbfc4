"""docs/sources.md names files, flags and tests that exist, and every row of it that claims something has a test."""

import re
from pathlib import Path

import pytest

from tests.scripts import ROOT

PAGE = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| the source |")]
NAMED = re.compile(r"`(\w+): (test_\w+)`$")
WITHOUT = "the published results"  # which were not reproduced


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_a_test_that_exists(row):
    source, _, test = cells(row)
    if not test:
        assert source.startswith(WITHOUT)
        return
    found = NAMED.fullmatch(test)
    assert found, test
    code = (ROOT / "tests" / f"test_{found[1]}.py").read_text(encoding="utf-8")
    assert re.search(rf"^def {found[2]}\(", code, flags=re.MULTILINE), found[0]


def test_why_nothing_is_installed_is_on_the_index():
    """`pip install -e .` would need a project in pyproject.toml; there is none, and the page says what instead."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert "`pip install -e .` is not supported" in index
    assert "PYTHONPATH=/path/to/checkout python -m synth.run" in index
    assert "[project]" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_file_that_is_ours_exists():
    ours = {path for row in ROWS for path in re.findall(r"`?((?:synth|data|tests)/[\w/.]+\w)", cells(row)[1])}
    ours |= {name for row in ROWS for name in re.findall(r"`(\w+\.py)`", cells(row)[1])} - {"file.py"}
    assert len(ours) > 10 and [path for path in ours if not (ROOT / path).exists()] == []


def test_every_flag_that_is_ours_is_on_a_page():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in Path(ROOT / "docs").glob("*.md"))
    tables = set(re.findall(r"`(--[\w-]+)`", pages.replace(PAGE, "")))
    flags = {flag for row in ROWS for flag in re.findall(r"(--[a-z][\w-]+)", cells(row)[1])}
    assert len(flags) > 25 and [flag for flag in sorted(flags) if flag.replace("_", "-") not in tables] == []
