"""Stage 3: near-duplicates dropped, then each sample's answer put to the vote of k independent answers.

An answer wins with at least a share `least` of all votes, and more than any other. The denominator is all votes,
whether they can be read or not: an unreadable, refused or failed answer speaks for nothing, but not against itself
alone. The generator's own output is one more vote, as in the paper (arXiv:2505.17063). Votes are asked in waves of
as many as the verdict still needs at least, so none is asked that could not change it. Near-duplicates go first, as
they cost no call: the first of two is voted on, and where it fails both are lost.
Leaves out tasks with a reward in place of an answer, and those with rows of their own: there is nothing to vote on.

    python -m synth.pipeline.verify --task my_task.yaml --in new.jsonl --out verified.jsonl --teacher-url URL
    --teacher-model M
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import run
from common.errors import UserError
from common.parser import Parser
from rewards.answers import AnswerType
from synth import prompts
from synth.near_duplicates import checked_threshold, find_duplicates
from synth.pipeline.generate import open_library, passage_texts
from synth.stages import Asker, Row, ask_all, drop, kept, load_rows, summary, write_rows
from synth.task import Task, load_task
from synth.teacher.completions import Ask
from synth.teacher.flags import add_teacher_flags, open_teacher

DIFFERING = ("replace", "drop")


@dataclass(frozen=True)
class Voting:
    """votes: answers asked for at most, besides the generator's `own` (0: no vote, every sample is kept).

    least: share of all votes that the winner needs. differing: what becomes of a sample whose winner is not the
    generator's answer. Raises UserError for values that cannot be.
    """

    votes: int = 16
    least: float = 0.6
    own: bool = True
    differing: str = "replace"
    temperature: float = 1.0
    max_tokens: int = 1024

    def __post_init__(self):
        if self.votes < 0:
            raise UserError(f"--votes is {self.votes}; it has to be at least 0")
        if not 0 < self.least <= 1:
            raise UserError(f"--least-agreement is {self.least}; it has to be above 0 and at most 1")
        if self.differing not in DIFFERING:
            raise UserError(f"--differing is {self.differing!r}; use one of {', '.join(DIFFERING)}")


class Ballot:
    """The votes on one sample. accepted: None while it is open; asked: votes that were asked for so far."""

    def __init__(self, answer: AnswerType, voting: Voting, own: str):
        self.answer = answer
        self.total = voting.votes + voting.own
        self.needed = math.ceil(voting.least * self.total - 1e-9)
        self.counts: dict[str, int] = {}
        self.asked = 0
        self.cast = 0
        if voting.own:
            self.add(own)

    def add(self, found: str | None) -> None:
        """Count one vote. found: an answer as the task's reader read it; None if it could not."""
        self.cast += 1
        if found is not None:
            if found not in self.counts:
                found = next((key for key in self.counts if self.answer.equal(key, found)), found)
            self.counts[found] = self.counts.get(found, 0) + 1

    @property
    def best(self) -> tuple[int, int]:
        """The votes of the first and of the second answer."""
        first, second, *_ = [*sorted(self.counts.values(), reverse=True), 0, 0]
        return first, second

    @property
    def left(self) -> int:
        return self.total - self.cast

    @property
    def accepted(self) -> bool | None:
        """Whether an answer has won, None as long as the votes that are left can change that."""
        first, second = self.best
        if first >= self.needed and first > second + self.left:
            return True
        return False if first + self.left < self.needed or not self.left else None

    @property
    def wave(self) -> int:
        """The fewest further votes after which the verdict can be known; 0 if it is."""
        if self.accepted is not None:
            return 0
        first, second = self.best
        to_accept = max(self.needed - first, (second + self.left - first) // 2 + 1)
        to_reject = first + self.left - self.needed + 1
        return min(to_accept, to_reject)

    def verdict(self, row: Row, differing: str) -> Row:
        """The row with its votes and margin (lead over the second answer, as a share of the votes cast)."""
        first, second = self.best
        row = {**row, "votes": dict(self.counts), "cast": self.cast, "margin": (first - second) / self.cast}
        if not self.accepted:
            heard = f"{first} of {self.cast} votes for one answer, {self.needed} of {self.total} needed"
            reason = "no readable vote" if not first else "tie" if first == second else "too little agreement"
            return drop(row, reason, heard)
        winner = max(self.counts, key=self.counts.__getitem__)
        if self.answer.equal(winner, row["output"]):
            return row
        if differing == "drop":
            return drop(row, "outvoted", f"{first} of {self.cast} votes say {winner}"[:200])
        return {**row, "output": winner, "outvoted": row["output"]}


async def verify(
    rows: Sequence[Row],
    task: Task,
    teacher: Asker,
    voting: Voting = Voting(),
    pool: Sequence[str] = (),
    passages: Mapping[str, str] | None = None,
) -> list[Row]:
    """All rows: those kept with their votes and the voted output, the others with the reason.

    pool: inputs of samples there already. passages: id → text, shown to those who vote on a sample drawn from one.
    """
    rows = drop_duplicates(rows, task, pool)
    if task.answer is None or task.source is not None or not voting.votes:
        return rows
    voted = await vote(kept(rows), task, task.answer, teacher, voting, passages or {})
    verdicts = iter(voted)
    return [row if "dropped" in row else next(verdicts) for row in rows]


def drop_duplicates(rows: Sequence[Row], task: Task, pool: Sequence[str] = ()) -> list[Row]:
    """The rows, those marked whose input repeats the evaluation set, a demo, the pool or an earlier row.

    Bare inputs are compared, as the words of the prompt's frame would make all of them alike.
    """
    known = {"the evaluation set": task.evaluation, "a demo": task.demos}
    against = [(row["input"], name) for name, examples in known.items() for row in examples]
    against += [(text, "the pool") for text in pool]
    found = find_duplicates([row["input"] for row in rows], [text for text, _ in against], task.near_duplicates)
    marked = list(rows)
    for match in found:
        of, name = against[match.of] if match.in_against else (rows[match.of]["input"], "the pool")
        marked[match.number] = drop(rows[match.number], f"near-duplicate of {name}", f"{match.reason}: {of}"[:200])
    return marked


async def vote(
    rows: Sequence[Row], task: Task, answer: AnswerType, teacher: Asker, voting: Voting, passages: Mapping[str, str]
) -> list[Row]:
    """The verdicts on the rows, in their order. All open votes of a wave are asked at once."""
    ballots = [Ballot(answer, voting, row["output"]) for row in rows]
    messages = [prompts.answer(task, row["input"], passages.get(row["passage"])) for row in rows]
    wave = 0
    while open_votes := [(n, ballot.asked + v) for n, ballot in enumerate(ballots) for v in range(ballot.wave)]:
        wave += 1
        asks = [
            Ask(messages[n], None, voting.temperature, voting.max_tokens, sample, "verify") for n, sample in open_votes
        ]
        replies = await ask_all(teacher, asks, f"votes, wave {wave}")
        for (n, _), reply in zip(open_votes, replies, strict=True):
            ballots[n].asked += 1
            ballots[n].add(answer.extract(reply.text) if reply.status == "ok" else None)
    return [ballot.verdict(row, voting.differing) for row, ballot in zip(rows, ballots, strict=True)]


def add_voting_flags(parser: Parser) -> None:
    """The flags of `Voting` and of near-duplicates."""
    group = parser.add_argument_group("verification")
    group.add_argument("--votes", type=int, default=Voting.votes, help="answers to vote at most; 0: no vote")
    group.add_argument("--least-agreement", type=float, default=Voting.least, help="share of all votes to win")
    group.add_argument("--no-own-vote", action="store_true", help="the generator's own answer is no vote")
    group.add_argument(
        "--differing", choices=DIFFERING, default=Voting.differing, help="if the generator is outvoted: its answer"
    )
    group.add_argument(
        "--duplicate-threshold", type=float, help="ROUGE-L of near-duplicates; 1: equal words (default: the task's)"
    )


def voting_from(args) -> Voting:
    """The settings that `add_voting_flags` and `add_teacher_flags` have read."""
    own, tokens = not args.no_own_vote, args.answer_tokens
    return Voting(args.votes, args.least_agreement, own, args.differing, args.teacher_temperature, tokens)


def with_threshold(task: Task, args) -> Task:
    """The task with the --duplicate-threshold that `add_voting_flags` has read, if there is one."""
    given = args.duplicate_threshold
    return task if given is None else replace(task, near_duplicates=checked_threshold(given))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--task", required=True, help="a task's YAML file, or reasoning_gym:NAME")
    parser.add_argument("--in", required=True, metavar="FILE", help="rows with id, input and output")
    parser.add_argument("--out", required=True, metavar="FILE", help="the rows, dropped ones included")
    parser.add_argument("--library", nargs="+", default=[], metavar="PATH", help="more files or folders with passages")
    add_voting_flags(parser)
    add_teacher_flags(parser)
    args = parser.parse_args()
    task, voting = with_threshold(load_task(args.task), args), voting_from(args)
    rows = kept(load_rows(getattr(args, "in")))
    index = None
    if any(row["passage"] is not None for row in rows):
        index = open_library(task, Path(args.out).parent, args.library)

    async def made() -> list[Row]:
        async with open_teacher(args) as teacher:
            passages = passage_texts(rows, index)
            return await verify(rows, task, teacher, voting, (), passages)

    rows = asyncio.run(made())
    write_rows(args.out, rows)
    print(f"{summary('verify', rows)}\n{args.out}")


if __name__ == "__main__":
    run(main)
