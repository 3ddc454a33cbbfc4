"""Supervised fine-tuning with LoRA, DoRA, a soft prompt or all weights; with --dpo, DPO; with --reward-model, a reward
model.

    python sft.py --train --iters 600 --save-file adapters
    python sft.py --dpo --train --data-base my_pairs_ --resume-adapter-file adapters --save-file dpo_adapters
    python sft.py --reward-model --train --data-base reward_function_increasing_mult_2_ --batch-size 16

In a notebook: training.sft_loop.train_sft. Not here: learning from a reward (ppo_training.py), merging the adapter into
its base (fuse.py).
"""

from models import cpu

cpu.enable()  # before mlx is imported

import argparse
import time
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.cli import Stopped, StopSignal, run
from common.errors import UserError
from common.files import say_replaced
from data.records import feature_names
from data.sources import Split, base_in, find_split
from models.adapter_base import base_of
from models.adapters import AdapterConfig, save_adapter
from models.gpu import memory_meter
from models.loading import load, resolve, twin
from training.checkpoint import (
    Trainee,
    restore_best,
    restore_checkpoint,
    save_best,
    save_checkpoint,
    share_checkpoint,
)
from training.checkpoint_folders import (
    drop_other_bests,
    may_save_stopped,
    open_for_all,
    restore_newest,
    stopped_words,
)
from training.console import DPO_COLUMNS, SFT_COLUMNS
from training.flags import adapter_settings, describe, parse_or_resume
from training.metrics import NoLog, RunLog, provenance
from training.mlx_ranks import launched, weights_digest
from training.objectives import Objective
from training.optimizer import bytes_of_numpy
from training.optimizer_groups import sft_optimizer
from training.planning import add_plan_flags, planned_peak, show_plan
from training.plots import LivePicture, plot_run
from training.preference_tuning import Reference, refer_in, start_reference
from training.ranks import ALONE, Ranks, digest_of
from training.settings import SFTSettings
from training.sft_flags import sft_parser, sft_settings
from training.sft_loop import (
    SFTProgress,
    build_trainee,
    evaluate,
    finished,
    make_objective,
    make_sft_optimizer,
    planned,
    read_rows,
    refer,
    sft_steps,
    validate,
)


def parse_args() -> argparse.Namespace:
    """The flags. Of --iters and --epochs, one on the command line wins over one in a YAML file."""
    parser = sft_parser(__doc__)
    add_plan_flags(parser)
    args = parse_or_resume(parser, "iters")
    args.train |= args.plan and not args.test
    given = parser.parse_args(namespace=argparse.Namespace(iters=None, epochs=None))  # without any defaults
    if given.iters is not None and given.epochs:
        raise UserError(f"--iters {given.iters} and --epochs {given.epochs:g} are both given; leave one out")
    if given.iters is not None and not args.resume:
        args.epochs = 0.0
    return args


def kind_of_run(args: argparse.Namespace) -> str:
    """What the run is called in front of its progress bar."""
    if args.dpo:
        return "DPO" if args.loss == "sigmoid" else args.loss.upper()
    return "reward model" if args.reward_model else "SFT"


def adapter_of(args: argparse.Namespace) -> AdapterConfig | str | None:
    """What is put on the model: the adapter to continue from, a new one, or, where nothing is trained, none."""
    if args.resume_adapter_file or not args.train:
        return args.resume_adapter_file or None
    adapter = AdapterConfig(**adapter_settings(args))
    if args.reward_model and args.lora_layers == 0 and adapter.fine_tune_type in ("lora", "dora"):
        adapter.fine_tune_type = "none"  # the value head alone
    return adapter


def read(
    args: argparse.Namespace, trainee: Trainee, tokenizer: Any, settings: SFTSettings, split: str, ranks: Ranks
) -> Objective:
    """Read the rows of a split, and say how many there are and how many were cut."""
    source = find_split(args.data, args.data_base, split)
    objective = make_objective(trainee, tokenizer, settings, feature_names(args), ranks)
    count = read_rows(objective, source, trainee.model)
    of = f" of {source}" if isinstance(source, Split) else ""
    cut = f", {objective.truncated} cut to {settings.max_length} tokens" if objective.truncated else ""
    empty = f", {objective.untrained} of them with nothing left to train" if objective.untrained else ""
    print(f"{split}: {count} {'pairs' if args.reward_model or args.dpo else 'rows'}{of}{cut}{empty}")
    return objective


def train(
    args: argparse.Namespace,
    settings: SFTSettings,
    trainee: Trainee,
    objectives: Mapping[str, Objective],
    ranks: Ranks = ALONE,
    planned_memory: float | None = None,
) -> None:
    """Train for --iters steps from the checkpoint of --resume, if any; leaves adapter, run folder and curves.

    objectives: by split. ranks: of which the first alone writes. planned_memory: bytes, by training.planning.
    """
    training, validation = objectives["train"], objectives["valid"]
    optimizer, progress = make_sft_optimizer(trainee, settings), SFTProgress()
    kind, sizes = trainee.adapter.fine_tune_type, trainee.sizes()
    used = sft_optimizer(settings, kind, sizes[1])
    args.learning_rate = used[1]  # config.json has it, so that a resumed run does not choose again
    folder, checkpoint, lock = open_for_all(ranks, args, "sft.py", "sft", cpu.BLAS)
    if settings.dpo:
        refer_in(folder, objectives, start_reference(trainee), checkpoint is not None, ranks)

    def restore() -> dict[str, Any]:
        restore_newest(
            folder, lambda found: progress.restore(restore_checkpoint(found, trainee, optimizer), found)
        )  # fmt: skip
        return {"step": progress.step, **progress.state()}

    if checkpoint:
        progress.restore(ranks.from_writer(restore), folder)
        if ranks.writes:
            drop_other_bests(folder, progress.best.step)
    share_checkpoint(ranks, trainee, optimizer)
    log: RunLog | NoLog = NoLog()
    picture = LivePicture(folder)
    if ranks.writes:
        log = RunLog(
            folder,
            settings.iters,
            progress.step,
            args.log_with,
            kind_of_run(args),
            DPO_COLUMNS if settings.dpo else SFT_COLUMNS,
            args.verbose,
            memory_meter(lambda: bytes_of_numpy(optimizer)),
            planned_memory,
        )
    device = cpu.describe_device(mx.default_device())
    log.say(describe(sizes, kind, used, device, rate_given=settings.learning_rate is not None))
    started = time.perf_counter()

    def save() -> None:
        if ranks.writes:
            save_checkpoint(folder, progress.step, trainee, optimizer, progress.state(), args.keep_checkpoints)
            drop_other_bests(folder, progress.best.step)

    def keep_best() -> None:
        if args.save_best and ranks.writes:
            save_best(folder, progress.step, trainee)

    if not checkpoint:
        valid = validate(trainee.module, validation, settings)
        log.report(0, valid)
        if progress.best.see(0, valid["valid_loss"]):
            keep_best()
        save()
    with StopSignal() as stop:
        for step in sft_steps(trainee.module, optimizer, training, validation, settings, progress):
            if step.skipped:
                log.say(f"step {step.number}: the loss or gradient is not finite; the update is skipped")
            log.advance()
            if step.reports:
                log.report(step.number, *step.reports)
            if ranks.writes:
                picture.draw_if_due()
            if step.note:
                log.say(step.note)
            if step.improved:
                keep_best()
            stopping = ranks.any(stop.requested)
            if step.number % args.save_every == 0 or step.last or stopping:
                save()
            if stopping:
                break
    whole, best = finished(settings, progress), progress.best
    summary = {"steps": progress.step, "seconds": round(time.perf_counter() - started, 1)}
    if whole and progress.step < settings.iters:
        log.say(f"stopped early: none of the last {best.stale} validations was better than that of step {best.step}")
    if whole and args.save_best and best.value is not None:
        if ranks.writes:
            restore_best(folder, best.step, trainee)
        share_checkpoint(ranks, trainee, optimizer)
        log.say(f"the adapter saved is that of step {best.step}, whose validation loss is the lowest")
    if whole:
        summary |= validate(trainee.module, validation, settings)
        summary |= {"truncated_rows": training.truncated, "truncated_valid_rows": validation.truncated}
    if whole and best.value is not None:
        summary |= {"best_step": best.step, "best_valid_loss": best.value}
    if not ranks.writes:
        if not whole:
            raise Stopped
        return
    trainee.adapter.provenance.append(provenance("sft.py", vars(args), summary))
    outcome = {"adapter": args.save_file, "picture": str(plot_run(folder))}
    if whole or may_save_stopped(args.save_file, args.resume_adapter_file):
        save_adapter(args.save_file, trainee.model, trainee.adapter, trainee.reward_head)
    else:
        outcome["adapter"] = ""
    if not whole:
        log.close()
        raise Stopped(stopped_words("sft.py", folder, progress.step, settings.iters, **outcome))
    log.close({**summary, **outcome})
    if lock:
        lock.close()


def check_same(ranks: Ranks, settings: SFTSettings, base: nn.Module, objectives: Mapping[str, Objective]) -> None:
    """Raise UserError where other ranks have other settings, another base or other rows than rank 0."""
    if ranks.size > 1:
        rows = [[split, *each.examples] for split, each in objectives.items()]
        digests = {"settings": digest_of([str(settings)]), "data": digest_of(rows)}
        ranks.check_same(**digests, base_model=weights_digest(base))


def main() -> None:
    with launched() as ranks:
        train_and_test(ranks)


def train_and_test(ranks: Ranks) -> None:
    """What the flags ask for, by all processes of a launch together."""
    args = argparse.Namespace(**ranks.from_writer(lambda: vars(parse_args())))
    settings = sft_settings(args, files=ranks.writes)
    if args.train and not args.plan and ranks.writes:
        say_replaced(args.save_file)
    args.model = base_of(args.model, args.resume_adapter_file, resolve)
    args.data_base = base_in(args.data, args.data_base)
    if show_plan("sft.py", args):
        return
    splits = ("train", "valid") * args.train + ("test",) * args.test
    for split in splits:
        find_split(args.data, args.data_base, split)
    planned_memory = planned_peak("sft.py", args) if ranks.writes else None
    loaded = load(args.model)
    # To test is to compare with the base, to train with where the training starts.
    base = None if args.train or not settings.dpo else Reference(twin(loaded.model), soft_prompt=False)
    checkpointing = args.train and args.grad_checkpoint
    trainee = build_trainee(
        loaded, settings, adapter_of(args), args.reward_model, checkpointing, new_head=args.train
    )  # fmt: skip
    objectives = {split: read(args, trainee, loaded.tokenizer, settings, split, ranks) for split in splits}
    check_same(ranks, settings, trainee.module, objectives)
    if args.train:
        settings = planned(settings, objectives["train"])
        args.iters = settings.iters
        train(args, settings, trainee, objectives, ranks, planned_memory)
    elif base is not None:
        refer(objectives, base)
    if args.test:
        figures = evaluate(trainee.module, objectives["test"], split="test")
        print(" | ".join(f"{name}: {value:.4f}" for name, value in figures.items()))


if __name__ == "__main__":
    run(main)
