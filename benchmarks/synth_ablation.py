"""What each part of synthetic data RL is worth: the full pipeline, and the same without one part, over seeds.

    python benchmarks/synth_ablation.py                                    every variant, 5 seeds
    python benchmarks/synth_ablation.py --variants full sft --seeds 2

A cell is one synth.run on the arithmetic task with tiny-arithmetic and the offline teacher, 20 % of whose answers are
wrong; for the two retrieval variants it is generating and verifying samples of a task whose facts are only in its
library. Each has its own folder: finished cells are kept, interrupted ones resumed. Ends with a table and a picture,
both also as files. The teacher's seed is the run's: teacher, samples and training differ from seed to seed.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from tqdm import tqdm

from common.cli import run
from common.errors import UserError
from common.files import atomic_file, read_json, write_json
from common.parser import Parser
from synth.chat_api import OFFLINE_MODEL
from synth.stages import StageRow, kept, load_rows
from synth.task import SHIPPED, load_task
from synth.teacher.connect import offline_teacher
from training.intervals import Interval, over_seeds

# The flags of each variant. A teacher's error rate is the offline teacher's default, 0.2, in all.
TRAINED = {
    "full": [],
    "no difficulty adaptation": ["--rounds", "0"],
    "random selection": ["--rule", "random"],
    "the paper's selection": ["--rule", "lowest"],
    "the paper's rules": ["--paper"],
    "no vote": ["--votes", "0"],
    "SFT in place of RL": ["--train-by", "sft"],
}
MADE = {"with retrieval": [], "no retrieval": ["--no-library"]}
FACTS = SHIPPED / "library_facts.yaml"
FACTS_COUNT = 200


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--variants", nargs="+", choices=(*TRAINED, *MADE), default=[*TRAINED, *MADE])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="cells at the same time")
    parser.add_argument("--output-dir", default="runs/synth_ablation", help="folder of all cells")
    return parser.parse_args()


def cell_folder(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{re.sub('[^a-zA-Z]+', '_', variant)}-{seed}"


def run_cell(folder: Path, variant: str, seed: int) -> None:
    """Start a cell, resume it, or leave it if it is finished."""
    cell = cell_folder(folder, variant, seed)
    if (cell / "result.json").exists():
        return
    started = time.perf_counter()
    if variant in MADE:
        make_facts(cell, MADE[variant], seed)
        result = measure_facts(load_rows(cell / "verify.jsonl"))
    else:
        train(cell, TRAINED[variant], seed)
        result = measure_run(cell)
    write_json(cell / "result.json", {**result, "seconds": time.perf_counter() - started})


def script(log: Path, *words: object) -> None:
    """Run one module with its output in a log file; raises UserError that names the log if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        code = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, stdout=out, stderr=out).returncode
    if code:
        raise UserError(f"{words[0]} failed with exit code {code}; see {log}")


def train(cell: Path, flags: Sequence[str], seed: int) -> None:
    """One run of the pipeline, from the task to the evaluation."""
    log = cell.with_name(f"{cell.name}.log")
    if (cell / "config.json").exists():
        script(log, "synth.run", "--resume", cell)
        return
    words = ["--task", SHIPPED / "arithmetic.yaml", "--offline-teacher", f"--seed {seed}", "--seed", seed]
    script(log, "synth.run", *words, *flags, "--output-dir", cell)


def make_facts(cell: Path, flags: Sequence[str], seed: int) -> None:
    """Samples of the task that needs its library, generated and voted on."""
    cell.mkdir(parents=True, exist_ok=True)
    log, made = cell.with_name(f"{cell.name}.log"), cell / "generate.jsonl"
    with offline_teacher(f"--seed {seed}") as url:
        words = ["--task", FACTS, "--teacher-url", url, "--teacher-model", OFFLINE_MODEL]
        words += ["--cache", cell / "cache.sqlite"]
        script(log, "synth.pipeline.generate", *words, *flags, "--count", FACTS_COUNT, "--out", made)
        script(log, "synth.pipeline.verify", *words, "--in", made, "--out", cell / "verify.jsonl")


def measure_run(cell: Path) -> dict[str, Any]:
    """The figures of a finished run."""
    found, rows = read_json(cell / "evaluation.json"), kept(load_rows(cell / "difficulty.jsonl"))
    return {
        "base": found["base"]["mean"],
        "trained": found["trained"]["mean"],
        "kept": len(rows),
        "correct": share(is_right_sum(row) for row in rows),
        "calls": read_json(cell / "ledger.json")["total"]["calls"],
    }


def is_right_sum(row: StageRow) -> bool:
    """Whether a sample's output is the sum of the two numbers in its input."""
    numbers = [int(number) for number in re.findall("[0-9]+", row["input"])]
    return len(numbers) == 2 and row["output"] == str(sum(numbers))


def measure_facts(rows: Sequence[StageRow]) -> dict[str, Any]:
    """The kept samples, and the share that agrees with the library; a town that is not in it is wrong."""
    years = dict(re.findall(r"town of (\w+) was founded in ([0-9]+)", " ".join(load_task(FACTS).passages)))

    def is_right(row: StageRow) -> bool:
        return any(town in row["input"] and row["output"] == year for town, year in years.items())

    return {"kept": len(kept(rows)), "correct": share(is_right(row) for row in kept(rows))}


def share(found: Any) -> float | None:
    """The share of true values; None if there are no values."""
    values = list(found)
    return sum(values) / len(values) if values else None


def finished(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Every finished cell of the folder: variant → seed → figures."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for variant in (*TRAINED, *MADE):
        prefix = cell_folder(folder, variant, 0).name.removesuffix("0")
        paths = {int(p.parent.name.removeprefix(prefix)): p for p in folder.glob(f"{prefix}[0-9]*/result.json")}
        if paths:
            found[variant] = {seed: read_json(paths[seed]) for seed in sorted(paths)}
    return found


def interval(values: Sequence[float]) -> Interval | None:
    return over_seeds(values) if len(values) > 1 else None


def against_full(cells: dict[str, dict[int, dict[str, Any]]], variant: str) -> Interval | None:
    """The difference in accuracy to the full pipeline, paired by seed."""
    full = cells.get("full", {})
    common = [seed for seed in cells[variant] if seed in full]
    return interval([cells[variant][seed]["trained"] - full[seed]["trained"] for seed in common])


def table(cells: dict[str, dict[int, dict[str, Any]]]) -> str:
    """One line per variant: means over the seeds, with 95 % intervals of Student's t."""
    lines = [
        "| variant | seeds | base | trained | trained, less full | kept samples that are right | kept | calls | s |"
    ]
    lines.append("|---" * 9 + "|")
    for variant, seeds in cells.items():
        rows = list(seeds.values())

        def mean(name: str, form: str, rows: list[dict[str, Any]] = rows) -> str:
            values = [row[name] for row in rows if row.get(name) is not None]
            if not values:
                return ""
            spread = interval(values) if form == ".3f" else None
            return str(spread) if spread else f"{np.mean(values):{form}}"

        less = against_full(cells, variant) if variant in TRAINED and variant != "full" else None
        figures = [mean("base", ".4g"), mean("trained", ".3f"), str(less or ""), mean("correct", ".3f")]
        figures += [mean("kept", ".0f"), mean("calls", ".0f"), mean("seconds", ".0f")]
        lines.append(f"| {variant} | {len(rows)} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def draw(path: Path, cells: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Accuracy before and after by variant, and the share of right samples: a dot per seed, a bar per interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, name, title in (
        (axes[0], "trained", "accuracy on the evaluation set (line: before training)"),
        (axes[1], "correct", "share of kept samples that are right"),
    ):
        shown = {v: [r[name] for r in s.values() if r.get(name) is not None] for v, s in cells.items()}
        shown = {variant: values for variant, values in shown.items() if values}
        for place, values in enumerate(shown.values()):
            axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5, markersize=5)
            if spread := interval(values):
                axis.plot([spread.low, spread.high], [place, place], color="tab:orange", linewidth=2)
                axis.plot([spread.mean], [place], "|", color="tab:orange", markersize=14)
        axis.set_yticks(range(len(shown)), list(shown))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    bases = [row["base"] for seeds in cells.values() for row in seeds.values() if "base" in row]
    if bases:
        axes[0].axvline(float(np.mean(bases)), color="grey", linewidth=0.8, linestyle="--")
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    plt.close(figure)


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cells = [(variant, seed) for seed in range(args.seeds) for variant in args.variants]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(lambda cell: run_cell(folder, *cell), cells)
        list(tqdm(done, total=len(cells), desc="runs", unit="run"))
    results = finished(folder)
    text = table(results)
    print(text)
    with atomic_file(folder / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    draw(folder / "ablation.png", results)
    print(f"table and picture: {folder}/table.md, ablation.png; figures: result.json of every cell")


if __name__ == "__main__":
    run(main)
