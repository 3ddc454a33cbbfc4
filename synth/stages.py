"""What every stage shares: rows that say why they were dropped, one file a stage, its summary, questions with a bar.

A row is a sample: id, input, output, origin ("generated", "harder", "easier"), parent and passage (ids or null),
votes, margin, rollouts, solved, pass_rate. A dropped one stays in its stage's file, with "dropped" (a reason that
can be counted) and "detail"; the next stage reads only the kept. Leaves out what a stage does.

    python -m pytest tests/test_generate.py -k "stage or row"
"""

import fcntl
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from common.files import atomic_file
from data.records import read_rows
from synth.teacher.completions import Ask, Reply

Row = dict[str, Any]
REQUIRED = ("id", "input", "output")


class Asker(Protocol):
    """What a stage needs of a teacher (synth.teacher.client.Teacher)."""

    async def ask_all(self, asks: Sequence[Ask], progress: Callable[[Reply], object] | None = None) -> list[Reply]: ...


def new_row(
    row_id: str, text: str, output: str, origin: str, parent: str | None = None, passage: str | None = None
) -> Row:
    """A sample that was not yet voted on or tried."""
    row = {"id": row_id, "input": text, "output": output, "origin": origin, "parent": parent, "passage": passage}
    return {**row, "votes": {}, "margin": None, "rollouts": 0, "solved": 0, "pass_rate": None}


def drop(row: Row, reason: str, detail: str = "") -> Row:
    """The row, marked as dropped. reason: one of few, as they are counted; detail: what is particular to this row."""
    return {**row, "dropped": reason, "detail": detail}


def kept(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "dropped" not in row]


def summary(stage: str, rows: Sequence[Row]) -> str:
    """One line: how many rows were kept, and how many were dropped for which reason, the most frequent first."""
    reasons = Counter(row["dropped"] for row in rows if "dropped" in row)
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda r: (-r[1], r[0])))
    line = f"{stage}: kept {len(rows) - reasons.total()} of {len(rows)}"
    return f"{line}; dropped: {listed}" if listed else line


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write a `.jsonl`, atomically."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def load_rows(path: str | Path) -> list[Row]:
    """The rows of a stage's file, dropped ones included. A user's own file needs id, input and output only.

    Raises UserError with file and line at a row that lacks one of these.
    """
    rows = read_rows(path, [REQUIRED])
    return [{**new_row(row["id"], row["input"], row["output"], "generated"), **row} for row in rows]


async def stage(folder: str | Path, name: str, make: Callable[[], Awaitable[list[Row]]]) -> list[Row]:
    """The rows of a stage: from FOLDER/NAME.jsonl if it was finished before, else made and written there.

    Prints the stage's summary. A folder belongs to one set of flags: who changes them takes another folder.
    """
    path = Path(folder) / f"{name}.jsonl"
    if path.is_file():
        rows = load_rows(path) if path.stat().st_size else []  # a stage may have had nothing to do
        print(f"{summary(name, rows)} (finished before: {path})", flush=True)
        return rows
    rows = await make()
    write_rows(path, rows)
    print(summary(name, rows), flush=True)
    return rows


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """One process at a time in a run folder: waits for another, even for a training whose starter was killed."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is at work in {folder}: waiting for it to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


async def ask_all(teacher: Asker, asks: Sequence[Ask], label: str) -> list[Reply]:
    """The replies in order, with a bar on a terminal: how many are in, how fast, how long the rest will take."""
    if not asks:
        return []
    with tqdm(total=len(asks), desc=label, unit="answer", disable=None) as bar:
        return await teacher.ask_all(asks, lambda _: bar.update())
