"""A real chat model learns to obey: SFT, PPO and DPO of SmolLM2-135M-Instruct on instructions that a program can check.

    make demo-real                     in the folder demo_real/; the same command goes on after a stop
    python demo_real.py --short        the same with few steps, to check that everything runs

PPO and DPO start from the same SFT adapter and see as many of its replies. Every stage runs one of the scripts as a
process; its command line is printed. Not here: the walkthrough on the embedded model (demo.py).
"""

from models import cpu

cpu.enable()  # before mlx is imported

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.cli import python_command, run
from common.errors import UserError
from common.files import read_json, write_json
from common.parser import Parser
from common.ranges import SEED
from data.generate_constraint_data import write_rows
from data.prompts import read_answers
from models.adapters import load_adapter
from models.loading import LoadedModel, load, twin
from models.smollm2 import NAME
from rewards.answer_reward import AnswerReward, answer_from_flag
from synth.pipeline.script import run_script
from training.evaluation import evaluate_model, score_interval
from training.intervals import Interval
from training.metrics import read_metrics
from training.plots import Panel, plot_panels, points_of
from training.samples import text_table

MARKER = "demo_real.json"
ANSWER = "constraints"
MAX_TOKENS = 48  # of a reply
LAYERS = ("--lora-layers", 8)  # those below are computed once a step
TRAINED = ("SFT", "PPO", "DPO")
# For a model of 135 million weights: the defaults suit larger ones. PPO has its default, which adapts.
SFT_RATE, DPO_RATE = (("--learning-rate", rate) for rate in (5e-4, 2e-4))
# Instructions differ in difficulty more than replies to one of them: each is compared with others to its own.
GROUPS = ("--advantage", "group", "--num-generations", 8)
KINDS = ("--kinds", "sentence", "count", "lower", "upper")  # few, so that each is met often enough to be learned


class Scale(NamedTuple):
    """How much of everything. rows: of train; DPO and PPO have twice as many replies.

    replies: of each held-out instruction, of which there is one to six rows.
    """

    rows: int
    sft_iters: int
    ppo_batch_size: int
    replies: int


FULL = Scale(rows=1024, sft_iters=15, ppo_batch_size=64, replies=1)
SHORT = Scale(rows=12, sft_iters=2, ppo_batch_size=16, replies=1)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--short", action="store_true", help="a few steps of each stage")
    parser.add_argument("--model", default=NAME, help="chat model to train, by a name as in docs/models.md")
    parser.add_argument("--output-dir", default="demo_real", help="folder for all files; what it has is not redone")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of all randomness")
    return parser.parse_args()


class Stages:
    """The stages of a demo in a folder, which keeps what is finished, and how long each took."""

    def __init__(self, folder: Path, flags: dict[str, Any]):
        """Begin, or go on with the same flags. Raises UserError for others, and for a folder of something else."""
        self.path = folder / MARKER
        if folder.exists() and any(folder.iterdir()) and not self.path.exists():
            raise UserError(f"{folder} was not created by this demo; name another --output-dir")
        begun: dict[str, Any] = {"flags": flags, "seconds": {}, "finished": []}
        state = read_json(self.path) if self.path.exists() else begun
        if state["flags"] != flags:
            raise UserError(f"{folder} was begun with {state['flags']}; give the same, or another --output-dir")
        self.flags, self.seconds, self.finished = flags, state["seconds"], state["finished"]
        self.keep()

    def keep(self) -> None:
        """Write what is finished."""
        write_json(self.path, {"flags": self.flags, "seconds": self.seconds, "finished": self.finished})

    def run(self, title: str, *words: object, run_folder: Path | None = None) -> None:
        """Run a script, unless it is finished. run_folder: of a training, which goes on where it was stopped."""
        print(f"\n=== {title}{' (finished before)' if title in self.finished else ''}", flush=True)
        if title in self.finished:
            return
        command = [str(word) for word in words]
        if run_folder and any((run_folder / "checkpoints").glob("[0-9]*")):
            command = [command[0], "--resume", str(run_folder)]
        elif run_folder:
            shutil.rmtree(run_folder, ignore_errors=True)
            command += ["--output-dir", str(run_folder)]
        started = time.perf_counter()
        try:
            run_script(command, f"{python_command()} demo_real.py, with the flags that it was begun with")
            self.finished.append(title)
        finally:
            self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - started
            self.keep()


def train(stages: Stages, folder: Path, scale: Scale) -> None:
    """Data, SFT, then PPO and DPO from it."""
    model, seed = stages.flags["model"], ("--seed", stages.flags["seed"])
    data, start, prompts = folder / "data", folder / "sft", ("--prompts", folder / "data/train.jsonl")
    short = ("--max-completion-length", MAX_TOKENS, "--answer", ANSWER)
    rows = ("--num-samples", scale.rows, *KINDS)
    stages.run("data", "data/generate_constraint_data.py", *rows, "--output-dir", data, *seed)
    stages.run(
        "SFT", "sft.py", "--train", "--model", model, "--data", data, "--iters", scale.sft_iters, "--batch-size", 8,
        "--val-batches", 4, *SFT_RATE, *LAYERS, *seed, "--save-file", start, run_folder=folder / "runs/sft",
    )  # fmt: skip
    stages.run(
        "PPO", "ppo_training.py", "--resume-file", start, *prompts, *short, *GROUPS, *seed,
        "--batch-size", scale.ppo_batch_size, "--mini-batch-size", scale.ppo_batch_size // 2,
        "--num-steps", 2 * scale.rows // scale.ppo_batch_size,
        "--save-file", folder / "ppo", run_folder=folder / "runs/ppo",
    )  # fmt: skip
    own = folder / "own"
    stages.run("replies of the SFT model", "evaluate.py", "--resume-file", start, *prompts, *short, "--num-samples",
               2 * scale.rows, "--save-samples", own / "samples.jsonl", *seed)  # fmt: skip
    write_pairs(own, read_rows(data / "train.jsonl"), read_rows(own / "samples.jsonl"))
    stages.run(
        "DPO", "sft.py", "--dpo", "--train", "--resume-adapter-file", start, *seed, "--data", own,
        "--data-base", "pairs_", "--epochs", 1, "--batch-size", 8, *DPO_RATE,
        "--save-file", folder / "dpo", run_folder=folder / "runs/dpo",
    )  # fmt: skip


def read_rows(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_pairs(folder: Path, rows: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]) -> None:
    """The pairs of DPO: of two replies to an instruction the better, if it ended by itself, and the worse.

    samples: two of every row of the task, the first of all before the second of all. A tenth is for validation.
    """
    pairs = []
    for row, *two in zip(rows, samples[: len(rows)], samples[len(rows) :], strict=True):
        worse, better = sorted(two, key=lambda sample: sample["reward"])
        if worse["reward"] < better["reward"] and better["tokens"] < MAX_TOKENS:
            said = {"chosen": better["completion"], "rejected": worse["completion"]}
            pairs.append({"messages": row["messages"][:1], **said})
    if len(pairs) < 2:
        raise UserError(f"only {len(pairs)} instructions have two replies of different scores; sample more of them")
    held_out = -(-len(pairs) // 10)
    write_rows(folder / "pairs_valid.jsonl", pairs[:held_out])
    write_rows(folder / "pairs_train.jsonl", pairs[held_out:])


def evaluate_all(stages: Stages, folder: Path, replies: int) -> dict[str, dict[str, Any]]:
    """The figures of every model on the instructions of test.jsonl; finished ones are kept."""
    base, adapters = load(stages.flags["model"]), {"base": None, **{name: folder / name.lower() for name in TRAINED}}
    results = {}
    for name, adapter in adapters.items():
        kept = folder / "results" / f"{name}.json"
        if not kept.exists():
            print(f"\n=== held-out replies: {name}", flush=True)
            data = folder / "data/test.jsonl"
            write_json(kept, held_out_figures(base, folder / "sft", adapter, data, replies, stages.flags["seed"]))
        results[name] = read_json(kept)
    return results


def held_out_figures(
    base: LoadedModel, start: Path, adapter: Path | None, data: Path, replies: int, seed: int
) -> dict[str, Any]:
    """Scores of sampled replies to the instructions of a file, at temperature 1, and the KL from the adapter `start`.

    adapter: of the model in question; None: the base. Returns the fields of Evaluation, and "interval".
    """
    reference, model = twin(base.model), twin(base.model)
    load_adapter(reference, start)
    if adapter:
        load_adapter(model, adapter)
    answers = read_answers(data, base.tokenizer)
    prompts = [prompt for prompt in answers for _ in range(replies)]
    reward = AnswerReward(answer_from_flag(ANSWER), answers).reward
    found = evaluate_model(model, base.tokenizer, prompts, reward, MAX_TOKENS, reference=reference, seed=seed)
    return {**found._asdict(), "interval": score_interval(prompts, found.scores)}


def show(results: dict[str, dict[str, Any]], seconds: dict[str, float], questions: Sequence[str], replies: int) -> None:
    """Print five instructions with the reply of every model, and the table of results."""
    print("\n=== replies to held-out instructions, temperature 1")
    for place in np.linspace(0, len(questions) - 1, 5).astype(int):
        print(f"\n{questions[place]}")
        for name, result in results.items():
            row = result["rows"][place * replies]
            print(f"  {name:<5}{row['score']:.2f}  {json.dumps(row['completion'], ensure_ascii=False)[1:-1]}")
    count, held_out = len(questions) * replies, len(questions)
    print(f"\n=== {count} replies to {held_out} held-out instructions; score: share of the constraints met, with its")
    print("95 % interval over instructions; KL from SFT in nats a reply; DPO's seconds include sampling its replies")
    took = dict(seconds, DPO=seconds["DPO"] + seconds["replies of the SFT model"])
    rows = [
        {
            "": name,
            "mean score": str(Interval(*result["interval"])),
            "perfect": f"{result['perfect_share']:.0%}",
            "KL": f"{result['kl']:.2f}",
            "tokens": f"{result['completion_length']:.1f}",
            "seconds": f"{took[name]:.0f}" if name in took else "",
        }
        for name, result in results.items()
    ]
    print(text_table(rows))


def draw(folder: Path) -> list[Path]:
    """Plot the runs. Returns the pictures' paths."""

    def curve(name: str, metric: str) -> list[tuple[float, float]]:
        return points_of(read_metrics(folder / "runs" / name), metric)

    scores = curve("ppo", "mean_score")
    windows = [scores[max(0, end - 8) : end] for end in range(1, len(scores) + 1)]
    recent = [(window[-1][0], float(np.mean([score for _, score in window]))) for window in windows]
    pictures = {
        "ppo.png": [
            Panel("PPO: score", "constraints met, 0 to 1", {"of a step": scores, "mean of the last 8": recent}),
            Panel("its KL from SFT", "nats per reply", {"": curve("ppo", "kl")}),
            Panel("its entropy", "nats per token", {"": curve("ppo", "entropy")}),
            Panel("its length", "tokens", {"": curve("ppo", "completion_length")}),
        ],
        "sft_dpo.png": [
            Panel("SFT: loss", "nats per token", {
                "training": curve("sft", "train_loss"), "validation": curve("sft", "valid_loss")}),
            Panel("DPO: margin of chosen over rejected", "nats × beta", {"": curve("dpo", "train_reward_margin")}),
        ],
    }  # fmt: skip
    for name, panels in pictures.items():
        plot_panels(folder / name, panels)
    return [folder / name for name in pictures]


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir)
    scale = SHORT if args.short else FULL
    stages = Stages(folder, {"model": args.model, "short": args.short, "seed": args.seed})
    train(stages, folder, scale)
    results = evaluate_all(stages, folder, scale.replies)
    questions = [row["messages"][0]["content"] for row in read_rows(folder / "data/test.jsonl")]
    show(results, stages.seconds, questions, scale.replies)
    print("\npictures:", *draw(folder), sep="\n  ")
    print(f"\n{sum(stages.seconds.values()):.0f} s of training and sampling")
    chat = f"talk_to_model.py --resume-file {folder / 'ppo'} --compare {args.model}"
    print(f"chat with it, the base's replies beside: {python_command()} {chat}")


if __name__ == "__main__":
    run(main)
