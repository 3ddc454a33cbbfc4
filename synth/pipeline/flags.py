"""The flags of synth.run: its parser, what a resumed run accepts anew, and the task and settings made of them."""

import argparse
import os
import shlex
import sys
from dataclasses import dataclass, replace

from common.errors import UserError
from common.parser import Parser, positive
from common.ranges import COUNT, SEED
from synth.offline.server import TASKS, teacher_from
from synth.pipeline.pass_rates import add_base_model_flags
from synth.pipeline.samples import SampleSettings, add_sample_flags, sample_settings
from synth.pipeline.selection import RULES, Selection, band_of
from synth.pipeline.tasks import open_task
from synth.pipeline.train import TrainingSettings, add_training_flags, training_settings, words_of
from synth.pipeline.verify import with_threshold
from synth.task import SHIPPED, Task, load_task, task_from_flags
from synth.teacher.address import KEY_NAME, OPENAI_URL
from synth.teacher.flags import TeacherSettings, add_offline_teacher_flag, add_teacher_flags, teacher_settings
from training.flags import resumed_with, say_changes

# What a resumed run may be given anew: nothing here changes a sample.
FREE_FLAGS = ["dry_run", "yes", "teacher_url", "concurrency", "timeout"]
FREE_FLAGS += ["max_calls", "max_tokens", "max_money", "price_in", "price_out"]


OPENAI_MODEL = "gpt-4o"  # asked where OPENAI_API_KEY is set and no teacher is named; the published program's
# --paper: the rules of arXiv:2505.17063. How long and at which rate is trained is left to the flags of training.
PAPER = {
    "count": 500, "votes": 16, "rollouts": 64, "max_rollouts": 64, "rewrite": "all", "rounds": 1, "rule": "lowest",
    "select": 500, "held_out_of": "selected", "advantage": "group", "training_flags": "--num-generations 16",
}  # fmt: skip
PAPER_RL = ("advantage", "training_flags")  # those of RL


@dataclass(frozen=True)
class RunSettings:
    """All settings of a run, by what they are of. held_out_of: "all" samples, or the "selected" ones."""

    samples: SampleSettings
    selection: Selection
    training: TrainingSettings
    teacher: TeacherSettings
    held_out_of: str = "all"


def run_parser(description: str | None) -> Parser:
    """All flags. Those that the published program has go by its names as well."""
    parser = Parser(description)
    group = parser.add_argument_group("task (a file, or flags alone, or flags that override a file's)")
    group.add_argument("--task", metavar="FILE", help="a task's YAML file, or reasoning_gym:NAME")
    group.add_argument(
        "--task-name", help="name of the task; the name of a shipped one, such as MedNLI, brings its settings"
    )
    group.add_argument("--task-instruction", help="what is asked, in words")
    group.add_argument("--domain", help="the task's domain or topic, which the teacher is told")
    group.add_argument(
        "--dataset-path",
        metavar="PATH",
        help="evaluation set: a .jsonl, a folder of save_to_disk (test; train gives demos), or OWNER/NAME on the hub",
    )
    group.add_argument("--validation-path", metavar="PATH", help="rows to choose the checkpoint, not held-out samples")
    group.add_argument(
        "--demo-examples", metavar="DEMOS", help="a .jsonl, or a list as text: [{'input': .., 'output': ..}]"
    )
    group.add_argument(
        "--passage-paths", nargs="+", metavar="PATH", help="library: files and folders to draw samples from"
    )
    group.add_argument("--no-library", action="store_true", help="draw samples from no passages")
    group.add_argument("--answer", metavar="TYPE", help="answer type: number, or {type: choice, choices: [A, B]}")
    group.add_argument("--labels", nargs="+", metavar="LABEL", help="answer type label, with these labels")
    group.add_argument("--input-format", help="what an input looks like, in words")
    group.add_argument("--output-format", help="what an answer must look like, in words")
    add_base_model_flags(parser)
    add_sample_flags(parser)
    group = parser.add_argument_group("selection")
    group.add_argument("--select", type=COUNT, default=Selection.count, metavar="M", help="samples to train on")
    group.add_argument(
        "--rule", choices=RULES, default=Selection.rule, help="see synth/pipeline/selection.py; lowest: the paper's"
    )
    group.add_argument("--no-never-solved", action="store_true", help="rule lowest: exclude what was never solved")
    add_training_flags(parser)
    parser.add_argument(
        "--held-out-of",
        choices=("all", "selected"),
        default=RunSettings.held_out_of,
        help="what --held-out is a share of: all samples, before the selection, or the selected ones",
    )
    add_teacher_flags(parser, cache=None)
    group = parser.add_argument_group("run")
    add_offline_teacher_flag(group)
    group.add_argument(
        "--paper", action="store_true", help="the rules of arXiv:2505.17063, as defaults of the flags that it prints"
    )
    group.add_argument("--experiment-name", help="the run folder is runs/NAME (default: runs/synth-TIME)")
    group.add_argument("--output-dir", help="the run folder, instead of runs/NAME")
    group.add_argument(
        "--resume", metavar="RUN_FOLDER", help="continue a stopped run with its own flags; others are refused or named"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print upper bounds on calls, tokens and money; send nothing"
    )
    group.add_argument(
        "--yes", action="store_true", help=f"agree to the cost of the teacher that {KEY_NAME} stands for"
    )
    group.add_argument("--model", help="the base model, as --base-model; beside that flag, how reports call it")
    group.add_argument("--seed", type=SEED, default=0, help="of everything random but the teacher")
    return parser


def parse_run_args(description: str | None) -> argparse.Namespace:
    """The flags of the command line, or of the run that --resume names."""
    parser = run_parser(description)
    args = parser.parse_args()
    if args.paper:
        parser.set_defaults(**{name: PAPER[name] for name in paper_flags(args)})
        args = parser.parse_args()
    args.base_model = args.base_model or args.model
    args.by_key = False  # whether the teacher is OpenAI's because its key is set
    args.endpoint = None  # the cache's name of a teacher whose URL has changed since
    return resumed_args(args, parser, FREE_FLAGS, {"endpoint": "teacher_url"}) if args.resume else args


def paper_flags(args: argparse.Namespace) -> list[str]:
    """The flags that --paper gives defaults to."""
    return [name for name in PAPER if args.train_by == "rl" or name not in PAPER_RL]


def paper_line(args: argparse.Namespace) -> str:
    """What --paper stands for, with the values that are used: flags of one's own and a YAML file go before it."""
    values = {name: getattr(args, name) for name in paper_flags(args)}
    words = shlex.join(words_of(values))
    own = [name for name in values if values[name] != PAPER[name]]
    return f"--paper: {words}" + (f" (your own: {', '.join(own)})" if own else "")


def resumed_args(
    args: argparse.Namespace, parser: Parser, free: list[str], endpoints: dict[str, str]
) -> argparse.Namespace:
    """The flags of the run that --resume names, with those of `free` that are given anew, which is said.

    endpoints: flag → flag of the URL that it keeps, so that the cache knows a teacher that has moved. Its config.json
    stays as it is. Raises UserError for any other flag that differs from the run's.
    """
    run, changed = resumed_with(parser, args, free)
    say_changes(parser, run, {name: value for name, value in changed.items() if name not in ("dry_run", "yes")})
    moved = {name: (getattr(run, url) or "").split()[:1] for name, url in endpoints.items()}
    for name, value in {**{name: first[0] if first else None for name, first in moved.items()}, **changed}.items():
        setattr(run, name, value)
    return run


def task_from(args: argparse.Namespace) -> Task:
    """The task of --task or of the flags. Raises UserError if there is none, or no teacher that could be asked."""
    task = task_from_flags(
        args.task_name,
        args.task_instruction,
        base=open_task(args.task) if args.task else None,
        answer=args.answer,
        labels=args.labels,
        input_format=args.input_format,
        output_format=args.output_format,
        demo_examples=args.demo_examples,
        passage_paths=args.passage_paths,
        dataset_path=args.dataset_path,
        validation_path=args.validation_path,
        domain=args.domain,
    )
    task = with_threshold(task, args.duplicate_threshold)
    if args.no_library:
        task = replace(task, library=[], passages=[])
    known = {load_task(SHIPPED / f"{name}.yaml").instruction for name in TASKS}
    strange = task.source is None and task.instruction not in known
    if not args.teacher_url and os.environ.get(KEY_NAME) and (strange or args.teacher_model):
        args.teacher_url, args.teacher_model = OPENAI_URL, args.teacher_model or OPENAI_MODEL
        args.by_key = True
    if args.dry_run:  # the bounds are of any teacher
        return task
    if args.teacher_model and not args.teacher_url:
        raise UserError(f"--teacher-model {args.teacher_model} has no URL; give --teacher-url, up to and including /v1")
    if not args.teacher_url and strange:
        raise UserError(
            f"the offline teacher knows the tasks {', '.join(TASKS)} only; for {task.name} give --teacher-url and "
            f"--teacher-model, or set {KEY_NAME}"
        )
    return task


def agree(args: argparse.Namespace, bounds: str) -> None:
    """Before OpenAI is asked because its key is set, and not by name: show what it may cost, and ask whether to go on.

    bounds: the table of the most that a run asks. Raises UserError unless --yes is given or a terminal answers y.
    """
    named = f"teacher: {args.teacher_model} at {args.teacher_url}, as {KEY_NAME} is set; another by --teacher-model"
    print(f"{named}\n{bounds}", flush=True)
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{args.teacher_model} at {args.teacher_url} costs money; give --yes, or limits and --yes")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not agreed; nothing was sent")


def checked_teacher(args: argparse.Namespace) -> TeacherSettings:
    """The teacher's settings. Raises UserError for what its first request would end with, before there is a run."""
    settings = teacher_settings(args)
    settings.check()
    if not settings.teacher_url:
        teacher_from(settings.offline_teacher)  # reads its flags, and starts nothing
    return settings


def run_settings(args: argparse.Namespace, task: Task) -> RunSettings:
    """The settings of the flags. Raises UserError for invalid values, before anything is started."""
    positive("select", args.select)
    teacher = checked_teacher(args)
    return RunSettings(
        sample_settings(args, teacher.asking),
        Selection(args.select, args.rule, band_of(args.band), not args.no_never_solved, args.seed),
        training_settings(args, task),
        teacher,
        args.held_out_of,
    )
