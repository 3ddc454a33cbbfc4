"""The digit task from equal data: DPO against SFT on the better completions, and against PPO.

    python benchmarks/digits_dpo.py                            5 seeds of 512 completions each
    python benchmarks/digits_dpo.py --methods ipo orpo
    python benchmarks/digits_dpo.py --methods dpo --flags "--beta 0.3" --label "beta 0.3"

Every method starts from the demo's SFT model and sees as many completions of it, each with the digit rule's score. PPO
samples them itself, step by step. The others get completions sampled beforehand, two a prompt: as pairs where the
scores differ, or, for SFT, the better one of each. Ends with a table of mean scores on starts that none trained on,
1 000 completions at temperature 1, and of the KL from the SFT model. Finished cells are kept.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import cpu

cpu.enable()  # before mlx is imported

import numpy as np

from common.cli import run
from common.errors import UserError
from common.files import atomic_file, read_json, write_json
from common.parser import Parser
from data.digits import DigitRule, digit_prompts, held_out_starts
from models.adapters import load_adapter
from models.loading import load
from rewards.digits import digit_reward
from training.evaluation import Evaluation, evaluate_model

RULE = DigitRule()
PPO_BATCH = 128
# The flags of each method beside those that all share; {steps} of PPO, {data} of the others.
TUNED = ["sft.py", "--train", "--batch-size", "32", "--epochs", "4", "--lr-schedule", "linear", "--data", "{data}"]
METHODS = {
    "sft": [*TUNED, "--data-base", "better_"],
    "dpo": [*TUNED, "--data-base", "pairs_", "--dpo"],
    "ipo": [*TUNED, "--data-base", "pairs_", "--dpo", "--loss", "ipo"],
    "orpo": [*TUNED, "--data-base", "pairs_", "--dpo", "--loss", "orpo"],
    "ppo": ["ppo_training.py", "--ground_truth_reward", "--num-steps", "{steps}", "--batch-size", str(PPO_BATCH)],
}


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=["sft", "dpo", "ppo"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--completions", type=int, default=512, help="seen by each method")
    parser.add_argument("--output-dir", default="runs/digits_dpo", help="folder of all cells")
    parser.add_argument("--flags", default="", help="further flags for every run, in one string")
    parser.add_argument("--label", default="", help="what the table calls the runs with those flags")
    return parser.parse_args()


def script(log: Path, *words: object) -> None:
    """Run one script with its output in a log file; raises UserError that names the log if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        code = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=out, stderr=out).returncode
    if code:
        raise UserError(f"{words[0]} failed with exit code {code}; see {log}")


def prepare(folder: Path) -> Path:
    """The demo's SFT model, made once."""
    model, log = folder / "sft_fine_tune", folder / "logs/prepare.log"
    if not model.exists():
        rule = ["--increasing", "--multiple-of", 2, "--num-samples", 150, "--noise", 0.0]
        script(log, "data/generate_digit_data.py", *rule, "--output-dir", folder / "data", "--seed", 0)
        words = ["--train", "--iters", 20, "--data", folder / "data", "--save-file", folder / "sft_adapter"]
        script(log, "sft.py", *words, "--output-dir", folder / "sft_run")
        script(log, "fuse.py", "--adapter-file", folder / "sft_adapter", "--save-path", model)
    return model


def sampled(model: Path, starts: Sequence[str], adapter: Path | None, seed: int, with_kl: bool = False) -> Evaluation:
    """One scored completion of every start."""
    loaded = load(str(model))
    reference = load(str(model)).model if with_kl else None
    if adapter is not None:
        load_adapter(loaded.model, adapter)
    return evaluate_model(loaded.model, loaded.tokenizer, starts, digit_reward(RULE), 48, 1.0, reference, seed, 512)


def make_data(folder: Path, model: Path, completions: int, seed: int) -> Path:
    """Completions of the SFT model, two a start: pairs_*.jsonl where scores differ, and better_*.jsonl."""
    data = folder / "data" / f"{completions}-{seed}"
    if (data / "pairs_valid.jsonl").exists():
        return data
    starts = np.random.default_rng(seed).choice(digit_prompts(RULE), completions // 2).tolist()
    rows = sampled(model, [start for start in starts for _ in range(2)], None, 1000 + seed).rows
    two = [sorted(rows[i : i + 2], key=lambda row: -row["score"]) for i in range(0, len(rows), 2)]
    pairs = [
        {"prompt": better["prompt"], "chosen": better["completion"], "rejected": worse["completion"]}
        for better, worse in two
        if better["score"] > worse["score"]
    ]
    better = [{"prompt": best["prompt"], "completion": best["completion"]} for best, _ in two]
    for name, all_rows in {"better": better, "pairs": pairs}.items():
        held_out = len(all_rows) // 20
        for split, some in {"train": all_rows[held_out:], "valid": all_rows[:held_out]}.items():
            with atomic_file(data / f"{name}_{split}.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return data


def run_cell(args: argparse.Namespace, folder: Path, model: Path, method: str, seed: int) -> None:
    """Train by one method and measure it, unless that is done."""
    cell = folder / f"{method}{f', {args.label}' if args.label else ''}-{seed}"
    result = cell / "result.json"
    if result.exists():
        return
    data = make_data(folder, model, args.completions, seed)
    words = [word.format(data=data, steps=args.completions // PPO_BATCH) for word in METHODS[method]]
    if not (cell / "adapter").exists():
        places = ["--save-file", cell / "adapter", "--output-dir", cell / "run"]
        script(
            folder / "logs" / f"{cell.name}.log", *words, "--model", model, "--seed", seed, *places, *args.flags.split()
        )
    measure(result, model, cell / "adapter")


def measure(result: Path, model: Path, adapter: Path | None) -> None:
    """Write the figures of a model with an adapter, on the held-out starts."""
    starts = [str(start) for start in held_out_starts(RULE)]
    found = sampled(model, [starts[i % len(starts)] for i in range(1000)], adapter, 0, with_kl=True)
    figures = {"score": found.mean_score, "perfect": found.perfect_share, "kl": found.kl}
    write_json(result, figures)


def table(folder: Path) -> str:
    """One line per method: median (lowest to highest) over the seeds."""
    cells: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*-*/result.json")):
        cells.setdefault(path.parent.name.rpartition("-")[0], []).append(read_json(path))

    def spread(rows: list[dict], name: str) -> str:
        values = [row[name] for row in rows]
        return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    lines = ["| method | seeds | mean score | share of perfect ones | KL, nats |", "|---" * 5 + "|"]
    lines += [
        f"| {name} | {len(rows)} | {' | '.join(spread(rows, key) for key in ('score', 'perfect', 'kl'))} |"
        for name, rows in cells.items()
    ]
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir).resolve()
    model = prepare(folder)
    if not (folder / "start-0/result.json").exists():
        measure(folder / "start-0/result.json", model, None)
    for seed in range(args.seeds):
        for method in args.methods:
            run_cell(args, folder, model, method, seed)
            print(f"{method}, seed {seed}: done", flush=True)
    print(table(folder))
    with atomic_file(folder / "table.md") as temporary:
        temporary.write_text(table(folder) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
