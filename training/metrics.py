"""A run's folder and its log: a table with a bar below it, `metrics.jsonl`, trackers, a summary.

    RUN/config.json      the flags as run, and on Linux CPU the BLAS that mlx runs on ("blas")
    RUN/metrics.jsonl    one JSON object per report, keyed by "step"
    RUN/samples.jsonl    of PPO: a few completions every few steps, one JSON object each, keyed by "step"
    RUN/summary.json     the final figures
    RUN/*.png            plots (training.plots)

Trackers (training.trackers) carry the same figures under the same names, and the samples as tables.
"""

import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.cli import reader_may_leave
from common.errors import UserError
from common.files import atomic_file, expanded, reading, write_json, writing
from common.progress import PlainProgress, progress
from common.schemas import read_as
from rewards.function import function_label
from training.console import SPEED, Table, shown, speed, title
from training.trackers import check_tracker, open_tracker

Row = Mapping[str, Any]
METRICS, SAMPLES, SUMMARY = "metrics.jsonl", "samples.jsonl", "summary.json"
ESCAPED = "backslashreplace"  # half a surrogate pair, which no file can hold, becomes \\udXXX, as JSON writes it


def start_run_folder(folder: str | Path, config: Mapping[str, Any], blas: str | None = None) -> Path:
    """Make the folder of a new run and write the flags into it. blas: the short name of mlx's BLAS, if known.

    Raises UserError if it holds a run already or a file that a run would replace, or if the tracker's package is
    missing; then nothing is written.
    """
    folder = expanded(folder)
    check_tracker(config.get("log_with"))
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a run already; use --resume {folder}, or name another --output-dir")
    for name in (METRICS, SAMPLES, SUMMARY):
        if os.path.lexists(folder / name):
            raise UserError(f"{folder} holds a {name} that a run would replace; name another --output-dir")
    write_json(folder / "config.json", {**config, "blas": blas} if blas else dict(config))
    return folder


def resumed_config(folder: str | Path) -> dict[str, Any]:
    """The flags of the run in `folder`. Raises UserError where there is no run."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds no run (no config.json); check --resume")
    config = read_as(dict[str, Any], Path(folder) / "config.json")
    config.pop("blas", None)  # not a flag: a resumed run takes the BLAS that it finds
    return config


def say_if_another_blas(folder: str | Path, blas: str | None) -> None:
    """Print one line if the run in `folder`, which is to be resumed, began with another BLAS than `blas`."""
    before = read_as(dict[str, Any], Path(folder) / "config.json").get("blas")
    if before and before != blas:
        now = f"with {blas}" if blas else "without it"
        print(f"this run began with the BLAS {before} and continues {now}, so its numbers may differ in the last bits")


class RunLog:
    """Shows and records one run."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int = 0,
        log_with: str = "none",
        description: str = "steps",
        columns: Sequence[str] = (),
        verbose: bool = False,
        peak_memory: Callable[[], float] | None = None,
        planned_memory: float | None = None,
    ):
        """start_step: steps done before a resume; later rows of both files are dropped and written again.

        columns: the metrics that the table shows (training.console); verbose: print the others, too. peak_memory: in
        bytes since the run's start; every row of metrics.jsonl and the summary then have it. planned_memory: the bytes
        that it was planned to be, which stand beside it in the summary.
        """
        self.folder = folder
        self.path, self.samples_path = folder / METRICS, folder / SAMPLES
        check_tracker(log_with)
        _drop_after(start_step, self.path)
        if self.samples_path.exists():
            _drop_after(start_step, self.samples_path)
        self.tracker = open_tracker(log_with, folder, start_step)
        self.bar = progress(total_steps, description, "step", start_step)
        self.table = Table([*columns, *SPEED] if columns and isinstance(self.bar, PlainProgress) else columns, verbose)
        self.peak_memory, self.planned_memory, self.speeds = peak_memory, planned_memory, list[float]()

    def advance(self) -> None:
        """One step is done."""
        with reader_may_leave():
            self.bar.update()

    def report(self, step: int, *parts: Mapping[str, float]) -> None:
        """Append each part as a row to `metrics.jsonl` and the tracker, and print all of them as one row of the table.

        Figures that are not finite are written as null.
        """
        memory = {"peak_memory_gb": round(self.peak_memory() / 1e9, 4)} if self.peak_memory else {}
        whole: dict[str, float] = {}
        for part in parts:
            whole |= (figures := {**part, **memory})
            finite = {name: _finite(value) for name, value in figures.items()}
            _append(self.path, [{"step": step, **finite}])
            if self.tracker:
                self.tracker.figures(step, {name: value for name, value in finite.items() if value is not None})
        self.speeds += [whole["tokens_per_second"]] if "tokens_per_second" in whole else []
        self.bar.set_postfix_str(speed(whole), refresh=False)
        for line in self.table.lines(step, whole):
            self.say(line)

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """Append sampled completions, all with the same keys, to `samples.jsonl`, and show the tracker their table."""
        if not rows:
            return
        rows = [{name: _finite(value) for name, value in row.items()} for row in rows]
        _append(self.samples_path, [{"step": step, **row} for row in rows])
        if self.tracker:
            self.tracker.table(step, "samples", rows)

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar; it is flushed at once, also into a pipe."""
        with reader_may_leave():
            tqdm.write(line)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """End the bar and the tracker; with a summary, write and print it, speed (the median) and memory included."""
        self.bar.close()
        if self.tracker:
            self.tracker.close()
        if summary is not None:
            summary = self._with_speed(summary)
            write_json(self.folder / SUMMARY, {name: _finite(value) for name, value in summary.items()})
            print("\nSummary")
            for name, value in summary.items():
                text = shown(name, value) if isinstance(value, float) else value
                print(f"  {title(name):<22}{text}")
            print(f"  {'run folder':<22}{self.folder}")

    def _with_speed(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """The summary with the median of the reports' tokens a second, and the peak memory, before what are no figures.

        The median, because the first steps of a process are slower.
        """
        known = {"tokens_per_second": statistics.median(self.speeds)} if self.speeds else {}
        known |= {"peak_memory_gb": round(self.peak_memory() / 1e9, 4)} if self.peak_memory else {}
        known |= {"planned_memory_gb": round(self.planned_memory / 1e9, 4)} if self.planned_memory else {}
        figures = {name: value for name, value in summary.items() if not isinstance(value, str)}
        return {**figures, **known, **{name: value for name, value in summary.items() if name not in figures}}


class NoLog:
    """`RunLog` of a rank that does not write."""

    def advance(self) -> None:
        """Nothing."""

    def report(self, step: int, *parts: Mapping[str, float]) -> None:
        """Nothing."""

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Nothing."""


def provenance(script: str, flags: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter keeps of the run that made it: script, flags, and its last figures (models.export.model_card).

    A user's functions are kept by name and hash, since adapters and model cards are published.
    """
    numbers = {name: _finite(value) for name, value in figures.items() if isinstance(value, int | float)}
    functions = [function_label(spec) for spec in flags.get("reward_function") or ()]
    own: dict[str, Any] = {"reward_function": functions} if functions else {}
    own |= {"resume": None} if "resume" in flags else {}  # whether a run was resumed is no property of its result
    return {"script": script, "flags": {**flags, **own}, "figures": numbers}


def _finite(value: Any) -> Any:
    """`value`, or None where it is a float that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`: of a line that is none, as a kill may leave one, nothing is taken."""
    rows = _read(Path(folder) / METRICS)
    return [row for row in rows if all(_is_figure(value) for value in row.values())]


def _is_figure(value: Any) -> bool:
    """Whether a row may have it: a finite number, or null."""
    return value is None or (isinstance(value, int | float) and abs(value) <= sys.float_info.max)


def figures_at(folder: str | Path, step: int) -> dict[str, float]:
    """The figures of a run's report at a step; those that were not finite are left out."""
    rows = [row for row in read_metrics(folder) if row.pop("step") == step]
    return {name: value for row in rows for name, value in row.items() if value is not None}


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file of a run that are objects with a step."""
    rows = []
    with reading(path, "move it away"):
        # Not splitlines, which also ends a line at characters that JSON leaves as they are.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    for line in lines:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _append(path: Path, rows: Iterable[Row]) -> None:
    with writing(path), path.open("a", encoding="utf-8", errors=ESCAPED) as file:
        file.write(_lines(rows))


def _drop_after(step: int, path: Path) -> None:
    kept = [row for row in _read(path) if row["step"] <= step]
    with atomic_file(path) as temporary:
        temporary.write_text(_lines(kept), encoding="utf-8", errors=ESCAPED)
