"""Training the policy with the instructor and the reviewer, without the expert (TeaMs-RL, arXiv:2403.08694).

An iteration draws some initial instructions, takes `group` chains from each through all rounds, and learns from their
rewards. As in use, chains share a pool that fills: the first chains of all groups share one, the second ones another,
and so on, so that the chains of a group can be compared. Pools last, over iterations, for as many starts as the
generation of the data will have, and are then emptied but for the initial instructions. Policy and log are saved
together after every iteration, in RUN/policy_training.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import atomic_folder, write_json
from common.schemas import read_key
from data.records import read_rows
from synth.evolution.chains import Chain, Evolution, batch_from, figures, root_rows
from synth.evolution.files import LOG, POLICY, PROGRESS, SETTINGS, load_policy, write_policy
from synth.evolution.judge import Pool
from synth.evolution.policy import Batch, OperatorPolicy
from synth.stages import StageRow, kept, write_rows

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Training:
    """iterations: updates; starts: initial instructions per iteration; group: chains from each.

    chains: how many the generation of the data will have from each initial instruction.

    Raises UserError for invalid values.
    """

    iterations: int = 20
    starts: int = 8
    group: int = 4
    seed: int = 0
    chains: int = 1

    def __post_init__(self):
        if self.iterations < 0 or self.starts < 1 or self.group < 2:
            raise UserError(
                f"--iterations {self.iterations}, --starts {self.starts} and --group {self.group}: at least 0, 1 and 2 "
                "(a chain is compared with the others of its group)"
            )


async def train_policy(
    policy: OperatorPolicy,
    instructions: Sequence[str],
    evolution: Evolution,
    training: Training,
    folder: Path,
    report: Report,
    relabel: Callable[[Batch], Batch] = lambda batch: batch,
) -> OperatorPolicy:
    """The policy after all iterations; resumes from FOLDER/policy_training if it exists.

    report: called with the iteration (from 1) and its figures; relabel: maps a batch to the one that is learned from.
    """
    path, log, done = folder / "policy_training", [], 0
    if (path / SETTINGS).is_file():
        policy, done = load_policy(path, policy.names), read_key(int, path / PROGRESS, "iterations")
        log = read_rows(path / LOG, [("id",)]) if (path / LOG).stat().st_size else []
    if done < training.iterations and policy.learns:
        roots = await root_rows(instructions, evolution.judge, evolution.name)
    for iteration in range(done, training.iterations if policy.learns else 0):
        rows = await evolution.run(chains_of(roots, training, iteration, log), policy)
        batch = batch_from(rows, evolution.rounds, training.group)
        learned = policy.learn(relabel(batch))
        log += [{**row, "iteration": iteration + 1} for row in rows]
        _save(path, policy, log, iteration + 1)
        report(iteration + 1, {**figures(rows), **learned})
    return policy


def _save(path: Path, policy: OperatorPolicy, log: Sequence[StageRow], iterations: int) -> None:
    with atomic_folder(path, POLICY) as temporary:
        write_policy(temporary, policy)
        write_rows(temporary / LOG, log)
        write_json(temporary / PROGRESS, {"iterations": iterations})


def chains_of(
    roots: Sequence[StageRow], training: Training, iteration: int, log: Sequence[StageRow] = ()
) -> list[Chain]:
    """The chains of an iteration (from 0); those of a group share a start and are adjacent.

    log: the choices of all iterations before, by which the pools hold what was kept since they were last emptied.
    """
    count = min(training.starts, len(roots))
    # Every instruction is used before any is used again, in a new order each time.
    needed = (iteration + 1) * count
    order: list[StageRow] = []
    while len(order) < needed:
        round_number = len(order) // len(roots)
        order += random.Random(f"{training.seed} starts {round_number}").sample(roots, len(roots))
    starts = [root for root in order[needed - count : needed] for _ in range(training.group)]
    first = iteration * count * training.group
    pools = _pools(roots, training, iteration, log)
    return [Chain(first + number, root, pools[number % training.group]) for number, root in enumerate(starts)]


def _pools(roots: Sequence[StageRow], training: Training, iteration: int, log: Sequence[StageRow]) -> list[Pool]:
    """The pools of an iteration, one for each place in a group."""
    count, lasting = min(training.starts, len(roots)), len(roots) * training.chains
    emptied = next(n for n in range(iteration + 1) if n * count // lasting == iteration * count // lasting)
    pools = [Pool([root["input"] for root in roots]) for _ in range(training.group)]
    for row in kept(row for row in log if row["iteration"] > emptied):
        pools[row["chain"] % training.group].add(row["input"])
    return pools
