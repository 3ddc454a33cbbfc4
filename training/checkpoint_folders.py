"""A run's checkpoint folders, for MLX and PyTorch; their contents: training.checkpoint, training.torch_checkpoint.

    RUN/checkpoints/000200/state.json     the step, and what the run adds to it

Each is written under a temporary name and renamed, so a folder with a number is complete.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import Kind, atomic_folder, read_json, write_json

STATE_FILE = "state.json"
CHECKPOINT = Kind(STATE_FILE, ("adapter", "*.safetensors", STATE_FILE))
KEPT = 2  # newest checkpoints, by default


@contextmanager
def new_checkpoint(run_folder: str | Path, step: int, state: Mapping[str, Any], keep: int = KEPT) -> Iterator[Path]:
    """Yield a temporary folder to fill; then add `state`, rename it, and delete all but the last `keep` (0: none)."""
    with atomic_folder(Path(run_folder) / "checkpoints" / f"{step:06d}", CHECKPOINT) as temporary:
        yield temporary
        write_json(temporary / STATE_FILE, {"step": step, **state})
    for old in all_checkpoints(run_folder)[:-keep] if keep else []:
        shutil.rmtree(old, ignore_errors=True)


def last_checkpoint(run_folder: str | Path) -> Path:
    """The newest complete checkpoint of a run. Raises UserError where there is none."""
    found = all_checkpoints(run_folder)
    if not found:
        raise UserError(f"{run_folder} holds no checkpoint to resume from; start the run again without --resume")
    return found[-1]


def read_state(folder: Path) -> dict[str, Any]:
    """The state given to `new_checkpoint`, and the step."""
    return read_json(folder / STATE_FILE)


def all_checkpoints(run_folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = Path(run_folder) / "checkpoints"
    found = [child for child in folder.glob("[0-9]*") if (child / STATE_FILE).is_file()]
    return sorted(found, key=lambda child: int(child.name))
