"""Instruction evolution by a learned policy: from instructions to more, and harder ones, with responses.

    python -m synth.evolve                                    no key, no network: offline teacher, instructions by rule
    python -m synth.evolve --instructions my.txt --teacher-url URL --teacher-model EXPERT \\
        --instructor-url http://127.0.0.1:8080/v1 --instructor-model default_model
    python -m synth.evolve --resume RUN_FOLDER                after a stop or a kill

A policy learns, with an instructor and a reviewer, which operator to apply when; frozen, it guides the expert, which
evolves the instructions and answers them (TeaMs-RL, arXiv:2403.08694). Every stage leaves a file in the run folder:

    policy/  policy_training/    the policy, and every choice of its training
    tree.jsonl                   every choice of the generation: parent, operator, propensities, parts of the reward
    responses.jsonl              the kept instructions with the expert's responses
    dataset.jsonl  sft/          the data set; the same for sft.py, split

Leaves out the stages' own work: synth/policy_training, evolution, evolution_reward and responses.
"""

import argparse
import asyncio
import shlex
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from models import cpu

cpu.enable()  # before mlx is imported

import numpy as np

from common.cli import run
from common.errors import UserError
from common.files import read_json, write_json
from synth.estimate import evolution_bounds, table
from synth.evolution.chains import Chain, Evolution, batch_from, figures, root_rows
from synth.evolution.files import SETTINGS, load_policy, save_policy
from synth.evolution.flags import (
    check,
    difficulty_from,
    gates_from,
    instructions_from,
    parse_evolve_args,
    policy_from,
    training_from,
    weights_from,
)
from synth.evolution.judge import Judge, Pool
from synth.evolution.off_policy import episode_values, value_interval
from synth.evolution.operators import ACTIONS
from synth.evolution.policy import Policy
from synth.evolution.responses import respond, write_data
from synth.evolution.training import train_policy
from synth.pipeline.flags import asking_from
from synth.pipeline.trainer import run_script
from synth.run import teacher_of
from synth.stages import Row, alone, kept, stage
from synth.teacher.client import Teacher
from synth.teacher.flags import limits_from
from training.checkpoint_folders import all_checkpoints
from training.flags import default_output_dir
from training.metrics import RunLog, start_run_folder

EXPERT_STAGES = ("evolve: rewrite", "respond")


class Roles(NamedTuple):
    """Who is asked: one teacher may have all three parts."""

    expert: Teacher
    instructor: Teacher
    reviewer: Teacher


@asynccontextmanager
async def roles_of(args: argparse.Namespace, folder: Path) -> AsyncIterator[Roles]:
    """The teachers, each endpoint with a cache and a ledger of its own."""
    async with AsyncExitStack() as stack:

        async def opened(role: str, default: Teacher) -> Teacher:
            url, model = getattr(args, f"{role}_url"), getattr(args, f"{role}_model")
            if not url:
                return default
            changes = {"teacher_url": url, "teacher_model": model, "endpoint": getattr(args, f"{role}_endpoint")}
            free = {"cache": None, "max_money": None, "price_in": 0.0, "price_out": 0.0}
            flags = argparse.Namespace(**{**vars(args), **changes, **free})
            return await stack.enter_async_context(teacher_of(flags, folder / role))

        expert = await stack.enter_async_context(teacher_of(args, folder))
        instructor = await opened("instructor", expert)
        yield Roles(expert, instructor, await opened("reviewer", instructor))


def evolution_of(args: argparse.Namespace, roles: Roles, writer: Teacher, name: str) -> Evolution:
    """How chains are evolved by a writer, the expert or the instructor."""
    judge = Judge(roles.reviewer, roles.instructor, gates_from(args), weights_from(args), difficulty_from(args))
    return Evolution(writer, judge, args.rounds, asking_from(args), args.seed, name)


async def trained_policy(args: argparse.Namespace, instructions: Sequence[str], roles: Roles, folder: Path) -> Policy:
    """The policy: trained with instructor and reviewer, and frozen."""
    path = folder / "policy"
    if not (path / SETTINGS).is_file():
        training, policy = training_from(args), policy_from(args)
        if policy.learns and not args.policy_path:
            evolution = evolution_of(args, roles, roles.instructor, "train")
            done = folder / "policy_training" / "progress.json"
            start = read_json(done)["iterations"] if done.is_file() else 0
            log = RunLog(folder, training.iterations, start, description="policy")

            def report(iteration: int, found: dict[str, float]) -> None:
                log.advance()
                log.report(iteration, found)

            policy = await train_policy(policy, instructions, evolution, training, folder, report)
            log.close()
        save_policy(path, policy)
    policy = load_policy(path)
    policy.freeze()
    return policy


async def evolved(
    args: argparse.Namespace, instructions: Sequence[str], evolution: Evolution, policy: Policy
) -> list[Row]:
    """The tree: the initial instructions and all choices. One pool for all chains."""
    roots = await root_rows(instructions, evolution.judge, evolution.name)
    pool = Pool(instructions)
    chains = [
        Chain(number, root, pool) for number, root in enumerate(root for root in roots for _ in range(args.chains))
    ]
    return [*roots, *await evolution.run(chains, policy)]


async def make_data(args: argparse.Namespace, instructions: Sequence[str], folder: Path) -> dict[str, Any]:
    """All stages that ask; returns what they came to."""
    async with roles_of(args, folder) as roles:
        policy = await trained_policy(args, instructions, roles, folder)
        evolution = evolution_of(args, roles, roles.expert, "evolve")
        tree = await stage(folder, "tree", lambda: evolved(args, instructions, evolution, policy))
        fresh = [row for row in kept(tree) if row["parent"] is not None]
        rows = await stage(folder, "responses", lambda: respond(fresh, roles.expert, asking_from(args), args.answers))
        calls = sum(
            roles.expert.ledger.stages[name].calls for name in EXPERT_STAGES if name in roles.expert.ledger.stages
        )
    if not kept(rows):
        raise UserError(f"no row is left of {len(tree)}; {folder}/tree.jsonl and responses.jsonl say why")
    write_data(kept(rows), args.format, folder, args.held_out, args.seed)
    return {"rows": len(kept(rows)), "expert_calls": calls, **judged([row for row in tree if row["parent"]], args)}


def judged(choices: Sequence[Row], args: argparse.Namespace) -> dict[str, Any]:
    """Figures of the choices; and what choosing evenly would have earned a chain, as far as these logs can tell."""
    batch = batch_from(choices, args.rounds, 1)
    own = episode_values(batch.rewards, batch.propensities, batch.propensities, batch.mask)
    found = {"reward_of_a_chain": str(value_interval(own)), **figures(choices)}
    if all(share > 0 for row in choices for share in row["propensities"].values()):
        evenly = np.full_like(batch.rewards, 1 / len(ACTIONS))
        values = episode_values(batch.rewards, batch.propensities, evenly, batch.mask)
        found["evenly_from_these_logs"] = str(value_interval(values))
    return found


def estimate(args: argparse.Namespace, instructions: Sequence[str]) -> str:
    """What the run would ask at most, instructor and reviewer included."""
    training, policy = training_from(args), policy_from(args)
    trained = training.iterations * min(training.starts, len(instructions)) * training.group * policy.learns
    chains = {"train": 0 if args.policy_path else trained, "evolve": len(instructions) * args.chains}
    bounds = evolution_bounds(instructions, chains, args.rounds, args.answers, args.answer_tokens)
    return table(bounds, limits_from(args))


def train(args: argparse.Namespace, folder: Path, lock: int) -> None:
    """sft.py on the data, from its last checkpoint if there is one."""
    run_folder = folder / "training"
    if (run_folder / "summary.json").is_file():
        print(f"training: finished before ({run_folder})", flush=True)
        return
    words: list[Any] = ["sft.py", "--train", "--model", args.base_model, "--data", folder / "sft", "--data-base", ""]
    words += ["--output-dir", run_folder, "--save-file", folder / "adapter", "--seed", args.seed]
    words += shlex.split(args.sft_flags)
    if all_checkpoints(run_folder):
        words = ["sft.py", "--resume", run_folder]
    elif (run_folder / "config.json").is_file():
        (run_folder / "config.json").unlink()  # ended before its first checkpoint
    run_script([*map(str, words)], f"python -m synth.evolve --resume {folder}", [lock])


def main() -> None:
    args = parse_evolve_args(__doc__)
    check(args)
    instructions = instructions_from(args)
    if args.dry_run:
        print(estimate(args, instructions))
        return
    folder = Path(args.resume or start_run_folder(args.output_dir or default_output_dir("evolve"), vars(args)))
    with alone(folder) as lock:
        summary = asyncio.run(make_data(args, instructions, folder))
        write_json(folder / "summary.json", summary)
        if args.sft:
            train(args, folder, lock)
    print(summary_text(summary, folder))


def summary_text(summary: dict[str, Any], folder: Path) -> str:
    """The run's last words."""
    shares = ", ".join(f"{name} {summary[name]:.2f}" for name in ACTIONS)
    lines = [
        f"rows: {summary['rows']}; expert calls per row: {summary['expert_calls'] / summary['rows']:.2f}",
        f"operators: {shares}; kept {summary['kept_share']:.2f}",
        f"reward of a chain, 95 % interval: {summary['reward_of_a_chain']}",
    ]
    if "evenly_from_these_logs" in summary:
        lines.append(f"choosing evenly, judged from these logs: {summary['evenly_from_these_logs']}")
    return "\n".join([*lines, f"data: {folder / 'dataset.jsonl'}", f"run folder: {folder}"])


if __name__ == "__main__":
    run(main)
