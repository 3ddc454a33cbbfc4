"""Stages 4 and 5: how often the base model solves each sample, and samples made harder or easier to suit it.

Every sample is tried 8 times, and more often only where none or all of the tries so far were right. Then the teacher
makes harder samples of those that are solved and easier ones of those that are not; they are verified like the rest,
tried, and may be rewritten again, until the wanted spread of pass rates is filled, nothing is left to rewrite, or the
rounds are used up. A sample is rewritten once. Leaves out which samples are trained on (synth/pipeline/selection.py).

    python -m synth.pipeline.difficulty --task my_task.yaml --in verified.jsonl --out tried.jsonl --base-model MODEL \\
        --teacher-url URL --teacher-model NAME
"""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from models import cpu

if __name__ == "__main__":
    cpu.enable()  # before mlx is imported

from common.cli import run
from common.errors import UserError
from common.parser import Parser, positive
from synth import prompts
from synth.pipeline.generate import Asking, open_library, passage_texts, read_sample
from synth.pipeline.rollouts import BaseModel, Rollout, Sampler, draw
from synth.pipeline.verify import Voting, add_voting_flags, verify, voting_from, with_threshold
from synth.stages import Asker, Row, ask_all, kept, load_rows, new_row, summary, write_rows
from synth.task import Task, load_task
from synth.teacher.cache import Cache
from synth.teacher.completions import Ask
from synth.teacher.flags import add_teacher_flags, open_teacher

# A new sample may fail the vote or miss the bins that are short, so more are asked for than are wanted.
ASKED_PER_WANTED = 2
DEFAULT_MODEL = "tiny-digits"
HARDER, EASIER = "harder", "easier"


@dataclass(frozen=True)
class Tries:
    """Rollouts of a sample: the `first`, then doubled up to `most` as long as none or all were right."""

    first: int = 8
    most: int = 32

    def __post_init__(self):
        if not 1 <= self.first <= self.most:
            raise UserError(f"--rollouts is {self.first} and --most-rollouts {self.most}; 1 <= rollouts <= most")


@dataclass(frozen=True)
class Spread:
    """The pass rates wanted: `wanted` samples within `band`, evenly over `bins` bins of equal width.

    rounds: of rewriting at most; 0: none.
    """

    wanted: int = 200
    band: tuple[float, float] = (0.05, 0.95)
    bins: int = 4
    rounds: int = 3

    def __post_init__(self):
        low, high = self.band
        if not 0 <= low < high <= 1:
            raise UserError(f"--band is {low:g} {high:g}; its ends lie between 0 and 1, the lower first")
        if self.wanted < 1 or self.bins < 1 or self.rounds < 0:
            raise UserError(
                f"--wanted {self.wanted}, --bins {self.bins} and --rounds {self.rounds}: at least 1, 1 and 0"
            )

    def place(self, rate: float) -> int:
        """The bin of a pass rate: -1 below the band, `bins` above it."""
        low, high = self.band
        if not low <= rate <= high:
            return -1 if rate < low else self.bins
        # The tiny term undoes rounding where a rate lies on the edge of two bins: it belongs to the upper one.
        return min(int((rate - low) / (high - low) * self.bins + 1e-9), self.bins - 1)

    def counts(self, rows: Sequence[Row]) -> list[int]:
        """How many rows lie below the band, in each bin, and above the band: (bins + 2,)."""
        places = [self.place(row["pass_rate"]) for row in kept(rows)]
        return [places.count(place) for place in range(-1, self.bins + 1)]

    def short(self, rows: Sequence[Row]) -> list[int]:
        """How many samples each bin still lacks: (bins,)."""
        each = -(-self.wanted // self.bins)
        return [max(0, each - count) for count in self.counts(rows)[1:-1]]

    def line(self, rows: Sequence[Row]) -> str:
        """The histogram as a line of text."""
        low, high = self.band
        edges = [low + (high - low) * n / self.bins for n in range(self.bins + 1)]
        names = [f"below {low:.2f}", *(f"{a:.2f}-{b:.2f}" for a, b in itertools.pairwise(edges))]
        return ", ".join(
            f"{name}: {count}" for name, count in zip([*names, f"above {high:.2f}"], self.counts(rows), strict=True)
        )


@dataclass(frozen=True)
class Rewriting:
    """What rewritten samples are asked for and verified by: the settings that the samples before them had."""

    asking: Asking = field(default_factory=Asking)
    voting: Voting = field(default_factory=Voting)


class Adapted(NamedTuple):
    """rows: those given and those made of them, dropped ones included; ended: why no more were made."""

    rows: list[Row]
    ended: str


def pass_rates(rows: Sequence[Row], task: Task, sampler: Sampler, store: Cache, tries: Tries = Tries()) -> list[Row]:
    """The rows with rollouts, solved and pass_rate; dropped ones as they are. A score of 1 or more is solved."""
    solved = {n: 0 for n, row in enumerate(rows) if "dropped" not in row}
    done = dict.fromkeys(solved, 0)
    undecided, target = list(solved), tries.first
    while undecided:
        wanted = [(n, Rollout(task.prompt(rows[n]["input"]), k)) for n in undecided for k in range(done[n], target)]
        texts = draw([rollout for _, rollout in wanted], sampler, store)
        for (n, _), text in zip(wanted, texts, strict=True):
            done[n] += 1
            solved[n] += task.score(rows[n]["input"], text, rows[n]["output"]) >= 1
        target = min(2 * target, tries.most)
        undecided = [n for n in undecided if solved[n] in (0, done[n]) and done[n] < target]
    return [
        {**row, "rollouts": done[n], "solved": solved[n], "pass_rate": solved[n] / done[n]} if n in solved else row
        for n, row in enumerate(rows)
    ]


def choose_parents(rows: Sequence[Row], spread: Spread) -> list[tuple[Row, str]]:
    """The rows to rewrite next and in which direction: towards the bins that lack samples, the extremes first.

    At most twice as many as are lacking; none that was rewritten before.
    """
    short = spread.short(rows)
    before = {row["parent"] for row in rows}
    found = []
    for row in kept(rows):
        place = spread.place(row["pass_rate"])
        below, above = sum(short[: max(place, 0)]), sum(short[place + 1 :])
        if row["id"] not in before and (below or above):
            harder = below > above or (below == above and row["pass_rate"] >= 0.5)
            found.append((row, HARDER if harder else EASIER))
    found.sort(key=lambda item: -abs(item[0]["pass_rate"] - 0.5))
    return found[: ASKED_PER_WANTED * sum(short)]


async def rewrite(
    parents: Sequence[tuple[Row, str]], task: Task, teacher: Asker, passages: Mapping[str, str], asking: Asking
) -> list[Row]:
    """A new row of each parent, unverified; its id is the parent's with h or e behind it, its passage the parent's."""
    wording = {HARDER: prompts.harder, EASIER: prompts.easier}
    asks = [
        Ask(
            wording[direction](task, row["input"], row["output"], passages.get(row["passage"])),
            prompts.NewSample,
            asking.temperature,
            asking.max_tokens,
            stage=direction,
        )
        for row, direction in parents
    ]
    replies = await ask_all(teacher, asks, "harder and easier")
    return [
        read_sample(new_row(row["id"] + direction[0], "", "", direction, row["id"], row["passage"]), reply, task)
        for (row, direction), reply in zip(parents, replies, strict=True)
    ]


async def adapt(
    rows: Sequence[Row],
    task: Task,
    teacher: Asker,
    measure: Callable[[Sequence[Row]], list[Row]],
    spread: Spread = Spread(),
    rewriting: Rewriting = Rewriting(),
    passages: Mapping[str, str] | None = None,
) -> Adapted:
    """Rows with pass rates, and round after round of harder and easier ones made of them.

    measure: gives rows their pass rates, as `pass_rates` does. passages: id → text, for those who rewrite and vote.
    """
    passages = passages or {}
    rows = list(rows)
    if task.source is not None:
        return Adapted(rows, "the task's scorer knows only its own rows")
    for number in range(1, spread.rounds + 1):
        if not any(spread.short(rows)):
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
    filled = not any(spread.short(rows))
    return Adapted(rows, "the spread is filled" if filled else f"the limit of {spread.rounds} rounds is reached")


def add_base_model_flags(parser: Parser) -> None:
    """The base model and how it is sampled."""
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--base-model",
        "--base-model-path",
        help=f"a folder or a Hugging Face name (default: the task's base_model, else {DEFAULT_MODEL})",
    )
    group.add_argument("--base-adapter", help="an adapter on it: a folder, or an .npz or .safetensors file")
    group.add_argument("--max-completion-length", type=int, default=256, help="tokens")
    group.add_argument("--temperature", type=float, default=1.0, help="of the base model's sampling")
    group.add_argument("--sampling-batch-size", type=int, default=64, help="completions in flight")


def add_difficulty_flags(parser: Parser) -> None:
    """The base model, its rollouts, and the spread of pass rates."""
    add_base_model_flags(parser)
    group = parser.add_argument_group("difficulty")
    group.add_argument("--rollouts", type=int, default=Tries.first, help="completions of each sample")
    group.add_argument("--most-rollouts", type=int, default=Tries.most, help="of those solved never or always")
    group.add_argument("--wanted", type=int, default=Spread.wanted, help="samples with a pass rate within the band")
    group.add_argument("--band", type=float, nargs="+", default=list(Spread.band), help="lowest, highest pass rate")
    group.add_argument("--bins", type=int, default=Spread.bins, help="parts of the band to be filled evenly")
    group.add_argument(
        "--rounds", "--iterations", type=int, default=Spread.rounds, help="of harder and easier samples; 0: none"
    )


def spread_from(args) -> Spread:
    """The settings that `add_difficulty_flags` has read."""
    return Spread(args.wanted, band_from(args), args.bins, args.rounds)


def band_from(args) -> tuple[float, float]:
    """--band as a pair. Raises UserError where it is none."""
    if len(args.band) != 2:
        raise UserError(f"--band has {len(args.band)} values; give the lowest and the highest pass rate")
    return args.band[0], args.band[1]


def model_name(args, task: Task) -> str:
    """The base model: the user's, else the task's, else the embedded one."""
    return args.base_model or task.base_model or DEFAULT_MODEL


def base_model_from(args, task: Task) -> BaseModel:
    """The base model that `add_difficulty_flags` or the task names, opened."""
    positive("max-completion-length", args.max_completion_length)
    positive("sampling-batch-size", args.sampling_batch_size)
    positive("temperature", args.temperature, zero=True)
    return BaseModel(
        model_name(args, task),
        args.base_adapter,
        args.max_completion_length,
        args.temperature,
        args.seed,
        args.sampling_batch_size,
    )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--task", required=True, help="a task's YAML file, or reasoning_gym:NAME")
    parser.add_argument("--in", required=True, metavar="FILE", help="rows with id, input and output")
    parser.add_argument("--out", required=True, metavar="FILE", help="the rows, dropped ones included")
    parser.add_argument("--rollout-store", default="rollouts.sqlite", metavar="FILE", help="where rollouts are kept")
    parser.add_argument("--library", nargs="+", default=[], metavar="PATH", help="more files or folders with passages")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    add_difficulty_flags(parser)
    add_voting_flags(parser)
    add_teacher_flags(parser)
    args = parser.parse_args()
    task = with_threshold(load_task(args.task), args)
    spread, tries = spread_from(args), Tries(args.rollouts, args.most_rollouts)
    rewriting = Rewriting(Asking(args.teacher_temperature, args.answer_tokens), voting_from(args))
    rows = kept(load_rows(getattr(args, "in")))
    model = base_model_from(args, task)
    with Cache(args.rollout_store) as store:

        def measure(some: Sequence[Row]) -> list[Row]:
            return pass_rates(some, task, model, store, tries)

        async def made(tried: list[Row]) -> Adapted:
            drawn = any(row["passage"] is not None for row in tried)
            index = open_library(task, Path(args.out).parent, args.library) if drawn else None
            async with open_teacher(args) as teacher:
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
    run(main)
