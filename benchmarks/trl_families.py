"""TRL 0.11.4's PPO on four tasks of benchmarks/families.py: how many completions does it need, and how many do we?

    python benchmarks/trl_families.py --trl-python ~/trl_env/bin/python       benchmarks/ppo_step.py makes that
    python benchmarks/trl_families.py --seeds 3 --rates 1e-3

TRL starts from the same models, with the same prompts, rewards, LoRA (rank 8 on all linear layers, scale 10) and first
KL coefficient; the rest are PPOConfig's defaults. The table has each task's best rate, chosen with hindsight, beside
our defaults from the folder of benchmarks/families.py, and how many completions each side needs to 0.9 of its own
final score and to 0.9 of ours. Cells are kept there as families' are; a cut one starts anew.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from tqdm import tqdm

from benchmarks.families import BATCH_SIZE, COMPLETIONS, DEFAULTS, finished, measure, prepare
from benchmarks.family_tasks import HALVES, NAMES, Task
from benchmarks.ppo_step import Worker
from common.cli import run
from common.errors import UserError
from common.files import atomic_file, write_json
from common.parser import Parser
from rewards.combined import Reward, rewards_from_flags
from training import ppo_flags
from training.metrics import METRICS, SUMMARY
from training.ppo_step import Prompts

TASKS = ("decreasing_mult_3", "decreasing_mult_6", "total", "length whole")
RATES = (3e-4, 1e-3, 3e-3)
KL_COEF = 0.01  # first, in score units per nat: what ppo_training.py began with when this was measured
LORA = {"r": 8, "lora_alpha": 80, "lora_dropout": 0.0}  # as ppo_training.py's: scale 10


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--trl-python", metavar="PATH", help="Python of an environment that has TRL 0.11.4")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", choices=NAMES, default=list(TASKS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--completions", type=int, default=COMPLETIONS, help="sampled in each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--output-dir", default="runs/families", help="folder of all cells")
    return parser.parse_args()


def run_cell(args: argparse.Namespace, start: list[object], task: Task, rate: float, seed: int) -> None:
    """One run of TRL, unless it is finished."""
    cell = Path(args.output_dir).resolve() / "cells" / f"{task.name}, gae, {label(rate)}, {seed}".replace(" ", "_")
    if (cell / SUMMARY).exists():
        return
    if not args.trl_python:
        raise UserError(f"{cell.name} has not been run; give --trl-python")
    ours = [*map(str, start), "--batch-size", str(BATCH_SIZE), "--seed", str(seed)]
    flags = ppo_flags.ppo_parser(None).parse_args(ours)
    settings = ppo_flags.ppo_settings(flags)
    prompts = Prompts(ppo_flags.choose_prompts(flags, None), settings)
    reward = rewards_from_flags(flags, None, no_reward_model)
    setup = {"model": flags.model, "seed": seed, "max_new_tokens": settings.max_completion_length, "lora": LORA,
             "settings": {"learning_rate": rate, "batch_size": BATCH_SIZE, "init_kl_coef": KL_COEF}}  # fmt: skip
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    worker = Worker("TRL", [args.trl_python, ROOT / "benchmarks/trl_run.py", json.dumps(setup)], threads)
    started, rows = time.monotonic(), []
    try:
        for step in tqdm(range(-(-args.completions // BATCH_SIZE)), desc=cell.name, unit="step", leave=False):
            batch = prompts.batch(step)
            completions = worker.ask(json.dumps(batch))
            figures = worker.ask(json.dumps(list(reward(batch, completions))))
            rows.append({"step": step + 1, **figures, "seconds": time.monotonic() - started})
    finally:
        worker.close()
    cell.mkdir(parents=True, exist_ok=True)
    with atomic_file(cell / METRICS) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(cell / SUMMARY, {**setup, "versions": worker.ready})


def no_reward_model(path: str) -> Reward:
    """For tasks whose reward is learned, which TRL is not run on."""
    raise UserError(f"TRL is not run on a reward model, as {path} is; name other --tasks")


def label(rate: float) -> str:
    return f"TRL {rate:g}"


def completions_to(rows: Sequence[dict], goal: float) -> float:
    """How many completions until a mean of 5 steps has the goal; infinite if none has."""
    means = np.convolve([row["mean_score"] for row in rows], np.ones(5) / 5, "valid")
    reached = np.flatnonzero(means >= goal)
    return (int(reached[0]) + 5) * BATCH_SIZE if len(reached) else float("inf")


def table(runs: dict[str, dict[tuple[str, str, int], list[dict]]], tasks: Sequence[str]) -> str:
    """A line per task and seed that both sides have; TRL's rate is the one with the highest final score."""
    lines = ["| task, seed | ours: final | to 0.9 of it | TRL: final, rate | to 0.9 of its own | to 0.9 of ours |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for task, method, seed in sorted(runs.get(DEFAULTS, {})):
        key = (task, method, seed)
        theirs = {name: cells[key] for name, cells in runs.items() if name.startswith("TRL") and key in cells}
        if task not in tasks or method != "gae" or not theirs:
            continue
        ours = runs[DEFAULTS][key]
        best = max(theirs, key=lambda name: measure(theirs[name]).final)
        final, trl = measure(ours).final, measure(theirs[best])
        goal = 0.9 * final
        counts = (completions_to(ours, goal), trl.completions_to_final, completions_to(theirs[best], goal))
        own, trl_own, trl_ours = (f"{count:,.0f}" if np.isfinite(count) else "never" for count in counts)
        lines.append(f"| {task.replace('_', ' ')}, {seed} | {final:.3f} | {own} | {trl.final:.3f}, "
                     f"{best.removeprefix('TRL_')} | {trl_own} | {trl_ours} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir).resolve()
    tasks = [task for half in HALVES.values() for task in half if task.name in args.tasks]
    starts = {task: prepare(folder, task) for task in tasks}
    cells = [(task, rate, seed) for seed in range(args.seeds) for task in tasks for rate in args.rates]
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = pool.map(lambda cell: run_cell(args, starts[cell[0]], *cell), cells)
        list(tqdm(waiting, total=len(cells), desc="runs of TRL", unit="run"))
    text = table(finished(folder), [task.name.replace(" ", "_") for task in tasks])
    print(text)
    with atomic_file(folder / "trl.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"table: {folder}/trl.md")


if __name__ == "__main__":
    run(main)
