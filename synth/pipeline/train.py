"""Stage 7 by itself: a training on samples, its checkpoint by held-out ones, and the evaluation set read once.

    python -m synth.pipeline.train --task my_task.yaml --in selected.jsonl --base-model MODEL --output-dir runs/mine
    python -m synth.pipeline.train --resume runs/mine                        after a stop or a kill

The work is synth/pipeline/trainer.py's. Leaves out making and selecting the samples: a row needs id, input and output.
"""

import argparse
from pathlib import Path

from models import cpu

if __name__ == "__main__":
    cpu.enable()  # before mlx is imported

from common.cli import run
from common.errors import UserError
from common.parser import Parser
from synth.pipeline.difficulty import add_base_model_flags, model_name
from synth.pipeline.report import write_report
from synth.pipeline.trainer import (
    add_training_flags,
    check_training,
    choose_checkpoint,
    draw_held_out,
    evaluate,
    evaluation_line,
    fuse,
    train,
)
from synth.stages import alone, kept, load_rows, write_rows
from synth.task import load_task
from synth.teacher.cache import Cache
from training.flags import default_output_dir, resumed
from training.metrics import resumed_config, start_run_folder


def parse_args() -> argparse.Namespace:
    """The flags of the command line, or of the run that --resume names."""
    parser = Parser(__doc__)
    parser.add_argument("--task", help="a task's YAML file, or reasoning_gym:NAME")
    parser.add_argument("--in", metavar="FILE", help="rows with id, input and output; dropped ones are passed over")
    parser.add_argument("--held-out-in", metavar="FILE", help="rows that choose the checkpoint (default: of --in)")
    add_base_model_flags(parser)
    add_training_flags(parser)
    parser.add_argument("--output-dir", help="the run folder (default: runs/train-TIME)")
    parser.add_argument("--resume", metavar="RUN_FOLDER", help="go on with a stopped run, by its own flags")
    parser.add_argument("--model", help="how reports call the base model")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    args = parser.parse_args()
    if args.resume:
        return resumed(args, resumed_config(args.resume))
    if not args.task or not getattr(args, "in"):
        raise UserError("a task and samples are needed; give --task FILE and --in FILE, or --resume RUN_FOLDER")
    return args


def main() -> None:
    args = parse_args()
    task = load_task(args.task)
    check_training(args, task)
    rows = kept(load_rows(getattr(args, "in")))
    if args.held_out_in:
        held_out = kept(load_rows(args.held_out_in))
    else:
        held_out, rows = draw_held_out(rows, args.held_out, args.seed)
    if not rows:
        raise UserError(f"{getattr(args, 'in')} leaves no sample to train on; give more, or lower --held-out")
    args.base_model = model_name(args, task)
    name = args.output_dir or default_output_dir("train")
    folder = Path(args.resume or start_run_folder(name, vars(args)))
    with alone(folder) as lock, Cache(folder / "rollouts.sqlite") as store:
        write_rows(folder / "select.jsonl", rows)
        write_rows(folder / "held_out.jsonl", held_out)
        training = train(args, task, rows, held_out, folder, lock, "synth.pipeline.train")
        adapter = choose_checkpoint(args, task, training, held_out, folder, store)
        result = evaluate(args, task, adapter, folder, store)
        fuse(args, task, adapter, folder, "synth.pipeline.train")
    print(f"{evaluation_line(result)}\nadapter: {adapter}\nrun folder: {folder}\nreport: {write_report(folder)}")


if __name__ == "__main__":
    run(main)
