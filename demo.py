"""The complete walkthrough on the embedded model in one command: data, SFT, reward model, PPO twice, fuse, chat.

    make demo                          the results of the README, in the folder demo/
    python demo.py --short             the same with few steps, to check that everything runs

Every stage runs one of the scripts as a process; its command line is printed.
"""

from models import cpu

cpu.enable()  # before mlx is imported

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.cli import python_command, run
from common.errors import UserError
from common.files import write_json
from common.parser import Parser
from common.ranges import SEED
from data.digits import DigitRule, held_out_starts
from models.adapters import load_adapter
from models.loading import load, resolve
from rewards.digits import digit_reward
from synth.pipeline.script import run_script
from training.evaluation import Evaluation, evaluate_model
from training.metrics import read_metrics
from training.plots import REWARD, Panel, plot_panels, points_of

RULE = DigitRule(increasing=True, multiple_of=2)
SAMPLES_PER_START = 25
MARKER = "demo.json"
SPLITS = {"train": "training", "valid": "validation"}


class Scale(NamedTuple):
    """Training steps of each stage."""

    sft_iters: int
    reward_iters: int
    ppo_steps: int


FULL, SHORT = Scale(sft_iters=20, reward_iters=800, ppo_steps=60), Scale(sft_iters=5, reward_iters=5, ppo_steps=2)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--short", action="store_true", help="a few steps of each stage")
    parser.add_argument("--stages", choices=("all", "models"), default="all", help="models: without PPO")
    parser.add_argument("--output-dir", default="demo", help="folder for all files of the demo; emptied first")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of all randomness")
    return parser.parse_args()


def stage(title: str, *command: object) -> float:
    """Run one script and return its duration in seconds. A failing stage ends the demo."""
    print(f"\n=== {title}", flush=True)
    started = time.perf_counter()
    run_script([str(word) for word in command], f"{python_command()} demo.py, which begins anew")
    return time.perf_counter() - started


def make_models(folder: Path, scale: Scale, seed: int) -> dict[str, float]:
    """Make data, SFT model and reward model. Returns the training times in seconds."""
    data, sft, reward = folder / "data", folder / "sft_fine_tune", folder / "reward_model"
    digits = ["data/generate_digit_data.py", "--increasing", "--multiple-of", 2, "--output-dir", data, "--seed", seed]
    stage("data", *digits, "--num-samples", 150, "--noise", 0.0)
    seconds = {}
    common = ["--seed", seed, "--data", data]
    seconds["sft"] = stage(
        "SFT", "sft.py", "--train", *common, "--iters", scale.sft_iters,
        "--save-file", folder / "sft_adapter", "--output-dir", folder / "runs/sft",
    )  # fmt: skip
    stage("fuse SFT", "fuse.py", "--adapter-file", folder / "sft_adapter", "--save-path", sft)
    reward_data(folder, digits)
    seconds["reward model"] = stage(
        "reward model", "sft.py", "--reward-model", "--train", *common, "--iters", scale.reward_iters,
        "--data-base", "reward_function_", "--fine-tune-type", "full", "--batch-size", 32, "--learning-rate", 2e-3,
        "--lr-schedule", "cosine",
        "--save-file", folder / "reward_adapter", "--output-dir", folder / "runs/reward_model",
    )  # fmt: skip
    stage("fuse the reward model", "fuse.py", "--adapter-file", folder / "reward_adapter", "--save-path", reward)
    return seconds


def train_by_ppo(folder: Path, scale: Scale, seed: int) -> dict[str, float]:
    """PPO on the ground truth and on the learned reward. Returns their times in seconds."""
    sft, reward, seconds = folder / "sft_fine_tune", folder / "reward_model", {}
    ppo = ["ppo_training.py", "--model", sft, "--seed", seed, "--num-steps", scale.ppo_steps]
    seconds["ppo"] = stage(
        "PPO on the ground truth", *ppo, "--ground_truth_reward",
        "--save-file", folder / "ppo_adapter", "--output-dir", folder / "runs/ppo",
    )  # fmt: skip
    seconds["ppo learned"] = stage(
        "PPO on the learned reward", *ppo, "--reward_model", reward,
        "--save-file", folder / "ppo_learned_adapter", "--output-dir", folder / "runs/ppo_learned",
    )  # fmt: skip
    stage("fuse PPO", "fuse.py", "--model", sft, "--adapter-file", folder / "ppo_adapter",
          "--save-path", folder / "ppo_fine_tune")  # fmt: skip
    return seconds


def reward_data(folder: Path, digits: Sequence[object]) -> None:
    """Scored rows for the reward model: noisy sequences of any length, and samples of the SFT model.

    Without the model's own samples, the reward model would never see the mistakes that it has to judge.
    """
    noisy = [*digits, "--num-samples", 2000, "--noise", 0.2, "--min-length", 1, "--prefix", "noisy_"]
    stage("data for the reward model: noisy sequences", *noisy)
    for seed, (split, count) in enumerate((("train", 6000), ("valid", 500))):
        own = folder / f"data/own_{split}.jsonl"
        stage(
            f"data for the reward model: the SFT model's own samples ({split})", "evaluate.py", "--model",
            folder / "sft_fine_tune", "--ground_truth_reward", "--num-samples", count, "--seed", seed,
            "--save-samples", own,
        )  # fmt: skip
        rows = own.read_text() + (folder / f"data/noisy_{RULE.name}_{split}.jsonl").read_text()
        (folder / f"data/reward_function_{split}.jsonl").write_text(rows)


def evaluate_all(folder: Path) -> dict[str, Evaluation]:
    """Evaluate every model on the same held-out prompts at temperature 1. KL is relative to the SFT model."""
    prompts = [str(start) for start in held_out_starts(RULE) for _ in range(SAMPLES_PER_START)]
    sft = folder / "sft_fine_tune"
    candidates = {
        "base": ("tiny-digits", None),
        "SFT": (str(sft), None),
        "PPO, ground truth": (str(folder / "ppo_fine_tune"), None),
        "PPO, learned reward": (str(sft), folder / "ppo_learned_adapter"),
    }
    reference = load(str(sft)).model
    results = {}
    for name, (model_name, adapter) in candidates.items():
        loaded = load(model_name)
        if adapter is not None:
            load_adapter(loaded.model, adapter)
        results[name] = evaluate_model(
            loaded.model, loaded.tokenizer, prompts, digit_reward(RULE), max_tokens=64, reference=reference
        )
    return results


def show(results: dict[str, Evaluation], seconds: dict[str, float], folder: Path) -> None:
    """Print sample completions and the table of results, and save them."""
    print("\n=== completions of held-out prompts, temperature 1")
    for name, result in results.items():
        print(f"{name}:")
        for index in range(0, 3 * SAMPLES_PER_START, SAMPLES_PER_START):
            print(f"  {result.scores[index]:.2f}  {result.texts[index]}")
    took = {"SFT": "sft", "PPO, ground truth": "ppo", "PPO, learned reward": "ppo learned"}
    count = len(results["base"].scores)
    print(f"\n=== {count} completions of held-out prompts each, temperature 1, score of the rule {RULE.name}")
    print(f"{'':<22}{'mean score':>16}{'perfect':>10}{'KL from SFT':>14}{'seconds':>10}")
    for name, result in results.items():
        spent = f"{seconds[took[name]]:.0f}" if name in took else ""
        score = f"{result.mean_score:.3f} ± {result.standard_error:.3f}"
        print(f"{name:<22}{score:>16}{result.perfect_share or 0:>10.0%}{result.kl:>14.2f}{spent:>10}")
    few = {name: {"texts": result.texts[:10], "rows": result.rows[:10]} for name, result in results.items()}
    table = {name: {**result._asdict(), **few[name]} for name, result in results.items()}
    write_json(folder / MARKER, {"seconds": seconds, "results": table})


def draw(folder: Path) -> list[Path]:
    """Plot loss, reward and KL of the runs. Returns the pictures' paths."""

    def curve(name: str, metric: str) -> list[tuple[float, float]]:
        return points_of(read_metrics(folder / "runs" / name), metric)

    def both(name: str, metric: str) -> dict[str, list[tuple[float, float]]]:
        return {label: curve(name, f"{split}_{metric}") for split, label in SPLITS.items()}

    rule, nats = "digit rule, 0 to 1", "nats per completion"
    pictures = {
        "loss.png": [
            Panel("SFT: loss", "nats per token", both("sft", "loss")),
            Panel("reward model: accuracy", "% of pairs", both("reward_model", "accuracy")),
        ],
        "reward.png": [
            Panel("PPO on the ground truth: score", rule, {"score": curve("ppo", "mean_score")}),
            Panel("its KL from the SFT model", nats, {"KL": curve("ppo", "kl")}),
            Panel("PPO on the learned reward: score", REWARD, {"score": curve("ppo_learned", "mean_score")}),
            Panel("its true score", rule, {"true score": curve("ppo_learned", "true_score")}),
        ],
        "kl.png": [
            Panel(
                "KL from the SFT model",
                nats,
                {"ground truth": curve("ppo", "kl"), "learned reward": curve("ppo_learned", "kl")},
            )
        ],
    }
    for name, panels in pictures.items():
        plot_panels(folder / name, panels)
    return [folder / name for name in pictures]


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    folder = Path(args.output_dir)
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise UserError(f"{folder} was not created by the demo and would be emptied; name another --output-dir")
    shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / MARKER, {})
    resolve("tiny-digits")
    built = time.perf_counter() - started
    scale = SHORT if args.short else FULL
    seconds = make_models(folder, scale, args.seed)
    if args.stages == "models":
        return
    seconds |= train_by_ppo(folder, scale, args.seed)
    results = evaluate_all(folder)
    show(results, seconds, folder)
    print("\npictures:", *draw(folder), sep="\n  ")
    print(f"\n{time.perf_counter() - started:.0f} s in total ({built:.0f} s of it to build the embedded model)")
    print(f"chat with it: {python_command()} talk_to_model.py --model {folder / 'ppo_fine_tune'}")


if __name__ == "__main__":
    run(main)
