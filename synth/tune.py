"""Tune how data is generated for a target model (docs/tuner.md).

python -m synth.tune --config synth/tuning/examples/reviews.yaml      offline: a scikit-learn classifier as target
python -m synth.tune --config synth/tuning/examples/digits.yaml       offline: tiny-digits as target
python -m synth.tune --resume RUN_FOLDER                             after a stop or a kill
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import cpu

cpu.enable()  # before mlx is imported

from common.cli import run
from common.errors import UserError
from common.files import write_json
from common.parser import Parser
from common.ranges import NATURAL
from data.records import read_rows
from synth.examples import read_examples
from synth.pipeline.tasks import open_task
from synth.pipeline.train import check_sft
from synth.stages import alone
from synth.tuning.config import Config, config_from, load_config
from synth.tuning.targets import SftTarget, TargetModel, instruction_task, load_target, takes_validation
from synth.tuning.tuner import RLTuner, changes, refuse_changes
from training.flags import default_output_dir
from training.intervals import difference
from training.metrics import resumed_config, start_run_folder

FEW = 5  # batches; with fewer, an interval means nothing


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file; for its keys see synth/tuning/config.py")
    parser.add_argument("--output-dir", help="run folder (default: the file's, or runs/tune-TIME)")
    parser.add_argument(
        "--resume",
        metavar="RUN_FOLDER",
        help="continue a stopped run with its own configuration; what differs in --config is refused or named",
    )
    parser.add_argument(
        "--confirm",
        type=NATURAL,
        default=0,
        help="then compare with the start's settings, on this many fresh batches each",
    )
    return parser.parse_args(args)


def configuration(args: argparse.Namespace) -> Config:
    """The configuration of --config, or of the run that --resume names, with its run folder.

    If both are given, the file's: it may name another port for the teacher, or more iterations, which is said; whatever
    else differs from the run's is refused.
    """
    if not args.config and not args.resume:
        raise UserError("neither --config nor --resume is given; name a YAML file such as docs/tuner.md shows")
    if args.resume and args.output_dir:
        raise UserError(f"--output-dir {args.output_dir} is not taken with --resume, which goes on in its own folder")
    place = args.config or f"{args.resume}/config.json"
    run = config_from(resumed_config(args.resume), f"{args.resume}/config.json") if args.resume else None
    config = load_config(args.config) if args.config else run
    assert config is not None, "one of them is given"
    if run and args.config:
        compare(run, config, args.resume)
    if not config.rl_tuning.enable_rl_tuning:
        raise UserError(f"{place} sets rl_tuning.enable_rl_tuning to false; set it to true to tune")
    folder = args.resume or args.output_dir or config.output_dir or default_output_dir("tune")
    return replace(config, output_dir=str(folder))


def compare(run: Config, config: Config, folder: str) -> None:
    """Print what a resumed run takes anew from --config. Raises UserError for what it may not be given anew."""
    before, now = run.as_dict(), config.as_dict()
    refuse_changes(folder, before, now)
    for key, (had, value) in changes(before, now).items():
        if key != "output_dir":
            print(f"{key} is now {value}; the run had {had}", flush=True)


def target_of(config: Config) -> tuple[TargetModel, list[dict[str, Any]]]:
    """The target and its validation rows: the user's function and file, or the built-in target and the task's rows."""
    tuning = config.rl_tuning
    if tuning.target_model_path:
        function = load_target(tuning.target_model_path)
        rows = read_rows(tuning.validation_data_path, [()]) if tuning.validation_data_path else []
        if takes_validation(function) and not rows:
            raise UserError(
                f"{tuning.target_model_path} takes a validation set, and there is none; set validation_data_path"
            )
        return function, rows
    if not config.task and not config.generator:
        raise UserError(
            "neither a target nor a task is named; write target_model_path: file.py:function, `task:`, or `generator:`"
        )
    task = open_task(config.task) if config.task else instruction_task(config.answer)
    rows = task.evaluation
    if tuning.validation_data_path:
        rows = read_examples(tuning.validation_data_path, tuning.validation_data_path, reading=task.reading)
    if not rows:
        raise UserError(f"the task {task.name} has no evaluation rows to validate on; give validation_data_path")
    assert config.output_dir is not None, "synth.tune always has a run folder"
    target = SftTarget(
        task,
        config.output_dir,
        config.sft_model,
        config.sft_iters,
        config.sft_flags,
        config.eval_temperature,
        config.seed,
        go_on=f"python -m synth.tune --resume {config.output_dir}",
    )
    return target, [dict(row) for row in rows]


def confirmation(found: dict[str, list[float]], metric: str) -> str:
    """The comparison on fresh batches, in one line; with an interval if there are enough batches for one."""
    best, start = (sum(found[name]) / len(found[name]) for name in ("best", "start"))
    means = f"{metric} {best:.3f} with the best settings, {start:.3f} with the initial ones"
    line = f"on {len(found['best'])} fresh batches each: {means}"
    if len(found["best"]) < FEW:
        return f"{line}; for an interval use {FEW} batches or more"
    return f"{line}; difference {difference(found['start'], found['best']).interval} (95 %, bootstrap over batches)"


def main() -> None:
    args = parse_args()
    if args.confirm < 0:
        raise UserError(f"--confirm is {args.confirm}; it must be at least 0")
    config = configuration(args)
    folder = Path(str(config.output_dir))
    target, validation = target_of(config)
    if isinstance(target, SftTarget) and not args.resume:
        check_sft(target.model, target.flags)
    with RLTuner(config, target, validation) as tuner:
        if not args.resume:
            start_run_folder(folder, config.as_dict())
        with alone(folder) as lock:
            if isinstance(target, SftTarget):
                target.files = (lock,)
            if (folder / "tuner").is_dir():
                tuner.load(folder / "tuner")
            write_json(folder / "config.json", config.as_dict())
            tuner.train()
            best = tuner.best
            print(f"best of {len(tuner.history)} iterations: number {best.number} ({best.settings})")
            if args.confirm:
                print(confirmation(tuner.confirm(args.confirm), config.rl_tuning.reward_metric))
            else:
                print(f"its metric is the best of several, so it is biased upward; --confirm {FEW} measures it again")


if __name__ == "__main__":
    run(main)
