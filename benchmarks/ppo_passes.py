"""PPO's scoring and update with what saves work there, one thing after the other.

    python benchmarks/ppo_passes.py
    python benchmarks/ppo_passes.py --hidden 576 --vocabulary 49152 --rounds 3

A random Llama with a LoRA on its last layers; prompts that have several completions each, of lengths as they vary
(geometric). All ways score the same completions and take the same update in turn, in one process, so that what else the
machine does falls on all; ratios are medians over rounds. Leaves out sampling, which is the same in all, and memory.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import cpu

cpu.enable()  # before mlx is imported

import mlx.core as mx
import numpy as np
from mlx_lm.models.llama import Model, ModelArgs

from common.cli import run
from common.parser import Parser, positive
from models.adapter_config import AdapterConfig
from models.loading import LoadedModel
from training.advantages import advantages_and_returns
from training.ppo_learner import PPOLearner, build_policies, make_ppo_optimizer
from training.settings import PPOSettings

WAYS = ("all layers every time", "those below the trained ones once", "and rows end to end")


class NoEnd:
    """A tokenizer as the learner needs it: without an EOS, so that a completion is as long as it is given."""

    eos_token_ids: frozenset[int] = frozenset()
    pad_token_id = 0


def build_learner(args: argparse.Namespace, way: str) -> PPOLearner:
    """A random Llama with a LoRA on its last layers, ready to learn."""
    mx.random.seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 8 * args.hidden // 3, "vocab_size": args.vocabulary}
    heads = {"num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 64}
    settings = {"model_type": "llama", "num_hidden_layers": args.layers, "rms_norm_eps": 1e-6, **sizes, **heads}
    model = Model(ModelArgs.from_dict({**settings, "tie_word_embeddings": True}))
    tokenizer = NoEnd()
    loaded = LoadedModel(model, tokenizer, {}, Path(), "random")
    rollout = {"batch_size": args.completions, "mini_batch_size": args.mini_batch, "max_completion_length": args.length}
    compared = {"advantage": "group", "num_generations": args.of_a_prompt} if args.of_a_prompt > 1 else {}
    ppo = PPOSettings(num_steps=1000, **compared, **rollout)
    adapter = AdapterConfig("lora", args.trained_layers, {"rank": 8, "scale": 10.0, "dropout": 0.0})
    policy, reference = build_policies(loaded, ppo, adapter)
    learner = PPOLearner(policy.module, reference, tokenizer, make_ppo_optimizer(policy, ppo), ppo)
    if way == WAYS[0]:
        learner.frozen_layers = 0
    learner.may_pack = way == WAYS[2]
    mx.eval(policy.module.parameters(), reference.parameters())
    return learner


def measure(learner: PPOLearner, args: argparse.Namespace, step: int) -> tuple[float, float]:
    """Seconds of scoring and of the update of one rollout, the same in all ways."""
    rng = np.random.default_rng(step)
    asked = rng.integers(1, args.vocabulary, (args.completions // args.of_a_prompt, args.prompt)).tolist()
    prompts = [prompt for prompt in asked for _ in range(args.of_a_prompt)]
    lengths = np.full(args.completions, args.length)
    if args.mean_length:
        lengths = np.minimum(rng.geometric(1 / args.mean_length, args.completions), args.length)
    completions = [rng.integers(1, args.vocabulary, length).tolist() for length in lengths]
    started = time.perf_counter()
    rollout, _ = learner.experience(prompts, completions, rng.normal(size=args.completions).astype(np.float32))
    mx.synchronize()
    scored = time.perf_counter()
    estimates = advantages_and_returns(rollout, learner.settings, 0.01)
    learner.update(step, rollout, *estimates, 0.01)
    return scored - started, time.perf_counter() - scored


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--hidden", type=int, default=256, help="width of the model, in heads of 64")
    parser.add_argument("--layers", type=int, default=30, help="of the model")
    parser.add_argument("--trained-layers", type=int, default=8, help="of these the last, with a LoRA")
    parser.add_argument("--vocabulary", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument("--completions", type=int, default=32, help="of a rollout")
    parser.add_argument("--of-a-prompt", type=int, default=8, help="completions that a prompt has")
    parser.add_argument("--mini-batch", type=int, default=16, help="completions an update takes at a time")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of a prompt")
    parser.add_argument(
        "--mean-length", type=int, default=20, help="of a completion on average; 0: all are --length"
    )
    parser.add_argument("--length", type=int, default=48, help="tokens of a completion at most")
    parser.add_argument("--rounds", type=int, default=5, help="measured, after one that is not")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    positive("rounds", args.rounds)
    learners = {way: build_learner(args, way) for way in WAYS}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds + 1):
        for way in WAYS if number % 2 else WAYS[::-1]:
            seconds[way].append(measure(learners[way], args, number))
    print(f"{args.trained_layers} of {args.layers} layers trained, hidden {args.hidden}, vocabulary {args.vocabulary}; "
          f"{args.completions} completions of {args.mean_length} tokens on average, {args.length} at most, "
          f"{args.of_a_prompt} to a prompt of {args.prompt}, {args.mini_batch} a mini batch; {args.rounds} rounds; "
          f"{platform.machine()}, {os.cpu_count()} cores, BLAS {cpu.BLAS}, mlx {mx.__version__}")  # fmt: skip
    print("| | scoring, s | times as fast | update, s | times as fast |\n|---|---|---|---|---|")
    first = np.array(seconds[WAYS[0]][1:])
    for way in WAYS:
        times = np.array(seconds[way][1:])
        ratios = np.median(first / times, axis=0)
        cells = [f"{np.median(times[:, stage]):.2f} | {ratios[stage]:.2f}" for stage in (0, 1)]
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run(main)
