"""Plots of a run, drawn from its `metrics.jsonl`: small multiples, one metric to an axis, named as in the tables.

python -m training.plots RUN_FOLDER
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run
from common.errors import UserError
from common.files import atomic_file
from common.parser import Parser
from training.console import title as title_of
from training.metrics import read_metrics

Points = Sequence[tuple[float, float]]
PICTURE = "curves.png"
TIME_SHARE = 0.01  # of a run's time, at most, that pictures drawn while it runs may take
FIRST_COST = 2.0  # seconds that the first is expected to take; most of it imports matplotlib
INCHES = (8.4, 2.35)  # width of a picture, height of a row: readable at the 830 pixels of a README


class Panel(NamedTuple):
    """One axis. unit: its label, with % of shares; curves: by their names, which a legend shows if there are several.

    limits: what of the y axis is shown at most.
    """

    title: str
    unit: str
    curves: Mapping[str, Points]
    limits: tuple[float, float] | None = None


class Metric(NamedTuple):
    """A panel of a run, with the title of the first of its metrics. names: metric → label; all of the same scale."""

    unit: str
    names: Mapping[str, str]
    limits: tuple[float, float] | None = None


def _alone(name: str) -> dict[str, str]:
    return {name: ""}


REWARD = "the reward's unit"
METRICS = (
    Metric("nats", {"train_loss": "training", "valid_loss": "validation"}),
    Metric("%", {"train_accuracy": "training", "valid_accuracy": "validation"}),
    Metric("nats × beta", {"train_chosen_reward": "chosen", "train_rejected_reward": "rejected"}),
    Metric(REWARD, _alone("mean_score")),
    Metric("digit rule, 0 to 1", _alone("true_score")),
    Metric(REWARD, _alone("held_out_score")),
    Metric("nats per completion", _alone("kl")),
    Metric("tokens", _alone("completion_length")),
    Metric("% of completions", _alone("eos_share")),
    Metric("nats per token", _alone("entropy")),
    Metric("score per nat", _alone("kl_coef")),
    Metric("% of tokens", _alone("clip_fraction")),
    Metric("", _alone("policy_loss")),
    Metric("squared score", _alone("value_loss")),
    # Below -1 values are worse than none in any case, and a single outlier would hide all others.
    Metric("1: exact, 0: as the mean", _alone("explained_variance"), (-1.0, 1.0)),
)


def run_panels(rows: Sequence[Mapping[str, float]], name: str = "") -> list[Panel]:
    """The panels of a run for which `rows`, its metrics, have figures. name: of curves that have no label."""
    parts = sorted({key for row in rows[-1:] for key in row if key.startswith("score_")})
    place = next(index for index, metric in enumerate(METRICS) if "true_score" in metric.names)
    metrics = [*METRICS[:place], *(Metric(REWARD, _alone(part)) for part in parts), *METRICS[place:]]
    panels = []
    for metric in metrics:
        curves = {label or name: points_of(rows, key) for key, label in metric.names.items()}
        if curves := {label: points for label, points in curves.items() if points}:
            panels.append(Panel(title_of(next(iter(metric.names))), metric.unit, curves, metric.limits))
    return panels


def plot_run(folder: str | Path) -> Path | None:
    """Draw every metric of the run that has a panel into `curves.png`; None if there is nothing to draw."""
    panels = run_panels(read_metrics(folder))
    if not panels:
        return None
    path = Path(folder) / PICTURE
    plot_panels(path, panels, Path(folder).resolve().name)
    return path


class LivePicture:
    """Draws the picture of a run anew while it goes on, in at most TIME_SHARE of its time."""

    def __init__(self, folder: str | Path):
        self.folder, self.started = folder, time.monotonic()
        self.spent, self.cost = 0.0, FIRST_COST

    def draw_if_due(self) -> bool:
        """Draw if the run has gone on for long enough; returns whether it was drawn. Call it after every step."""
        now = time.monotonic()
        if self.spent + self.cost > TIME_SHARE * (now - self.started):
            return False
        plot_run(self.folder)
        self.cost = time.monotonic() - now
        self.spent += self.cost
        return True


def plot_panels(path: str | Path, panels: Sequence[Panel], title: str = "", x_label: str = "step") -> None:
    """Draw panels, two beside each other, into one PNG, written atomically."""
    import matplotlib  # here, because its import takes seconds

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    width, height = INCHES
    size = (width, (height if columns > 1 else 3.2) * lines + 0.3)
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            for label, points in panel.curves.items():
                marker = "." if len(points) < 40 else ""
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1.4, marker=marker, markersize=4)
            if panel.limits:
                low, high = panel.limits
                seen = axis.get_ylim()
                axis.set_ylim(max(seen[0], low), min(seen[1], high))
            axis.set_title(panel.title, fontsize=11, loc="left")
            axis.set_ylabel(panel.unit)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
            axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
            if panel.unit.startswith("%"):
                axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
            else:
                axis.ticklabel_format(axis="y", style="plain", useOffset=False)
            axis.grid(alpha=0.3)
            if len(panel.curves) > 1:
                axis.legend(fontsize=9, frameon=False)
        for axis in axes.flat[max(len(panels) - columns, 0) : len(panels)]:
            axis.set_xlabel(x_label)
        if title:
            figure.suptitle(title, fontsize=11)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150)
        pyplot.close(figure)


def points_of(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, figure) of the rows that have the metric."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def main() -> None:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run, with a metrics.jsonl")
    folder = Path(parser.parse_args().run_folder)
    if not os.path.isfile(folder / "metrics.jsonl"):
        raise UserError(f"{folder} holds no run (no metrics.jsonl); check the path")
    print(plot_run(folder) or "nothing to draw")


if __name__ == "__main__":
    run(main)
