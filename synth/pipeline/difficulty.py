"""Stage 5: samples made harder or easier, towards a wanted spread of pass rates.

The teacher makes harder samples of those that the base model solves and easier ones of those that it does not. They
are verified like the rest, tried, and may be rewritten in turn, until the wanted spread is filled, nothing is left to
rewrite, or the rounds are used up. Each sample is rewritten at most once. With --rewrite all it is the paper's rule
instead (arXiv:2505.17063): a harder one of every solved sample and an easier one of every unsolved one, whatever the
spread. As a command, stages 4 and 5.

    python -m synth.pipeline.difficulty --task my_task.yaml --in verified.jsonl --out tried.jsonl --base-model MODEL \\
        --teacher-url URL --teacher-model NAME

Not here: which samples are trained on (see synth/pipeline/selection.py).
"""

import argparse
import asyncio
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import cpu

if __name__ == "__main__":
    cpu.enable()  # before mlx is imported

from common.cli import run
from common.errors import UserError
from common.files import check_file
from common.parser import Parser
from common.ranges import COUNT, NATURAL, SEED, SHARE
from synth import prompts
from synth.pipeline.generate import open_library, passage_texts, read_sample
from synth.pipeline.many import with_all
from synth.pipeline.pass_rates import (
    add_base_model_flags,
    add_tries_flags,
    base_model_settings,
    pass_rates,
    tries_settings,
)
from synth.pipeline.selection import band_of
from synth.pipeline.tasks import open_task
from synth.pipeline.verify import Voting, add_voting_flags, verify, voting_settings, with_threshold
from synth.stages import StageRow, kept, load_rows, new_row, summary, write_rows
from synth.task import Task
from synth.teacher.asking import Asker, Asking, ask_each
from synth.teacher.cache import Cache
from synth.teacher.completions import Ask, Reply
from synth.teacher.connect import open_teacher
from synth.teacher.flags import add_teacher_flags, teacher_settings

# A new sample may fail the vote or miss the bins that need it, so more are asked for than are wanted.
ASKED_PER_WANTED = 2
HARDER, EASIER = "harder", "easier"
REWRITE = ("short", "all")
SOLVED = 0.5  # the pass rate from which a single try more likely succeeds than fails


@dataclass(frozen=True)
class Spread:
    """The wanted pass rates: `wanted` samples within `band`, spread evenly over `bins` bins of equal width.

    rounds: most rounds of rewriting; 0: none. rewrite: what the bins are short of, or "all" that was not rewritten yet.
    Raises UserError for invalid values.
    """

    wanted: int = 200
    band: tuple[float, float] = (0.05, 0.95)
    bins: int = 4
    rounds: int = 3
    rewrite: str = "short"

    def __post_init__(self):
        low, high = self.band
        if not 0 <= low < high <= 1:
            raise UserError(f"--band is {low:g} {high:g}; give two numbers between 0 and 1, the lower first")
        if self.wanted < 1 or self.bins < 1 or self.rounds < 0:
            raise UserError(
                f"--wanted {self.wanted}, --bins {self.bins} and --rounds {self.rounds}: at least 1, 1 and 0"
            )

    def place(self, rate: float) -> int:
        """The bin of a pass rate: -1 below the band, `bins` above it."""
        low, high = self.band
        if not low <= rate <= high:
            return -1 if rate < low else self.bins
        # The tiny term undoes rounding for a rate on the edge of two bins, which belongs to the upper one.
        return min(int((rate - low) / (high - low) * self.bins + 1e-9), self.bins - 1)

    def counts(self, rows: Sequence[StageRow]) -> list[int]:
        """The number of rows below the band, in each bin, and above the band: (bins + 2,)."""
        places = [self.place(row["pass_rate"]) for row in kept(rows)]
        return [places.count(place) for place in range(-1, self.bins + 1)]

    def short(self, rows: Sequence[StageRow]) -> list[int]:
        """How many samples each bin still lacks: (bins,)."""
        return [max(0, self.per_bin - count) for count in self.counts(rows)[1:-1]]

    @property
    def per_bin(self) -> int:
        return -(-self.wanted // self.bins)

    def most_rewritten(self, count: int) -> int:
        """Upper bound on rewritten samples, of `count` samples: a round rewrites at most those not rewritten yet."""
        if self.rewrite == "all":
            return self.rounds * count
        return self.rounds * min(count, ASKED_PER_WANTED * self.per_bin * self.bins)

    def filled(self, rows: Sequence[StageRow]) -> bool:
        """Whether no bin lacks samples; never, if all samples are to be rewritten."""
        return self.rewrite != "all" and not any(self.short(rows))

    def line(self, rows: Sequence[StageRow]) -> str:
        """The histogram in one line."""
        low, high = self.band
        edges = [low + (high - low) * n / self.bins for n in range(self.bins + 1)]
        names = [f"below {low:.2f}", *(f"{a:.2f}-{b:.2f}" for a, b in itertools.pairwise(edges))]
        return ", ".join(
            f"{name}: {count}" for name, count in zip([*names, f"above {high:.2f}"], self.counts(rows), strict=True)
        )


@dataclass(frozen=True)
class Rewriting:
    """How rewritten samples are asked for and verified: as the samples before them."""

    asking: Asking = field(default_factory=Asking)
    voting: Voting = field(default_factory=Voting)


class Adapted(NamedTuple):
    """rows: those given and those made from them, dropped ones included; ended: why no more were made."""

    rows: list[StageRow]
    ended: str


def choose_parents(rows: Sequence[StageRow], spread: Spread) -> list[tuple[StageRow, str]]:
    """The rows to rewrite next and in which direction: towards the bins that lack samples, extreme pass rates first.

    At most twice as many as are lacking; none that was rewritten before. If all are to be rewritten, those that were
    not yet: solved ones harder, others easier.
    """
    if spread.rewrite == "all":
        done = {row["parent"] for row in rows}
        fresh = [row for row in kept(rows) if row["id"] not in done]
        return [(row, HARDER if row["pass_rate"] >= SOLVED else EASIER) for row in fresh]
    short = spread.short(rows)
    before = {row["parent"] for row in rows}
    found = []
    for row in kept(rows):
        place = spread.place(row["pass_rate"])
        below, above = sum(short[: max(place, 0)]), sum(short[place + 1 :])
        if row["id"] not in before and (below or above):
            harder = below > above or (below == above and row["pass_rate"] >= SOLVED)
            found.append((row, HARDER if harder else EASIER))
    found.sort(key=lambda item: -abs(item[0]["pass_rate"] - 0.5))
    return found[: ASKED_PER_WANTED * sum(short)]


async def rewrite(
    parents: Sequence[tuple[StageRow, str]], task: Task, teacher: Asker, passages: Mapping[str, str], asking: Asking
) -> list[StageRow]:
    """A new, unverified row from each parent; its id is the parent's with h or e appended, its passage the parent's."""
    wording = {HARDER: prompts.harder, EASIER: prompts.easier}
    asks = (
        Ask(
            wording[direction](task, row["input"], row["output"], passages.get(row["passage"])),
            prompts.NewSample,
            asking.temperature,
            asking.max_tokens,
            stage=direction,
        )
        for row, direction in parents
    )
    made: dict[int, StageRow] = {}

    def take(number: int, reply: Reply) -> None:
        row, direction = parents[number]
        new = new_row(row["id"] + direction[0], "", "", direction, row["id"], row["passage"])
        made[number] = read_sample(new, reply, task)

    await ask_each(teacher, asks, len(parents), "harder and easier", take)
    return [made[number] for number in range(len(parents))]


async def adapt(
    rows: Sequence[StageRow],
    task: Task,
    teacher: Asker,
    measure: Callable[[Sequence[StageRow]], list[StageRow]],
    spread: Spread = Spread(),
    rewriting: Rewriting = Rewriting(),
    passages: Mapping[str, str] | None = None,
) -> Adapted:
    """Rows with pass rates, and round after round of harder and easier ones made from them.

    measure: gives rows their pass rates, as `pass_rates` does. passages: id → text, for rewriting and votes.
    """
    passages = passages or {}
    rows = list(rows)
    if task.source is not None:
        return Adapted(rows, "the task's scorer knows only its own rows")
    for number in range(1, spread.rounds + 1):
        if spread.filled(rows):
            return Adapted(rows, "the spread is filled")
        parents = choose_parents(rows, spread)
        if not parents:
            return Adapted(rows, "no sample is left to rewrite")
        made = await rewrite(parents, task, teacher, passages, rewriting.asking)
        pool = [row["input"] for row in kept(rows)]
        voted = await verify(kept(made), task, teacher, rewriting.voting, pool, passages)
        # A parent whose rewriting failed is known by its dropped row.
        rows += measure(voted) + [row for row in made if "dropped" in row]
        print(f"pass rates after round {number}: {spread.line(rows)}", flush=True)
    if spread.filled(rows):
        return Adapted(rows, "the spread is filled")
    return Adapted(rows, f"the limit of {spread.rounds} rounds is reached")


def add_difficulty_flags(parser: Parser) -> None:
    """The base model's rollouts, and the spread of pass rates."""
    group = parser.add_argument_group("difficulty")
    add_tries_flags(group)
    group.add_argument("--wanted", type=NATURAL, default=Spread.wanted, help="samples with a pass rate within the band")
    group.add_argument("--band", type=SHARE, nargs="+", default=list(Spread.band), help="lowest, highest pass rate")
    group.add_argument("--bins", type=COUNT, default=Spread.bins, help="parts of the band to fill evenly")
    group.add_argument(
        "--rounds", "--iterations", type=NATURAL, default=Spread.rounds, help="of harder and easier samples; 0: none"
    )
    group.add_argument(
        "--rewrite",
        choices=REWRITE,
        default=Spread.rewrite,
        help="towards the bins that are short of samples, or all: every solved one harder, every other easier",
    )


def spread_settings(args: argparse.Namespace) -> Spread:
    """The settings that `add_difficulty_flags` has read."""
    return Spread(args.wanted, band_of(args.band), args.bins, args.rounds, args.rewrite)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--task", required=True, help="a task's YAML file, or reasoning_gym:NAME")
    parser.add_argument("--in", required=True, metavar="FILE", help="rows with id, input and output")
    parser.add_argument("--out", required=True, metavar="FILE", help="the rows, dropped ones included")
    parser.add_argument("--rollout-store", default="rollouts.sqlite", metavar="FILE", help="where rollouts are kept")
    parser.add_argument("--library", nargs="+", default=[], metavar="PATH", help="more files or folders with passages")
    parser.add_argument("--seed", type=SEED, default=0, help="of sampling")
    add_base_model_flags(parser)
    add_difficulty_flags(parser)
    add_voting_flags(parser)
    add_teacher_flags(parser)
    args = parser.parse_args()
    task, settings = with_threshold(open_task(args.task), args.duplicate_threshold), teacher_settings(args)
    spread, tries = spread_settings(args), tries_settings(args)
    settings.check()
    check_file(args.out)
    rewriting = Rewriting(settings.asking, voting_settings(args, settings.asking))
    rows = kept(load_rows(getattr(args, "in")))
    model = base_model_settings(args, task).open()
    with Cache(args.rollout_store) as store:

        def measure(some: Sequence[StageRow]) -> list[StageRow]:
            return pass_rates(some, task, model, store, tries)

        async def made(tried: list[StageRow]) -> Adapted:
            drawn = any(row["passage"] is not None for row in tried)
            index = open_library(task, Path(args.out).parent, args.library) if drawn else None
            async with open_teacher(settings) as teacher:
                passages = passage_texts(tried, index)
                return await adapt(tried, task, teacher, measure, spread, rewriting, passages)

        rows = measure(rows)
        print(f"pass rates before: {spread.line(rows)}", flush=True)
        if spread.rounds and task.source is None:
            rows, ended = asyncio.run(made(rows))
            print(f"harder and easier: {ended}\npass rates after: {spread.line(rows)}")
    write_rows(args.out, rows)
    print(f"{summary('difficulty', rows)}\n{args.out}")


if __name__ == "__main__":
    run(lambda: with_all(main))
