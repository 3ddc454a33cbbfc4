"""A learned choice of operators against its controls, on the offline teacher: at equal calls, on held-out instructions.

    python benchmarks/evolve_controls.py                       PPO, 6 seeds
    python benchmarks/evolve_controls.py --policy linucb --seeds 6 --output-dir runs/evolve_controls_linucb
    python benchmarks/evolve_controls.py --arms learned "reviewer score" --seeds 3
    python benchmarks/evolve_controls.py --command --seeds 10         the command itself, python -m synth.evolve

The arms: learned; uniform, and uniform without stop; the learned policy's marginal frequencies, without state; the
operator that is best on the training instructions, measured as the arms are; a policy trained in the same way on
rewards drawn at random from a uniform policy's, whatever was chosen; and one trained on the reviewer's score, as
`--reviewer-score` does. A cell is one arm of one seed, in its own file; finished cells are kept. Each held-out
instruction gets chains until the budget of rewritings is used up. Measured per instruction, for every arm: the default
reward and the reviewer's score per call, of which an arm optimises one or none; kept rows; and two measures that none
optimises, distinct word pairs and distinct kinds of sums, as the offline teacher's rule parses them. Differences are
paired by instruction. Intervals are over instructions; the seeds show how much trainings differ.

With --command, `python -m synth.evolve` is run with its own defaults, once a seed with its learned policy and once with
--policy uniform: all chains share one pool, and a policy has as many calls as it doesn't stop. A third arm is the
control of the learned run, even choice without stop. Differences are paired by seed, intervals over seeds (Student's).
"""

import argparse
import asyncio
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import cpu

cpu.enable()  # before mlx is imported

import numpy as np

from common.cli import run
from common.files import atomic_file, read_json, write_json
from common.parser import Parser
from data.records import read_rows
from rewards.answers import answer_type
from synth import stages
from synth.evolution.chains import Chain, Evolution, root_rows
from synth.evolution.features import Situation, features
from synth.evolution.files import make_policy
from synth.evolution.judge import Difficulty, Judge, Pool, Weights, reward_of
from synth.evolution.operators import ACTIONS, OPERATORS, STOP
from synth.evolution.policy import Batch, Constant, OperatorPolicy, PolicySettings, fixed, marginal
from synth.evolution.training import LOG, Training, train_policy
from synth.near_duplicates import tokens
from synth.offline.instructions import read_sum, starting
from synth.stages import StageRow
from synth.teacher.cache import Cache
from synth.teacher.client import Teacher
from synth.teacher.connect import offline_teacher
from training.intervals import bootstrap, difference, over_seeds

BY_SCORE = "reviewer score"
ARMS = ("learned", "uniform", "uniform without stop", "marginal", "best fixed", "shuffled reward", BY_SCORE)
MEASURES = ("reward a call", "reviewer's score a call", "kept a call", "distinct word pairs", "distinct kinds of sums")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--policy", choices=("linucb", "reinforce", "ppo"), default="ppo")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="all are compared with the first")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=20, help="of training")
    parser.add_argument("--starts", type=int, default=8, help="instructions an iteration")
    parser.add_argument("--group", type=int, default=4, help="chains from each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--training-instructions", type=int, default=24)
    parser.add_argument("--held-out-instructions", type=int, default=48)
    parser.add_argument("--calls", type=int, default=3, help="rewritings of each held-out instruction")
    parser.add_argument("--answers", type=int, default=4, help="to each instruction, for its pass rate")
    parser.add_argument("--error-rate", type=float, default=0.1, help="of the offline teacher")
    parser.add_argument("--command", action="store_true", help="measure `python -m synth.evolve` with its own defaults")
    parser.add_argument("--output-dir", default="runs/evolve_controls", help="folder of all cells")
    return parser.parse_args()


class Bench:
    """One seed: its instructions, its teacher, and the arms' policies."""

    def __init__(self, args: argparse.Namespace, teacher: Teacher, seed: int):
        self.args, self.teacher, self.seed = args, teacher, seed
        self.folder = Path(args.output_dir) / f"seed-{seed}"
        found = starting(args.training_instructions + args.held_out_instructions, seed)
        self.train, self.held_out = found[: args.training_instructions], found[args.training_instructions :]
        self.training = Training(args.iterations, args.starts, args.group, seed)

    def evolution(self, name: str, scores: bool = False) -> Evolution:
        difficulty = Difficulty(self.args.answers, answer_type("number"))
        judge = Judge(self.teacher, self.teacher, difficulty=difficulty, scores=scores)
        return Evolution(self.teacher, judge, self.args.rounds, seed=self.seed, name=name)

    async def learned(self, name: str, relabel=lambda batch: batch, scores: bool = False) -> OperatorPolicy:
        policy = make_policy(self.args.policy, PolicySettings(seed=self.seed))
        self.folder.mkdir(parents=True, exist_ok=True)
        evolution, folder = self.evolution("train", scores), self.folder / name.replace(" ", "-")
        policy = await train_policy(policy, self.train, evolution, self.training, folder, lambda *_: None, relabel)
        policy.freeze()
        return policy

    async def best_fixed(self) -> OperatorPolicy:
        """The best operator on the training instructions, measured there as the arms are on the held-out ones."""
        path = self.folder / "fixed.json"
        if not path.is_file():
            policies = {name: fixed(ACTIONS.index(name)) for name in OPERATORS}
            found = {name: await self.chains(policy, self.train, "fixed") for name, policy in policies.items()}
            budget = self.args.calls
            write_json(
                path,
                {
                    name: float(np.mean([measures(one, budget)[MEASURES[0]] for one in rows]))
                    for name, rows in found.items()
                },
            )
        means = read_json(path)
        return fixed(ACTIONS.index(max(means, key=means.__getitem__)))

    async def policy(self, arm: str) -> OperatorPolicy:
        """The policy of one arm; "marginal" is computed from the learned one's choices."""
        if arm == "learned":
            return await self.learned(arm)
        if arm == "marginal":
            rows = read_rows(self.folder / "learned" / "policy_training" / LOG, [("id",)])
            late = [row for row in rows if row["iteration"] > self.args.iterations * 3 // 4]
            return marginal(await self.learned("learned"), features([Situation(**row["situation"]) for row in late]))
        if arm == "best fixed":
            return await self.best_fixed()
        if arm == "shuffled reward":
            return await self.learned(arm, dealt_out(self.seed))
        if arm == BY_SCORE:
            return await self.learned(arm, scores=True)
        without_stop = [1 / len(OPERATORS)] * len(OPERATORS) + [0.0]
        return Constant(shares=without_stop if arm == "uniform without stop" else None)

    async def chains(self, policy: OperatorPolicy, instructions: Sequence[str], name: str) -> list[list[StageRow]]:
        """The choices for each instruction, with both rewards, until its rewritings are used up; they share a pool."""
        evolution, budget = self.evolution(name, scores=True), self.args.calls
        roots = await root_rows(instructions, evolution.judge, name)
        pools, rows = [Pool(instructions) for _ in roots], [list[StageRow]() for _ in roots]

        def left(place: int) -> int:
            return budget - sum(row["operator"] != STOP for row in rows[place])

        for wave in range(budget):  # a chain takes at least one call, or stops at once
            chains = {n: Chain(wave * len(roots) + n, root, pools[n]) for n, root in enumerate(roots) if left(n)}
            for number in range(1, evolution.rounds + 1):
                going = [place for place, chain in chains.items() if not chain.ended and left(place)]
                made = await evolution.step([chains[place] for place in going], policy, number)
                for place, row in zip(going, made, strict=True):
                    rows[place].append(row)
        return rows

    async def measure(self, arm: str) -> dict[str, Any]:
        """The arm on the held-out instructions: each measure per instruction."""
        rows = await self.chains(await self.policy(arm), self.held_out, "evaluate")
        measured = [measures(found, self.args.calls) for found in rows]
        choices = [row for found in rows for row in found]
        used = sum(row["operator"] != STOP for row in choices)
        kept = sum("dropped" not in row for row in choices)
        operators = [row["operator"] for row in choices]
        return {
            "arm": arm,
            "calls": used,
            "kept": kept,
            "expert_calls_per_kept_row": (used + kept) / max(kept, 1),
            "operators": {name: operators.count(name) / len(operators) for name in ACTIONS},
            **{name: [one[name] for one in measured] for name in MEASURES},
        }


def dealt_out(seed: int):
    """A relabelling: rewards drawn at random from the first batch's, which came from a uniform policy."""
    rng, first = np.random.default_rng((seed, 7)), list[float]()

    def relabel(batch: Batch) -> Batch:
        if not first:
            first.extend(batch.rewards[batch.mask > 0].tolist())
        return batch._replace(rewards=rng.choice(first, size=batch.rewards.shape).astype(np.float32) * batch.mask)

    return relabel


def measures(rows: Sequence[StageRow], budget: int) -> dict[str, float]:
    """The measures of the choices for one held-out instruction."""
    kept = [row["input"] for row in rows if "dropped" not in row]
    pairs = {pair for text in kept for pair in itertools.pairwise(tokens(text))}
    sums = [found for found in map(read_sum, kept) if found is not None]
    kinds = {(one.kind, one.form, tuple(kind for kind, _ in one.steps), one.rules) for one in sums}
    parts = [row["parts"] for row in rows if "dropped" not in row]
    rewards, scores = sum(reward_of(one, Weights()) for one in parts), sum(one["score"] for one in parts)
    per_call = (one / budget for one in (rewards, scores, len(kept)))
    return dict(zip(MEASURES, (*per_call, len(pairs), len(kinds)), strict=True))


async def cells(args: argparse.Namespace, url: str) -> None:
    """Every arm of every seed that has no file yet."""
    folder = Path(args.output_dir)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        missing = [arm for arm in args.arms if not cell_path(folder, seed, arm).is_file()]
        if not missing:
            continue
        # One cache per seed keeps the file small; it knows the teacher by its flags, as its port changes.
        with Cache(folder / f"seed-{seed}.sqlite", wait=60) as cache:
            async with Teacher(url, "m", cache, concurrency=16, endpoint=f"offline {args.error_rate}") as teacher:
                for arm in missing:
                    found = await Bench(args, teacher, seed).measure(arm)
                    write_json(cell_path(folder, seed, arm), found)
                    print(f"seed {seed}, {arm}: {np.mean(found[MEASURES[0]]):.3f} {MEASURES[0]}", flush=True)


def cell_path(folder: Path, seed: int, arm: str) -> Path:
    return folder / "cells" / f"{seed}-{arm.replace(' ', '-')}.json"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The arms' means, and the first arm's differences to each of the others. found: arm → cells, seed by seed."""
    lines = [f"| arm | {' | '.join(MEASURES)} | calls | expert calls per kept row |", "|---" * 8 + "|"]
    for arm, own in found.items():
        means = " | ".join(f"{bootstrap(joined(own, name))}" for name in MEASURES)
        each = sum(cell["calls"] + cell["kept"] for cell in own) / max(sum(cell["kept"] for cell in own), 1)
        lines.append(f"| {arm} | {means} | {sum(cell['calls'] for cell in own)} | {each:.2f} |")
    first = next(iter(found))
    lines += [
        "",
        f"| {first} less | {' | '.join(MEASURES)} | seeds in which it has the higher reward |",
        "|---" * 7 + "|",
    ]
    for arm in list(found)[1:]:
        pairs = [difference(joined(found[arm], name), joined(found[first], name)).interval for name in MEASURES]
        better = sum(
            np.mean(a[MEASURES[0]]) > np.mean(b[MEASURES[0]]) for a, b in zip(found[first], found[arm], strict=True)
        )
        lines.append(f"| {arm} | {' | '.join(map(str, pairs))} | {better} of {len(found[arm])} |")
    return "\n".join(lines)


COMMAND_MEASURES = ("kept rows", "reward", "calls", "expert calls per row")


def command_cells(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """arm → the measures of each seed, of runs of the command; finished runs are kept."""
    found: dict[str, list[dict[str, float]]] = {"learned": [], "uniform": [], "uniform without stop": []}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for arm, policy in (("learned", args.policy), ("uniform", "uniform")):
            folder = Path(args.output_dir) / "command" / f"{seed}-{policy}"
            if not (folder / "summary.json").is_file():
                words = ["--resume", folder] if (folder / "config.json").is_file() else ["--output-dir", folder]
                words += [] if words[0] == "--resume" else ["--seed", seed, "--policy", policy]
                command = [sys.executable, "-m", "synth.evolve", *map(str, words)]
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            summary = read_json(folder / "summary.json")
            choices = [row for row in read_rows(folder / "tree.jsonl", [("id",)]) if row["parent"]]
            found[arm].append(command_measures(choices, summary["expert_calls"] / summary["rows"]))
            if arm == "learned":
                control = [row for row in read_rows(folder / "control.jsonl", [("id",)]) if row["parent"]]
                found["uniform without stop"].append(command_measures(control))
            print(f"seed {seed}, {arm}: {found[arm][-1]}", flush=True)
    return found


def command_measures(choices: Sequence[StageRow], calls_per_row: float | None = None) -> dict[str, float]:
    """COMMAND_MEASURES of a run's choices; without responses, each kept instruction counts as one more call."""
    kept, calls = len(stages.kept(choices)), sum(row["operator"] != STOP for row in choices)
    per_row = (calls + kept) / max(kept, 1) if calls_per_row is None else calls_per_row
    return dict(zip(COMMAND_MEASURES, (kept, sum(row["reward"] for row in choices), calls, per_row), strict=True))


def command_table(found: dict[str, list[dict[str, float]]]) -> str:
    """Each arm's means and their ranges over seeds, and the paired differences of the learned arm to the others."""
    lines = [f"| arm | {' | '.join(COMMAND_MEASURES)} |", "|---" * 5 + "|"]
    for arm, cells in found.items():
        columns = [[cell[name] for cell in cells] for name in COMMAND_MEASURES]
        shown = [f"{np.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})" for values in columns]
        lines.append(f"| {arm} | {' | '.join(shown)} |")
    lines += ["", f"| learned less | {' | '.join(COMMAND_MEASURES)} | seeds with more reward |", "|---" * 6 + "|"]
    for arm in list(found)[1:]:
        pairs = list(zip(found["learned"], found[arm], strict=True))
        gains = [over_seeds([own[name] - other[name] for own, other in pairs]) for name in COMMAND_MEASURES]
        more = sum(own["reward"] > other["reward"] for own, other in pairs)
        lines.append(f"| {arm} | {' | '.join(map(str, gains))} | {more} of {len(pairs)} |")
    return "\n".join(lines)


def joined(cells: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [value for cell in cells for value in cell[name]]


def main() -> None:
    args = parse_args()
    if args.command:
        print(command_table(command_cells(args)))
        return
    folder, seeds = Path(args.output_dir), range(args.first_seed, args.first_seed + args.seeds)
    with offline_teacher(f"--error-rate {args.error_rate}") as url:
        asyncio.run(cells(args, url))
    text = table({arm: [read_json(cell_path(folder, seed, arm)) for seed in seeds] for arm in args.arms})
    with atomic_file(folder / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
