"""Writing files and folders: a stop at any moment leaves the old content or the new, whole, and nothing is replaced
but what is ours to replace.

There is no locking here: if two processes write the same path, the later one wins.
"""

import ctypes
import errno
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from common.errors import UserError, reason
from common.json_text import parse_json

REMEDIES = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n 4096)",
    errno.ENAMETOOLONG: "choose a shorter name",
}
RENAMES = {"Linux": ("renameat2", 2), "Darwin": ("renameatx_np", 2)}  # RENAME_EXCHANGE, RENAME_SWAP
AT_FDCWD = {"Linux": -100, "Darwin": -2}


class Unwritable(UserError):
    """A path that cannot be written. error: what the system or a writer raised."""

    def __init__(self, path: str | Path, error: Exception):
        self.why, self.remedy = why_and_remedy(error)
        super().__init__(f"{path} cannot be written ({self.why}); {self.remedy}")


def why_and_remedy(error: Exception) -> tuple[str, str]:
    """The reason for a failed write in a few words, and what can be done about it."""
    if isinstance(error, Unwritable):
        return error.why, error.remedy
    why = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError):
        return error.strerror or why, REMEDIES.get(error.errno or 0, "choose another path")
    return why, "check that the disk has room, or choose another path"


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Say in one line that `path` cannot be written, whatever the system, mlx or safetensors raise."""
    try:
        yield
    except (OSError, SafetensorError, Unwritable) as error:
        raise Unwritable(path, error) from None
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # of mlx's writers, and no RecursionError or the like
            raise
        raise Unwritable(path, error) from None


class Kind(NamedTuple):
    """A kind of folder that we write. marker: a JSON file that each holds; files: patterns of the names that are ours.

    ours: whether a marker's content is by us, where others write files of that name.
    """

    marker: str
    files: tuple[str, ...]
    ours: Callable[[Any], bool] = lambda content: True

    def is_at(self, folder: Path) -> bool:
        """Whether `folder` is one of this kind."""
        try:
            return self.ours(json.loads((folder / self.marker).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError, RecursionError):
            return False

    def others(self, folder: Path) -> list[Path]:
        """What in `folder` is not ours."""
        return [child for child in folder.iterdir() if not any(fnmatch(child.name, own) for own in self.files)]


def user_cache() -> Path:
    """The user's cache folder, for files that can be recreated. It may not exist yet."""
    in_home = "~/Library/Caches" if platform.system() == "Darwin" else "~/.cache"
    return expanded(os.environ.get("XDG_CACHE_HOME") or in_home)


def expanded(path: str | Path) -> Path:
    """The path with its `~` expanded. Raises UserError for a user who does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path} names a home folder that does not exist; write the whole path") from None


def check_file(path: str | Path) -> None:
    """Raise UserError unless a file can be written to `path`, in place of a regular file or of nothing.

    A link, a device or a pipe is never replaced. Folders that are missing are made, and removed again.
    """
    path = expanded(path)
    with writing(path):
        _check_kind(path, stat.S_ISREG, "file")
        _try(_absolute(path))


def check_replaceable(path: str | Path, kind: Kind) -> None:
    """Raise UserError unless a folder of this kind can be written to `path`, in place of such a one or of nothing."""
    path = expanded(path)
    with writing(path):
        _check_kind(path, stat.S_ISDIR, "folder")
        if path.exists() and any(path.iterdir()) and not kind.is_at(path):
            raise UserError(f"{path} holds other files (no {kind.marker} of ours); choose another name")
        _try(_absolute(path))


def say_replaced(path: str | Path) -> None:
    """Print what a later save to `path` will replace, if there is something; `path` was checked before."""
    path = expanded(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        print(f"{path}, written {written}, will be replaced at the end")


def _absolute(path: str | Path) -> Path:
    """With a last part that is a name, unlike "." and "..", and without following a link."""
    return Path(os.path.abspath(path))


def _check_kind(path: Path, wanted: Callable[[int], bool], name: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not wanted(mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe"}
        found = kinds.get(stat.S_IFMT(mode), "a device or socket")
        raise UserError(f"{path} is {found}, where a {name} would be written; choose another name")


def _try(path: Path) -> None:
    """Make what a writer of `path` makes first, and remove it."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        with temporary_beside(path) as temporary:
            temporary.write_bytes(b"tried")
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a free path of the same name on the same disk, in a new folder of ours, which is then removed.

    What killed processes left for the same path is removed first. A folder is made or refused as one, so a planted file
    or link is never opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        yield folder / path.name
    finally:
        _clear(folder, path.name)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the temporary folders that killed processes left in `folder`. name: of one target only."""
    for child in folder.glob(".*.tmp"):
        found = re.fullmatch(r"\.(.+)\.(\d+)\.tmp", child.name)
        if found and name in (None, found[1]) and child.is_dir() and not child.is_symlink():
            try:
                inside = {file.name for file in child.iterdir()}
            except FileNotFoundError:  # its process has just removed it
                continue
            if inside <= {found[1], f"{found[1]}.old", child.name} and not _is_running(int(found[2])):
                _clear(child, found[1])


def sweep_all(folder: Path) -> None:
    """`sweep` in `folder` and in all folders below it."""
    for place in [folder, *(child for child in folder.rglob("*") if child.is_dir() and not child.is_symlink())]:
        if place.is_dir():
            sweep(place)


def restore_old(path: Path) -> None:
    """Put back the folder `path` where a process was killed between moving it aside and replacing it."""
    if not os.path.lexists(path) and path.parent.is_dir():
        sweep(path.parent, path.name)


def _is_running(process: int) -> bool:
    """Whether another process has this number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _clear(folder: Path, name: str) -> None:
    """Remove a temporary folder; an old version that was moved into it and not yet replaced goes back first."""
    old, path = folder / f"{name}.old", folder.parent / name
    if old.exists() and not path.exists():
        os.rename(old, path)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path of the same name; rename it to `path` if the block succeeds.

    Raises Unwritable, and UserError where `path` is no regular file.
    """
    path = expanded(path)
    with writing(path):
        _check_kind(path, stat.S_ISREG, "file")
        with temporary_beside(_absolute(path)) as temporary:
            yield temporary
            os.replace(temporary, path)


@contextmanager
def atomic_folder(path: str | Path, kind: Kind) -> Iterator[Path]:
    """Yield a new temporary folder; if the block succeeds, it takes the place of `path` at once.

    What `path` held and is not ours (kind.files) stays in it, unless a new file has its name. Raises Unwritable, and
    UserError as `check_replaceable` does.
    """
    check_replaceable(path, kind)
    path = expanded(path)
    with writing(path), temporary_beside(path := _absolute(path)) as temporary:
        temporary.mkdir()
        yield temporary
        if not path.exists():
            os.rename(temporary, path)
            return
        for other in kind.others(path):
            if not os.path.lexists(temporary / other.name):
                _link(other, temporary / other.name)
        _exchange(temporary, path)


def _link(source: Path, target: Path) -> None:
    """The same file or folder under a second name; a copy where the disk has no hard links."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=link)
    else:
        link(str(source), str(target))


def _exchange(new: Path, path: Path) -> None:
    """Exchange two folders, in one call where the system and the disk can."""
    name, flag = RENAMES.get(platform.system(), ("", 0))
    call = getattr(ctypes.CDLL(None), name, None) if name else None
    at = AT_FDCWD.get(platform.system(), 0)
    if call is not None and call(at, os.fsencode(new), at, os.fsencode(path), flag) == 0:
        return
    # A kill between these two leaves the old folder where `sweep` finds it.
    os.rename(path, new.with_name(f"{new.name}.old"))
    os.rename(new, path)


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically. Raises ValueError for non-finite floats."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises UserError if it is missing or malformed."""
    path = Path(path)
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        why = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} is not valid JSON ({why}); restore it or recreate it") from None


@contextmanager
def reading(path: str | Path, remedy: str) -> Iterator[None]:
    """Say in one line that `path` cannot be read, whatever the system, mlx, NumPy or safetensors raise for its content.

    The block calls libraries only.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (zipfile, NumPy, mlx and safetensors have many types of their own)
        raise UserError(f"{path} cannot be read ({reason(error)}); {remedy}") from None
