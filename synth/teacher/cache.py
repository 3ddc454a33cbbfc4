"""A teacher's answers in one SQLite file: nothing received once is asked for again.

A response is committed before `put` returns, so a kill at any moment loses only what was in flight. Refusals,
truncated and empty answers are kept under their own status, never as "ok": a restart neither pays for them again nor
takes them for answers. What never arrived is not stored, nor are prompts (only their hash) and API keys. The file
cannot be shared over a network.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError

FORMAT = 1
TABLES = """
CREATE TABLE IF NOT EXISTS responses (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


class Stored(NamedTuple):
    """One response as it was received. status: "ok", "refusal", "truncated", "empty" or "malformed"."""

    text: str
    status: str
    reason: str
    prompt_tokens: int
    completion_tokens: int


def cache_key(
    endpoint: str, model: str, messages: list[dict], parameters: dict, schema: dict | None, sample: int
) -> str:
    """SHA-256 of everything that an answer depends on. sample: index of one of several otherwise equal calls."""
    content = [endpoint, model, messages, parameters, schema, sample]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Cache:
    """The file at `path`, created if missing; open until `close` or the end of a `with` block.

    wait: seconds to wait for another process that is writing. Several processes may use one file.
    Raises UserError, here and in every method, if the file is no cache, is damaged, cannot grow or stays locked.
    """

    def __init__(self, path: str | Path, wait: float = 5.0):
        self.path = Path(path)
        with self._one_line():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open(wait)

    def _open(self, wait: float) -> None:
        self._db = sqlite3.connect(self.path, timeout=wait, isolation_level=None)
        try:
            found, tables = self._db.execute(
                "SELECT user_version, (SELECT COUNT(*) FROM sqlite_master) FROM pragma_user_version"
            ).fetchone()
            if found != (FORMAT if tables else 0):
                raise UserError(f"{self.path} is a database, but not a cache of format {FORMAT}; name another file")
            self._db.execute("PRAGMA journal_mode = WAL")
            # Survives a kill of the process; a power failure may lose the last commits, never the file.
            self._db.execute("PRAGMA synchronous = NORMAL")
            if found != FORMAT:
                self._db.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")
        except BaseException:
            self._db.close()
            raise

    def get(self, key: str) -> Stored | None:
        with self._one_line():
            columns = ", ".join(Stored._fields)
            row = self._db.execute(f"SELECT {columns} FROM responses WHERE key = ?", (key,)).fetchone()
        return Stored(*row) if row else None

    def put(self, key: str, stored: Stored) -> None:
        """Store a response. If another process was first, its response stays."""
        with self._one_line():
            self._db.execute("INSERT OR IGNORE INTO responses VALUES (?, ?, ?, ?, ?, ?)", (key, *stored))

    def note(self, name: str) -> str | None:
        """What was noted under `name`, such as a capability of an endpoint."""
        with self._one_line():
            row = self._db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def set_note(self, name: str, value: str) -> None:
        with self._one_line():
            self._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value))

    def counts(self) -> dict[str, int]:
        """The number of stored responses by status."""
        with self._one_line():
            return dict(self._db.execute("SELECT status, COUNT(*) FROM responses GROUP BY status ORDER BY status"))

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the cache {self.path} cannot be created ({error.strerror}); choose another path"
            ) from None
        except sqlite3.Error as error:
            remedy = "name another file, or move this one away to start over"
            if "locked" in str(error) or "busy" in str(error):
                remedy = "another process is writing to it: wait for it to end, or name another file"
            raise UserError(f"the cache {self.path} cannot be used ({error}); {remedy}") from None
