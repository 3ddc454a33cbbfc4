"""Synthetic Data RL: from a task's definition to a tuned model, by a teacher's samples (arXiv:2505.17063).

    python -m synth.run --task synth/tasks/arithmetic.yaml          no key, no network: offline teacher, embedded model
    python -m synth.run --task my_task.yaml --teacher-url URL --teacher-model NAME --base-model MODEL
    python -m synth.run --resume RUN_FOLDER                         after a stop or a kill

Every stage leaves a file in the run folder, and a finished one is not done again. The evaluation set is read once, at
the end. Leaves out the stages' own work: synth/generate, verify, difficulty, selection and trainer.
"""

import argparse
import asyncio
import fcntl
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import models.fast_blas  # noqa: F401  (before mlx)
from data.errors import UserError
from data.files import read_json, write_json
from synth.cache import Cache
from synth.difficulty import Rewriting, Tries, adapt, base_model_from, pass_rates, spread_from
from synth.estimate import table, upper_bounds
from synth.generate import generate, open_library, passage_texts, source_rows
from synth.offline_teacher import MODEL
from synth.report import write_report
from synth.retrieval import Index
from synth.rollouts import BaseModel
from synth.run_flags import asking_from, check, parse_run_args, selection_from, task_from
from synth.selection import select
from synth.stages import Row, kept, stage, summary, write_rows
from synth.task import Task
from synth.teacher import Teacher
from synth.teacher_flags import limits_from, offline_teacher, open_teacher
from synth.trainer import check_training, choose_checkpoint, evaluate, evaluation_line, model_name, run_script, train
from synth.verify import verify, voting_from
from training import config
from training.cli import run
from training.metrics import start_run_folder


@asynccontextmanager
async def teacher_of(args: argparse.Namespace, folder: Path) -> AsyncIterator[Teacher]:
    """The teacher, with the run's ledger so far, which is kept in the run folder second by second."""
    if not args.teacher_url:
        with offline_teacher(args.offline_teacher) as url:
            flags = argparse.Namespace(**{**vars(args), "teacher_url": url, "teacher_model": MODEL})
            async with teacher_of(flags, folder) as teacher:
                yield teacher
        return
    args = argparse.Namespace(**{**vars(args), "cache": args.cache or str(folder / "cache.sqlite")})
    # The offline teacher's port changes; its answers depend on its flags.
    endpoint = f"offline teacher {args.offline_teacher}" if args.teacher_model == MODEL else args.endpoint
    ledger = folder / "ledger.json"
    async with open_teacher(args, endpoint) as teacher:
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
    rest, path = kept(rows), folder / "held_out.jsonl"
    drawn = random.Random(f"{args.seed} held out").sample(rest, round(args.held_out * len(rest)))
    held_out = {row["id"] for row in drawn}
    write_rows(path, drawn)
    selected = select([row for row in rest if row["id"] not in held_out], selection_from(args))
    write_rows(folder / "select.jsonl", selected)
    print(f"held out: {len(drawn)} of {len(rest)}\n{summary('select', selected)}", flush=True)
    return drawn, left(selected, folder / "select.jsonl")


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """One process at a time in a run folder: waits for another, even for a training whose starter was killed."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is at work in {folder}: waiting for it to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


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
    name = f"runs/{args.experiment_name}" if args.experiment_name else config.default_output_dir("synth")
    folder = Path(args.resume or start_run_folder(args.output_dir or name, vars(args)))
    with alone(folder) as lock, Cache(folder / "rollouts.sqlite") as store:
        samples = asyncio.run(make_samples(args, task, folder, store))
        held_out, selected = split(args, samples, folder)
        training = train(args, task, selected, held_out, folder, lock)
        adapter = choose_checkpoint(args, task, training, held_out, folder, store)
        result = evaluate(args, task, adapter, folder, store)
        if args.target_model_path:
            words = ["fuse.py", "--model", model_name(args, task), "--adapter-file", adapter]
            run_script(
                [*map(str, words), "--save-path", args.target_model_path], f"python -m synth.run --resume {folder}"
            )
    print(f"{evaluation_line(result)}\nadapter: {adapter}\nrun folder: {folder}\nreport: {write_report(folder)}")


if __name__ == "__main__":
    run(main)
