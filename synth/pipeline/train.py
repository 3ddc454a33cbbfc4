"""Stage 7: a training on samples, its checkpoint chosen on held-out ones, and the evaluation set read once.

The training is ppo_training.py, or sft.py on the same samples, as a process with a run folder of its own inside the
run's. Rows need id, input and output only.

    python -m synth.pipeline.train --task my_task.yaml --in selected.jsonl --base-model MODEL --output-dir runs/mine
    python -m synth.pipeline.train --resume runs/mine                        after a stop or a kill
"""

import argparse
import math
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import cpu

if __name__ == "__main__":
    cpu.enable()  # before mlx is imported

from common.cli import run
from common.errors import UserError
from common.files import check_replaceable
from common.parser import Parser, positive, split_words
from common.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE_BELOW_1
from common.schemas import read_as
from models.adapter_config import WEIGHT_TYPES
from models.export.model_card import FUSED
from synth.pipeline.evaluation import choose_checkpoint, evaluate, evaluation_line
from synth.pipeline.many import continued_by, with_all
from synth.pipeline.pass_rates import BaseModelSettings, add_base_model_flags, base_model_settings
from synth.pipeline.report import write_report
from synth.pipeline.script import run_script
from synth.pipeline.tasks import open_task
from synth.stages import StageRow, alone, kept, load_rows, roots_of, write_rows
from synth.task import Task
from synth.teacher.cache import Cache
from training import ppo_flags, sft_flags
from training.flags import default_output_dir, resumed_with
from training.metrics import start_run_folder

WAYS = {"rl": "ppo_training.py", "sft": "sft.py"}
STEPS = {"rl": 200, "sft": 200}
BATCHES = {"rl": 64, "sft": 16}
PROMPTS, LAST_ADAPTER = "prompts.jsonl", "last_adapter"
FEW = 32  # samples that a model memorises sooner than it learns what they have in common
CHECKPOINTS = 10  # of a training, among which the held-out samples choose


@dataclass(frozen=True)
class TrainingSettings:
    """How the base model is trained and evaluated.

    way: one of WAYS. steps, batch_size, learning_rate: None stands for STEPS, BATCHES and the script's own rate.
    script_flags: further flags of the script, as one string. held_out: share of the samples that choose the
    checkpoint. fused_path: where the trained model is written, fused. run_folder: the training's own (default:
    training/ in the run's). label: how reports call the base model. Raises UserError for invalid values.
    """

    base: BaseModelSettings
    way: str = "rl"
    advantage: str = "group"
    num_steps: int | None = None
    batch_size: int | None = None
    fine_tune_type: str = "lora"
    learning_rate: float | None = None
    script_flags: str = ""
    held_out: float = 0.2
    eval_temperature: float = 0.0
    fused_path: str | None = None
    run_folder: str | None = None
    label: str | None = None

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "learning_rate"):
            if getattr(self, name) is not None:
                positive(name.replace("_", "-"), getattr(self, name))
        positive("eval-temperature", self.eval_temperature, zero=True)
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out is {self.held_out}; it is a share, at least 0 and below 1")

    @property
    def evaluated(self) -> BaseModelSettings:
        """The base model as it is sampled in evaluation."""
        return replace(self.base, temperature=self.eval_temperature)

    def training_folder(self, folder: Path) -> Path:
        """The training's own run folder."""
        return Path(self.run_folder or folder / "training")


def draw_held_out(
    rows: Sequence[StageRow], share: float, seed: int, family: Sequence[StageRow] = ()
) -> tuple[list[StageRow], list[StageRow]]:
    """Rows that will choose the checkpoint, and the rest, both in order.

    Drawn by root, so that no row is held out whose harder or easier twin is trained on: a share of the roots with all
    that was made from them, but never all of them. family: further rows, through which rows may be related.
    """
    roots = roots_of([*family, *rows])
    names = list(dict.fromkeys(roots[row["id"]] for row in rows))
    count = min(round(share * len(names)), max(len(names) - 1, 0))
    drawn = set(random.Random(f"{seed} held out").sample(names, count))
    sides: tuple[list[StageRow], list[StageRow]] = ([], [])
    for row in rows:
        sides[roots[row["id"]] not in drawn].append(row)
    return sides


def train(
    settings: TrainingSettings,
    task: Task,
    rows: Sequence[StageRow],
    held_out: Sequence[StageRow],
    folder: Path,
    lock: int,
    go_on: str,
) -> Path:
    """Train on the rows, from the last checkpoint if there is one; returns the training's run folder.

    lock: an open file that the training keeps open as long as it runs, even if this process is killed; go_on: the
    command that resumes. Raises UserError if the script fails, Stopped if it was stopped.
    """
    run_folder = settings.training_folder(folder)
    begun = (run_folder / "config.json").is_file()
    if begun and read_as(dict[str, Any], run_folder / "config.json").get("save_file") != str(folder / LAST_ADAPTER):
        raise UserError(f"{run_folder} holds something other than this run's training; move it away")
    if begun and (run_folder / "summary.json").is_file():
        print(f"training: finished before ({run_folder})", flush=True)
        return run_folder
    if len(rows) < FEW:
        print(
            f"warning: {len(rows)} samples to train on, which the model may memorise; ask for more (--count), or for "
            "samples that it solves sometimes (an easier task, a larger model)",
            flush=True,
        )
    words = command(settings, task, folder)
    if begun:
        words = [WAYS[settings.way], "--resume", str(run_folder)]
    chat = settings.base.takes_turns
    write_rows(folder / PROMPTS, [prompt_row(task, row, chat) for row in rows])
    for split, some in (("train", rows), ("valid", held_out or rows)):
        write_rows(folder / "sft" / f"{split}.jsonl", [sft_row(task, row, chat) for row in some])
    run_script(words, go_on, [lock])
    return run_folder


def own_flags(settings: TrainingSettings, folder: Path) -> dict[str, Any]:
    """The script's flags that the run depends on, and which script_flags may not change."""
    own = {
        "model": settings.base.name,
        "output_dir": str(settings.training_folder(folder)),
        "save_file": str(folder / LAST_ADAPTER),
        "keep_checkpoints": 0,
    }
    if settings.way == "rl":
        return {**own, "prompts": str(folder / PROMPTS)}
    return {**own, "data": str(folder / "sft"), "data_base": ""}


def command(settings: TrainingSettings, task: Task, folder: Path) -> list[str]:
    """The command line of the training."""
    way, base = settings.way, settings.base
    steps, batch = settings.num_steps or STEPS[way], settings.batch_size or BATCHES[way]
    flags: dict[str, Any] = {
        **own_flags(settings, folder),
        "batch_size": batch,
        "fine_tune_type": settings.fine_tune_type,
        "seed": base.seed,
        "save_every": max(1, steps // CHECKPOINTS),
    }
    flags |= {"learning_rate": settings.learning_rate} if settings.learning_rate else {}
    if way == "rl":
        flags |= {"num_steps": steps, "advantage": settings.advantage, "mini_batch_size": math.gcd(batch, 64)}
        flags |= {"max_completion_length": base.max_tokens, "temperature": base.temperature}
        flags |= {"resume_file": base.adapter} if base.adapter else {}
        switches = list(task.scoring_flags)
    else:
        flags["iters"] = steps
        flags |= {"resume_adapter_file": base.adapter} if base.adapter else {}
        switches = ["--train"]
    return [WAYS[way], *words_of(flags), *switches, *split_words("training-flags", settings.script_flags)]


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """Flags as words of a command line: {"batch_size": 4} → ["--batch-size", "4"]."""
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def check_training(settings: TrainingSettings, task: Task, resuming: bool) -> None:
    """Raise UserError for what the training would refuse, before a teacher is paid for anything."""
    if settings.fused_path:
        check_replaceable(settings.fused_path, FUSED)
    if settings.run_folder and not resuming and (Path(settings.run_folder) / "config.json").exists():
        raise UserError(f"--work-model-paths {settings.run_folder} already holds a run or a model; name another folder")
    # The script's own checks, on its own command line, in a scratch folder, as its files are not written yet.
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / PROMPTS).touch()
        words = command(settings, task, folder)
        parser = {"rl": ppo_flags.ppo_parser, "sft": sft_flags.sft_parser}[settings.way](None)
        parser.prog = words[0]
        read = parser.parse_args(words[1:])
        for name, value in {**own_flags(settings, folder), "resume": None}.items():
            if getattr(read, name) != value:
                raise UserError(
                    f"--training-flags sets --{name.replace('_', '-')}, which synth.run sets itself; leave it out"
                )
        if settings.way == "rl":
            ppo_flags.check(read)
            return
        if read.reward_model:
            raise UserError("--training-flags sets --reward-model, which trains no policy; leave it out")
        sft_flags.check(read)


def check_sft(model: str, flags: str) -> None:
    """Raise UserError for a model that cannot be opened, and for flags that sft.py would refuse on its own rows."""
    parser = sft_flags.sft_parser(None)
    parser.prog = "sft.py"
    read = parser.parse_args(["--train", *split_words("sft-flags", flags)])
    sft_flags.check(read)
    BaseModelSettings(model).open()


def prompt_row(task: Task, row: StageRow, chat: bool) -> dict[str, Any]:
    """A sample as ppo_training.py reads it; chat: as a user's turn."""
    prompt = task.prompt(row["input"])
    given = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    return {**given, "answer": row["output"]}


def sft_row(task: Task, row: StageRow, chat: bool) -> dict[str, Any]:
    """A sample as sft.py reads it; chat: as a conversation."""
    prompt = task.prompt(row["input"])
    if chat:
        roles = (("user", prompt), ("assistant", row["output"]))
        return {"messages": [{"role": role, "content": content} for role, content in roles]}
    space = "" if prompt[-1:].isspace() else " "
    return {"prompt": prompt, "completion": space + row["output"]}


def fuse(settings: TrainingSettings, adapter: Path, go_on: str) -> None:
    """Write base model and adapter as one model to fused_path, if that is given."""
    if settings.fused_path:
        words = ["fuse.py", "--model", settings.base.name, "--adapter-file", str(adapter)]
        run_script([*words, "--save-path", settings.fused_path], go_on)


def train_and_evaluate(
    settings: TrainingSettings,
    task: Task,
    rows: Sequence[StageRow],
    held_out: Sequence[StageRow],
    folder: Path,
    lock: int,
    store: Cache,
    go_on: str,
) -> None:
    """The whole of stage 7, and the run's last words. Arguments as those of `train`; store: of completions."""
    training = train(settings, task, rows, held_out, folder, lock, go_on)
    adapter = choose_checkpoint(settings.evaluated, task, training, held_out, folder, store)
    result = evaluate(settings.evaluated, task, adapter, folder, store, settings.label)
    fuse(settings, adapter, go_on)
    print(f"{evaluation_line(result)}\nadapter: {adapter}\nrun folder: {folder}\nreport: {write_report(folder)}")


def add_training_flags(parser: Parser) -> None:
    """How the base model is trained and evaluated."""
    group = parser.add_argument_group("training and evaluation")
    group.add_argument("--train-by", choices=WAYS, default=TrainingSettings.way, help="rl, or sft on the same samples")
    group.add_argument(
        "--advantage",
        choices=ppo_flags.ADVANTAGES,
        default=TrainingSettings.advantage,
        help="rl: group (GRPO), gae (PPO) or rloo",
    )
    group.add_argument("--num-steps", type=COUNT, help=f"of training (default: {_listed(STEPS)})")
    group.add_argument("--batch-size", type=COUNT, help=f"completions or rows a step (default: {_listed(BATCHES)})")
    group.add_argument(
        "--fine-tune-type",
        choices=WEIGHT_TYPES,
        default=TrainingSettings.fine_tune_type,
        help="which weights to train",
    )
    group.add_argument("--learning-rate", type=POSITIVE, help="Adam's step size (default: the training script's)")
    group.add_argument(
        "--training-flags", default="", metavar="TEXT", help="more flags of the training script, as one string"
    )
    group.add_argument(
        "--held-out",
        type=SHARE_BELOW_1,
        default=TrainingSettings.held_out,
        help="share of samples that choose the checkpoint, drawn with all that was rewritten from them",
    )
    group.add_argument(
        "--eval-temperature",
        type=NOT_NEGATIVE,
        default=TrainingSettings.eval_temperature,
        help="of evaluation; 0: the most likely token",
    )
    group.add_argument("--target-model-path", metavar="DIR", help="write the trained model here, fused")
    group.add_argument("--work-model-paths", metavar="DIR", help="the training's run folder (default: RUN/training)")


def _listed(defaults: dict[str, int]) -> str:
    return ", ".join(f"{way} {value}" for way, value in defaults.items())


def training_settings(args: argparse.Namespace, task: Task) -> TrainingSettings:
    """The settings that `add_training_flags` and `add_base_model_flags` have read."""
    return TrainingSettings(
        base_model_settings(args, task),
        args.train_by,
        args.advantage,
        args.num_steps,
        args.batch_size,
        args.fine_tune_type,
        args.learning_rate,
        args.training_flags,
        args.held_out,
        args.eval_temperature,
        args.target_model_path,
        args.work_model_paths,
        args.model,
    )


def parse_args() -> argparse.Namespace:
    """The flags of the command line, or of the run that --resume names."""
    parser = Parser(__doc__)
    parser.add_argument("--task", help="a task's YAML file, or reasoning_gym:NAME")
    parser.add_argument("--in", metavar="FILE", help="rows with id, input and output; dropped ones are skipped")
    parser.add_argument("--held-out-in", metavar="FILE", help="rows that choose the checkpoint (default: from --in)")
    add_base_model_flags(parser)
    add_training_flags(parser)
    parser.add_argument("--output-dir", help="the run folder (default: runs/train-TIME)")
    parser.add_argument(
        "--resume", metavar="RUN_FOLDER", help="continue a stopped run with its own flags; others are refused"
    )
    parser.add_argument("--model", help="how reports call the base model")
    parser.add_argument("--seed", type=SEED, default=0, help="of everything random")
    args = parser.parse_args()
    if args.resume:
        return resumed_with(parser, args, ())[0]
    if not args.task or not getattr(args, "in"):
        raise UserError("a task and samples are needed; give --task FILE and --in FILE, or --resume RUN_FOLDER")
    return args


def main() -> None:
    args = parse_args()
    task = open_task(args.task)
    settings = training_settings(args, task)
    check_training(settings, task, resuming=bool(args.resume))
    rows = kept(load_rows(getattr(args, "in")))
    if args.held_out_in:
        held_out = kept(load_rows(args.held_out_in))
    else:
        held_out, rows = draw_held_out(rows, args.held_out, args.seed)
    if not rows:
        raise UserError(f"{getattr(args, 'in')} leaves no sample to train on; give rows that were not dropped")
    args.base_model = settings.base.name
    if not args.resume:
        settings.base.open()  # what is wrong with it is said before the first file is written
    name = args.output_dir or default_output_dir("train")
    folder = Path(args.resume or start_run_folder(name, vars(args)))
    with alone(folder) as lock, Cache(folder / "rollouts.sqlite") as store:
        write_rows(folder / "selection.jsonl", rows)
        write_rows(folder / "held_out.jsonl", held_out)
        go_on = f"python -m synth.pipeline.train --resume {folder}"
        continued_by(go_on)
        train_and_evaluate(settings, task, rows, held_out, folder, lock, store, go_on)


if __name__ == "__main__":
    run(lambda: with_all(main))
