"""Supervised fine-tuning with LoRA, DoRA, a soft prompt or all weights; with --reward-model, a reward model.

    python sft.py --train --iters 600 --save-file adapters
    python sft.py --reward-model --train --data-base reward_function_increasing_mult_2_ --batch-size 16

Leaves out: learning from a reward (ppo_training.py) and merging the adapter into its base (fuse.py).
"""

import argparse
import time
from pathlib import Path
from typing import Any

from models import cpu

cpu.enable()  # before mlx is imported

import mlx.core as mx
import mlx.nn as nn

from common.cli import Stopped, StopSignal, run
from data.records import feature_names
from data.sources import Split, find_split
from models.adapters import AdapterConfig, attach_adapter, load_adapter, save_adapter
from models.grad_checkpoint import checkpoint_layers
from models.loading import LoadedModel, load
from models.soft_prompt import check_ids, soft_prompt_ids
from models.value_head import ScoringModel, new_value_head
from training.checkpoint import Trainee, restore_checkpoint, save_checkpoint
from training.checkpoint_folders import last_checkpoint
from training.flags import (
    SFT_OPTIMIZERS,
    adapter_settings,
    default_output_dir,
    describe,
    optimizer_and_rate,
    resumed,
    step_seed,
)
from training.metrics import RunLog, provenance, resumed_config, say_if_another_blas, start_run_folder
from training.objectives import LanguageModelling, Objective, RewardModelling
from training.optimizer import loss_and_gradients, make_optimizer, update
from training.plots import plot_run
from training.sft_flags import check, sft_parser


def parse_args() -> argparse.Namespace:
    return sft_parser(__doc__).parse_args()


def build(args: argparse.Namespace, loaded: LoadedModel) -> Trainee:
    """Put the adapter, and for a reward model the value head, on the base; only they are trainable."""
    model, head = loaded.model, None
    settings = AdapterConfig(**adapter_settings(args))
    if args.reward_model and args.lora_layers == 0 and settings.fine_tune_type in ("lora", "dora"):
        settings.fine_tune_type = "none"  # the value head alone
    if args.resume_adapter_file:
        saved = load_adapter(model, args.resume_adapter_file)
        settings, head = saved.config, saved.value_head
        mx.random.seed(args.seed)  # which a new value head draws from
    elif args.train:
        attach_adapter(model, settings, args.seed)
    if args.train and args.grad_checkpoint:
        checkpoint_layers(model, settings.lora_parameters["dropout"])
    if not args.reward_model:
        return Trainee(model, settings, model)
    head = head or new_value_head(model, std=None)
    return Trainee(model, settings, ScoringModel(model, head), head)


def build_objective(args: argparse.Namespace, loaded: LoadedModel) -> Objective:
    prefix, features = soft_prompt_ids(loaded.model), feature_names(args)
    shared = (loaded.tokenizer, prefix, args.batch_size, args.max_length, args.seed)
    if args.reward_model:
        return RewardModelling(*shared, args.center_coef, features)
    return LanguageModelling(*shared, features, args.mask_prompt)


def read(args: argparse.Namespace, objective: Objective, split: str, model: nn.Module) -> None:
    """Read the rows of a split for the model, and say how many there are and how many were cut."""
    source = find_split(args.data, args.data_base, split)
    count = objective.read(source)
    check_ids(model, (example.tokens for example in objective.examples))
    of = f" of {source}" if isinstance(source, Split) else ""
    cut = f", {objective.truncated} cut to {args.max_length} tokens" if objective.truncated else ""
    empty = f", {objective.untrained} of them with nothing left to train" if objective.untrained else ""
    print(f"{split}: {count} {'pairs' if args.reward_model else 'rows'}{of}{cut}{empty}")


def evaluate(module: nn.Module, objective: Objective, num_batches: int = -1) -> tuple[float, float]:
    """Mean loss and accuracy over the first `num_batches` batches (-1: all), dropout off."""
    module.eval()
    totals = mx.zeros(3)
    for index, arrays in enumerate(objective.batches()):
        if index == num_batches:
            break
        _, figures = objective.loss(module, *arrays)
        totals += mx.stack([x.astype(mx.float32) for x in figures])
        mx.eval(totals)
    loss, correct, count = totals.tolist()
    return loss / max(count, 1), correct / max(count, 1)


def train(args: argparse.Namespace, trainee: Trainee, objective: Objective, validation: Objective) -> None:
    """Train for --iters steps from the checkpoint of --resume, if any; leaves adapter, run folder and picture."""
    module = trainee.module
    kind = trainee.adapter.fine_tune_type
    name, rate = optimizer_and_rate(args, SFT_OPTIMIZERS[kind])
    optimizer = make_optimizer(rate, args.iters, args.lr_schedule, args.warmup_steps, args.weight_decay, name)
    # window: sums of the figures since the last report
    state: dict[str, Any] = {"step": 0, "window": [0.0, 0.0, 0.0], "skipped": 0}
    if args.resume:
        folder = Path(args.resume)
        say_if_another_blas(folder, cpu.BLAS)
        state = restore_checkpoint(last_checkpoint(folder), trainee, optimizer)
    else:
        optimizer.init(module.trainable_parameters())
        folder = start_run_folder(args.output_dir or default_output_dir("sft"), vars(args), cpu.BLAS)
    step, skipped = state["step"], state["skipped"]
    log = RunLog(folder, args.iters, step, args.log_with, "reward model" if args.reward_model else "sft")
    log.say(describe(trainee.sizes(), kind, (name, rate), cpu.describe_device(mx.default_device())))
    gradients_of = loss_and_gradients(module, objective.loss)

    started = time.perf_counter()
    window, window_started, window_step = mx.array(state["window"]), started, step

    def save() -> None:
        figures = {"window": window.tolist(), "skipped": skipped}
        save_checkpoint(folder, step, trainee, optimizer, figures, args.keep_checkpoints)

    if not args.resume:
        loss, accuracy = evaluate(module, validation, args.val_batches)
        log.report(0, {"valid_loss": loss, "valid_accuracy": accuracy})
        save()
    with StopSignal() as stop:
        while step < args.iters and not stop.requested:
            mx.random.seed(step_seed(args.seed, step))
            module.train()
            (loss, figures), gradients = gradients_of(*objective.batch(step))
            norm = update(module, optimizer, loss, gradients, args.max_grad_norm)
            step += 1
            if norm != norm:
                skipped += 1
                log.say(f"step {step}: the loss or gradient is not finite; the update is skipped")
            else:
                window += mx.stack([x.astype(mx.float32) for x in figures])
                mx.eval(window)
            log.advance()

            if step % args.steps_per_report == 0 or step == args.iters:
                total, correct, count = window.tolist()
                now = time.perf_counter()
                log.report(
                    step,
                    {
                        "train_loss": total / max(count, 1),
                        "train_accuracy": correct / max(count, 1),
                        "learning_rate": float(optimizer.learning_rate),
                        "grad_norm": norm,
                        "steps_per_second": (step - window_step) / (now - window_started),
                        "skipped_updates": skipped,
                    },
                )
                window, window_started, window_step = mx.zeros(3), now, step
            if step % args.steps_per_eval == 0 or step == args.iters:
                loss, accuracy = evaluate(module, validation, args.val_batches)
                log.report(step, {"valid_loss": loss, "valid_accuracy": accuracy})
            if step % args.save_every == 0 or step == args.iters or stop.requested:
                save()
    if step < args.iters:
        log.close()
        raise Stopped(f"{step} of {args.iters} steps are done; go on with: python sft.py --resume {folder}")
    loss, accuracy = evaluate(module, validation)
    seconds = round(time.perf_counter() - started, 1)
    figures = {"steps": step, "seconds": seconds, "valid_loss": loss, "valid_accuracy": accuracy}
    figures |= {"truncated_rows": objective.truncated, "truncated_valid_rows": validation.truncated}
    trainee.adapter.provenance.append(provenance("sft.py", vars(args), figures))
    save_adapter(args.save_file, trainee.model, trainee.adapter, trainee.reward_head)
    log.close({**figures, "adapter": args.save_file, "picture": str(plot_run(folder))})


def main() -> None:
    args = parse_args()
    if args.resume:
        args = resumed(args, resumed_config(args.resume))
    check(args)
    for split in ("train", "valid") * args.train + ("test",) * args.test:
        find_split(args.data, args.data_base, split)
    loaded = load(args.model)
    trainee = build(args, loaded)
    if args.train:
        training, validation = build_objective(args, loaded), build_objective(args, loaded)
        for split, objective in (("train", training), ("valid", validation)):
            read(args, objective, split, loaded.model)
        train(args, trainee, training, validation)
    if args.test:
        objective = build_objective(args, loaded)
        read(args, objective, "test", loaded.model)
        loss, accuracy = evaluate(trainee.module, objective)
        print(f"test_loss: {loss:.4f} | test_accuracy: {accuracy:.4f}")


if __name__ == "__main__":
    run(main)
