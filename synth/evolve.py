"""Instruction evolution by a learned policy: from instructions to more, and harder ones, with responses.

    python -m synth.evolve                                    no key, no network: offline teacher, instructions by rule
    python -m synth.evolve --instructions my.txt --teacher-url URL --teacher-model EXPERT \\
        --instructor-url http://127.0.0.1:8080/v1 --instructor-model default_model
    python -m synth.evolve --resume RUN_FOLDER                after a stop or a kill

A policy learns, with an instructor and a reviewer, which operator to apply when; then, frozen, it guides the expert,
which evolves the instructions and responds to them (TeaMs-RL, arXiv:2403.08694). Stages leave files in the run folder:

    policy/  policy_training/    the policy, and every choice of its training
    tree.jsonl                   every choice of the generation: parent, operator, propensities, parts of the reward
    control.jsonl                the same by even choice, where the run compares the policy with it (--control)
    responses.jsonl              the kept instructions with the expert's responses
    dataset.jsonl  sft/          the dataset; the same for sft.py, split

The stages' own work is in synth/evolution.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import cpu

cpu.enable()  # before mlx is imported

import numpy as np

from common.cli import run
from common.errors import UserError
from common.files import write_json
from common.parser import split_words
from common.schemas import read_key
from synth.estimate import table
from synth.evolution.chains import Chain, Evolution, actions_of, batch_from, figures, root_rows
from synth.evolution.control import Verdict, verdict
from synth.evolution.estimate import self_instruct_bounds, upper_bounds
from synth.evolution.files import SETTINGS, load_policy, save_policy
from synth.evolution.flags import EvolveSettings, evolve_settings, instructions_from, parse_evolve_args
from synth.evolution.generators import SelfInstructGenerator
from synth.evolution.judge import Judge, Pool
from synth.evolution.off_policy import episode_values, value_interval
from synth.evolution.operators import ACTIONS
from synth.evolution.policy import OperatorPolicy, without_stop
from synth.evolution.responses import respond, write_data
from synth.evolution.training import train_policy
from synth.pipeline.script import run_script
from synth.pipeline.train import check_sft
from synth.stages import StageRow, alone, kept, new_row, stage
from synth.teacher.asking import ask_all
from synth.teacher.client import Teacher
from synth.teacher.completions import Ask, Reply
from synth.teacher.connect import teacher_of
from synth.teacher.flags import TeacherSettings
from training.flags import default_output_dir
from training.intervals import Interval
from training.metrics import RunLog, start_run_folder

EXPERT_STAGES = ("evolve: rewrite", "respond")


class Roles(NamedTuple):
    """Who is asked: one teacher may have all three parts."""

    expert: Teacher
    instructor: Teacher
    reviewer: Teacher


@asynccontextmanager
async def roles_of(settings: EvolveSettings, folder: Path) -> AsyncIterator[Roles]:
    """The teachers; each endpoint has its own cache and ledger."""
    async with AsyncExitStack() as stack:

        async def opened(role: str, own: TeacherSettings | None, default: Teacher) -> Teacher:
            return await stack.enter_async_context(teacher_of(own, folder / role)) if own else default

        expert = await stack.enter_async_context(teacher_of(settings.teacher, folder))
        instructor = await opened("instructor", settings.instructor, expert)
        yield Roles(expert, instructor, await opened("reviewer", settings.reviewer, instructor))


def evolution_of(settings: EvolveSettings, roles: Roles, writer: Teacher, name: str) -> Evolution:
    """How chains are evolved by a writer, the expert or the instructor."""
    judge = Judge(
        roles.reviewer, roles.instructor, settings.gates, settings.weights, settings.difficulty, settings.reviewer_score
    )
    return Evolution(writer, judge, settings.rounds, settings.teacher.asking, settings.seed, name, settings.operators)


async def trained_policy(
    settings: EvolveSettings, instructions: Sequence[str], roles: Roles, folder: Path
) -> OperatorPolicy:
    """The policy: trained with instructor and reviewer, and frozen."""
    path = folder / "policy"
    if not (path / SETTINGS).is_file():
        training, policy = settings.training, settings.initial_policy()
        if policy.learns and not settings.policy_path:
            evolution = evolution_of(settings, roles, roles.instructor, "train")
            done = folder / "policy_training" / "progress.json"
            start = read_key(int, done, "iterations") if done.is_file() else 0
            log = RunLog(folder, training.iterations, start, description="policy")

            def report(iteration: int, found: dict[str, float]) -> None:
                log.advance()
                log.report(iteration, found)

            policy = await train_policy(policy, instructions, evolution, training, folder, report)
            log.close()
        save_policy(path, policy)
    policy = load_policy(path, settings.operators.actions)
    policy.freeze()
    return policy


async def evolved(
    instructions: Sequence[str], chains: int, evolution: Evolution, policy: OperatorPolicy
) -> list[StageRow]:
    """The tree: the initial instructions and all choices, `chains` chains from each. All chains share one pool."""
    roots = await root_rows(instructions, evolution.judge, evolution.name)
    pool, starts = Pool(instructions), [root for root in roots for _ in range(chains)]
    return [*roots, *await evolution.run([Chain(n, root, pool) for n, root in enumerate(starts)], policy)]


def rows_wanted(settings: EvolveSettings, instructions: Sequence[str]) -> int:
    """Without a policy: as many as the chains of one would have choices."""
    return len(instructions) * settings.chains * settings.rounds


async def without_policy(settings: EvolveSettings, instructions: Sequence[str], expert: Teacher) -> list[StageRow]:
    """Rows by Self-Instruct (arXiv:2212.10560), dropped ones included: as many as the chains would have choices."""
    loop = asyncio.get_running_loop()

    def ask(asks: Sequence[Ask]) -> list[Reply]:
        # The generator has an event loop of its own, in a thread; the teacher belongs to this one.
        return asyncio.run_coroutine_threadsafe(ask_all(expert, asks, "self-instruct"), loop).result()

    generator = SelfInstructGenerator(ask, settings.teacher.asking, settings.seed)
    seeds, count = [{"instruction": text} for text in instructions], rows_wanted(settings, instructions)
    found = await asyncio.to_thread(generator.generate_from_seed, seeds, count)
    rows = [new_row(f"n{n}", row["instruction"], row["output"], "self-instruct") for n, row in enumerate(found, 1)]
    return [{**row, "root": row["id"]} for row in [*rows, *generator.dropped]]


async def make_data(settings: EvolveSettings, instructions: Sequence[str], folder: Path) -> dict[str, Any]:
    """All stages that ask; returns the figures of the summary."""
    if settings.without_policy == "self":
        async with teacher_of(settings.teacher, folder) as expert:
            rows = await stage(folder, "responses", lambda: without_policy(settings, instructions, expert))
            calls = expert.ledger.total.calls
        if not kept(rows):
            raise UserError(f"no row is left of {len(rows)}; {folder}/responses.jsonl says why")
        write_data(kept(rows), settings.format, folder, settings.held_out, settings.seed)
        return {"rows": len(kept(rows)), "expert_calls": calls}
    async with roles_of(settings, folder) as roles:
        policy = await trained_policy(settings, instructions, roles, folder)
        evolution = evolution_of(settings, roles, roles.expert, "evolve")
        tree = await stage(folder, "tree", lambda: evolved(instructions, settings.chains, evolution, policy))
        fresh = [row for row in kept(tree) if row["parent"] is not None]
        control = None
        if settings.control and policy.kind != "constant":
            even = without_stop(settings.operators.actions)
            other = evolution_of(settings, roles, roles.expert, "control")
            control = await stage(folder, "control", lambda: evolved(instructions, settings.chains, other, even))
        drawn = settings.difficulty.answers  # the pass rates' own answers come before these
        rows = await stage(folder, "responses", lambda: respond(fresh, roles.expert, settings.teacher.asking, drawn))
        calls = sum(
            roles.expert.ledger.stages[name].calls for name in EXPERT_STAGES if name in roles.expert.ledger.stages
        )
    if not kept(rows):
        raise UserError(f"no row is left of {len(tree)}; {folder}/tree.jsonl and responses.jsonl say why")
    write_data(kept(rows), settings.format, folder, settings.held_out, settings.seed)
    choices = [row for row in tree if row["parent"]]
    summary = {"rows": len(kept(rows)), "expert_calls": calls, **judged(choices, settings.rounds)}
    if control:
        summary["control"] = verdict(choices, [row for row in control if row["parent"]])._asdict()
    return summary


def judged(choices: Sequence[StageRow], rounds: int) -> dict[str, Any]:
    """Figures of the choices; and, as far as these logs can tell, what choosing evenly would have earned per chain."""
    batch = batch_from(choices, rounds, 1)
    own = episode_values(batch.rewards, batch.propensities, batch.propensities, batch.mask)
    found = {"reward_of_a_chain": str(value_interval(own)), **figures(choices)}
    if all(share > 0 for row in choices for share in row["propensities"].values()):
        evenly = np.full_like(batch.rewards, 1 / len(actions_of(choices)))
        values = episode_values(batch.rewards, batch.propensities, evenly, batch.mask)
        found["evenly_from_these_logs"] = str(value_interval(values))
    return found


def estimate(settings: EvolveSettings, instructions: Sequence[str]) -> str:
    """What the run may ask at most, instructor and reviewer included, as a table."""
    teacher = settings.teacher
    if settings.without_policy == "self":
        count = rows_wanted(settings, instructions)
        return table(self_instruct_bounds(count, teacher.answer_tokens), teacher.price_in, teacher.price_out)
    training, learns = settings.training, settings.initial_policy().learns and not settings.policy_path
    trained = training.iterations * min(training.starts, len(instructions)) * training.group * learns
    chains = {"train": trained, "evolve": len(instructions) * settings.chains}
    if settings.control and (learns or settings.policy_path):
        chains["control"] = chains["evolve"]
    answers, tokens = settings.difficulty.answers, settings.teacher.answer_tokens
    own = (settings.operators, settings.reviewer_score)
    bounds = upper_bounds(instructions, chains, settings.rounds, answers, tokens, *own)
    return table(bounds, settings.teacher.price_in, settings.teacher.price_out)


def train(settings: EvolveSettings, folder: Path, lock: int) -> None:
    """sft.py on the dataset, from its last checkpoint if there is one."""
    run_folder = folder / "training"
    if (run_folder / "summary.json").is_file():
        print(f"training: finished before ({run_folder})", flush=True)
        return
    words: list[Any] = ["sft.py", "--train", "--model", settings.base_model, "--data", folder / "sft"]
    words += ["--data-base", "", "--output-dir", run_folder, "--save-file", folder / "adapter"]
    words += ["--seed", settings.seed, *split_words("sft-flags", settings.sft_flags)]
    if (run_folder / "config.json").is_file():
        words = ["sft.py", "--resume", run_folder]
    run_script([*map(str, words)], f"python -m synth.evolve --resume {folder}", [lock])


def main() -> None:
    args = parse_evolve_args(__doc__)
    settings = evolve_settings(args)
    instructions = instructions_from(args)
    if args.dry_run:
        print(estimate(settings, instructions))
        return
    if settings.sft and not args.resume:
        check_sft(settings.base_model, settings.sft_flags)
    folder = Path(args.resume or start_run_folder(args.output_dir or default_output_dir("evolve"), vars(args)))
    with alone(folder) as lock:
        summary = asyncio.run(make_data(settings, instructions, folder))
        write_json(folder / "summary.json", summary)
        if settings.sft:
            train(settings, folder, lock)
    print(summary_text(summary, folder, settings.operators.actions))


def summary_text(summary: dict[str, Any], folder: Path, actions: Sequence[str] = ACTIONS) -> str:
    """The run's last lines."""
    lines = [f"rows: {summary['rows']}; expert calls per row: {summary['expert_calls'] / summary['rows']:.2f}"]
    ends = [f"data: {folder / 'dataset.jsonl'}", f"run folder: {folder}"]
    if "reward_of_a_chain" not in summary:
        return "\n".join([*lines, *ends])
    shares = ", ".join(f"{name} {summary[name]:.2f}" for name in actions)
    lines += [
        f"operators: {shares}; kept {summary['kept_share']:.2f}",
        f"reward of a chain, 95 % interval: {summary['reward_of_a_chain']}",
    ]
    if "control" in summary:
        found = summary["control"]
        lines += Verdict(found["kept"], found["calls"], found["reward"], Interval(*found["gain"])).lines()
    elif "evenly_from_these_logs" in summary:
        lines.append(f"choosing evenly, judged from these logs: {summary['evenly_from_these_logs']}")
    return "\n".join([*lines, *ends])


if __name__ == "__main__":
    run(main)
