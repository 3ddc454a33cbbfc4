"""PPO on many tasks, most of which nothing was tuned on: does one set of defaults learn them all?

    python benchmarks/families.py                                        the defaults on the tasks of the first half
    python benchmarks/families.py --half "held out" --seeds 3 --methods gae group rloo
    python benchmarks/families.py --label 2e-3 --flags "--learning-rate 2e-3 --step-kl 0"       against a fixed rate

A cell is one run of ppo_training.py by its defaults and `--flags`, on one task (benchmarks/family_tasks.py), by one
estimator of advantages, from a model that 100 steps of SFT made. Finished cells are kept in the folder, cut ones
resumed. Ends with a table and a picture over all cells of the folder: the mean score of the last fifth under every
label, and the share of the best label that each reaches. A collapse is a mean of ten steps below half of the best one
before it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from tqdm import tqdm

from benchmarks.digits_seeds import script
from benchmarks.family_tasks import FIRST_NUMBERS, HALVES, NAMES, Task, noisy_text, sum_rows
from common.cli import run
from common.files import atomic_file, write_json
from common.parser import Parser
from training.metrics import read_metrics

COMPLETIONS, BATCH_SIZE = 25_000, 128
SFT_ITERS, PAIRS = 100, 500
DEFAULTS = "defaults"


class Result(NamedTuple):
    """What one run shows; scores are those of the task's own rule."""

    first: float  # mean score of the first step
    final: float  # mean score of the last fifth
    completions_to_final: float  # until a mean of 5 steps has 0.9 of `final`
    collapsed: bool
    kl: float  # nats per completion, mean of the last 10 steps
    seconds: float


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--half", choices=tuple(HALVES), default="choosing", help="of the tasks")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", choices=NAMES, help="of the half only these")
    parser.add_argument("--methods", nargs="+", choices=("gae", "group", "rloo"), default=["gae"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--completions", type=int, default=COMPLETIONS, help="sampled in each run")
    parser.add_argument("--flags", default="", help="further flags for every run, in one string")
    parser.add_argument("--label", default=DEFAULTS, help="what the table calls the runs with those flags")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--output-dir", default="runs/families", help="folder of all cells")
    return parser.parse_args()


def prepare(folder: Path, task: Task) -> list[object]:
    """Make what the task's runs start from, unless it is there; returns their flags."""
    work = folder / "tasks" / task.name.replace(" ", "_")
    if task.operand_digits:
        prompts = work / "sums.jsonl"
        if not prompts.exists():
            write_rows(prompts, sum_rows(np.random.default_rng(0), task.operand_digits, 400))
        return ["--model", "tiny-arithmetic", "--prompts", prompts, "--answer", "number", "--max-completion-length", 8]
    fused, log = work / "sft_fine_tune", work / "prepare.log"
    if not fused.exists():
        write_texts(work, task, log)
        adapter = work / "sft"
        train(log, work / "runs/sft", "sft.py", "--train", "--data", work, "--data-base", "text_", "--iters", SFT_ITERS,
              "--save-file", adapter)  # fmt: skip
        script(log, 1, "fuse.py", "--adapter-file", adapter, "--save-path", fused)
    flags: list[object] = ["--model", fused]
    if task.word_rule:
        prompts = work / "prompts.jsonl"
        write_rows(prompts, [{"prompt": str(number)} for number in FIRST_NUMBERS[task.word_rule]])
        reward = task.word_rule + ("_whole" if task.whole else "")
        return [*flags, "--prompts", prompts, "--reward-function", f"{ROOT}/benchmarks/family_tasks.py:{reward}"]
    reward_flags = learned_reward(work, task, log) if task.learned else ["--ground-truth-reward"]
    return [*flags, *digit_flags(task), *reward_flags]


def train(log: Path, run_folder: Path, name: str, *flags: object, jobs: int = 1) -> None:
    """Run a training script, or resume it where its run folder is there."""
    resumed = (run_folder / "config.json").exists()
    script(log, jobs, name, *(["--resume", run_folder] if resumed else [*flags, "--output-dir", run_folder]))


def digit_flags(task: Task) -> list[object]:
    rule = task.digit_rule
    return [] if rule is None else ["--multiple-of", rule.multiple_of, *([] if rule.increasing else ["--decreasing"])]


def learned_reward(work: Path, task: Task, log: Path) -> list[object]:
    """Train the task's reward model, unless it is there, on 500 pairs of noisy sequences; returns the flags."""
    assert task.digit_rule is not None
    adapter = work / "reward"
    if not adapter.exists():
        script(log, 1, "data/generate_digit_data.py", *digit_flags(task), "--num-samples", PAIRS, "--noise", 0.2,
               "--min-length", 1, "--prefix", "reward_", "--output-dir", work)  # fmt: skip
        train(log, work / "runs/reward", "sft.py", "--reward-model", "--train", "--model", work / "sft_fine_tune",
              "--data", work, "--data-base", f"reward_{task.digit_rule.name}_", "--iters", 300, "--batch-size", 32,
              "--fine-tune-type", "full", "--learning-rate", 2e-3, "--lr-schedule", "cosine",
              "--save-file", adapter)  # fmt: skip
    return ["--reward-model", adapter]


def write_texts(work: Path, task: Task, log: Path) -> None:
    """Write the rows of SFT: 150 to train on and as many to validate with."""
    if task.digit_rule is not None:
        script(log, 1, "data/generate_digit_data.py", *digit_flags(task), "--num-samples", 150, "--noise", 0,
               "--output-dir", work)  # fmt: skip
        for split in ("train", "valid", "test"):
            (work / f"{task.digit_rule.name}_{split}.jsonl").rename(work / f"text_{split}.jsonl")
        return
    rng = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        write_rows(work / f"text_{split}.jsonl", [{"text": noisy_text(rng, task.word_rule)} for _ in range(150)])


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_cell(args: argparse.Namespace, start: list[object], task: Task, method: str, seed: int) -> None:
    """Start or resume a cell, unless it is finished."""
    folder = Path(args.output_dir).resolve()
    cell = folder / "cells" / f"{task.name}, {method}, {args.label}, {seed}".replace(" ", "_")
    if (cell / "summary.json").exists():
        return
    train(folder / "logs" / f"{cell.name}.log", cell, "ppo_training.py", *start, "--advantage", method,
          "--batch-size", BATCH_SIZE, "--num-steps", -(-args.completions // BATCH_SIZE), "--seed", seed,
          "--save-file", folder / "adapters" / cell.name, *args.flags.split(), jobs=args.jobs)  # fmt: skip


def measure(rows: Sequence[dict], batch_size: int = BATCH_SIZE) -> Result:
    """The figures of one run."""
    scores = np.array([row.get("true_score", row["mean_score"]) for row in rows])
    final = float(scores[-max(len(scores) // 5, 1) :].mean())

    def means(window: int) -> np.ndarray:
        """Of every `window` steps in a row."""
        return np.convolve(scores, np.ones(window) / window, "valid") if len(scores) >= window else scores

    reached = np.flatnonzero(means(5) >= 0.9 * final)
    tens = means(10)
    return Result(
        first=float(scores[0]),
        final=final,
        completions_to_final=(int(reached[0]) + min(5, len(scores))) * batch_size if len(reached) else float("inf"),
        collapsed=bool(np.any(tens < 0.5 * np.maximum.accumulate(tens))),
        kl=float(np.mean([row["kl"] for row in rows[-10:]])),
        seconds=rows[-1]["seconds"],
    )


def finite(result: NamedTuple) -> dict[str, float | None]:
    """The figures by name, for JSON: None where one was not reached."""
    return {name: value if np.isfinite(value) else None for name, value in result._asdict().items()}


def finished(folder: Path) -> dict[str, dict[tuple[str, str, int], list[dict]]]:
    """The metrics of every finished cell, by label, and by task, method and seed."""
    runs: dict[str, dict[tuple[str, str, int], list[dict]]] = {}
    for summary in sorted((folder / "cells").glob("*/summary.json")):
        task, method, *label, seed = summary.parent.name.replace("_,", ",").split(",_")
        runs.setdefault(", ".join(label), {})[task, method, int(seed)] = read_metrics(summary.parent)
    return runs


def table(results: dict[str, dict[tuple[str, str, int], Result]], half: str) -> str:
    """A line per task and method of the half: the mean final score (lowest to highest over seeds) of every label."""
    labels = sorted(results, key=lambda label: (label != DEFAULTS, label))
    lines = [f"| task, method | start | {' | '.join(labels)} |", "|---" * (len(labels) + 2) + "|"]
    for task in (task.name.replace(" ", "_") for task in HALVES[half]):
        for method in ("gae", "group", "rloo"):
            cells = [[r for (t, m, _), r in results[label].items() if (t, m) == (task, method)] for label in labels]
            if any(cells):
                start = np.mean([r.first for rows in cells for r in rows])
                lines.append(f"| {task}, {method} | {start:.2f} | {' | '.join(map(spread, cells))} |")
    return "\n".join(lines)


def spread(rows: Sequence[Result]) -> str:
    """Mean final score and KL of a task's seeds, the lowest and highest score, and how many collapsed."""
    if not rows:
        return ""
    finals, fallen = [r.final for r in rows], sum(r.collapsed for r in rows)
    seeds = f" ({min(finals):.2f} to {max(finals):.2f})" if len(rows) > 1 else ""
    return f"{np.mean(finals):.2f}{seeds}, KL {np.mean([r.kl for r in rows]):.0f}" + (f", {fallen} fell" * bool(fallen))


def verdicts(results: dict[str, dict[tuple[str, str, int], Result]], half: str) -> list[str]:
    """For every label: in how many cells of the half it has 0.9 of the best label's score, among cells all have."""
    names = {task.name.replace(" ", "_") for task in HALVES[half]}
    shared = set.intersection(*(set(cells) for cells in results.values()))
    shared = {cell for cell in shared if cell[0] in names}
    if len(results) < 2 or not shared:
        return []
    best = {cell: max(cells[cell].final for cells in results.values()) for cell in shared}
    lines = []
    for label, cells in sorted(results.items()):
        near = sum(cells[cell].final >= 0.9 * best[cell] for cell in shared)
        share = np.mean([cells[cell].final / best[cell] for cell in shared])
        lines.append(f"{label}: 0.9 of the best label in {near} of {len(shared)} cells, {share:.2f} of it on average")
    return lines


def draw(path: Path, runs: dict[str, dict[tuple[str, str, int], list[dict]]], half: str) -> None:
    """A panel per task of the half, with the score of every cell over the completions sampled; a color per label and
    method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [task.name.replace(" ", "_") for task in HALVES[half]]
    kinds = sorted({(label, method) for label, cells in runs.items() for _, method, _ in cells})
    figure, axes = plt.subplots(3, 3, figsize=(11, 8), sharex=True, sharey=True, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=True):
        for index, (label, method) in enumerate(kinds):
            seeds = [rows for (task, m, _), rows in sorted(runs[label].items()) if (task, m) == (name, method)]
            for number, rows in enumerate(seeds):
                scores = [row.get("true_score", row["mean_score"]) for row in rows]
                smooth = np.convolve(scores, np.ones(5) / 5, "valid") if len(scores) >= 5 else scores
                x = BATCH_SIZE * (np.arange(len(smooth)) + len(scores) - len(smooth) + 1)
                title = method if len(runs) == 1 else f"{label}, {method}"
                axis.plot(x, smooth, color=f"C{index}", linewidth=1, alpha=0.7, label=title if not number else None)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.grid(alpha=0.3)
    handles, titles = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda found: len(found[1]))
    figure.legend(handles, titles, loc="outside upper right", ncols=3, fontsize=9)
    figure.supxlabel("completions sampled", fontsize=10)
    figure.supylabel("score, mean of 5 steps", fontsize=10)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir).resolve()
    tasks = [task for task in HALVES[args.half] if not args.tasks or task.name in args.tasks]
    starts = {task: prepare(folder, task) for task in tqdm(tasks, desc="starts", unit="task")}
    cells = [(task, method, seed) for seed in range(args.seeds) for method in args.methods for task in tasks]
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = pool.map(lambda cell: run_cell(args, starts[cell[0]], *cell), cells)
        list(tqdm(waiting, total=len(cells), desc="runs", unit="run"))
    runs = finished(folder)
    results = {label: {cell: measure(rows) for cell, rows in cells.items()} for label, cells in runs.items()}
    text = "\n\n".join([table(results, args.half), *verdicts(results, args.half)])
    print(text)
    name = args.half.replace(" ", "_")
    with atomic_file(folder / f"{name}.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_json(folder / "results.json", {
        label: {", ".join(map(str, cell)): finite(r) for cell, r in cells.items()} for label, cells in results.items()
    })  # fmt: skip
    draw(folder / f"{name}.png", runs, args.half)
    print(f"table, figures and picture: {folder}/{name}.md, results.json, {name}.png")


if __name__ == "__main__":
    run(main)
