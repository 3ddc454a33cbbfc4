"""A run's folder while it trains, and its checkpoints, for MLX and PyTorch.

    RUN/lock                              held by the process that trains
    RUN/checkpoints/000200/state.json     the step, and what the run adds to it
    RUN/best/000150/                      with --save-best: the adapter of the best evaluation so far

What a checkpoint holds: training.checkpoint, training.torch_checkpoint. Each is written under a temporary name and
renamed, so a folder with a number is complete.
"""

import argparse
import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

from pydantic import Field

from common.errors import UserError
from common.files import Kind, atomic_folder, check_file, expanded, sweep_all, write_json, writing
from common.schemas import Schema, read_as
from training.flags import default_output_dir
from training.metrics import METRICS, SAMPLES, say_if_another_blas, start_run_folder
from training.ranks import Ranks

STATE_FILE, OPTIMIZER_FILE = "state.json", "optimizer.safetensors"
CHECKPOINT = Kind(STATE_FILE, ("adapter", "*.safetensors", STATE_FILE))
KEPT = 2  # newest checkpoints, by default
DAMAGED = "resume from an earlier checkpoint"


class CheckpointState(Schema):
    """state.json, to which each kind of run adds its own."""

    step: Annotated[int, Field(ge=0)]


class RunFolder(NamedTuple):
    """The folder of a run. checkpoint: the one to continue from, if any; lock: keeps other processes out while open."""

    path: Path
    checkpoint: Path | None
    lock: IO[str] | None  # None on ranks that do not write


def open_run_folder(args: argparse.Namespace, script: str, blas: str | None = None) -> RunFolder:
    """The folder of a new run, or of the one that --resume names, which begins anew if it holds no checkpoint.

    script: names a new folder where --output-dir does not. Raises UserError as `start_run_folder` does, and while
    another process trains in the folder.
    """
    if not args.resume:
        folder = start_run_folder(args.output_dir or default_output_dir(script), vars(args), blas)
        return RunFolder(folder, None, lock_run(folder))
    folder = Path(args.resume)
    lock = lock_run(folder)
    say_if_another_blas(folder, blas)
    _tidy(folder, args.keep_checkpoints)
    found = all_checkpoints(folder)
    if not found:
        print(f"{folder} was stopped before its first checkpoint, so the run begins anew")
        for name in (METRICS, SAMPLES):
            (folder / name).unlink(missing_ok=True)
    return RunFolder(folder, found[-1] if found else None, lock)


def open_for_all(
    ranks: Ranks, args: argparse.Namespace, script: str, kind: str, blas: str | None = None
) -> RunFolder:
    """`open_run_folder` on rank 0, the only one that reads and writes it; the others learn its names.

    script: with its suffix, by which the run goes on if a rank is lost; kind: names a new folder.
    """
    opened: list[RunFolder] = []

    def names() -> tuple[str, str | None]:
        opened.append(open_run_folder(args, kind, blas))
        run = opened[0]
        return str(run.path), None if run.checkpoint is None else str(run.checkpoint)

    path, checkpoint = ranks.from_writer(names)
    ranks.continued_by(f"{script} --resume {path}")
    return opened[0] if opened else RunFolder(Path(path), None if checkpoint is None else Path(checkpoint), None)


def may_save_stopped(save_file: str, started_from: str | None) -> bool:
    """Whether a stopped run may leave its adapter as it is so far: not in place of the one that it started from.

    That one is read again when the run is resumed, and is PPO's reference.
    """
    return not started_from or expanded(save_file).resolve() != expanded(started_from).resolve()


def stopped_words(script: str, folder: Path, done: int, planned: int, adapter: str, picture: str) -> str:
    """What a stopped run says at its end. adapter: where it left one, if it did."""
    left = f"the adapter so far is in {adapter}, its curves in {picture}" if adapter else f"its curves are in {picture}"
    return f"{done} of {planned} steps are done; {left}; continue with: python {script} --resume {folder}"


def lock_run(folder: Path) -> IO[str]:
    """Keep other processes from training in `folder` until the file returned is closed or this process ends."""
    check_file(folder / "lock")  # to open a pipe would wait for its other end
    with writing(folder):
        file = (folder / "lock").open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"another process is training in {folder}; wait for it to end, or stop it") from None
    except OSError:  # a disk without locks
        pass
    return file


def _tidy(folder: Path, keep: int) -> None:
    """Remove what killed processes left: temporary folders, and checkpoints that were being or to be deleted."""
    sweep_all(folder)
    for child in (folder / "checkpoints").glob("[0-9]*"):
        if not (child / STATE_FILE).is_file():
            shutil.rmtree(child, ignore_errors=True)
    _delete_old(folder, keep)


def _delete_old(run_folder: str | Path, keep: int) -> None:
    """Delete all checkpoints but the last `keep` (0: none)."""
    for old in all_checkpoints(run_folder)[:-keep] if keep else []:
        (old / STATE_FILE).unlink()  # half deleted, it is no checkpoint
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_checkpoint(run_folder: str | Path, step: int, state: Mapping[str, Any], keep: int = KEPT) -> Iterator[Path]:
    """Yield a temporary folder to fill; then add `state`, rename it, and delete all but the last `keep` (0: none)."""
    with atomic_folder(Path(run_folder) / "checkpoints" / f"{step:06d}", CHECKPOINT) as temporary:
        yield temporary
        write_json(temporary / STATE_FILE, {"step": step, **state})
    _delete_old(run_folder, keep)


def best_folder(run_folder: str | Path, step: int) -> Path:
    """Where the adapter of the best evaluation is kept, if that was after `step` steps."""
    return Path(run_folder) / "best" / f"{step:06d}"


def drop_other_bests(run_folder: str | Path, step: int) -> None:
    """Delete the adapters of earlier bests. To be called once a checkpoint knows of the one at `step`: a run resumed
    from an older checkpoint would look for the older best."""
    for folder in (Path(run_folder) / "best").glob("[0-9]*"):
        if folder != best_folder(run_folder, step):
            shutil.rmtree(folder, ignore_errors=True)


def last_checkpoint(run_folder: str | Path) -> Path:
    """The newest complete checkpoint of a run. Raises UserError where there is none."""
    found = all_checkpoints(run_folder)
    if not found:
        raise UserError(f"{run_folder} holds no checkpoint; train it first")
    return found[-1]


def restore_newest(run_folder: str | Path, restore: Callable[[Path], None]) -> None:
    """Call `restore` with the newest checkpoint, and where it raises UserError with the one before, and so on.

    A damaged one is put aside under another name, which is said. Raises the newest one's error if none can be restored.
    """
    errors: list[tuple[Path, UserError]] = []
    for checkpoint in reversed(all_checkpoints(run_folder)):
        try:
            restore(checkpoint)
        except UserError as error:
            errors.append((checkpoint, error))
            continue
        for damaged, why in errors:
            aside = damaged.with_name(f"damaged-{damaged.name}")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
            print(f"checkpoint {damaged.name} cannot be used ({why}), so it is now {aside}")
        if errors:
            print(f"the run goes on from checkpoint {checkpoint.name}")
        return
    raise errors[0][1]


def read_state(folder: Path) -> dict[str, Any]:
    """The state given to `new_checkpoint`, and the step."""
    return read_as(dict[str, Any], folder / STATE_FILE, DAMAGED)


def all_checkpoints(run_folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = Path(run_folder) / "checkpoints"
    found = [child for child in folder.glob("[0-9]*") if (child / STATE_FILE).is_file()]
    return sorted(found, key=lambda child: int(child.name))
