"""Rows as they pass from stage to stage: one file per stage, dropped rows with a reason, a summary line.

A row is a sample: id, input, output, origin ("generated", "harder", "easier"), parent and passage (ids or null),
votes, margin, rollouts, solved, pass_rate. A dropped row stays in its stage's file, with "dropped" (a reason that
can be counted) and "detail"; the next stage reads only the rows that were kept.
"""

import fcntl
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import atomic_file, sweep_all
from data.records import read_rows

StageRow = dict[str, Any]
REQUIRED = ("id", "input", "output")


def new_row(
    row_id: str, text: str, output: str, origin: str, parent: str | None = None, passage: str | None = None
) -> StageRow:
    """A sample that has not been voted on or tried yet."""
    row = {"id": row_id, "input": text, "output": output, "origin": origin, "parent": parent, "passage": passage}
    return {**row, "votes": {}, "margin": None, "rollouts": 0, "solved": 0, "pass_rate": None}


def drop(row: StageRow, reason: str, detail: str = "") -> StageRow:
    """The row, marked as dropped. reason: a category, as reasons are counted; detail: specific to this row."""
    return {**row, "dropped": reason, "detail": detail}


def kept(rows: Iterable[StageRow]) -> list[StageRow]:
    return [row for row in rows if "dropped" not in row]


def roots_of(rows: Iterable[StageRow]) -> dict[str, str]:
    """The sample that each row was rewritten from in the end, by id: its own id if it is no rewriting."""
    parents = {row["id"]: row.get("parent") for row in rows}
    roots = {}
    for name in parents:
        root, seen = name, {name}
        while (parent := parents.get(root)) and parent not in seen:
            root = parent
            seen.add(root)
        roots[name] = root
    return roots


def summary(stage: str, rows: Sequence[StageRow]) -> str:
    """One line: how many rows were kept, and how many dropped for each reason, most frequent first."""
    reasons = Counter(row["dropped"] for row in rows if "dropped" in row)
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda r: (-r[1], r[0])))
    line = f"{stage}: kept {len(rows) - reasons.total()} of {len(rows)}"
    return f"{line}; dropped: {listed}" if listed else line


def write_rows(path: str | Path, rows: Iterable[StageRow]) -> None:
    """Write a `.jsonl`, atomically."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def load_rows(path: str | Path) -> list[StageRow]:
    """The rows of a stage's file, dropped ones included. A user's own file needs only id, input and output.

    Raises UserError with file and line for a row that lacks one of these.
    """
    rows = read_rows(path, [REQUIRED])
    return [{**new_row(row["id"], row["input"], row["output"], "generated"), **row} for row in rows]


async def stage(folder: str | Path, name: str, make: Callable[[], Awaitable[list[StageRow]]]) -> list[StageRow]:
    """The rows of a stage: from FOLDER/NAME.jsonl if it finished before, else made and written there.

    Prints the stage's summary. A folder belongs to one set of flags; other flags need another folder.
    """
    path = Path(folder) / f"{name}.jsonl"
    if path.is_file():
        rows = load_rows(path) if path.stat().st_size else []  # the stage may have had nothing to do
        print(f"{summary(name, rows)} (finished before: {path})", flush=True)
        return rows
    rows = await make()
    write_rows(path, rows)
    print(summary(name, rows), flush=True)
    return rows


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Lock a run folder for this process. Waits for another, even for a training whose parent was killed.

    Then removes what killed ones left in the folder. Yields the lock's file descriptor.
    """
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is at work in {folder}: waiting for it to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        sweep_all(folder)
        yield lock.fileno()
