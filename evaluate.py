"""Sample completions, score them by any reward, and save them as rows; or compare two models.

    python evaluate.py --model ./sft_fine_tune/ --ground_truth_reward --held-out
    python evaluate.py --model ./sft_fine_tune/ --ground_truth_reward --num-samples 2000 --save-samples rows.jsonl
    python evaluate.py --model ./sft_fine_tune/ --resume-file ppo --against ./sft_fine_tune/ --ground_truth_reward

The saved rows have "text" and "reward", so `sft.py --reward-model` can learn from them: a reward model is most accurate
on what the policy writes. Intervals are 95 % confidence intervals over prompts, equally weighted. They cover the choice
of prompts, not the seed of training.
"""

from models import cpu

cpu.enable()  # before mlx is imported

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import run
from common.errors import UserError
from common.files import atomic_file, check_file, say_replaced
from common.parser import Parser, positive
from common.ranges import COUNT, NATURAL, NOT_NEGATIVE, SEED
from data.digits import held_out_starts
from data.prompts import say_beyond_context
from models.adapter_base import MODEL_HELP, base_of
from models.adapters import load_adapter
from models.gpu import memory_meter
from models.loading import LoadedModel, load, resolve, twin
from models.sharding import add_shard_flag, check_shard, files_digest, load_share
from rewards.build import build_reward
from rewards.combined import Reward
from training import console, ppo_flags
from training.evaluation import Evaluation, evaluate_model, per_prompt, score_difference, score_interval
from training.flags import add_logits_memory
from training.mlx_ranks import MLXRanks, launched, weights_digest
from training.planning import add_plan_flags, planned_peak, show_plan
from training.ranks import ALONE, Ranks, digest_of
from training.samples import text_table
from training.settings import Settings

# The reward, the reference, and the models to evaluate by their titles.
Opened = tuple[Reward, LoadedModel | None, dict[str, LoadedModel]]


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument(
        "--resume-file", "--adapter-path", help="adapter or soft prompt: a folder, or an .npz or .safetensors file"
    )
    parser.add_argument("--against", metavar="MODEL", help="compare with this model, prompt by prompt")
    parser.add_argument(
        "--against-adapter",
        metavar="FILE",
        help="compare with this adapter, on --against, else --model, else its own base",
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help="report the KL from this model, which must have the same tokens"
    )
    ppo_flags.add_reward_flags(parser)
    ppo_flags.add_prompt_source(parser)
    parser.add_argument(
        "--held-out", action="store_true", help="digit rule: prompt with the starts that PPO does not train on"
    )
    parser.add_argument(
        "--num-samples",
        type=COUNT,
        default=250,
        help="completions, spread evenly over the prompts, or over a sample of them",
    )
    parser.add_argument("--max-completion-length", "--max-new-tokens", type=COUNT, default=64, help="tokens")
    parser.add_argument(
        "--temperature", type=NOT_NEGATIVE, default=1.0, help="of sampling; 0: always the most likely token"
    )
    parser.add_argument("--show-samples", type=NATURAL, default=5, help="completions of each model to print")
    parser.add_argument("--save-samples", metavar="FILE.jsonl", help='write rows with "text" and "reward"')
    add_logits_memory(parser, Settings.logits_memory)
    add_plan_flags(parser)
    add_shard_flag(parser)
    parser.add_argument("--seed", type=SEED, default=0, help="seed of sampling")
    parser.show_first(
        *("--model", "--resume-file", "--against", "--ground-truth-reward", "--reward-model", "--reward-function"),
        *("--prompts", "--held-out", "--num-samples", "--temperature", "--save-samples"),
    )
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raise UserError for invalid combinations of flags, before anything is loaded."""
    ppo_flags.check_reward(args)
    positive("num-samples", args.num_samples)
    positive("max-completion-length", args.max_completion_length)
    positive("temperature", args.temperature, zero=True)
    positive("show-samples", args.show_samples, zero=True)
    positive("logits-memory", args.logits_memory)
    if args.save_samples:
        check_file(args.save_samples)
        say_replaced(args.save_samples)
    if args.reference and not args.temperature:
        raise UserError("--reference needs a --temperature above 0, because at 0 there is no KL")
    check_against(args)


def check_against(args: argparse.Namespace) -> None:
    """Raise UserError where a model would be compared with itself, as far as names tell."""
    compared = args.against or args.against_adapter
    if compared and args.against in (None, args.model) and args.against_adapter == args.resume_file:
        raise UserError("--against is the evaluated model itself; name another model, or another adapter")


def choose_prompts(args: argparse.Namespace, tokenizer) -> list[str]:
    """--num-samples prompts, chosen by `spread` from those that the flags name."""
    if args.held_out and not args.prompts:
        prompts = [str(start) for start in held_out_starts(ppo_flags.digit_rule(args))]
    else:
        prompts = ppo_flags.choose_prompts(args, tokenizer)
    if not prompts:
        raise UserError(f"no held-out start is a multiple of {args.multiple_of}; omit --held-out")
    return spread(prompts, args.num_samples, args.seed)


def spread(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` prompts: all of them in turn or, if there are more than `count`, a random sample in order."""
    if count >= len(prompts):
        return [prompts[i % len(prompts)] for i in range(count)]
    drawn = np.random.default_rng(seed).choice(len(prompts), count, replace=False)
    return [prompts[i] for i in sorted(drawn)]


def open_beside(name: str, base: LoadedModel) -> LoadedModel:
    """The model `name`, sharing the weights of `base` if it is the same. base: without an adapter so far."""
    same = resolve(name).resolve() == base.path.resolve()
    return replace(base, model=twin(base.model)) if same else load(name)


def open_whole(args: argparse.Namespace) -> Opened:
    """What the flags name; models and adapters on the same base share its weights."""
    loaded = load(args.model)
    reward = build_reward(args, loaded)
    reference = open_beside(args.reference, loaded) if args.reference else None
    candidates = {title_of(args.model, args.resume_file): loaded}
    if args.against:
        candidates[title_of(args.against, args.against_adapter)] = open_beside(args.against, loaded)
    for candidate, adapter in zip(candidates.values(), (args.resume_file, args.against_adapter), strict=False):
        if adapter:
            load_adapter(candidate.model, adapter)
    return reward, reference, candidates


def open_shares(args: argparse.Namespace, ranks: Ranks) -> Opened:
    """What the flags name, of each model this process's share; the reward is whole, and for rank 0 alone."""
    assert isinstance(ranks, MLXRanks)  # by check_shard
    named = [(args.model, args.resume_file), (args.against, args.against_adapter), (args.reference, None)]
    shares = [load_share(name, adapter, args.shard, ranks.group) if name else None for name, adapter in named]
    candidates = {title_of(*names): share for names, share in zip(named[:2], shares, strict=False) if share}
    first = next(iter(candidates.values()))
    reward = build_reward(args, first, shared=False) if ranks.writes else lambda prompts, completions: []
    return reward, shares[2], candidates


def check_reference(reference: LoadedModel, candidate: LoadedModel) -> None:
    """Raise UserError if the KL would compare probabilities of different tokens."""
    if reference.tokenizer.get_vocab() != candidate.tokenizer.get_vocab():
        raise UserError(
            f"--reference {reference.name} has other tokens than {candidate.name}, so the KL is undefined; "
            "name a model with the same tokenizer"
        )


def show(title: str, prompts: Sequence[str], result: Evaluation, num_rows: int, with_kl: bool) -> None:
    """Print `num_rows` of the samples as a table, and below them the figures."""
    count = min(num_rows, len(result.rows))
    print(f"{title}\n{text_table([result.rows[i * len(result.rows) // count] for i in range(count)])}".rstrip())
    figures = {
        **result.part_scores,
        "perfect_share": result.perfect_share,
        "completion_length": result.completion_length,
    }
    if with_kl:
        figures["kl"] = result.kl
    print(f"\n  {console.title('mean_score'):<22}{score_interval(prompts, result.scores)}")
    for name, value in figures.items():
        if value is not None:
            print(f"  {console.title(name):<22}{console.shown(name, value)}")
    print()


def show_difference(prompts: Sequence[str], first: Evaluation, second: Evaluation) -> None:
    """Print by how much the first model is better than the second, and on how many prompts."""
    found = score_difference(prompts, second.scores, first.scores)
    even = len(per_prompt(prompts, first.scores)) - found.gained - found.lost
    print(f"first less second, paired: {found.interval}")
    print(
        f"the first is better on {found.gained} prompts, as good on {even}, worse on {found.lost}; "
        f"sign test: p = {found.p_value:.2g}"
    )


def save_samples(path: str | Path, results: dict[str, Evaluation]) -> None:
    """Write one row per completion, atomically. If two models are compared, each row names its model."""
    rows: list[dict[str, Any]] = []
    for title, result in results.items():
        whose = {"model": title} if len(results) > 1 else {}
        for text, row in zip(result.texts, result.rows, strict=True):
            parts = {name: value for name, value in row.items() if name != "score"}
            rows.append({"text": text, "reward": row["score"], **parts, **whose})
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows: {path}")


def main() -> None:
    with launched() as ranks:
        evaluate(ranks)


def evaluate(ranks: Ranks) -> None:
    """What the flags ask for, by all processes of a launch together."""
    args = argparse.Namespace(**ranks.from_writer(lambda: vars(parse_args())))
    if not args.plan and ranks.writes:
        check(args)
    elif args.plan and args.shard:
        raise UserError("--plan counts a process that holds the whole model; leave out --shard")
    check_shard(args.shard, ranks.size, "evaluate.py")
    if args.num_samples < ranks.size and not args.shard:
        raise UserError(f"--num-samples {args.num_samples} is less than the {ranks.size} processes; raise it")
    if args.against_adapter:
        args.against = base_of(args.against or args.model, args.against_adapter, resolve)
    args.model = base_of(args.model, args.resume_file, resolve)
    if show_plan("evaluate.py", args):
        return
    check_against(args)
    planned = None if args.shard else planned_peak("evaluate.py", args)
    reward, reference, candidates = open_shares(args, ranks) if args.shard else open_whole(args)
    loaded = next(iter(candidates.values()))
    if reference:
        for candidate in candidates.values():
            check_reference(reference, candidate)
    prompts = choose_prompts(args, loaded.tokenizer)
    context = loaded.config.get("max_position_embeddings")
    say_beyond_context(loaded.tokenizer, prompts, args.max_completion_length, context)
    if ranks.size > 1:
        digests = [files_digest(one.path) if args.shard else weights_digest(one.model) for one in candidates.values()]
        models = {f"model_{number}": digest for number, digest in enumerate(digests, 1)}
        ranks.check_same(data=digest_of(prompts), **models)
    ranks, together = (ALONE, ranks) if args.shard else (ranks, ALONE)
    results, memory, started = {}, memory_meter(), time.perf_counter()
    for title, candidate in candidates.items():
        results[title] = evaluate_model(
            candidate.model,
            candidate.tokenizer,
            choose_prompts(args, candidate.tokenizer),  # as its own chat template renders them
            reward,
            args.max_completion_length,
            args.temperature,
            reference.model if reference else None,
            args.seed,
            known_prompts=prompts,
            logits_bytes=args.logits_memory * 10**6,
            ranks=ranks,
            together=together,
        )
        show(title, prompts, results[title], args.show_samples, with_kl=reference is not None)
    if len(results) > 1:
        show_difference(prompts, *results.values())
    distinct = len(set(prompts))
    over = f"{distinct} prompts" if distinct > 1 else f"{len(prompts)} completions of one prompt"
    print(f"intervals: 95 %, over {over}")
    tokens = sum(row["tokens"] for result in results.values() for row in result.rows)
    figures = {"tokens_per_second": tokens / (time.perf_counter() - started), "peak_memory_gb": memory() / 1e9}
    print(console.speed({**figures, **({"planned_memory_gb": planned / 1e9} if planned else {})}))
    if args.save_samples and ranks.writes and together.writes:
        save_samples(args.save_samples, results)


def title_of(model: str, adapter: str | None) -> str:
    """The name under which a model is printed."""
    return f"{model} with {adapter}" if adapter else model


if __name__ == "__main__":
    run(main)
