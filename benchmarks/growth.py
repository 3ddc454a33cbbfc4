"""How a PPO step's time and memory grow with the batch, the length, the layers, those trained, and the vocabulary.

    python benchmarks/growth.py --picture docs/growth.png

Scoring and update of one rollout, in one mini batch, by a random Llama with a LoRA on its last layers; sampling is left
out (see benchmarks/rollouts.py). Each curve changes one size, the others stay as in BASE. Peaks are those of mlx's
counter, weights included.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import cpu

cpu.enable()  # before mlx is imported

import mlx.core as mx
from tqdm import tqdm

from benchmarks.ppo_passes import WAYS, build_learner, measure
from common.cli import run
from common.parser import Parser, positive
from training.plots import Panel, plot_panels

BASE = {"completions": 8, "length": 64, "layers": 8, "trained_layers": 4, "vocabulary": 8192}
OTHERS = {"hidden": 256, "prompt": 16, "of_a_prompt": 1, "mean_length": 0}
NAMES = {
    "completions": "completions",
    "length": "tokens of a completion, beside 16 of its prompt",
    "layers": "layers",
    "trained_layers": "trained layers, of 8",
    "vocabulary": "vocabulary",
}
VALUES = {
    "completions": (4, 8, 16, 32),
    "length": (32, 64, 128, 256),
    "layers": (4, 8, 16, 32),
    "trained_layers": (1, 2, 4, 8),
    "vocabulary": (4096, 8192, 16384, 32768),
}


class Point(NamedTuple):
    """What was measured at one value of one size."""

    value: int
    seconds: float
    peak: float  # GB


def measure_at(sizes: dict[str, int], rounds: int) -> tuple[float, float]:
    """Median seconds of scoring and update together, after one that is not counted, and the peak in GB."""
    args = argparse.Namespace(**OTHERS, **sizes, mini_batch=sizes["completions"])
    learner = build_learner(args, WAYS[-1])
    seconds = [sum(measure(learner, args, 0))]
    mx.reset_peak_memory()
    seconds += [sum(measure(learner, args, number + 1)) for number in range(rounds)]
    return statistics.median(seconds[1:]), mx.get_peak_memory() / 1e9


def curves(base: dict[str, int], values: Mapping[str, tuple[int, ...]], rounds: int) -> dict[str, list[Point]]:
    """The points of every size's curve. What curves have in common is measured once."""
    cells = {tuple({**base, name: value}.values()) for name, some in values.items() for value in some}
    found = {
        cell: measure_at(dict(zip(base, cell, strict=True)), rounds)
        for cell in tqdm(sorted(cells), desc="cells", unit="cell")
    }
    return {
        name: [Point(value, *found[tuple({**base, name: value}.values())]) for value in some]
        for name, some in values.items()
    }


def table(found: dict[str, list[Point]]) -> str:
    """One line a point, as Markdown, with how many times the point before it."""
    lines = ["| size | value | seconds | times | peak, GB | times |", "|---|---|---|---|---|---|"]
    for name, points in found.items():
        for before, point in zip([None, *points], points, strict=False):
            times = ("", "") if before is None else (point.seconds / before.seconds, point.peak / before.peak)
            by_time, by_peak = (f"{each:.2f}" if each else "" for each in times)
            cells = [NAMES[name], point.value, f"{point.seconds:.2f}", by_time, f"{point.peak:.2f}", by_peak]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def panels(found: dict[str, list[Point]]) -> list[Panel]:
    """Seconds on the left and peaks on the right, one size below another."""
    return [
        Panel(f"by {NAMES[name]}", unit, {"": [(point.value, getattr(point, field)) for point in points]})
        for name, points in found.items()
        for field, unit in (("seconds", "seconds"), ("peak", "GB"))
    ]


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--rounds", type=int, default=3, help="measured at each point, after one that is not")
    parser.add_argument("--picture", default="runs/growth.png", help="file of the picture")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    positive("rounds", args.rounds)
    found = curves(BASE, VALUES, args.rounds)
    plot_panels(args.picture, panels(found), x_label="")
    print(f"{os.cpu_count()} cores, BLAS {cpu.BLAS}, mlx {mx.__version__}, {args.rounds} rounds\n\n{table(found)}")


if __name__ == "__main__":
    run(main)
