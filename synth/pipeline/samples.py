"""Stages 1 to 5 in their order: the table of stages, their settings, and the run through them.

A new stage is a module of its own beside this file and, here, a row of STAGES and, if it has flags, a field of
SampleSettings.
"""

import argparse
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.parser import Parser, positive
from common.ranges import COUNT
from synth.estimate import Bound
from synth.pipeline.difficulty import Rewriting, Spread, adapt, add_difficulty_flags, spread_settings
from synth.pipeline.estimate import upper_bounds
from synth.pipeline.generate import generate, open_library, passage_texts, source_rows
from synth.pipeline.pass_rates import BaseModelSettings, Tries, pass_rates, tries_settings
from synth.pipeline.retrieval import Index
from synth.pipeline.rollouts import Completer
from synth.pipeline.verify import Voting, add_voting_flags, verify, voting_settings
from synth.stages import StageRow, kept, stage
from synth.task import Task
from synth.teacher.asking import Asking
from synth.teacher.cache import Cache
from synth.teacher.connect import teacher_of
from synth.teacher.flags import TeacherSettings


@dataclass(frozen=True)
class SampleSettings:
    """How samples are made. count: samples asked for; seed: of a task's own source."""

    count: int = 500
    seed: int = 0
    asking: Asking = field(default_factory=Asking)
    voting: Voting = field(default_factory=Voting)
    tries: Tries = field(default_factory=Tries)
    spread: Spread = field(default_factory=Spread)

    def __post_init__(self):
        positive("count", self.count)


def add_sample_flags(parser: Parser) -> None:
    """The flags of SampleSettings."""
    group = parser.add_argument_group("samples")
    group.add_argument("--count", type=COUNT, default=SampleSettings.count, help="samples to ask the teacher for")
    add_difficulty_flags(parser)
    add_voting_flags(parser)


def sample_settings(args: argparse.Namespace, asking: Asking) -> SampleSettings:
    """The settings that `add_sample_flags` has read."""
    voting = voting_settings(args, asking)
    return SampleSettings(args.count, args.seed, asking, voting, tries_settings(args), spread_settings(args))


@dataclass
class Workshop:
    """What the stages work with. teacher: an Asker; None if nothing is left to ask, or the task has its own source."""

    settings: SampleSettings
    task: Task
    base: BaseModelSettings
    store: Cache  # of rollouts
    index: Index | None
    teacher: Any = None

    @cached_property
    def base_model(self) -> Completer:
        """The base model, loaded at first use."""
        return self.base.open()

    def measure(self, rows: Sequence[StageRow]) -> list[StageRow]:
        """The rows with the base model's pass rates."""
        return pass_rates(rows, self.task, self.base_model, self.store, self.settings.tries)


async def _generate(rows: Sequence[StageRow], shop: Workshop) -> list[StageRow]:
    settings = shop.settings
    if shop.task.source is not None:
        return source_rows(shop.task, settings.count, settings.seed)
    return await generate(shop.task, shop.teacher, settings.count, shop.index, settings.asking)


async def _verify(rows: Sequence[StageRow], shop: Workshop) -> list[StageRow]:
    return await verify(rows, shop.task, shop.teacher, shop.settings.voting, (), passage_texts(rows, shop.index))


async def _pass_rates(rows: Sequence[StageRow], shop: Workshop) -> list[StageRow]:
    return shop.measure(rows)


async def _difficulty(rows: Sequence[StageRow], shop: Workshop) -> list[StageRow]:
    settings = shop.settings
    rewriting, passages = Rewriting(settings.asking, settings.voting), passage_texts(rows, shop.index)
    rows, ended = await adapt(rows, shop.task, shop.teacher, shop.measure, settings.spread, rewriting, passages)
    print(f"harder and easier: {ended}", flush=True)
    return rows


class Stage(NamedTuple):
    """One stage, which leaves RUN/NAME.jsonl.

    make: f(rows of the stage before, workshop) -> rows; outcome: what the report says of the rows it kept (empty: the
    report shows the next stage only); shown: print the spread of pass rates after it, under this title.
    """

    name: str
    make: Callable[[Sequence[StageRow], Workshop], Awaitable[list[StageRow]]]
    outcome: str = ""
    shown: str = ""


STAGES = (
    Stage("generate", _generate, "readable"),
    Stage("verify", _verify, "verified"),
    Stage("pass_rates", _pass_rates, shown="pass rates before"),
    Stage("difficulty", _difficulty, "kept with a pass rate", "pass rates after"),
)


async def make_samples(
    settings: SampleSettings, task: Task, base: BaseModelSettings, teacher: TeacherSettings, folder: Path, store: Cache
) -> list[StageRow]:
    """All stages, those that are finished read from their files; returns the last one's rows, dropped ones included.

    Raises UserError where a stage keeps no row.
    """
    index = open_library(task, folder) if task.library or task.passages else None
    shop = Workshop(settings, task, base, store, index)
    finished = (folder / f"{STAGES[-1].name}.jsonl").is_file()
    if not finished:
        _ = shop.base_model  # a missing model is found before the teacher is paid for samples
    opened: Any = nullcontext() if finished or task.source is not None else teacher_of(teacher, folder)
    rows: list[StageRow] = []
    async with opened as shop.teacher:
        for made in STAGES:
            before = kept(rows)
            rows = await stage(folder, made.name, lambda made=made, before=before: made.make(before, shop))  # type: ignore[misc]
            left(rows, folder / f"{made.name}.jsonl")
            if made.shown:
                print(f"{made.shown}: {settings.spread.line(rows)}", flush=True)
    return rows


def left(rows: Sequence[StageRow], path: Path) -> list[StageRow]:
    """The rows that were kept. Raises UserError if there is none."""
    if not kept(rows):
        raise UserError(f"no sample is left of {len(rows)}; {path} says why each was dropped")
    return kept(rows)


def sample_bounds(settings: SampleSettings, task: Task) -> list[Bound]:
    """What the stages may ask the teacher at most."""
    texts = [*task.passages, *(["x" * 8000] if task.library else [])]
    longest = max(texts, key=len, default=None)
    return upper_bounds(task, settings.count, settings.voting, settings.spread, settings.asking.max_tokens, longest)
