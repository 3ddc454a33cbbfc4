"""Synthetic Data RL: from a task's definition to a tuned model, on samples from a teacher (arXiv:2505.17063).

    python -m synth.run --task synth/tasks/arithmetic.yaml          no key, no network: offline teacher, embedded model
    python -m synth.run --task my_task.yaml --teacher-url URL --teacher-model NAME --base-model MODEL
    python -m synth.run --resume RUN_FOLDER                         after a stop or a kill

Every stage leaves a file in the run folder, and a finished one is not repeated. The evaluation set is read once, at
the end. The stages' own work is in synth/pipeline.
"""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import cpu

cpu.enable()  # before mlx is imported

from common.cli import run
from common.errors import UserError
from common.files import write_json
from common.schemas import read_as
from models.folders import check_name
from synth.estimate import table
from synth.examples import Example
from synth.pipeline.flags import RunSettings, agree, paper_line, parse_run_args, run_settings, task_from
from synth.pipeline.many import continued_by, with_all
from synth.pipeline.samples import left, make_samples, sample_bounds
from synth.pipeline.selection import selected_or_lowest
from synth.pipeline.train import check_training, draw_held_out, train_and_evaluate
from synth.stages import StageRow, alone, kept, new_row, summary, write_rows
from synth.task import Task
from synth.teacher.cache import Cache
from training.flags import default_output_dir
from training.metrics import start_run_folder


def keep_task(task: Task, folder: Path) -> None:
    """Write the task to FOLDER/task.json. Raises UserError if a resumed run's task is another."""
    path, now = folder / "task.json", task.as_dict()
    before = read_as(dict[str, Any], path) if path.is_file() else now
    changed = ", ".join(name for name in now if before.get(name, now[name]) != now[name])
    if changed:
        raise UserError(
            f"the task has another {changed} than when {folder} was started; restore it ({path}), or start a new run"
        )
    write_json(path, now)


def split(
    settings: RunSettings, rows: Sequence[StageRow], folder: Path, validation: Sequence[Example] = ()
) -> tuple[list[StageRow], list[StageRow]]:
    """Held-out samples, which choose the checkpoint, and selected ones, which are trained on (6).

    Which is drawn first is settings.held_out_of: the held-out of all samples, or the selection from all of them.
    validation: rows of the user's own that choose the checkpoint, so that no sample is held out.
    """
    share, seed, whole = 0.0 if validation else settings.training.held_out, settings.training.base.seed, kept(rows)
    if settings.held_out_of == "all":
        drawn, rest = draw_held_out(whole, share, seed, rows)
        selected = selected_or_lowest(rest, settings.selection)
    else:
        selected = selected_or_lowest(whole, settings.selection)
        drawn, _ = draw_held_out(kept(selected), share, seed, rows)
        names = {row["id"] for row in drawn}
        selected = [row for row in selected if row["id"] not in names]
    drawn = drawn or [new_row(f"v{n}", row["input"], row["output"], "yours") for n, row in enumerate(validation, 1)]
    write_rows(folder / "held_out.jsonl", drawn)
    write_rows(folder / "selection.jsonl", selected)
    chosen_by = f"{len(drawn)} rows of your own" if validation else f"{len(drawn)} of {len(whole)}"
    print(f"held out: {chosen_by}\n{summary('selection', selected)}", flush=True)
    return drawn, left(selected, folder / "selection.jsonl")


def main() -> None:
    args = parse_run_args(__doc__)
    task = task_from(args)
    settings = run_settings(args, task)
    check_training(settings.training, task, resuming=bool(args.resume))
    teacher, base = settings.teacher, settings.training.base
    if args.paper and not args.resume:
        print(paper_line(args), flush=True)
    print("".join(f"{line}\n" for line in task.taken), end="", flush=True)
    bounds = table(sample_bounds(settings.samples, task), teacher.price_in, teacher.price_out)
    if args.dry_run:
        check_name(base.name)
        print(bounds)
        return
    if args.by_key and not args.resume:
        agree(args, bounds)
    if not args.resume:
        base.open()  # what is wrong with it is said before the first file is written
    args.base_model = base.name
    name = f"runs/{args.experiment_name}" if args.experiment_name else default_output_dir("synth")
    folder = Path(args.resume or start_run_folder(args.output_dir or name, vars(args)))
    keep_task(task, folder)
    go_on = f"python -m synth.run --resume {folder}"
    continued_by(go_on)
    with alone(folder) as lock, Cache(folder / "rollouts.sqlite") as store:
        samples = asyncio.run(make_samples(settings.samples, task, base, teacher, folder, store))
        held_out, selected = split(settings, samples, folder, task.validation)
        train_and_evaluate(settings.training, task, selected, held_out, folder, lock, store, go_on)


if __name__ == "__main__":
    run(lambda: with_all(main))
