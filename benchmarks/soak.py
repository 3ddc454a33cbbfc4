"""A soak: thousands of PPO steps on tiny-digits, with memory and open files after each; writes a picture.

    python benchmarks/soak.py --steps 2000 --picture docs/soak.png

Resident memory (/proc/self/statm; off Linux its peak), mlx's active memory and the number of open files. After the
warm-up each is fitted by a line; its slope has a 95 % interval by a bootstrap over blocks of 50 steps, as neighbouring
steps are not independent. Flat: 0 is within it, or the slope is below 1 % of the level in 1 000 steps.
"""

import argparse
import os
import resource
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import cpu

cpu.enable()  # before mlx is imported

import mlx.core as mx
import numpy as np

import ppo_training
from common.cli import run
from common.parser import Parser, positive
from training.plots import Panel, plot_panels
from training.ppo_loop import PPORun

BLOCK = 50  # steps that are drawn together
DRAWS = 2000
FLAT = 0.01  # of the level, in 1 000 steps
FLAGS = ["--ground-truth-reward", "--batch-size", "8", "--mini-batch-size", "8", "--max-completion-length", "16"]
FLAGS += ["--save-every", "100", "--steps-per-samples", "100"]
MB = 1e6


def measured() -> dict[str, float]:
    """What the process holds now: resident and mlx's active memory in MB, and open files."""
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text(encoding="utf-8").split()[1]) if statm.is_file() else 0
    resident = pages * resource.getpagesize() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = len(os.listdir("/dev/fd")) - 1  # without the one that lists them
    return {"resident memory, MB": resident / MB, "mlx active memory, MB": mx.get_active_memory() / MB,
            "open files": float(files)}  # fmt: skip


def slope(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The slope of a line through `values` per 1 000 steps, and its 95 % interval by a bootstrap over blocks."""
    steps = np.arange(len(values)) / 1000
    line = np.polyfit(steps, values, 1)
    rest = values - np.polyval(line, steps)
    blocks = np.array_split(rest, max(len(values) // BLOCK, 1))
    rng, found = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        drawn = np.concatenate([blocks[i] for i in rng.integers(len(blocks), size=2 * len(blocks))])[: len(values)]
        found.append(np.polyfit(steps, np.polyval(line, steps) + drawn, 1)[0])
    low, high = np.percentile(found, [2.5, 97.5])
    return float(line[0]), float(low), float(high)


def soak(steps: int, seed: int, folder: Path) -> list[dict[str, float]]:
    """Run ppo_training.py in this process; what it holds after each step."""
    rows: list[dict[str, float]] = []
    record = PPORun.record

    def recording(self: PPORun, *args):
        stopping = record(self, *args)
        rows.append(measured())
        return stopping

    PPORun.record = recording  # type: ignore
    sys.argv = ["ppo_training.py", *FLAGS, "--num-steps", str(steps), "--seed", str(seed)]
    sys.argv += ["--output-dir", str(folder / "run"), "--save-file", str(folder / "adapter")]
    try:
        ppo_training.main()
    finally:
        PPORun.record = record  # type: ignore
    return rows


def table(rows: list[dict[str, float]], warm_up: int) -> str:
    """The figures in Markdown."""
    lines = ["| | after the warm-up | at the end | slope per 1 000 steps (95 %) | |", "|---|---|---|---|---|"]
    for name in rows[0]:
        values = np.array([row[name] for row in rows[warm_up:]])
        found, low, high = slope(values)
        flat = low <= 0 <= high or abs(found) < FLAT * values.mean()
        lines.append(
            f"| {name} | {values[0]:.1f} | {values[-1]:.1f} | {found:+.3f} ({low:+.3f} to {high:+.3f}) "
            f"| {'flat' if flat else 'not flat'} |"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--steps", type=int, default=2000, help="PPO steps")
    parser.add_argument("--warm-up", type=int, default=200, help="first steps, which are left out of the fit")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    parser.add_argument("--picture", metavar="FILE.png", help="where the curves go")
    args = parser.parse_args()
    positive("warm-up", args.warm_up)
    positive("steps", args.steps - args.warm_up - BLOCK)
    return args


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(args.steps, args.seed, Path(folder))
    if args.picture:
        numbered = list(enumerate(rows, 1))
        panels = [Panel(name, "", {name: [(n, row[name]) for n, row in numbered]}) for name in rows[0]]
        plot_panels(Path(args.picture), panels)
    print(table(rows, args.warm_up))


if __name__ == "__main__":
    run(main)
