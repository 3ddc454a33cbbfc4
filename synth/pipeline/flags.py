"""The flags of synth.run: its parser, what a resumed run takes anew, and the task and settings that they describe.

python -m pytest tests/test_run.py -k "flags or mistake"
"""

import argparse
from dataclasses import replace

from common.errors import UserError
from common.parser import Parser, positive
from synth.offline.server import TASKS
from synth.pipeline.difficulty import Tries, add_difficulty_flags, band_from, spread_from
from synth.pipeline.generate import Asking
from synth.pipeline.selection import RULES, Selection
from synth.pipeline.trainer import add_training_flags
from synth.pipeline.verify import add_voting_flags, voting_from, with_threshold
from synth.task import SHIPPED, Task, load_task, task_from_flags
from synth.teacher.flags import add_teacher_flags, limits_from
from training.flags import resumed
from training.metrics import resumed_config

# What a resumed run may be given anew: nothing here changes a sample.
FREE_FLAGS = ["dry_run", "teacher_url", "concurrency", "timeout"]
FREE_FLAGS += ["max_calls", "max_tokens", "max_money", "price_in", "price_out"]


def run_parser(description: str | None) -> Parser:
    """All flags; those that the published program has go by its names as well."""
    parser = Parser(description)
    group = parser.add_argument_group("task (a file, or flags alone, or flags that override a file's)")
    group.add_argument("--task", metavar="FILE", help="a task's YAML file, or reasoning_gym:NAME")
    group.add_argument(
        "--task-name", help="name of the task; that of a shipped one, such as MedNLI, brings its settings"
    )
    group.add_argument("--task-instruction", help="what is asked, in words")
    group.add_argument("--domain", help="the task's domain or topic, which the teacher is told")
    group.add_argument("--dataset-path", metavar="PATH", help="evaluation set: a .jsonl, or a folder of save_to_disk")
    group.add_argument(
        "--demo-examples", metavar="DEMOS", help="a .jsonl, or a list as text: [{'input': .., 'output': ..}]"
    )
    group.add_argument(
        "--passage-paths", nargs="+", metavar="PATH", help="library: files and folders to draw samples from"
    )
    group.add_argument("--answer", metavar="TYPE", help="answer type: number, or {type: choice, choices: [A, B]}")
    group.add_argument("--labels", nargs="+", metavar="LABEL", help="answer type label, of these")
    group.add_argument("--input-format", help="what an input looks like, in words")
    group.add_argument("--output-format", help="what an answer has to look like, in words")
    group = parser.add_argument_group("samples")
    group.add_argument("--count", type=int, default=500, help="samples to ask the teacher for")
    group.add_argument("--no-library", action="store_true", help="draw samples from no passages")
    group.add_argument("--select", type=int, default=Selection.count, metavar="M", help="samples to train on")
    group.add_argument(
        "--rule", choices=RULES, default=Selection.rule, help="of selection; see synth/pipeline/selection.py"
    )
    group.add_argument("--no-never-solved", action="store_true", help="rule lowest: leave out what was never solved")
    add_difficulty_flags(parser)
    add_voting_flags(parser)
    add_training_flags(parser)
    add_teacher_flags(parser)
    parser.set_defaults(cache=None)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--offline-teacher",
        default="",
        metavar="TEXT",
        help="without --teacher-url: flags of that teacher, as one text",
    )
    group.add_argument("--experiment-name", help="the run folder is runs/NAME (default: runs/synth-TIME)")
    group.add_argument("--output-dir", help="the run folder, in place of that")
    group.add_argument("--resume", metavar="RUN_FOLDER", help="go on with a stopped run, by its own flags")
    group.add_argument(
        "--dry-run", action="store_true", help="print upper bounds of calls, tokens and money; send nothing"
    )
    group.add_argument("--model", help="how reports call the base model")
    group.add_argument("--seed", type=int, default=0, help="of everything random but the teacher")
    return parser


def parse_run_args(description: str | None) -> argparse.Namespace:
    """The flags of the command line, or of the run that --resume names."""
    flags = run_parser(description)
    args = flags.parse_args()
    args.endpoint = None  # the cache's name of a teacher whose URL has changed since
    if not args.resume:
        return args
    saved = resumed_config(args.resume)
    given = {name: getattr(args, name) for name in FREE_FLAGS if getattr(args, name) != flags.get_default(name)}
    return argparse.Namespace(**{**vars(resumed(args, saved)), "endpoint": saved["teacher_url"], **given})


def task_from(args: argparse.Namespace) -> Task:
    """The task of --task or of the flags. Raises UserError where it is none, or no teacher could be asked for it."""
    task = task_from_flags(
        args.task_name,
        args.task_instruction,
        base=load_task(args.task) if args.task else None,
        answer=args.answer,
        labels=args.labels,
        input_format=args.input_format,
        output_format=args.output_format,
        demo_examples=args.demo_examples,
        passage_paths=args.passage_paths,
        dataset_path=args.dataset_path,
        domain=args.domain,
    )
    task = with_threshold(task, args)
    if args.no_library:
        task = replace(task, library=[], passages=[])
    if args.teacher_model and not args.teacher_url:
        raise UserError(f"--teacher-model {args.teacher_model} is at no URL; give --teacher-url, up to and with /v1")
    known = {load_task(SHIPPED / f"{name}.yaml").instruction for name in TASKS}
    if not args.teacher_url and task.source is None and task.instruction not in known:
        raise UserError(
            f"the offline teacher knows the tasks {', '.join(TASKS)} only; for {task.name} give --teacher-url and "
            "--teacher-model"
        )
    return task


def check(args: argparse.Namespace) -> None:
    """Raise UserError for settings that cannot be, before anything is started."""
    for name in ("count", "select"):
        positive(name, getattr(args, name))
    (
        spread_from(args),
        voting_from(args),
        Tries(args.rollouts, args.most_rollouts),
        limits_from(args),
        selection_from(args),
    )


def selection_from(args: argparse.Namespace) -> Selection:
    return Selection(args.select, args.rule, band_from(args), not args.no_never_solved, args.seed)


def asking_from(args: argparse.Namespace) -> Asking:
    return Asking(args.teacher_temperature, args.answer_tokens)
