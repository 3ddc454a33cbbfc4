"""Initial instructions from a user's file: plain lines, or JSON rows as datasets have them.

    {"instruction"}                        followed by Alpaca's "input", if there is one
    {"messages"} or {"conversations"}      the user's first turn
Any other file has one instruction per line. Repeated instructions are read once.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.json_text import parse_json
from synth.near_duplicates import normalise

WANTED = 'write {"instruction": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
USERS = ("user", "human")


def read_instructions(path: str | Path) -> list[str]:
    """The instructions of a file, in order. Raises UserError with file and line for an unreadable one."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--instructions {path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--instructions {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    found: dict[str, str] = {}
    for place, row in _rows(path, text):
        instruction = row if isinstance(row, str) else _instruction(row, place)
        found.setdefault(normalise(instruction), instruction)
    if not found:
        raise UserError(f"--instructions {path} holds no instruction; write one per line, or JSON rows")
    return list(found.values())


def _rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(place, line or parsed row)."""
    if path.suffix == ".json":
        content = _parsed(text, str(path))
        if not isinstance(content, list):
            raise UserError(f"--instructions {path} is not a list of rows; {WANTED}")
        yield from ((f"{path}, row {n}", {} if isinstance(row, str) else row) for n, row in enumerate(content, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _parsed(line, place) if path.suffix == ".jsonl" else line.strip()


def _parsed(text: str, place: str) -> Any:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(f"{place} is not valid JSON ({error}); {WANTED}") from None
    return {} if isinstance(found, str) else found


def _instruction(row: Any, place: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{place} is not an object; {WANTED}")
    parts: list[Any] = [row.get("instruction"), row.get("input") or ""]
    if "instruction" not in row:
        turns = row.get("messages", row.get("conversations"))
        turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        said = [turn.get("content", turn.get("value")) for turn in turns if turn.get("role", turn.get("from")) in USERS]
        parts = said[:1]
    if not parts or not all(isinstance(part, str) for part in parts) or not parts[0].strip():
        raise UserError(f"{place} has the keys {sorted(row)} and no instruction as a string; {WANTED}")
    return "\n\n".join(part.strip() for part in parts if part.strip())
