"""Sampled completions as a table of plain text, for the terminal and for trackers that show text."""

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any
from unicodedata import category


def text_table(rows: Sequence[Mapping[str, Any]], width: int = 60) -> str:
    """`rows`, all with the same keys, as aligned columns under their names; "" for none.

    Floats have three decimals; text is on one line, with \\n for a line break, cut to `width` characters. Where one
    would be, the lines that all texts of a column begin with, such as a system prompt, are an ellipsis.
    """
    if not rows:
        return ""
    columns = [
        [name, *(_cell(value, width) for value in _without_common_lines([row[name] for row in rows], width))]
        for name in rows[0]
    ]
    numbers = [all(isinstance(row[name], int | float) for row in rows) for name in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for cells in zip(*columns, strict=True):
        aligned = (
            cell.rjust(size) if number else cell.ljust(size)
            for cell, size, number in zip(cells, widths, numbers, strict=True)
        )
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _without_common_lines(values: list[Any], width: int) -> list[Any]:
    if len(set(values)) < 2 or not all(isinstance(value, str) for value in values) or max(map(len, values)) <= width:
        return values
    lines = [value.split("\n") for value in values]
    common = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*(own[:-1] for own in lines), strict=False))))
    return ["…" + "\n".join(own[common:]) for own in lines] if common else values


def _cell(value: Any, width: int) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    # As JSON writes it, without the quotes: no control character can break the table or drive the terminal.
    text = json.dumps(value, ensure_ascii=False)[1:-1].replace('\\"', '"') if isinstance(value, str) else str(value)
    text = "".join(c if c.isprintable() or category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"
