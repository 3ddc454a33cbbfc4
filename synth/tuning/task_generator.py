"""The tuner's generator of task samples: they are asked of a teacher with the sampler's settings.

The requests are the pipeline's (synth/prompts.py) inside the sampler's template. Rows with an unreadable output or a
repeated input are dropped; near-duplicates are kept, and outputs are not verified.

    with task_generator(task, sampler, TeacherSettings(), "runs/mine") as generator:
        rows = generator.generate_from_seed(100).data
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from synth import prompts
from synth.chat_api import OFFLINE_MODEL
from synth.examples import Example
from synth.offline.server import teacher_from
from synth.pipeline.generate import read_sample
from synth.sampler import Results, Sampler, in_turn
from synth.stages import new_row
from synth.task import Task
from synth.teacher.asking import AskFunction, ask_all
from synth.teacher.completions import Ask, Reply
from synth.teacher.connect import teacher_of
from synth.teacher.flags import TeacherSettings

REPEATED = "repeated input"


class TaskGenerator:
    """A generator as synth/sampler.py describes it.

    ask: answers asks in order; seed_rows: the rows to evolve (default: the task's demos); max_tokens: per answer.
    Raises UserError if evolving is asked for and there is nothing to evolve.
    """

    def __init__(
        self,
        task: Task,
        sampler: Sampler,
        ask: AskFunction,
        seed_rows: Sequence[Example] | None = None,
        max_tokens: int = 1024,
    ):
        self.task, self.sampler, self.ask = task, sampler, ask
        self.seed_rows = list(task.demos if seed_rows is None else seed_rows)
        self.max_tokens = max_tokens

    def generate_from_seed(self, count: int, first: int = 1) -> Results:
        """New samples of the task."""
        numbers = range(first, first + count)
        return self._made("generate", numbers, [prompts.new_sample(self.task, None, None, n) for n in numbers])

    def evolve_instructions(self, count: int, first: int = 1) -> Results:
        """Samples that are harder than a seed row; seed rows are used in turn."""
        if not self.seed_rows:
            raise UserError(f"the task {self.task.name} has no demos to evolve; give it some, or seed_data")
        numbers = range(first, first + count)
        parents = [in_turn(self.seed_rows, n) for n in numbers]
        asked = [prompts.harder(self.task, parent["input"], parent["output"], None) for parent in parents]
        return self._made("evolve", numbers, asked)

    def _made(self, stage: str, numbers: Sequence[int], requests: Sequence[list[dict]]) -> Results:
        settings, text = self.sampler.get(), self.sampler.template_text
        asks = [
            Ask(
                prompts.with_template(messages, text),
                prompts.NewSample,
                settings.temperature,
                self.max_tokens,
                sample=number,
                stage=stage,
                top_p=settings.top_p,
            )
            for number, messages in zip(numbers, requests, strict=True)
        ]
        rows, dropped, inputs = [], Counter[str](), set()
        for number, reply in zip(numbers, self.ask(asks), strict=True):
            row = read_sample(new_row(f"{stage} {number}", "", "", stage), reply, self.task)
            reason = row.get("dropped") or (REPEATED if row["input"] in inputs else None)
            if reason:
                dropped[reason] += 1
                continue
            inputs.add(row["input"])
            rows.append({"input": row["input"], "output": row["output"]})
        return Results(rows, dict(dropped))


@contextmanager
def task_generator(
    task: Task,
    sampler: Sampler,
    teacher: TeacherSettings,
    folder: str | Path,
    seed_rows: Sequence[Example] | None = None,
) -> Iterator[TaskGenerator]:
    """A generator that asks the teacher, or, without a URL, an offline teacher in this process.

    folder: where cache and ledger are kept; limits hold for everything that is ever asked from there.
    """
    with asking(teacher, folder) as ask:
        yield TaskGenerator(task, sampler, ask, seed_rows, teacher.answer_tokens)


@contextmanager
def asking(teacher: TeacherSettings, folder: str | Path) -> Iterator[AskFunction]:
    """A function that asks the teacher, or, without a URL, an offline teacher in this process."""
    with nullcontext() if teacher.teacher_url else teacher_from(teacher.offline_teacher) as server:
        if server:
            # Its port changes from run to run, so the cache knows it by its flags.
            name = f"offline {teacher.offline_teacher}"
            teacher = replace(teacher, teacher_url=server.url, teacher_model=OFFLINE_MODEL, endpoint=name)
        yield asker(teacher, Path(folder))


def asker(settings: TeacherSettings, folder: Path) -> AskFunction:
    """A function that asks a teacher, each time in an event loop of its own."""

    async def asked(asks: Sequence[Ask]) -> list[Reply]:
        async with teacher_of(settings, folder) as teacher:
            return await ask_all(teacher, asks, "generate")

    return lambda asks: asyncio.run(asked(asks))
