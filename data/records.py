"""Reading and validating `.jsonl`: what a user's rows may look like, and where they are wrong.

A row is one of
    {"text"}                              plain text
    {"prompt", "completion"}              trained on the completion only
    {"text", "reward"}                    for a reward model: any two rows with unequal rewards make a pair
    {"chosen", "rejected"} or with "prompt"   preference pairs
    {"prompt"} or {"prompt", "answer"}    prompts for PPO
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError

Row = dict[str, Any]


def split_path(folder: str | Path, base: str, split: str) -> Path:
    """The file of a split, `FOLDER/BASEsplit.jsonl`. Raises UserError that lists what the folder has instead."""
    folder = Path(folder)
    path = folder / f"{base}{split}.jsonl"
    if path.is_file():
        return path
    if not folder.is_dir():
        raise UserError(f"--data {folder} is no folder; name the one that holds {base}{split}.jsonl")
    bases = sorted(p.name.removesuffix(f"{split}.jsonl") for p in folder.glob(f"*{split}.jsonl"))
    found = f"there are the bases {', '.join(map(repr, bases))}" if bases else "there is none for any base"
    raise UserError(f"{path} does not exist; {found}: set --data and --data-base")


def read_rows(path: str | Path, required: Sequence[Sequence[str]]) -> list[Row]:
    """The rows of a `.jsonl` file, each of which must have all keys of at least one alternative in `required`.

    Blank lines are skipped. Raises UserError with file and line number at the first row that does not fit, and where
    the file is missing or has no row.
    """
    path = Path(path)
    try:
        # Not splitlines(), which also breaks at U+2028 and others that a JSON string may hold as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    rows = [_row(line, f"{path}:{n}", required) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no rows; each line is a JSON object such as {_example(required[0])}")
    return rows


def _row(line: str, place: str, required: Sequence[Sequence[str]]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not valid JSON ({error}); write one object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{place} is {type(row).__name__}, not an object; write {_example(required[0])}")
    keys = next((keys for keys in required if all(key in row for key in keys)), None)
    if keys is None:
        wanted = " or ".join(_example(keys) for keys in required)
        raise UserError(f"{place} has the keys {sorted(row)}; write {wanted}")
    for key in keys:
        if key == "reward":
            row[key] = _number(row[key], place)
        elif not isinstance(row[key], str):
            raise UserError(f"{place} has {key!r} of type {type(row[key]).__name__}; it has to be a string")
    return row


def _number(value: Any, place: str) -> float:
    """A reward as a finite float; "0.9" and 0.9 are the same number."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{place} has the reward {value!r:.80}; it has to be a finite number")
    return number


def _example(keys: Sequence[str]) -> str:
    return json.dumps({key: 1.0 if key == "reward" else "..." for key in keys})
