"""Sampled completions as a table of plain text, for the terminal and for trackers that show text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import category


def text_table(rows: Sequence[Mapping[str, Any]], width: int = 60) -> str:
    """`rows`, all with the same keys, as aligned columns under their names; "" for none.

    Floats have three decimals; text is on one line, with \\n for a line break, cut to `width` characters.
    """
    if not rows:
        return ""
    columns = [[name, *(_cell(row[name], width) for row in rows)] for name in rows[0]]
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


def _cell(value: Any, width: int) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    # As JSON writes it, without the quotes: no control character can break the table or drive the terminal.
    text = json.dumps(value, ensure_ascii=False)[1:-1].replace('\\"', '"') if isinstance(value, str) else str(value)
    text = "".join(c if c.isprintable() or category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"
