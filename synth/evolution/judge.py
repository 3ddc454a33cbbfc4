"""What an evolved instruction is worth: gates that it must pass, and a reward of three parts.

    gates    a refusal, words leaked from the request, only stop words, too short or too long, ROUGE-L to an
             instruction of the pool above 0.7, or equal to its parent by the reviewer in either order: reward 0
    reward   novelty · (1 − the highest ROUGE-L to the pool) + difficulty · 4p(1 − p) − growth · ln(length / parent's)

p is the pass rate: the share of answers that a verifier accepts, or that agree with the most frequent one. Without
answers the difficulty is unknown and counts as 0; shrinking is not rewarded. The row records each part separately.
If the reviewer scores, as in TeaMs-RL (arXiv:2403.08694), its score is the reward instead: how much an instruction
differs from its parent, 0 to 10 by a rubric, asked in both orders, their mean divided by 10.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from common.errors import UserError
from rewards.answers import AnswerType
from rewards.function import RewardFunction
from synth import prompts
from synth.near_duplicates import THRESHOLD, checked_threshold, normalise, rouge_l, tokens
from synth.stages import StageRow, drop
from synth.teacher.asking import Asker, ask_all
from synth.teacher.completions import Ask, Reply
from synth.teacher.structured import is_refusal

REVIEW_TOKENS = 256  # of a verdict, including a reviewer's thoughts
# The most frequent function words of English; on their own they ask for nothing.
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a about above after again all also am an and any are as at be because been before being below between
        both but by can could did do does doing down during each few for from further had has have having he her
        here hers him his how i if in into is it its just me more most my no nor not now of off on once only or
        other our out over own same she should so some such than that the their them then there these they this
        those through to too under until up very was we were what when where which while who whom why will with
        would you your""",
    )
)


@dataclass(frozen=True)
class Gates:
    """near_duplicates: the highest ROUGE-L that passes; shortest, longest: an instruction's length in words."""

    near_duplicates: float = THRESHOLD
    shortest: int = 3
    longest: int = 300

    def __post_init__(self):
        checked_threshold(self.near_duplicates)
        if not 1 <= self.shortest <= self.longest:
            raise UserError(f"--shortest is {self.shortest} and --longest {self.longest}; 1 <= shortest <= longest")


# Evol-Instruct has no near-duplicate filter: only equal words are dropped.
EVOL_GATES = Gates(near_duplicates=1.0, shortest=1)


@dataclass(frozen=True)
class Weights:
    """Of the reward's parts."""

    novelty: float = 1.0
    difficulty: float = 1.0
    growth: float = 0.2


@dataclass(frozen=True)
class Difficulty:
    """How a pass rate is found: `answers` per instruction (0: not at all), read by `answer` or scored by `verifier`.

    verifier: f(instructions, responses) -> scores, 1 or more is correct. Raises UserError for invalid settings.
    """

    answers: int = 0
    answer: AnswerType | None = None
    verifier: RewardFunction | None = None
    max_tokens: int = 1024
    temperature: float = 1.0

    def __post_init__(self):
        if self.answers < 0 or self.answers == 1:
            raise UserError(
                f"--answers is {self.answers}; 0 for none, else at least 2, as a single one cannot disagree"
            )
        if self.answers and not (self.answer or self.verifier):
            raise UserError("--answers needs a way to compare them; give --answer TYPE or --verifier")
        if not self.answers and (self.answer or self.verifier):
            raise UserError("--answer and --verifier compare answers, and none are asked for; give --answers 4")

    def pass_rate(self, instruction: str, texts: Sequence[str]) -> float:
        """0..1, of some responses; an unreadable or empty one agrees with none."""
        if self.verifier is not None:
            return sum(score >= 1 for score in self.verifier([instruction] * len(texts), list(texts))) / len(texts)
        assert self.answer is not None, "there is a verifier or an answer type"
        counts: Counter[str] = Counter()
        for found in (self.answer.extract(text) for text in texts):
            if found is not None:
                counts[next((key for key in counts if self.answer.equal(key, found)), found)] += 1
        return max(counts.values(), default=0) / len(texts)


class Pool:
    """The instructions that a new one is compared with."""

    def __init__(self, texts: Sequence[str] = ()):
        self._lists = [tokens(text) for text in texts]
        self._normalised = {normalise(text) for text in texts}

    def add(self, text: str) -> None:
        self._lists.append(tokens(text))
        self._normalised.add(normalise(text))

    def nearest(self, text: str) -> float:
        """The highest ROUGE-L to the pool, 1 for the same words; 0 if the pool is empty."""
        if normalise(text) in self._normalised:
            return 1.0
        own = tokens(text)
        return max((rouge_l(own, other) for other in self._lists), default=0.0)

    def copy(self) -> "Pool":
        other = Pool()
        other._lists, other._normalised = list(self._lists), set(self._normalised)
        return other

    def __len__(self) -> int:
        return len(self._lists)


def text_fault(text: str, gates: Gates) -> tuple[str, str]:
    """(reason, detail) of the first gate that fails on the text alone; two empty strings if it passes."""
    lowered, words = text.lower(), text.split()
    leaked = next((words for words in prompts.LEAKS if words in lowered), None)
    if is_refusal(text):
        return "refusal", text[:200]
    if leaked is not None:
        return "leaked template", leaked
    if all(token in STOP_WORDS or not token.isalnum() for token in tokens(text)):
        return "only stop words", text[:200]
    if not gates.shortest <= len(words) <= gates.longest:
        return "length", f"{len(words)} words; {gates.shortest} to {gates.longest} pass"
    return "", ""


def growth(text: str, parent: str) -> float:
    """How much longer a text is than its parent: log of the ratio of their token counts, 0 if it is not longer."""
    return max(0.0, math.log(max(len(tokens(text)), 1) / max(len(tokens(parent)), 1)))


def reward_of(parts: dict[str, Any], weights: Weights) -> float:
    """The reward of an instruction that passed all gates. An unknown part (None) counts as 0."""
    novelty, difficulty = (parts[name] or 0.0 for name in ("novelty", "difficulty"))
    return weights.novelty * novelty + weights.difficulty * difficulty - weights.growth * (parts["growth"] or 0.0)


@dataclass(frozen=True)
class Judge:
    """Drops instructions that fail a gate and gives the others their parts and reward.

    reviewer, solver: teachers; the solver answers instructions for their pass rates (needed only for that). scores:
    whether the reviewer's score is the reward.
    """

    reviewer: Asker
    solver: Asker
    gates: Gates = Gates()
    weights: Weights = Weights()
    difficulty: Difficulty = Difficulty()
    scores: bool = False

    async def judge(
        self, rows: Sequence[StageRow], parents: Sequence[str], pools: Sequence[Pool], name: str
    ) -> list[StageRow]:
        """The rows with parts, pass_rate and reward. parents, pools: per row; texts that pass are added to their pool.

        Within one pool earlier rows come first. name: prefix of the ledger's stages.
        """
        rows = self._gated(rows, pools)
        rows = await self._reviewed(rows, parents, name)
        rows = await self._scored(rows, parents, name) if self.scores else rows
        rows = await self._solved(rows, name)
        judged = []
        for row, parent, pool in zip(rows, parents, pools, strict=True):
            if "dropped" not in row:
                pool.add(row["input"])
                rate = row["pass_rate"]
                row = {**row, "parts": {**row["parts"], "difficulty": None if rate is None else 4 * rate * (1 - rate)}}
                row["parts"]["growth"] = growth(row["input"], parent)
                row["reward"] = row["parts"]["score"] if self.scores else reward_of(row["parts"], self.weights)
            judged.append(row)
        return judged

    def _gated(self, rows: Sequence[StageRow], pools: Sequence[Pool]) -> list[StageRow]:
        """Gates that cost no call. A text is also compared with those before it that share its pool."""
        waiting: dict[int, Pool] = {}
        gated = []
        for row, pool in zip(rows, pools, strict=True):
            if "dropped" not in row:
                reason, detail = text_fault(row["input"], self.gates)
                row = drop(row, reason, detail) if reason else row
            if "dropped" not in row:
                seen = waiting.setdefault(id(pool), pool.copy())
                nearest = seen.nearest(row["input"])
                row = {**row, "parts": {**row["parts"], "novelty": 1 - nearest}}
                if nearest > self.gates.near_duplicates or nearest == 1:
                    row = drop(row, "near-duplicate", f"ROUGE-L {nearest:.2f}")
                else:
                    seen.add(row["input"])
            gated.append(row)
        return gated

    async def _in_both_orders(
        self, rows: Sequence[StageRow], parents: Sequence[str], stage: str, ask: Callable, schema: type[BaseModel]
    ) -> dict[int, list[Reply]]:
        """The reviewer's two replies on each row that is not dropped and its parent, by the row's number."""
        passed = [number for number, row in enumerate(rows) if "dropped" not in row]
        pairs = [(parents[number], rows[number]["input"]) for number in passed]
        asks = [
            Ask(ask(*order), schema, 0.0, REVIEW_TOKENS, stage=stage) for pair in pairs for order in (pair, pair[::-1])
        ]
        replies = await ask_all(self.reviewer, asks, stage)
        return {number: replies[2 * place : 2 * place + 2] for place, number in enumerate(passed)}

    async def _reviewed(self, rows: Sequence[StageRow], parents: Sequence[str], name: str) -> list[StageRow]:
        """Drop what the reviewer calls equal to its parent in either order (Evol-Instruct's rule)."""
        reviewed = list(rows)
        found = await self._in_both_orders(rows, parents, f"{name}: review", prompts.review, prompts.Verdict)
        for number, both in found.items():
            verdicts = [reply.parsed.equal if reply.status == "ok" else None for reply in both]
            row = {**rows[number], "parts": {**rows[number]["parts"], "equal": verdicts}}
            if True in verdicts:
                row = drop(row, "equal to its parent")
            elif None in verdicts:
                row = drop(row, "not reviewed", next(reply.reason for reply in both if reply.status != "ok"))
            reviewed[number] = row
        return reviewed

    async def _scored(self, rows: Sequence[StageRow], parents: Sequence[str], name: str) -> list[StageRow]:
        """The rows with the reviewer's score, 0..1; dropped where it gives none."""
        scored = list(rows)
        found = await self._in_both_orders(rows, parents, f"{name}: score", prompts.score, prompts.Score)
        for number, both in found.items():
            row, failed = rows[number], next((reply.reason for reply in both if reply.status != "ok"), None)
            if failed is not None:
                scored[number] = drop(row, "not scored", failed)
                continue
            mean = sum(reply.parsed.score for reply in both) / 20
            scored[number] = {**row, "parts": {**row["parts"], "score": mean}}
        return scored

    async def _solved(self, rows: Sequence[StageRow], name: str) -> list[StageRow]:
        """The rows with pass rates, if answers are asked for."""
        passed = [number for number, row in enumerate(rows) if "dropped" not in row]
        texts = [rows[number]["input"] for number in passed] if self.difficulty.answers else []
        rates = await answer_rates(texts, self.difficulty, self.solver, name)
        solved = list(rows)
        for number, rate in zip(passed, rates, strict=False):
            solved[number] = {**rows[number], "pass_rate": rate}
        return solved


async def answer_rates(texts: Sequence[str], difficulty: Difficulty, solver: Asker, name: str) -> list[float]:
    """The pass rate of each instruction."""
    count = difficulty.answers
    asks = [
        Ask(prompts.respond(text), None, difficulty.temperature, difficulty.max_tokens, sample, f"{name}: answers")
        for text in texts
        for sample in range(count)
    ]
    replies = await ask_all(solver, asks, f"{name}: answers")
    answers = [reply.text if reply.status == "ok" else "" for reply in replies]
    return [difficulty.pass_rate(text, answers[n * count : (n + 1) * count]) for n, text in enumerate(texts)]
