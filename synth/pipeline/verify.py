"""Stage 3: near-duplicates dropped, then each sample's answer put to a vote of independent answers.

An answer wins with at least a share `least` of all votes, and more than any other. The denominator is all votes, so
an unreadable, refused or failed one counts against every answer. The generator's own output is one more vote, as in
the paper (arXiv:2505.17063). Votes are asked in waves of the smallest number that could decide, so no vote is asked
that could not change the verdict. Near-duplicates go first, as finding them costs no call: only the first of two is
voted on, so if it fails, both are lost. Tasks with a reward instead of an answer, or with rows of their own, have
nothing to vote on.

    python -m synth.pipeline.verify --task my_task.yaml --in new.jsonl --out verified.jsonl --teacher-url URL \\
        --teacher-model NAME
"""

import argparse
import asyncio
import itertools
import math
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import run
from common.errors import UserError
from common.files import check_file
from common.parser import Parser
from common.ranges import NATURAL, SHARE
from rewards.answers import AnswerType
from synth import prompts
from synth.near_duplicates import checked_threshold, find_duplicates
from synth.pipeline.generate import open_library, passage_texts
from synth.pipeline.tasks import open_task
from synth.stages import StageRow, drop, kept, load_rows, summary, write_rows
from synth.task import Task
from synth.teacher.asking import Asker, Asking, ask_each
from synth.teacher.completions import Ask, Reply
from synth.teacher.connect import open_teacher
from synth.teacher.flags import add_teacher_flags, teacher_settings

ON_OUTVOTED = ("replace", "drop")


@dataclass(frozen=True)
class Voting:
    """votes: most answers asked for, besides the generator's `own` (0: no vote, every sample is kept).

    least: share of all votes that the winner needs. on_outvoted: what happens to the output of a sample whose winner
    is another: "replace" it or "drop" the sample. asking: of a vote. Raises UserError for invalid values.
    """

    votes: int = 16
    least: float = 0.6
    own: bool = True
    on_outvoted: str = "replace"
    asking: Asking = field(default_factory=Asking)

    def __post_init__(self):
        if self.votes < 0:
            raise UserError(f"--votes is {self.votes}; it must be at least 0")
        if not 0 < self.least <= 1:
            raise UserError(f"--least-agreement is {self.least}; it must be above 0 and at most 1")
        if self.on_outvoted not in ON_OUTVOTED:
            raise UserError(f"--on-outvoted is {self.on_outvoted!r}; use one of {', '.join(ON_OUTVOTED)}")


class Ballot:
    """The votes on one sample. accepted: None while undecided; asked: votes asked for so far."""

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
        """The votes of the leading answer and of the second."""
        first, second, *_ = [*sorted(self.counts.values(), reverse=True), 0, 0]
        return first, second

    @property
    def left(self) -> int:
        return self.total - self.cast

    @property
    def accepted(self) -> bool | None:
        """Whether an answer has won; None while the remaining votes can change that."""
        first, second = self.best
        if first >= self.needed and first > second + self.left:
            return True
        return False if first + self.left < self.needed or not self.left else None

    @property
    def wave(self) -> int:
        """The smallest number of further votes that could decide; 0 if decided."""
        if self.accepted is not None:
            return 0
        first, second = self.best
        to_accept = max(self.needed - first, (second + self.left - first) // 2 + 1)
        to_reject = first + self.left - self.needed + 1
        return min(to_accept, to_reject)

    def verdict(self, row: StageRow, on_outvoted: str) -> StageRow:
        """The row with its votes and margin (lead over the second answer, as a share of votes cast)."""
        first, second = self.best
        row = {**row, "votes": dict(self.counts), "cast": self.cast, "margin": (first - second) / self.cast}
        if not self.accepted:
            heard = f"{first} of {self.cast} votes for one answer, {self.needed} of {self.total} needed"
            reason = "no readable vote" if not first else "tie" if first == second else "too little agreement"
            return drop(row, reason, heard)
        winner = max(self.counts, key=self.counts.__getitem__)
        if self.answer.equal(winner, row["output"]):
            return row
        if on_outvoted == "drop":
            return drop(row, "outvoted", f"{first} of {self.cast} votes say {winner}"[:200])
        return {**row, "output": winner, "outvoted": row["output"]}


async def verify(
    rows: Sequence[StageRow],
    task: Task,
    teacher: Asker,
    voting: Voting = Voting(),
    pool: Sequence[str] = (),
    passages: Mapping[str, str] | None = None,
) -> list[StageRow]:
    """All rows: those kept with their votes and the voted output, the others with the reason.

    pool: inputs of existing samples. passages: id → text, shown to the voters on samples drawn from them.
    """
    rows = drop_duplicates(rows, task, pool)
    if task.answer is None or task.source is not None or not voting.votes:
        return rows
    voted = await vote(kept(rows), task, task.answer, teacher, voting, passages or {})
    verdicts = iter(voted)
    return [row if "dropped" in row else next(verdicts) for row in rows]


def drop_duplicates(rows: Sequence[StageRow], task: Task, pool: Sequence[str] = ()) -> list[StageRow]:
    """The rows; those whose input repeats the evaluation set, a demo, the pool or an earlier row are dropped.

    Bare inputs are compared, as the wording of the prompt would make all of them alike.
    """
    known = {"the evaluation set": task.evaluation, "the validation set": task.validation, "a demo": task.demos}
    against = [(row["input"], name) for name, examples in known.items() for row in examples]
    against += [(text, "the pool") for text in pool]
    found = find_duplicates([row["input"] for row in rows], [text for text, _ in against], task.near_duplicates)
    marked = list(rows)
    for match in found:
        of, name = against[match.of] if match.in_against else (rows[match.of]["input"], "the pool")
        marked[match.number] = drop(rows[match.number], f"near-duplicate of {name}", f"{match.reason}: {of}"[:200])
    return marked


async def vote(
    rows: Sequence[StageRow],
    task: Task,
    answer: AnswerType,
    teacher: Asker,
    voting: Voting,
    passages: Mapping[str, str],
) -> list[StageRow]:
    """The verdicts on the rows, in order. All votes of a wave are asked at once."""
    ballots = [Ballot(answer, voting, row["output"]) for row in rows]
    for wave in itertools.count(1):
        wanted = [(n, ballot.wave) for n, ballot in enumerate(ballots) if ballot.wave]
        if not wanted:
            break
        starts = [0, *itertools.accumulate(count for _, count in wanted)]  # the number of each row's first vote
        found: dict[int, dict[int, str | None]] = {}  # of rows whose votes are not all there

        def asks(wanted: list[tuple[int, int]] = wanted) -> Iterator[Ask]:
            for n, count in wanted:
                messages = prompts.answer(task, rows[n]["input"], passages.get(rows[n]["passage"]))
                for sample in range(ballots[n].asked, ballots[n].asked + count):
                    yield Ask(messages, None, voting.asking.temperature, voting.asking.max_tokens, sample, "verify")

        def take(number: int, reply: Reply, wanted=wanted, starts=starts, found=found) -> None:
            place = bisect_right(starts, number) - 1
            n, count = wanted[place]
            votes = found.setdefault(n, {})
            votes[number] = answer.extract(reply.text) if reply.status == "ok" else None
            if len(votes) == count:  # counted in their order, whichever came first
                ballots[n].asked += count
                for _, vote in sorted(found.pop(n).items()):
                    ballots[n].add(vote)

        await ask_each(teacher, asks(), starts[-1], f"votes, wave {wave}", take)
    return [ballot.verdict(row, voting.on_outvoted) for row, ballot in zip(rows, ballots, strict=True)]


def add_voting_flags(parser: Parser) -> None:
    """The flags of `Voting` and of near-duplicates."""
    group = parser.add_argument_group("verification")
    group.add_argument("--votes", type=NATURAL, default=Voting.votes, help="most answers per vote; 0: no vote")
    group.add_argument("--least-agreement", type=SHARE, default=Voting.least, help="share of all votes needed to win")
    group.add_argument("--no-own-vote", action="store_true", help="the generator's own answer is not a vote")
    group.add_argument(
        "--on-outvoted",
        choices=ON_OUTVOTED,
        default=Voting.on_outvoted,
        help="if the vote goes against the generator: replace its answer, or drop the sample",
    )
    group.add_argument(
        "--duplicate-threshold", type=SHARE, help="ROUGE-L of near-duplicates; 1: same words only (default: the task's)"
    )


def voting_settings(args: argparse.Namespace, asking: Asking) -> Voting:
    """The settings that `add_voting_flags` has read."""
    return Voting(args.votes, args.least_agreement, not args.no_own_vote, args.on_outvoted, asking)


def with_threshold(task: Task, threshold: float | None) -> Task:
    """The task with the --duplicate-threshold, if one is given."""
    return task if threshold is None else replace(task, near_duplicates=checked_threshold(threshold))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--task", required=True, help="a task's YAML file, or reasoning_gym:NAME")
    parser.add_argument("--in", required=True, metavar="FILE", help="rows with id, input and output")
    parser.add_argument("--out", required=True, metavar="FILE", help="the rows, dropped ones included")
    parser.add_argument("--library", nargs="+", default=[], metavar="PATH", help="more files or folders with passages")
    add_voting_flags(parser)
    add_teacher_flags(parser)
    args = parser.parse_args()
    task, settings = with_threshold(open_task(args.task), args.duplicate_threshold), teacher_settings(args)
    voting = voting_settings(args, settings.asking)
    settings.check()
    check_file(args.out)
    rows = kept(load_rows(getattr(args, "in")))
    index = None
    if any(row["passage"] is not None for row in rows):
        index = open_library(task, Path(args.out).parent, args.library)

    async def made() -> list[StageRow]:
        async with open_teacher(settings) as teacher:
            passages = passage_texts(rows, index)
            return await verify(rows, task, teacher, voting, (), passages)

    rows = asyncio.run(made())
    write_rows(args.out, rows)
    print(f"{summary('verify', rows)}\n{args.out}")


if __name__ == "__main__":
    run(main)
