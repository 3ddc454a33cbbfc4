"""Chains of instructions: a policy chooses an operator, a teacher rewrites, the judge drops or rewards, round by round.

A row of the tree is one choice: id, parent and root, round, operator, the propensities of all actions, the situation
it was made in, the resulting instruction ("input"; empty for a stop or a failed rewriting), parts, pass_rate, reward,
or why it was dropped. After a dropped choice the chain stays where it was, to be tried again in the next round (as in
Evol-Instruct, arXiv:2304.12244). All draws depend only on the seed, the chain and the round, so that a run that was
killed and started again chooses what it would have chosen, and finds the answers in the cache.

Not here: responses to the instructions (see synth/evolution/responses.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from synth.evolution.features import Situation, features, size_of
from synth.evolution.judge import Judge, Pool, answer_rates
from synth.evolution.operators import OWN, STOP, Operators, read_rewriting
from synth.evolution.policy import Batch, OperatorPolicy
from synth.stages import StageRow, drop
from synth.teacher.asking import Asker, Asking, ask_all


@dataclass
class Chain:
    """One instruction being evolved. number: unique in a run, so that each chain's asks and draws are its own.

    rows: its choices so far; given: its current row, whose parts and pass rate the policy sees.
    """

    number: int
    given: StageRow
    pool: Pool
    rows: list[StageRow] = field(default_factory=list)
    ended: bool = False

    @property
    def root(self) -> str:
        return self.given["root"]


def root_row(number: int, instruction: str, novelty: float, pass_rate: float | None) -> StageRow:
    """An initial instruction as a row of the tree."""
    row_id = f"i{number}"
    return {
        "id": row_id, "parent": None, "root": row_id, "round": 0, "operator": None, "input": instruction, "output": "",
        "parts": {"novelty": novelty}, "pass_rate": pass_rate, "reward": None,
    }  # fmt: skip


async def root_rows(instructions: Sequence[str], judge: Judge, name: str) -> list[StageRow]:
    """The initial instructions as rows, with their novelty to each other and, if answers are asked for, pass rates."""
    rates: list[Any] = [None] * len(instructions)
    if judge.difficulty.answers:
        rates = await answer_rates(instructions, judge.difficulty, judge.solver, name)
    rows = []
    for number, (text, rate) in enumerate(zip(instructions, rates, strict=True), 1):
        others = Pool([other for other in instructions if other != text])
        rows.append(root_row(number, text, 1 - others.nearest(text), rate))
    return rows


@dataclass(frozen=True)
class Evolution:
    """How chains are evolved. writer: the teacher that rewrites; name: prefix of the ledger's stages."""

    writer: Asker
    judge: Judge
    rounds: int = 3
    asking: Asking = field(default_factory=Asking)
    seed: int = 0
    name: str = "evolve"
    operators: Operators = OWN

    async def run(self, chains: Sequence[Chain], policy: OperatorPolicy) -> list[StageRow]:
        """Take every chain through all rounds, or until it stops; returns all rows, by round and chain."""
        rows: list[StageRow] = []
        for number in range(1, self.rounds + 1):
            rows += await self.step([chain for chain in chains if not chain.ended], policy, number)
        return rows

    async def step(self, chains: Sequence[Chain], policy: OperatorPolicy, number: int) -> list[StageRow]:
        """One round, all chains together; returns their new rows."""
        if not chains:
            return []
        situations = [situation_of(chain, number, self.rounds) for chain in chains]
        shares = policy.probabilities(features(situations, self.operators.actions[:-1]))
        rows = [
            self._chosen(chain, number, situation, share)
            for chain, situation, share in zip(chains, situations, shares, strict=True)
        ]
        rows = await self._rewritten(chains, rows)
        parents, pools = [chain.given["input"] for chain in chains], [chain.pool for chain in chains]
        rows = await self.judge.judge(rows, parents, pools, self.name)
        for chain, row in zip(chains, rows, strict=True):
            chain.rows.append(row)
            chain.ended = row["operator"] == STOP
            chain.given = chain.given if "dropped" in row else row
        return rows

    def _chosen(self, chain: Chain, number: int, situation: Situation, shares: np.ndarray) -> StageRow:
        rng = np.random.default_rng((self.seed, chain.number, number))
        actions = self.operators.actions
        action = int(rng.choice(len(actions), p=shares))
        return {
            "id": f"{chain.root}.{chain.number}.{number}",
            "parent": chain.given["id"],
            "root": chain.root,
            "chain": chain.number,
            "round": number,
            "operator": actions[action],
            "propensity": float(shares[action]),
            "propensities": dict(zip(actions, shares.tolist(), strict=True)),
            "situation": situation._asdict(),
            "input": "",
            "output": "",
            "parts": {},
            "pass_rate": None,
            "reward": 0.0,
        }

    async def _rewritten(self, chains: Sequence[Chain], rows: Sequence[StageRow]) -> list[StageRow]:
        """The rows with the writer's new instructions."""
        asks = [
            # Each choice has its own number: otherwise a failed one would fail again with the cached answer.
            self.operators.rewriting(
                row["operator"],
                chain.given["input"],
                self.asking,
                chain.number * self.rounds + row["round"] - 1,
                f"{self.name}: rewrite",
            )
            for chain, row in zip(chains, rows, strict=True)
            if row["operator"] != STOP
        ]
        replies = iter(await ask_all(self.writer, asks, f"{self.name}: rewrite"))
        made = []
        for chain, row in zip(chains, rows, strict=True):
            if row["operator"] == STOP:
                made.append(drop(row, "stopped"))
                continue
            text, reason, detail = read_rewriting(next(replies))
            if text:
                reason, detail = self.operators.by_name[row["operator"]].fault(text, chain.given["input"])
            row = {**row, "input": text}
            made.append(drop(row, reason, detail) if reason else row)
        return made


def situation_of(chain: Chain, number: int, rounds: int) -> Situation:
    """What the policy sees of a chain before round `number`."""
    last = chain.rows[-1] if chain.rows else None
    return Situation(
        chain.given["input"],
        number,
        rounds,
        last["operator"] if last else None,
        bool(last and "dropped" in last),
        chain.given["parts"]["novelty"],
        chain.given["pass_rate"],
    )


def actions_of(rows: Sequence[StageRow]) -> list[str]:
    """The names of the actions that some choices were made from; the last is stop."""
    return list(rows[0]["propensities"])


def batch_from(rows: Sequence[StageRow], rounds: int, group_size: int) -> Batch:
    """The logged choices as a batch to learn from: one episode per chain, in the order of their numbers."""
    names = actions_of(rows)
    numbers = {number: place for place, number in enumerate(sorted({row["chain"] for row in rows}))}
    shape = (len(numbers), rounds)
    seen = np.zeros((*shape, size_of(names[:-1])), dtype=np.float32)
    actions, mask = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
    propensities, rewards = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    found = features([Situation(**row["situation"]) for row in rows], names[:-1])
    for row, x in zip(rows, found, strict=True):
        place = (numbers[row["chain"]], row["round"] - 1)
        seen[place], actions[place], mask[place] = x, names.index(row["operator"]), 1.0
        propensities[place], rewards[place] = row["propensity"], row["reward"]
    return Batch(seen, actions, propensities, rewards, mask, group_size)


def figures(rows: Sequence[StageRow]) -> dict[str, float]:
    """Figures of some choices: reward per choice, share kept, share of each operator."""
    kept_share = float(np.mean(["dropped" not in row for row in rows]))
    shares = {name: float(np.mean([row["operator"] == name for row in rows])) for name in actions_of(rows)}
    return {"mean_reward": float(np.mean([row["reward"] for row in rows])), "kept_share": kept_share, **shares}
