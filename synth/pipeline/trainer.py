"""Stage 7's work: a training script as a process, the checkpoint that is best on held-out samples, two models compared.

The training is ppo_training.py, or sft.py on the same samples, with a run folder of its own in the run's. Every
completion is kept (synth/pipeline/rollouts.py), so a restart draws none again. Leaves out which samples are trained on.

    python -m pytest tests/test_trainer.py
"""

import argparse
import json
import math
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Stopped, StopSignal
from common.errors import UserError
from common.files import atomic_file, atomic_folder, check_replaceable, read_json, write_json
from common.parser import Parser, positive
from models.adapters import CONFIG_FILE
from synth.pipeline.difficulty import model_name
from synth.pipeline.rollouts import BaseModel, Rollout, draw
from synth.stages import Row, write_rows
from synth.task import Task
from synth.teacher.cache import Cache
from training import ppo_flags, sft_flags
from training.checkpoint_folders import all_checkpoints
from training.intervals import difference, mean_interval

ROOT = Path(__file__).resolve().parent.parent.parent
WAYS = {"rl": "ppo_training.py", "sft": "sft.py"}
STEPS = {"rl": 200, "sft": 200}
BATCHES = {"rl": 64, "sft": 16}
OWN_FLAGS = {  # which --training-flags may not change
    "rl": ("model", "output_dir", "save_file", "keep_checkpoints", "resume", "prompts"),
    "sft": ("model", "output_dir", "save_file", "keep_checkpoints", "resume", "data", "data_base", "reward_model"),
}
PROMPTS, LAST_ADAPTER = "prompts.jsonl", "last_adapter"
CHECKPOINTS = 10  # of a training, between which the held-out samples choose


def add_training_flags(parser: Parser) -> None:
    """How the base model is trained and evaluated."""
    group = parser.add_argument_group("training and evaluation")
    group.add_argument("--train-by", choices=WAYS, default="rl", help="rl, or sft on the same samples")
    group.add_argument(
        "--advantage", choices=ppo_flags.ADVANTAGES, default="group", help="rl: group (GRPO), gae (PPO) or rloo"
    )
    group.add_argument("--num-steps", type=int, help=f"of training (default: {_listed(STEPS)})")
    group.add_argument("--batch-size", type=int, help=f"completions or rows a step (default: {_listed(BATCHES)})")
    group.add_argument("--fine-tune-type", choices=("lora", "dora", "full"), default="lora", help="what is trained")
    group.add_argument("--learning-rate", type=float, help="Adam's step size (default: the training script's)")
    group.add_argument("--training-flags", default="", metavar="TEXT", help="more flags of the script, as one text")
    group.add_argument("--held-out", type=float, default=0.2, help="share of samples that choose the checkpoint")
    group.add_argument("--eval-temperature", type=float, default=0.0, help="of evaluation; 0: the most likely token")
    group.add_argument("--target-model-path", metavar="DIR", help="write the trained model here, fused")
    group.add_argument("--work-model-paths", metavar="DIR", help="training's own run folder (default: RUN/training)")


def _listed(defaults: dict[str, int]) -> str:
    return ", ".join(f"{way} {value}" for way, value in defaults.items())


def draw_held_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """A share of the rows, which will choose the checkpoint, and the rest, in their order."""
    drawn = random.Random(f"{seed} held out").sample(rows, round(share * len(rows)))
    ids = {row["id"] for row in drawn}
    return drawn, [row for row in rows if row["id"] not in ids]


def train(
    args: argparse.Namespace,
    task: Task,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    folder: Path,
    lock: int,
    module: str = "synth.run",
) -> Path:
    """Train on the rows, from the last checkpoint if there is one; returns the training's run folder.

    lock: an open file that the training keeps open as long as it runs, even if this process is killed; module: the
    entry point whose --resume goes on.
    Raises UserError where the script fails and Stopped where it was stopped; what it said stands above.
    """
    run_folder = training_folder(args, folder)
    begun = (run_folder / "config.json").is_file()
    if begun and read_json(run_folder / "config.json").get("save_file") != str(folder / LAST_ADAPTER):
        raise UserError(f"{run_folder} holds something else than this run's training; move it away")
    if begun and (run_folder / "summary.json").is_file():
        print(f"training: finished before ({run_folder})", flush=True)
        return run_folder
    words = command(args, task, folder)
    if all_checkpoints(run_folder):
        words = [WAYS[args.train_by], "--resume", str(run_folder)]
    elif begun:
        (run_folder / "config.json").unlink()  # ended before its first checkpoint
    write_rows(folder / PROMPTS, [_prompt_row(task, row) for row in rows])
    for split, some in (("train", rows), ("valid", held_out or rows)):
        write_rows(folder / "sft" / f"{split}.jsonl", [sft_row(task, row) for row in some])
    run_script(words, f"python -m {module} --resume {folder}", [lock])
    return run_folder


def training_folder(args: argparse.Namespace, folder: Path) -> Path:
    """The training's own run folder."""
    return Path(args.work_model_paths or folder / "training")


def check_training(args: argparse.Namespace, task: Task) -> None:
    """Raise UserError for flags that the training would refuse, before a teacher is paid for anything."""
    for name in ("num_steps", "batch_size", "learning_rate"):
        if getattr(args, name) is not None:
            positive(name.replace("_", "-"), getattr(args, name))
    positive("eval-temperature", args.eval_temperature, zero=True)
    if not 0 <= args.held_out < 1:
        raise UserError(f"--held-out is {args.held_out}; it is a share, from 0 to below 1")
    if args.target_model_path:
        check_replaceable(args.target_model_path, "config.json")
    if args.work_model_paths and not args.resume and (Path(args.work_model_paths) / "config.json").exists():
        raise UserError(
            f"--work-model-paths {args.work_model_paths} holds a run or a model already; name another folder"
        )
    plain = argparse.Namespace(**{**vars(args), "training_flags": ""})
    own, given = (_parsed(args.train_by, command(some, task, Path())) for some in (plain, args))
    for name in OWN_FLAGS[args.train_by]:
        if getattr(own, name) != getattr(given, name):
            raise UserError(
                f"--training-flags sets --{name.replace('_', '-')}, which synth.run sets itself; leave it out"
            )
    if args.train_by == "rl":
        ppo_flags.check(argparse.Namespace(**{**vars(given), "prompts": __file__}))  # not written yet
    else:
        sft_flags.check(given)


def _parsed(way: str, words: Sequence[str]) -> argparse.Namespace:
    """The training script's own reading of its command line."""
    parser = {"rl": ppo_flags.ppo_parser, "sft": sft_flags.sft_parser}[way](None)
    parser.prog = words[0]
    return parser.parse_args(words[1:])


def command(args: argparse.Namespace, task: Task, folder: Path) -> list[str]:
    """The command line of the training."""
    steps = args.num_steps or STEPS[args.train_by]
    batch = args.batch_size or BATCHES[args.train_by]
    words: list[Any] = [WAYS[args.train_by], "--model", model_name(args, task), "--batch-size", batch]
    words += ["--fine-tune-type", args.fine_tune_type, "--seed", args.seed]
    words += ["--output-dir", training_folder(args, folder)]
    words += ["--save-file", folder / LAST_ADAPTER, "--save-every", max(1, steps // CHECKPOINTS)]
    words += ["--keep-checkpoints", 0]
    words += ["--learning-rate", args.learning_rate] if args.learning_rate else []
    if args.train_by == "rl":
        words += ["--num-steps", steps, "--prompts", folder / PROMPTS, *task.scoring_flags]
        words += ["--advantage", args.advantage, "--mini-batch-size", math.gcd(batch, 64)]
        words += ["--max-completion-length", args.max_completion_length, "--temperature", args.temperature]
        words += ["--resume-file", args.base_adapter] if args.base_adapter else []
    else:
        words += ["--train", "--iters", steps, "--data", folder / "sft", "--data-base", ""]
        words += ["--resume-adapter-file", args.base_adapter] if args.base_adapter else []
    return [*map(str, words), *shlex.split(args.training_flags)]


def _prompt_row(task: Task, row: Row) -> dict[str, str]:
    return {"prompt": task.prompt(row["input"]), "answer": row["output"]}


def sft_row(task: Task, row: Row) -> dict[str, str]:
    prompt = task.prompt(row["input"])
    space = "" if prompt[-1:].isspace() else " "
    return {"prompt": prompt, "completion": space + row["output"]}


def run_script(words: Sequence[str], go_on: str, files: Sequence[int] = ()) -> None:
    """Run one of the scripts as a process. A first Ctrl-C or SIGTERM makes it end its step and save."""
    print(f"$ python {shlex.join(words)}", flush=True)
    with StopSignal() as stop:
        # In a session of its own, so that a Ctrl-C reaches it once, from here.
        process = subprocess.Popen(
            [sys.executable, str(ROOT / words[0]), *words[1:]], start_new_session=True, pass_fds=files
        )
        asked = False
        while process.poll() is None:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                if stop.requested and not asked:
                    process.terminate()
                    asked = True
    if stop.requested or process.returncode == 130:
        raise Stopped(f"go on with: {go_on}")
    if process.returncode:
        raise UserError(f"{words[0]} failed; its message stands above. Then go on with: {go_on}")


def fuse(args: argparse.Namespace, task: Task, adapter: Path, folder: Path, module: str = "synth.run") -> None:
    """Write base model and adapter as one model to --target-model-path, if that is given."""
    if args.target_model_path:
        words = ["fuse.py", "--model", model_name(args, task), "--adapter-file", str(adapter)]
        run_script([*words, "--save-path", args.target_model_path], f"python -m {module} --resume {folder}")


def completions_of(
    args: argparse.Namespace, task: Task, adapter: str | Path | None, rows: Sequence[Row], store: Cache
) -> list[str]:
    """One completion of each row's prompt, by the base model with an adapter."""
    model = BaseModel(
        model_name(args, task),
        adapter,
        args.max_completion_length,
        args.eval_temperature,
        args.seed,
        args.sampling_batch_size,
    )
    return draw([Rollout(task.prompt(row["input"]), 0) for row in rows], model, store)


def scores_of(task: Task, rows: Sequence[Row], completions: Sequence[str]) -> list[float]:
    """The score of each row's completion."""
    pairs = zip(rows, completions, strict=True)
    return [task.score(row["input"], completion, row["output"]) for row, completion in pairs]


def choose_checkpoint(
    args: argparse.Namespace, task: Task, run_folder: Path, held_out: Sequence[Row], folder: Path, store: Cache
) -> Path:
    """The adapter of the checkpoint with the best mean score on the held-out samples, copied to FOLDER/adapter.

    The first checkpoint, the base model itself, is one of them; of equal ones the earliest is taken. Without held-out
    samples the last one is. The scores go to FOLDER/checkpoints.json.
    """
    chosen, found = folder / "adapter", folder / "checkpoints.json"
    if found.is_file() and (chosen / CONFIG_FILE).is_file():
        print(f"checkpoint: step {read_json(found)['chosen']} (chosen before)", flush=True)
        return chosen
    rows = []
    for checkpoint in all_checkpoints(run_folder)[0 if held_out else -1 :]:
        texts = completions_of(args, task, checkpoint / "adapter", held_out, store)
        scores = scores_of(task, held_out, texts)
        rows.append({"step": int(checkpoint.name), "mean_score": sum(scores) / max(len(scores), 1)})
    best = max(rows, key=lambda row: row["mean_score"])
    with atomic_folder(chosen, CONFIG_FILE) as temporary:
        shutil.copytree(run_folder / "checkpoints" / f"{best['step']:06d}" / "adapter", temporary, dirs_exist_ok=True)
    write_json(found, {"held_out": len(held_out), "checkpoints": rows, "chosen": best["step"]})
    listed = ", ".join(f"{row['step']}: {row['mean_score']:.3f}" for row in rows)
    print(f"checkpoint: step {best['step']} of {listed} on {len(held_out)} held-out samples", flush=True)
    return chosen


def evaluate(args: argparse.Namespace, task: Task, adapter: Path, folder: Path, store: Cache) -> dict[str, Any] | None:
    """Base against trained on the evaluation set, once; to FOLDER/evaluation.json, and row by row to .jsonl.

    None where the task names no evaluation set.
    """
    path = folder / "evaluation.json"
    if path.is_file():
        return read_json(path)
    if not task.evaluation:
        return None
    texts = {
        name: completions_of(args, task, one, task.evaluation, store)
        for name, one in (("base", args.base_adapter), ("trained", adapter))
    }
    scores = {name: scores_of(task, task.evaluation, found) for name, found in texts.items()}
    with atomic_file(path.with_suffix(".jsonl")) as temporary:
        rows = [
            {**row, **{name: texts[name][n] for name in texts}, **{f"{name}_score": scores[name][n] for name in texts}}
            for n, row in enumerate(task.evaluation)
        ]
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    paired = difference(scores["base"], scores["trained"])
    result = {
        "model": args.model or model_name(args, task),
        "questions": len(task.evaluation),
        **{name: mean_interval(found)._asdict() for name, found in scores.items()},
        "difference": {**paired.interval._asdict(), "gained": paired.gained, "lost": paired.lost},
        "mcnemar_p": paired.p_value,
    }
    write_json(path, result)
    return result


def evaluation_line(result: dict[str, Any] | None) -> str:
    """The evaluation as a line of text."""
    if result is None:
        return "evaluation: the task names no evaluation set; give --dataset-path"
    shown = {
        name: "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**result[name]) for name in ("base", "trained", "difference")
    }
    return (
        f"evaluation on {result['questions']} questions, 95 % intervals: base {shown['base']}, trained "
        f"{shown['trained']}, difference {shown['difference']} (paired; McNemar p = {result['mcnemar_p']:.2g})"
    )
