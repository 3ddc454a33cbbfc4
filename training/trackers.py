"""wandb and tensorboard: the figures of a run under the names of `metrics.jsonl`, and tables of its samples.

Each is imported only when asked for. wandb is offline without an account, unless WANDB_MODE says otherwise.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError, one_line, reason
from common.files import write_json
from common.schemas import read_as, read_key
from training.samples import text_table

TRACKERS = {"none": "", "wandb": "wandb", "tensorboard": "tensorboardX"}  # and the package that each needs


class Tracker(Protocol):
    """Where a run's figures and tables go."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Finite figures by name."""

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that have the same keys, at least one."""

    def close(self) -> None:
        """Everything is on disk, or sent, when this returns."""


def check_tracker(log_with: str | None) -> None:
    """Raise UserError for an unknown tracker, and for one whose package is not installed. Imports nothing."""
    if log_with not in (*TRACKERS, "", None):
        raise UserError(f"--log-with is {log_with!r}; use one of {', '.join(TRACKERS)}")
    package = TRACKERS.get(log_with or "none")
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"--log-with {log_with} needs the package {package}; pip install {package}, or leave the flag out"
        )


def open_tracker(log_with: str, folder: Path, start_step: int = 0) -> Tracker | None:
    """The tracker of the run in `folder`, or None. start_step: steps done before a resume; later ones come again.

    Where wandb cannot be reached or refuses the key, one line on stderr says so, and the run goes on without it: its
    figures are in its folder. Raises UserError as `check_tracker` does.
    """
    check_tracker(log_with)
    if log_with == "wandb":
        import wandb

        try:
            return Wandb(folder)
        except wandb.Error as error:
            _say_left_out(error)
            return None
    return Tensorboard(folder, start_step) if log_with == "tensorboard" else None


def _say_left_out(error: Exception) -> None:
    why = one_line(reason(error))
    remedy = "set WANDB_MODE=offline to keep a run for `wandb sync`"
    print(f"warning: wandb cannot be used ({why}), so this run goes on without it; {remedy}", file=sys.stderr)


class Wandb:
    """A wandb run, the same one after a resume; tables are wandb.Tables.

    wandb ignores steps that it has already; after a resume they are the same.
    """

    def __init__(self, folder: Path):
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_account() else "offline")
        self.wandb = wandb
        id_file = folder / "wandb.json"
        self.run = wandb.init(
            project="mlx-tuning",
            name=folder.name,
            dir=str(folder),
            config=read_as(dict[str, Any], folder / "config.json"),
            mode=mode,
            id=read_key(str, id_file, "id") if id_file.exists() else None,
            resume="allow",
            settings=wandb.Settings(silent=True),
        )
        write_json(id_file, {"id": self.run.id})

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        data = [list(row.values()) for row in rows]
        self.run.log({name: self.wandb.Table(columns=list(rows[0]), data=data)}, step=step)

    def close(self) -> None:
        self.run.finish()


def _has_wandb_account() -> bool:
    """Whether `wandb login` was run here: it writes into ~/.netrc, which may also be there for other hosts."""
    netrc = Path.home() / ".netrc"
    logged_in = netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="replace")
    return logged_in or bool(os.environ.get("WANDB_API_KEY"))


class Tensorboard:
    """Event files in RUN/tensorboard; a table is text, as tensorboard has no other."""

    def __init__(self, folder: Path, start_step: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(
            str(folder / "tensorboard"),
            filename_suffix=f".from{start_step}",  # two files of one second would have one name
            flush_secs=1,  # its flush() ignores what is queued
            purge_step=start_step + 1,  # removes what was logged past the checkpoint
        )

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        # Indented, Markdown shows it as it is: tags, stars and all.
        lines = text_table(rows, width=1000).splitlines()
        self.writer.add_text(name, "\n".join(f"    {line}" for line in lines), step)

    def close(self) -> None:
        self.writer.close()
