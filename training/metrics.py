"""A run's folder and what is seen of it: progress bar, one report line, `metrics.jsonl`, trackers, a summary.

    RUN/config.json      the flags as run
    RUN/metrics.jsonl    one JSON object per report, keyed by "step"
    RUN/summary.json     the last word
    RUN/*.png            pictures (training.plots)

wandb and tensorboard are imported only when asked for, and carry the same figures under the same names.
"""

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import atomic_file, read_json, write_json

from tqdm import tqdm

TRACKERS = {"none": "", "wandb": "wandb", "tensorboard": "tensorboardX"}  # and the package that each needs


def figure(value: float) -> str:
    """A number as the report line shows it: four significant digits, and no exponent, which some readers miss."""
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{Decimal(f'{value:.4g}'):f}"


def start_run_folder(folder: str | Path, config: Mapping[str, Any]) -> Path:
    """Make the folder of a new run and write the flags into it.

    Raises UserError if it holds a run already, or the package of its tracker is missing: then nothing is written.
    """
    folder = Path(folder)
    check_tracker(config.get("log_with"))
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a run already; use --resume {folder}, or name another --output-dir")
    write_json(folder / "config.json", dict(config))
    return folder


def resumed_config(folder: str | Path) -> dict[str, Any]:
    """The flags of the run in `folder`. Raises UserError where there is no run."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds no run (no config.json); check --resume")
    return read_json(Path(folder) / "config.json")


class RunLog:
    """Shows and records one run."""

    def __init__(self, folder: Path, total_steps: int, start_step: int = 0, log_with: str = "none", description=""):
        """start_step: steps done before a resume; later rows of `metrics.jsonl` are dropped, as they come again."""
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= start_step]
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.tracker = _tracker(log_with, folder)
        self.bar = tqdm(total=total_steps, initial=start_step, desc=description, unit="step", dynamic_ncols=True)

    def advance(self, **shown: float) -> None:
        """One step is done; `shown` stands behind the bar."""
        if shown:
            self.bar.set_postfix({name: figure(value) for name, value in shown.items()}, refresh=False)
        self.bar.update()

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Print one line and append it to `metrics.jsonl` and the tracker. Non-finite figures are written as null."""
        line = " | ".join([f"Step - {step}", *(f"{name}: {figure(value)}" for name, value in figures.items())])
        self.say(line)
        finite = {name: _finite(value) for name, value in figures.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self.tracker:
            self.tracker(step, {name: value for name, value in finite.items() if value is not None})

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar, whose redrawing sends it off at once, also into a pipe."""
        tqdm.write(line)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """End the bar; with a summary, write and print it."""
        self.bar.close()
        if summary is not None:
            write_json(self.folder / "summary.json", {name: _finite(value) for name, value in summary.items()})
            print("\nSummary")
            for name, value in summary.items():
                print(f"  {name.replace('_', ' '):<24}{figure(value) if isinstance(value, float) else value}")
            print(f"  {'run folder':<24}{self.folder}")


def provenance(script: str, flags: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter keeps of the run that made it: script, flags, and its last figures (models.model_card)."""
    numbers = {name: _finite(value) for name, value in figures.items() if isinstance(value, int | float)}
    return {"script": script, "flags": dict(flags), "figures": numbers}


def _finite(value: Any) -> Any:
    """`value`, or None where it is a float that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; a last line cut off by a kill is left out."""
    path = Path(folder) / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def check_tracker(log_with: str | None) -> None:
    """Raise UserError for an unknown tracker, and for one whose package is not installed. Imports nothing."""
    if log_with not in (*TRACKERS, "", None):
        raise UserError(f"--log-with is {log_with!r}; use one of {', '.join(TRACKERS)}")
    package = TRACKERS.get(log_with or "none")
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"--log-with {log_with} needs the package {package}; pip install {package}, or leave the flag out"
        )


def _tracker(log_with: str, folder: Path):
    """A function of (step, figures) that feeds the tracker, or None."""
    check_tracker(log_with)
    if log_with == "wandb":
        return _wandb(folder)
    return _tensorboard(folder) if log_with == "tensorboard" else None


def _wandb(folder: Path):
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_account() else "offline")
    run = wandb.init(
        project="mlx-tuning",
        name=folder.name,
        dir=str(folder),
        config=read_json(folder / "config.json"),
        mode=mode,
        settings=wandb.Settings(silent=True),
    )
    return lambda step, figures: run.log(dict(figures), step=step)


def _has_wandb_account() -> bool:
    """Whether `wandb login` was run here: it writes into ~/.netrc, which may also be there for other hosts."""
    netrc = Path.home() / ".netrc"
    logged_in = netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="replace")
    return logged_in or bool(os.environ.get("WANDB_API_KEY"))


def _tensorboard(folder: Path):
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log
