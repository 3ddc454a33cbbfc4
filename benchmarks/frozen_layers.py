"""PPO's scoring and update with the layers below the first trained one run once a rollout, and run every time.

    python benchmarks/frozen_layers.py
    python benchmarks/frozen_layers.py --hidden 576 --rounds 3

A random Llama with a LoRA on its last layers. Both ways score the same completions and take the same update in turn, in
one process, so that what else the machine does falls on both; the ratio is the median over rounds. Leaves out sampling,
which is the same in both, and memory.
"""

import argparse
import os
import platform
import statistics
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

WAYS = ("every time", "once")


class NoEnd:
    """A tokenizer as the learner needs it: without an EOS, so that every completion is as long as it may be."""

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
    ppo = PPOSettings(num_steps=1000, **rollout)
    adapter = AdapterConfig("lora", args.trained_layers, {"rank": 8, "scale": 10.0, "dropout": 0.0})
    policy, reference = build_policies(loaded, ppo, adapter)
    learner = PPOLearner(policy.module, reference, tokenizer, make_ppo_optimizer(policy, ppo), ppo)
    if way == "every time":
        learner.frozen_layers = 0
    mx.eval(policy.module.parameters(), reference.parameters())
    return learner


def measure(learner: PPOLearner, args: argparse.Namespace, step: int) -> tuple[float, float]:
    """Seconds of scoring and of the update of one rollout, the same in both ways."""
    rng = np.random.default_rng(step)
    prompts, completions = (
        rng.integers(1, args.vocabulary, (args.completions, length)).tolist() for length in (args.prompt, args.length)
    )
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
    parser.add_argument("--completions", type=int, default=16, help="of a rollout")
    parser.add_argument("--mini-batch", type=int, default=8, help="completions an update takes at a time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=48, help="tokens of a completion")
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
    print(f"{args.trained_layers} of {args.layers} layers trained, hidden {args.hidden}, "
          f"{args.completions} completions of {args.prompt} + {args.length} tokens, {args.rounds} rounds; "
          f"{platform.machine()}, {os.cpu_count()} cores, BLAS {cpu.BLAS}, mlx {mx.__version__}")  # fmt: skip
    print("| stage | every time, s | once, s | times as fast |\n|---|---|---|---|")
    for index, stage in enumerate(("scoring", "update")):
        plain, kept = ([times[index] for times in seconds[way][1:]] for way in WAYS)
        ratio = statistics.median(a / b for a, b in zip(plain, kept, strict=True))
        print(f"| {stage} | {statistics.median(plain):.2f} | {statistics.median(kept):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    run(main)
