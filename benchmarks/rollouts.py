"""Tokens a second of rollouts against `mlx_lm.batch_generate`: the same prompts, lengths and EOS.

    python benchmarks/rollouts.py
    python benchmarks/rollouts.py --shapes "hidden 192" --prompts 8 --repeats 8        as for --advantage group
    python benchmarks/rollouts.py --shapes "hidden 192" --prompts 256 --in-flight 64   more than are sampled at once

A random Llama samples from its whole vocabulary, but its logits are bent so that each token says how many follow: every
side gets completions of the lengths drawn here, geometric as those that an EOS ends, cut at --max-tokens. Prompts are
of unequal lengths, each --repeats times. mlx-lm runs by its defaults (32 completions in flight, 8 prompts read at a
time), and with as many as we have, by default all. Sides take turns in one process, with the same BLAS; what counts is
the ratio within a round.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import cpu

cpu.enable()  # before mlx is imported

import mlx.core as mx
import numpy as np
from mlx_lm import batch_generate
from mlx_lm.models import llama

from benchmarks.ppo_step import MODELS
from benchmarks.sft_step import MODEL
from common.cli import run
from common.parser import Parser, positive
from models.generation import sample, temperature_sampler

SHAPES = {"hidden 192": MODEL, "real shape": {"model_type": "llama", "rms_norm_eps": 1e-5, **MODELS["real shape"]}}
EOS = 0
OURS, THEIRS, AS_WE_DO = "ours", "mlx_lm.batch_generate", "the same, as many in flight"
CERTAIN = 1e4  # a logit that is always drawn

Side = Callable[[], list[int]]  # gives the number of tokens of each completion, its EOS left out


class Countdown(llama.Model):
    """A Llama in which the token n is followed by n − 1, until 0."""

    def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        logits = super().__call__(inputs, *args, **kwargs)
        following = mx.maximum(inputs[..., None].astype(mx.int32) - 1, EOS)
        return mx.put_along_axis(logits, following, mx.array(CERTAIN, logits.dtype), axis=-1)


class Ids:
    """A tokenizer as `batch_generate` needs it."""

    eos_token_ids = (EOS,)

    def decode(self, ids: list[int]) -> str:
        return str(ids)


def make_prompts(args: argparse.Namespace, vocabulary: int) -> list[list[int]]:
    """The prompts, copies side by side. The last token of each is the length of its completion, EOS included."""
    rng = np.random.default_rng(args.seed)
    lengths = rng.integers(args.prompt_length // 2, args.prompt_length * 3 // 2 + 1, args.prompts)
    prompts = [rng.integers(1, vocabulary, length).tolist() for length in lengths]
    ends = rng.geometric(1 / args.mean_length, (args.prompts, args.repeats))
    return [[*prompt, int(end)] for prompt, row in zip(prompts, ends, strict=True) for end in row]


def make_sides(model: Countdown, prompts: list[list[int]], max_tokens: int, in_flight: int) -> dict[str, Side]:
    """What is compared, each at temperature 1. in_flight: completions at once, of ours and of mlx-lm's second way."""

    def ours() -> list[int]:
        found = sample(model, prompts, {EOS}, max_tokens, batch_size=in_flight)
        return [len(completion) - (completion[-1] == EOS) for completion in found]

    def theirs(**widths: int) -> list[int]:
        draw = temperature_sampler(1.0)
        found = batch_generate(
            model, Ids(), prompts, max_tokens=max_tokens, sampler=draw, return_token_ids=True, **widths
        )
        return [len(completion) for completion in found.token_ids or []]

    as_we_do = {"completion_batch_size": in_flight, "prefill_batch_size": in_flight}
    return {OURS: ours, THEIRS: theirs, AS_WE_DO: lambda: theirs(**as_we_do)}


def measure(sides: dict[str, Side], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each side in every round after the first, and the tokens of a rollout. Each round, every side runs."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    lengths: list[int] = []
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            found = sides[name]()
            seconds[name].append(time.perf_counter() - started)
            lengths = lengths or found
            assert found == lengths, "every side has completions of the same lengths"
        print(f"round {number}", file=sys.stderr, flush=True)
    return {name: values[1:] for name, values in seconds.items()}, sum(lengths)


def lines(shape: str, seconds: dict[str, list[float]], tokens: int) -> list[str]:
    """Tokens a second of each side and, by rounds, how many times as many ours are."""
    found = []
    for name, values in seconds.items():
        ratios = np.array(values) / np.array(seconds[OURS])
        ratio = "" if name == OURS else f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        found.append(f"| {shape} | {name} | {tokens / np.median(values):.0f} | {ratio} |")
    return found


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="of the model")
    parser.add_argument("--prompts", type=int, default=64, help="different ones")
    parser.add_argument("--repeats", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--in-flight", type=int, default=0, help="completions sampled at once; 0: all")
    parser.add_argument("--prompt-length", type=int, default=32, help="mean tokens of a prompt")
    parser.add_argument("--mean-length", type=int, default=32, help="of a completion, before it is cut")
    parser.add_argument("--max-tokens", type=int, default=96, help="of a completion")
    parser.add_argument("--rounds", type=int, default=5, help="measured, after one that is not")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and lengths")
    args = parser.parse_args()
    for name in ("prompts", "repeats", "prompt_length", "mean_length", "max_tokens", "rounds"):
        positive(name.replace("_", "-"), getattr(args, name))
    positive("in-flight", args.in_flight, zero=True)
    return args


def main() -> None:
    args = parse_args()
    found = []
    for shape in args.shapes:
        mx.random.seed(args.seed)
        model = Countdown(llama.ModelArgs.from_dict(SHAPES[shape]))
        model.eval()
        mx.eval(model.parameters())
        prompts = make_prompts(args, SHAPES[shape]["vocab_size"])
        sides = make_sides(model, prompts, args.max_tokens, args.in_flight or len(prompts))
        seconds, tokens = measure(sides, args.rounds)
        found += lines(shape, seconds, tokens)
        print(f"{shape}: {len(prompts)} prompts of {sum(map(len, prompts))} tokens, {tokens} sampled", flush=True)
    print(f"{os.cpu_count()} cores, BLAS {cpu.BLAS}, mlx {mx.__version__}, {args.rounds} rounds\n")
    print("| shape | side | tokens a second | ours are so many times (lowest to highest round) |\n|---|---|---|---|")
    print("\n".join(found))


if __name__ == "__main__":
    run(main)
