"""Synthetic Data RL: from a task's definition to a tuned model, by a teacher's samples (arXiv:2505.17063).

    python -m synth.run --task synth/tasks/arithmetic.yaml          no key, no network: offline teacher, embedded model
    python -m synth.run --task my_task.yaml --teacher-url URL --teacher-model NAME --base-model MODEL
    python -m synth.run --resume RUN_FOLDER                         after a stop or a kill

Every stage leaves a file in the run folder, and a finished one is not done again. The evaluation set is read once, at
the end. Leaves out the stages' own work: synth/generate, verify, difficulty, selection and trainer.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from models import cpu

cpu.enable()  # before mlx is imported

from common.cli import run
from common.errors import UserError
from common.files import read_json, write_json
from synth.estimate import table, upper_bounds
from synth.offline.server import MODEL
from synth.pipeline.difficulty import Rewriting, Tries, adapt, base_model_from, model_name, pass_rates, spread_from
from synth.pipeline.flags import asking_from, check, parse_run_args, selection_from, task_from
from synth.pipeline.generate import generate, open_library, passage_texts, source_rows
from synth.pipeline.report import write_report
from synth.pipeline.retrieval import Index
from synth.pipeline.rollouts import BaseModel
from synth.pipeline.selection import select
from synth.pipeline.trainer import (
    check_training,
    choose_checkpoint,
    draw_held_out,
    evaluate,
    evaluation_line,
    fuse,
    train,
)
from synth.pipeline.verify import verify, voting_from
from synth.stages import Row, alone, kept, stage, summary, write_rows
from synth.task import Task
from synth.teacher.cache import Cache
from synth.teacher.client import Teacher
from synth.teacher.flags import limits_from, offline_teacher, open_teacher
from training.flags import default_output_dir
from training.metrics import start_run_folder


@asynccontextmanager
async def teacher_of(args: argparse.Namespace, folder: Path) -> AsyncIterator[Teacher]:
    """The teacher, with the run's ledger so far, which is kept in the run folder second by second."""
    ledger, given, endpoint = folder / "ledger.json", vars(args), args.endpoint
    with nullcontext() if args.teacher_url else offline_teacher(args.offline_teacher) as started:
        if started:
            given = {**given, "teacher_url": started, "teacher_model": MODEL}
            endpoint = f"offline teacher {args.offline_teacher}"  # its port changes; its answers depend on its flags
        given = {**given, "cache": args.cache or str(folder / "cache.sqlite")}
        async with open_teacher(argparse.Namespace(**given), endpoint) as teacher:
            if ledger.is_file():
                teacher.ledger.restore(read_json(ledger))

            async def keep_ledger() -> None:
                while True:
                    await asyncio.sleep(1)
                    write_json(ledger, teacher.ledger.as_dict())

            keeping = asyncio.create_task(keep_ledger())
            try:
                yield teacher
            finally:
                keeping.cancel()
                write_json(ledger, teacher.ledger.as_dict())


def keep_task(task: Task, folder: Path) -> None:
    """Write what is asked to FOLDER/task.json. Raises UserError where a resumed run asks for something else."""
    path, now = folder / "task.json", task.as_dict()
    before = read_json(path) if path.is_file() else now
    changed = ", ".join(name for name in now if before.get(name) != now[name])
    if changed:
        raise UserError(f"the task has another {changed} than when {folder} began; restore it ({path}), or begin anew")
    write_json(path, now)


def left(rows: Sequence[Row], path: Path) -> list[Row]:
    """The rows that were kept. Raises UserError where there is none."""
    if not kept(rows):
        raise UserError(f"no sample is left of {len(rows)}; {path} says why each was dropped")
    return kept(rows)


async def make_samples(args: argparse.Namespace, task: Task, folder: Path, store: Cache) -> list[Row]:
    """Stages 1 to 5: samples, verified, with the base model's pass rates, and harder and easier ones of them."""
    index: Index | None = open_library(task, folder) if task.library or task.passages else None
    spread, tries, voting = spread_from(args), Tries(args.rollouts, args.most_rollouts), voting_from(args)

    @cache
    def base_model() -> BaseModel:
        return base_model_from(args, task)

    def measure(rows: Sequence[Row]) -> list[Row]:
        return pass_rates(rows, task, base_model(), store, tries)

    async def made() -> list[Row]:
        if task.source is not None:
            return source_rows(task, args.count, args.seed)
        return await generate(task, teacher, args.count, index, asking_from(args))

    async def verified() -> list[Row]:
        return await verify(samples, task, teacher, voting, (), passage_texts(samples, index))

    async def tried() -> list[Row]:
        return measure(samples)

    async def adapted() -> list[Row]:
        rewriting, passages = Rewriting(asking_from(args), voting), passage_texts(samples, index)
        rows, ended = await adapt(samples, task, teacher, measure, spread, rewriting, passages)
        print(f"harder and easier: {ended}", flush=True)
        return rows

    finished = (folder / "difficulty.jsonl").is_file()
    if not finished:
        base_model()  # opened before the teacher is paid for samples, should it be missing
    opened: Any = nullcontext() if finished or task.source is not None else teacher_of(args, folder)
    async with opened as teacher:
        samples = left(await stage(folder, "generate", made), folder / "generate.jsonl")
        samples = left(await stage(folder, "verify", verified), folder / "verify.jsonl")
        samples = await stage(folder, "pass_rates", tried)
        print(f"pass rates before: {spread.line(samples)}", flush=True)
        samples = await stage(folder, "difficulty", adapted)
        print(f"pass rates after: {spread.line(samples)}", flush=True)
    return samples


def split(args: argparse.Namespace, rows: Sequence[Row], folder: Path) -> tuple[list[Row], list[Row]]:
    """Held-out samples, which choose the checkpoint, and the rest, the selected ones of which are trained on (6)."""
    drawn, rest = draw_held_out(kept(rows), args.held_out, args.seed)
    write_rows(folder / "held_out.jsonl", drawn)
    selected = select(rest, selection_from(args))
    write_rows(folder / "select.jsonl", selected)
    print(f"held out: {len(drawn)} of {len(kept(rows))}\n{summary('select', selected)}", flush=True)
    return drawn, left(selected, folder / "select.jsonl")


def estimate(args: argparse.Namespace, task: Task) -> str:
    """What the run would ask the teacher at most."""
    texts = [*task.passages, *(["x" * 8000] if task.library else [])]
    bounds = upper_bounds(
        task, args.count, voting_from(args), spread_from(args), args.answer_tokens, max(texts, key=len, default=None)
    )
    return table(bounds, limits_from(args))


def main() -> None:
    args = parse_run_args(__doc__)
    check(args)
    task = task_from(args)
    check_training(args, task)
    if args.dry_run:
        print(estimate(args, task))
        return
    args.base_model = model_name(args, task)
    name = f"runs/{args.experiment_name}" if args.experiment_name else default_output_dir("synth")
    folder = Path(args.resume or start_run_folder(args.output_dir or name, vars(args)))
    keep_task(task, folder)
    with alone(folder) as lock, Cache(folder / "rollouts.sqlite") as store:
        samples = asyncio.run(make_samples(args, task, folder, store))
        held_out, selected = split(args, samples, folder)
        training = train(args, task, selected, held_out, folder, lock)
        adapter = choose_checkpoint(args, task, training, held_out, folder, store)
        result = evaluate(args, task, adapter, folder, store)
        fuse(args, task, adapter, folder)
    print(f"{evaluation_line(result)}\nadapter: {adapter}\nrun folder: {folder}\nreport: {write_report(folder)}")


if __name__ == "__main__":
    run(main)
