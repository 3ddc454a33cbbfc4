"""The generator of the tuner's examples: samples of a task, asked of a teacher by the sampler's settings.

Rows are the pipeline's own requests (synth/prompts.py) within the sampler's template. A row whose output cannot be read
is dropped, and so is one whose input is there already. Leaves out near-duplicates and whether outputs are right.

    with task_generator(task, sampler, teacher_args({}), "runs/mine") as generator:
        rows = generator.generate_from_seed(100).data

    python -m pytest tests/test_task_generator.py
"""

import asyncio
import shlex
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.parser import Parser
from synth import prompts
from synth.examples import Example
from synth.offline.server import MODEL, OfflineTeacher
from synth.offline.server import parse_args as offline_flags
from synth.pipeline.generate import read_sample
from synth.run import teacher_of
from synth.stages import ask_all, new_row
from synth.task import Task
from synth.teacher.completions import Ask, Reply
from synth.teacher.flags import add_teacher_flags
from synth.tuning.sampler import Results, Sampler, in_turn

REPEATED = "repeated input"
Asking = Callable[[Sequence[Ask]], list[Reply]]


class TaskGenerator:
    """A generator as synth/tuning/sampler.py describes it.

    ask: what answers the asks, in their order; seed_rows: what is evolved (default: the task's demos); max_tokens: of
    an answer. Raises UserError where there is nothing to evolve and that is asked for.
    """

    def __init__(
        self,
        task: Task,
        sampler: Sampler,
        ask: Asking,
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
        """Samples that are harder than a seed row, which are taken in turn."""
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


def teacher_args(given: Mapping[str, Any]) -> Namespace:
    """The flags of synth/teacher/flags.py from a mapping such as {"teacher_url": ...}, and offline_teacher's text.

    Raises UserError for an unknown flag or a value that it cannot take.
    """
    parser = Parser(None, yaml_file=False)
    add_teacher_flags(parser)
    parser.add_argument("--offline-teacher", default="")
    parser.set_defaults(cache=None)
    known = vars(parser.parse_args([]))
    for key in given:
        if key not in known:
            raise UserError(f"teacher has the unknown key {key!r}; known are {', '.join(sorted(known))}")
    try:
        return parser.parse_args([f"--{key}={value}" for key, value in given.items()])
    except SystemExit:
        raise UserError(f"teacher: {dict(given)} cannot be read; its message stands above") from None


@contextmanager
def task_generator(
    task: Task, sampler: Sampler, args: Namespace, folder: str | Path, seed_rows: Sequence[Example] | None = None
) -> Iterator[TaskGenerator]:
    """A generator that asks the teacher of `teacher_args`, or an offline one in this process where it has no URL.

    folder: where the cache and the ledger are kept; limits hold for all that is ever asked from it.
    """
    given = {**vars(args), "endpoint": None}
    if args.teacher_url:
        yield TaskGenerator(task, sampler, asker(Namespace(**given), Path(folder)), seed_rows, args.answer_tokens)
        return
    flags = dict(vars(offline_flags(shlex.split(args.offline_teacher))))
    flags.pop("until_stdin_closes")
    with OfflineTeacher(**flags) as server:
        # The cache knows it by this endpoint, as its port changes.
        given |= {"teacher_url": server.url, "teacher_model": MODEL, "endpoint": f"offline {args.offline_teacher}"}
        yield TaskGenerator(task, sampler, asker(Namespace(**given), Path(folder)), seed_rows, args.answer_tokens)


def asker(args: Namespace, folder: Path) -> Asking:
    """Asks a teacher, in an event loop of its own each time."""

    async def asked(asks: Sequence[Ask]) -> list[Reply]:
        async with teacher_of(args, folder) as teacher:
            return await ask_all(teacher, asks, "generate")

    return lambda asks: asyncio.run(asked(asks))
