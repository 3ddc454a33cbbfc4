"""Runs beside one another: their curves in one picture, the flags that differ, and their last figures.

    python -m training.compare runs/sft-a runs/sft-b                 and --output FILE.png for the picture's place

Of SFT, PPO and the tuner: whatever has a metrics.jsonl. A metric that several runs have is drawn once, a curve a run.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run
from common.errors import UserError
from common.files import check_file
from common.parser import Parser
from common.schemas import read_as
from training.console import COLUMNS, shown, title
from training.metrics import SUMMARY, read_metrics
from training.plots import METRICS, Panel, plot_panels, points_of

PLACES = ("output_dir", "save_file", "resume")  # flags that differ in any case, and say nothing
LONGEST = 28  # characters of a value in a table


def names_of(folders: Sequence[Path]) -> list[str]:
    """What each run is called: its folder's name, or its path where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def differing_flags(configs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the flags whose values are not the same in all runs; the first row has the runs' names."""
    keys = {key: None for config in configs.values() for key in config if key not in PLACES}
    rows = [["flag", *configs]]
    for key in keys:
        values = [json.dumps(config[key]).strip('"') if key in config else "–" for config in configs.values()]
        if len(set(values)) > 1:
            rows.append([f"--{key.replace('_', '-')}", *values])
    return rows


def last_figures(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Rows of the metrics that tables have, with the last value of each run, and the step that it is of."""
    known = [name for name in COLUMNS if any(name in row for rows in runs.values() for row in rows)]
    own = {name: None for rows in runs.values() for row in rows for name in row} if not known else {}
    lines = [["last figure", *runs], ["step", *(str(rows[-1]["step"]) if rows else "" for rows in runs.values())]]
    for name in known or [name for name in own if name != "step"]:
        values = [points_of(rows, name) for rows in runs.values()]
        lines.append([title(name), *(shown(name, points[-1][1]) if points else "–" for points in values)])
    return lines


def compared_panels(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """A panel for each metric that any run has, with a curve for each run that has it."""
    known = {name: metric for metric in METRICS for name in metric.names}
    found = {name: None for rows in runs.values() for row in rows for name in row if name in known}
    if not found:  # of a tuner: the metrics have names of their own
        found = {name: None for rows in runs.values() for row in rows for name in row if name != "step"}
    panels = []
    for name in [*(name for name in known if name in found), *(name for name in found if name not in known)]:
        curves = {run: points for run, rows in runs.items() if (points := points_of(rows, name))}
        metric = known.get(name)
        if curves:
            panels.append(Panel(title(name), metric.unit if metric else "", curves, metric.limits if metric else None))
    return panels


def text_rows(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first to the left, the others to the right."""
    cut = [[cell if len(cell) <= LONGEST else f"{cell[: LONGEST - 1]}…" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
    lines = []
    for first, *others in cut:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)


def config_of(folder: Path) -> dict[str, Any]:
    """The flags of a run; none where it was started from Python."""
    return read_as(dict[str, Any], folder / "config.json") if (folder / "config.json").is_file() else {}


def main() -> None:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", metavar="FILE.png", default="compare.png", help="where the picture goes")
    args = parser.parse_args()
    check_file(args.output)
    folders = [Path(name) for name in args.runs]
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder} holds no run (no metrics.jsonl); name the folders of runs")
    names = names_of(folders)
    if len(set(names)) < len(names):
        raise UserError("a run is named twice; name each once")
    runs = {name: read_metrics(folder) for name, folder in zip(names, folders, strict=True)}
    flags = differing_flags({name: config_of(folder) for name, folder in zip(names, folders, strict=True)})
    print(text_rows(flags) if len(flags) > 1 else "the flags are the same")
    print(f"\n{text_rows(last_figures(runs))}")
    for name, folder in zip(names, folders, strict=True):
        if not (folder / SUMMARY).is_file():
            print(f"{name} has not finished")
    if panels := compared_panels(runs):
        plot_panels(args.output, panels)
        print(f"\npicture: {args.output}")


if __name__ == "__main__":
    run(main)
