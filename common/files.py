"""Atomic writes: an interruption at any moment leaves either the old content or the new, never a mixture.

There is no locking: if two processes write the same path, the later one wins.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError


def user_cache() -> Path:
    """The user's cache folder, for files that can be recreated. It may not exist yet."""
    in_home = "~/Library/Caches" if platform.system() == "Darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or in_home).expanduser()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` if the block succeeds.

    The temporary name keeps the suffix, because some writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: str | Path, marker: str) -> None:
    """Raise UserError if writing a folder at `path` would destroy something other than a folder of the same kind.

    marker: a file that every folder of this kind holds, such as `config.json` for a model.
    """
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path} is a file, where a folder would be written; choose another name")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).is_file():
        raise UserError(f"{path} holds other files (no {marker}) and would be replaced; choose another name")


@contextmanager
def atomic_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """Yield a fresh temporary folder beside `path`; if the block succeeds, it replaces `path` as a whole.

    A folder cannot be renamed over a non-empty one in one call, so the old one is first moved aside and deleted
    afterwards. A kill in between leaves it beside `path` as `.NAME.old`, which the next write removes.
    Raises UserError as `check_replaceable(path, marker)` does.
    """
    path = Path(os.path.abspath(path))
    check_replaceable(path, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            os.rename(path, aside)
        os.rename(temporary, path)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically. Raises ValueError for non-finite floats."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises UserError if it is missing or malformed."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it or recreate it") from None
