"""Sample a model on prompts, score the completions by any reward, and keep them as rows.

    python evaluate.py --model ./sft_fine_tune/ --ground_truth_reward --held-out
    python evaluate.py --model ./sft_fine_tune/ --ground_truth_reward --num-samples 2000 --save-samples rows.jsonl

The saved rows hold "text" and "reward", so `sft.py --reward-model` learns from them: a reward model is best where it
has seen what the policy writes. Leaves out comparing two models pairwise.
"""

import argparse
import json
from pathlib import Path

import models.fast_blas  # noqa: F401  (before mlx)
from data.errors import UserError
from data.files import atomic_file
from data.prompts import held_out_starts
from models.adapters import load_adapter
from models.loading import load
from rewards.build import build_reward
from training import config, ppo_flags, ppo_step
from training.cli import run
from training.evaluation import Evaluation, evaluate_model


def parse_args() -> argparse.Namespace:
    parser = config.Parser(__doc__)
    parser.add_argument("--model", default="tiny-digits", help="tiny-digits, a folder, or a Hugging Face name")
    parser.add_argument(
        "--resume-file", "--adapter-path", help="adapter or soft prompt: a folder, or an .npz or .safetensors file"
    )
    parser.add_argument("--reference", metavar="MODEL", help="report the KL from this model, which has the same tokens")
    ppo_flags.add_reward_flags(parser)
    ppo_flags.add_prompt_source(parser)
    parser.add_argument("--held-out", action="store_true", help="digit rule: the starts that no training uses")
    parser.add_argument("--num-samples", type=int, default=250, help="completions, spread evenly over the prompts")
    parser.add_argument("--max-completion-length", "--max-new-tokens", type=int, default=64, help="tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0: the most likely token")
    parser.add_argument("--save-samples", metavar="FILE.jsonl", help='write rows of "text" and "reward"')
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    return parser.parse_args()


def choose_prompts(args: argparse.Namespace, tokenizer) -> list[str]:
    """--num-samples prompts: every one as often as the others, but for the remainder."""
    if args.held_out and not args.prompts:
        prompts = [str(start) for start in held_out_starts(ppo_step.digit_rule(args))]
    else:
        prompts = ppo_step.choose_prompts(args, tokenizer)
    if not prompts:
        raise UserError(f"no held-out start is a multiple of {args.multiple_of}; leave --held-out out")
    return [prompts[i % len(prompts)] for i in range(args.num_samples)]


def save_samples(path: str | Path, result: Evaluation) -> None:
    """Write one row per completion, atomically."""
    rows = ({"text": text, "reward": score} for text, score in zip(result.texts, result.scores, strict=True))
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    args = parse_args()
    ppo_flags.check_reward(args)
    config.positive("num-samples", args.num_samples)
    config.positive("max-completion-length", args.max_completion_length)
    config.positive("temperature", args.temperature, zero=True)
    loaded = load(args.model)
    reward = build_reward(args, loaded)
    reference = load(args.reference).model if args.reference else None
    if args.resume_file:
        load_adapter(loaded.model, args.resume_file)
    result = evaluate_model(
        loaded.model,
        loaded.tokenizer,
        choose_prompts(args, loaded.tokenizer),
        reward,
        args.max_completion_length,
        args.temperature,
        reference,
        args.seed,
    )
    for text, score in zip(result.texts[:5], result.scores, strict=False):
        print(f"{score:7.3f}  {text}")
    print(
        f"mean_score: {result.mean_score:.4f} ± {result.standard_error:.4f} (standard error) | "
        f"perfect_share: {result.perfect_share:.3f} | completion_length: {result.completion_length:.1f}"
        + (f" | kl: {result.kl:.3f}" if reference is not None else "")
    )
    if args.save_samples:
        save_samples(args.save_samples, result)
        print(f"{len(result.texts)} rows: {args.save_samples}")


if __name__ == "__main__":
    run(main)
