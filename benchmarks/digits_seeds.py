"""The walkthrough's PPO task over many seeds: how fast, how high and how stable it learns.

    python benchmarks/digits_seeds.py                          MLX, LoRA on the ground truth, 10 seeds
    python benchmarks/digits_seeds.py --framework both         the same in MLX and in PyTorch
    python benchmarks/digits_seeds.py --variants lora learned soft_prompt full
    python benchmarks/digits_seeds.py --seeds 3 --output-dir runs/knobs --flags "--ppo-epochs 4" --label "4 epochs"

A cell is one run of ppo_training.py (or pytorch_ppo_training.py) by its defaults and the flags of `VARIANTS`, from an
SFT model with a mean score of 0.5 to 0.7, in a folder of its own: finished cells are kept, cut ones resumed. Ends with
a table, a picture of all cells that the folder holds, and both as files. Scores are those of the digit rule, at
temperature 1.
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from tqdm import tqdm

from common.cli import run
from common.errors import UserError
from common.files import atomic_file, read_json, write_json
from common.parser import Parser
from training.metrics import read_metrics

SCRIPTS = {"mlx": "ppo_training.py", "torch": "pytorch_ppo_training.py"}
# The flags of each variant; {folder} is the benchmark's.
FROM_SFT = ["--model", "{folder}/sft_fine_tune"]
VARIANTS = {
    "lora": [*FROM_SFT, "--ground_truth_reward"],
    # The learned scores have a wider scale than the rule's 0 to 1, and are not to be followed too far.
    "learned": [*FROM_SFT, "--reward_model", "{folder}/reward_model"],
    # It cannot be fused: PPO continues with the one that SFT trained. It learns more slowly, and a larger
    # batch keeps its rise through the goal steady.
    "soft_prompt": ["--resume-file", "{folder}/soft_prompt", "--ground_truth_reward", "--ppo-epochs", "4"],
    "full": [*FROM_SFT, "--fine-tune-type", "full", "--ground_truth_reward"],
}
BATCH_SIZES = {"lora": 128, "learned": 128, "soft_prompt": 1024, "full": 128}
COMPLETIONS = 25_000
GOAL = 0.9


class Run(NamedTuple):
    """A finished cell: a row of figures a step, and how many completions a step has."""

    rows: list[dict]
    batch_size: int


class Result(NamedTuple):
    """What one run shows. Steps are counted in completions sampled."""

    completions_to_goal: float  # inf if never reached
    seconds_to_goal: float
    last_fifth: float  # mean score over the last fifth of the run
    lowest_10_steps: float  # lowest mean of 10 steps after the goal was first reached
    lowest_1000: float  # lowest mean of some 1 000 completions after the goal was first reached
    fell_back: bool  # whether a mean of some 1 000, once one had reached the goal, was below it again
    final_kl: float  # nats per completion, mean of the last 10 steps
    seconds: float


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--framework", choices=("mlx", "torch", "both"), default="mlx")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=["lora"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--completions", type=int, default=COMPLETIONS, help="sampled in each run")
    parser.add_argument("--batch-size", type=int, help="completions a step (default: 1024 for soft_prompt, else 128)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--output-dir", default="runs/digits_seeds", help="folder of all cells")
    parser.add_argument("--flags", default="", help="further flags for every run, in one string")
    parser.add_argument("--label", default="", help="what the table calls the runs with those flags")
    return parser.parse_args()


def script(log: Path, jobs: int, *words: object) -> None:
    """Run one script with its output in a log file; raises UserError that names the log if it fails.

    jobs: how many run at the same time; each gets its share of the cores, as on CPU more threads would only wait.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    environment = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, **os.environ}
    with log.open("a", encoding="utf-8") as out:
        command = [sys.executable, *map(str, words)]
        code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, env=environment).returncode
    if code:
        raise UserError(f"{words[0]} failed with exit code {code}; see {log}")


def prepare(folder: Path) -> None:
    """What all cells start from: the SFT model and the reward model of the demo, and a soft prompt; made once."""
    log = folder / "prepare.log"
    if not (folder / "reward_model").exists():
        script(log, 1, "demo.py", "--stages", "models", "--output-dir", folder / "models")
        for name in ("sft_fine_tune", "reward_model"):
            (folder / "models" / name).rename(folder / name)
    if not (folder / "soft_prompt").exists():
        script(
            log, 1, "sft.py", "--train", "--prompt-tuning", "--iters", 100, "--data", folder / "models/data",
            "--save-file", folder / "soft_prompt", "--output-dir", folder / "models/runs/soft_prompt",
        )  # fmt: skip


def cell_folder(folder: Path, framework: str, variant: str, label: str, seed: int) -> Path:
    return folder / f"{framework}-{variant}{f', {label}' if label else ''}-{seed}"


def run_cell(args: argparse.Namespace, framework: str, variant: str, seed: int) -> None:
    """Start or resume a cell, unless it is finished."""
    folder = Path(args.output_dir).resolve()
    cell = cell_folder(folder, framework, variant, args.label, seed)
    if (cell / "summary.json").exists():
        return
    log = folder / "logs" / f"{cell.name}.log"
    if any((cell / "checkpoints").glob("[0-9]*")):
        script(log, args.jobs, SCRIPTS[framework], "--resume", cell)
        return
    batch_size = args.batch_size or BATCH_SIZES[variant]
    (cell / "config.json").unlink(missing_ok=True)  # a cell that was cut before its first checkpoint starts anew
    script(
        log, args.jobs, SCRIPTS[framework], *(flag.format(folder=folder) for flag in VARIANTS[variant]),
        "--batch-size", batch_size, "--num-steps", -(-args.completions // batch_size), "--seed", seed,
        "--save-file", folder / "adapters" / cell.name, "--output-dir", cell, *args.flags.split(),
    )  # fmt: skip


def finished(folder: Path) -> dict[tuple[str, str], list[Run]]:
    """Every finished cell of the folder, by framework and variant, in the order of the seeds."""
    runs: dict[tuple[str, str], dict[int, Run]] = {}
    for cell in (summary.parent for summary in folder.glob("*-*-*/summary.json")):
        framework, _, rest = cell.name.partition("-")
        variant, _, seed = rest.rpartition("-")
        done = Run(read_metrics(cell), read_json(cell / "config.json")["batch_size"])
        runs.setdefault((framework, variant), {})[int(seed)] = done
    known = [key for key in itertools.product(SCRIPTS, VARIANTS) if key in runs]
    keys = sorted(known, key=lambda key: list(VARIANTS).index(key[1])) + sorted(runs.keys() - known)
    return {key: [runs[key][seed] for seed in sorted(runs[key])] for key in keys}


def true_scores(rows: Sequence[dict]) -> np.ndarray:
    """The ground-truth mean score of every step, also where a learned reward was trained on."""
    return np.array([row.get("true_score", row["mean_score"]) for row in rows])


def measure(rows: Sequence[dict], batch_size: int) -> Result:
    """The figures of one run."""
    scores = true_scores(rows)
    reached = np.flatnonzero(scores >= GOAL)
    first = int(reached[0]) if len(reached) else None

    def means(scores: np.ndarray, window: int) -> np.ndarray:
        """Of every `window` steps in a row."""
        return np.convolve(scores, np.ones(window) / window, "valid") if len(scores) >= window else scores[:0]

    def lowest(window: int) -> float:
        after = means(scores[first:], window) if first is not None else scores[:0]
        return float(after.min()) if len(after) else float("nan")

    thousand = max(round(1000 / batch_size), 1)
    at_goal = means(scores, thousand) >= GOAL
    return Result(
        completions_to_goal=float("inf") if first is None else (first + 1) * batch_size,
        seconds_to_goal=float("inf") if first is None else rows[first]["seconds"],
        last_fifth=float(scores[-max(len(scores) // 5, 1) :].mean()),
        lowest_10_steps=lowest(10),
        lowest_1000=lowest(thousand),
        fell_back=bool(np.any(at_goal[:-1] & ~at_goal[1:])),
        final_kl=float(np.mean([row["kl"] for row in rows[-10:]])),
        seconds=rows[-1]["seconds"],
    )


def table(results: dict[tuple[str, str], list[Result]]) -> str:
    """One line per framework and variant: median (lowest to highest) over the seeds."""

    def spread(values: list[float], digits: int) -> str:
        return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    columns = ["completions to 0.9", "seconds to 0.9", "last fifth", "lowest 10 steps", "lowest 1 000", "fell back",
               "final KL"]  # fmt: skip
    lines = ["| run | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for (framework, variant), rows in results.items():
        cells = [
            spread([r.completions_to_goal for r in rows], 0),
            spread([r.seconds_to_goal for r in rows], 0),
            spread([r.last_fifth for r in rows], 3),
            spread([r.lowest_10_steps for r in rows], 3),
            spread([r.lowest_1000 for r in rows], 3),
            f"{sum(r.fell_back for r in rows)} of {len(rows)}",
            spread([r.final_kl for r in rows], 1),
        ]
        lines.append(f"| {framework}, {variant} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, runs: dict[tuple[str, str], list[Run]]) -> None:
    """All curves: one column per variant with the scores of every seed, and the learned reward's gap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"mlx": "tab:blue", "torch": "tab:orange"}
    variants = list(dict.fromkeys(variant for _, variant in runs))
    figure, axes = plt.subplots(2, len(variants), figsize=(5 * len(variants), 6.4), squeeze=False, sharex=True)
    for column, variant in enumerate(variants):
        score_axis, kl_axis = axes[:, column]
        learned_axis = None
        for framework in colours:
            for index, (rows, batch_size) in enumerate(runs.get((framework, variant), [])):
                x = np.array([row["step"] for row in rows]) * batch_size
                label = framework if index == 0 else None
                score_axis.plot(x, true_scores(rows), color=colours[framework], alpha=0.5, linewidth=0.9, label=label)
                kl_axis.plot(x, [row["kl"] for row in rows], color=colours[framework], alpha=0.5, linewidth=0.9)
                if variant == "learned":
                    learned_axis = learned_axis or score_axis.twinx()
                    learned = [row["mean_score"] for row in rows]
                    learned_axis.plot(x, learned, color="tab:green", alpha=0.4, linewidth=0.8, linestyle=":")
                    learned_axis.set_ylabel("dotted: the reward model's score, which PPO sees", fontsize=8)
        score_axis.axhline(GOAL, color="grey", linewidth=0.8, linestyle="--")
        score_axis.set_title(f"{variant}: mean score of the digit rule", fontsize=10)
        kl_axis.set_title("KL from the SFT model (nats per completion)", fontsize=10)
        kl_axis.set_xlabel("completions sampled")
        score_axis.legend(fontsize=8)
        for axis in (score_axis, kl_axis):
            axis.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir)
    prepare(folder.resolve())
    frameworks = ["mlx", "torch"] if args.framework == "both" else [args.framework]
    cells = [(f, v, seed) for seed in range(args.seeds) for v in args.variants for f in frameworks]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(lambda cell: run_cell(args, *cell), cells), total=len(cells), desc="runs", unit="run"))
    runs = finished(folder)
    results = {key: [measure(*run) for run in same] for key, same in runs.items()}
    text = table(results)
    print(text)
    with atomic_file(folder / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    finite = {
        f"{f}, {v}": [{k: x if np.isfinite(x) else None for k, x in r._asdict().items()} for r in rows]
        for (f, v), rows in results.items()
    }
    write_json(folder / "results.json", finite)
    draw(folder / "curves.png", runs)
    print(f"table, figures and picture: {folder}/table.md, results.json, curves.png")


if __name__ == "__main__":
    run(main)
