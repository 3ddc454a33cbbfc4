"""PPO on MLX: rollout, score, advantages, update, save; with a KL penalty to the reference policy.

    python ppo_training.py --model ./sft_fine_tune/ --ground_truth_reward
    python ppo_training.py --model ./sft_fine_tune/ --reward_model ./reward_model/

The mathematics stands in training/ppo.py; pytorch_ppo_training.py is this script's twin in PyTorch. Leaves out
supervised learning (sft.py) and merging the adapter into its base (fuse.py).
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

from models import cpu

cpu.enable()  # before mlx is imported

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from common.cli import Stopped, StopSignal, run
from common.errors import UserError
from common.files import check_replaceable
from data.batching import encode_prompt, in_order
from data.decoding import completion_texts
from models.adapters import (
    CONFIG_FILE,
    SINGLE_FILE_SUFFIXES,
    AdapterConfig,
    attach_adapter,
    load_adapter,
    save_adapter,
    turn_dropout_off,
)
from models.export.fused import check_free, save_fused
from models.generation import sample
from models.grad_checkpoint import checkpoint_layers
from models.loading import LoadedModel, load, twin
from models.soft_prompt import find_embedding, num_embeddings, soft_prompt_ids
from models.value_head import Policy, new_value_head
from rewards.build import build_reward
from rewards.combined import score
from rewards.digits import digit_reward
from training import ppo, ppo_flags, ppo_step, transformer_lab
from training.checkpoint import Trainee, restore_checkpoint, save_checkpoint
from training.checkpoint_folders import last_checkpoint
from training.flags import adapter_settings, default_output_dir, describe, resumed, step_seed
from training.metrics import RunLog, provenance, resumed_config, say_if_another_blas, start_run_folder
from training.optimizer import loss_and_gradients, make_optimizer, update
from training.optimizer_groups import HEAD_RATE
from training.plots import plot_run
from training.rollout import Rollout, has_eos, pack

SCORED_LOGITS = 2**22  # at most so many at once, where one mini batch has fewer: 16 MB in float32


def build_policies(args: argparse.Namespace, loaded: LoadedModel) -> tuple[Trainee, nn.Module]:
    """The policy with its adapter and value head, and the reference policy: the same arrays as they are now."""
    model = loaded.model
    base = twin(model)
    if args.resume_file:
        adapter = load_adapter(model, args.resume_file).config
        adapter.lora_parameters["dropout"] = 0.0
        turn_dropout_off(model)
    else:
        adapter = AdapterConfig(**adapter_settings(args))
        attach_adapter(model, adapter, args.seed)
    reference = base if args.use_peft else twin(model)
    reference.freeze()
    if args.grad_checkpoint:
        checkpoint_layers(model)
    head = new_value_head(model) if args.advantage == "gae" else None
    policy = Policy(model, head)
    policy.train()  # it has no dropout; some families of mlx-lm have a gradient in this mode only
    reference.eval()
    return Trainee(model, adapter, policy, head), reference


def roll_out(args, trainee: Trainee, reference: nn.Module, tokenizer, prompts: list[str], reward, moments):
    """Sample one completion per prompt, score it, and recompute the logprobs of policy and reference.

    Returns the Rollout, the texts with their scores, and figures for the report.
    """
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    completions = sample(
        trainee.model, prompt_ids, tokenizer.eos_token_ids, args.max_completion_length, args.temperature, len(prompts)
    )
    texts = completion_texts(tokenizer, prompt_ids, completions)
    ended = [has_eos(completion, tokenizer.eos_token_ids) for completion in completions]
    # The prompts as they were given, by which a reward knows them; decoding may change a space.
    scored = score(reward, prompts, texts)
    scores = ppo_step.shape_scores(args, np.asarray(scored.scores, dtype=np.float32), ended, moments)

    prefix = soft_prompt_ids(trainee.model)
    packed = pack(
        [prefix + ids for ids in prompt_ids], completions, tokenizer.eos_token_ids, tokenizer.pad_token_id or 0
    )
    tokens, positions, completion_ids, mask = (mx.array(field) for field in packed)
    pieces = []
    for rows in in_order(len(prompts), rows_to_score(args, trainee.model, positions.shape[1])):
        piece = slice(rows.start, rows.stop)
        logits, values = trainee.module(tokens[piece], positions[piece])
        ref_logits = reference_logits(args, reference, tokens[piece], positions[piece], prefix)
        logprobs = ppo.logprobs_from_logits(logits, completion_ids[piece], args.temperature)
        ref_logprobs = ppo.logprobs_from_logits(ref_logits, completion_ids[piece], args.temperature)
        kl = ppo_step.token_kl(args, logits, ref_logits, logprobs, ref_logprobs)
        entropy = ppo.entropy_from_logits(logits, args.temperature)
        pieces.append((logprobs, ref_logprobs, kl, mx.zeros_like(kl) if values is None else values, entropy))
        mx.eval(pieces[-1])
    logprobs, ref_logprobs, kl, values, entropy = (mx.concatenate(parts) for parts in zip(*pieces, strict=True))
    rollout = Rollout(
        tokens, positions, completion_ids, mask, logprobs, ref_logprobs, kl, old_values=values, scores=mx.array(scores)
    )
    return rollout, scored, ppo_step.rollout_figures(scored, ended, rollout, entropy)


def rows_to_score(args, model: nn.Module, completion_length: int) -> int:
    """Completions per scoring pass: a mini batch, or more where their logits stay small."""
    row = completion_length * num_embeddings(find_embedding(model)[1])
    return max(args.mini_batch_size, SCORED_LOGITS // row)


def reference_logits(args, reference: nn.Module, tokens: mx.array, positions: mx.array, prefix: list[int]) -> mx.array:
    """Logits (B, C, V) of the reference policy; with --use-peft it never saw the soft prompt, so that is cut off."""
    if args.use_peft and prefix:
        tokens, positions = tokens[:, len(prefix) :], positions - len(prefix)
    return Policy(reference)(tokens, positions)[0]


def make_loss(args):
    """PPO's loss as a function of the policy and arrays alone."""

    def loss(policy: Policy, rollout: Rollout, advantages, returns, denominator, kl_coef):
        logits, values = policy(rollout.tokens, rollout.positions)
        return ppo_step.policy_loss(args, logits, values, rollout, advantages, returns, denominator, kl_coef)

    return loss


def accumulate(gradients_of, rollout: Rollout, advantages, returns, pieces, kl_coef: mx.array):
    """Loss, stats and gradients of a mini batch, summed over its pieces: equal to those of the whole."""
    pieces = [mx.array(rows) for rows in pieces]
    denominator = sum(rollout.mask[rows].sum() for rows in pieces)
    whole: Any = None
    for rows in pieces:
        piece = gradients_of(rollout.rows(rows), advantages[rows], returns[rows], denominator, kl_coef)
        if whole is not None:
            largest = mx.maximum(whole[0][1]["ratio_max"], piece[0][1]["ratio_max"])
            piece = tree_map(mx.add, whole, piece)
            piece[0][1]["ratio_max"] = largest
        whole = piece
        mx.eval(whole)
    (loss, stats), gradients = whole
    return loss, {name: float(value) for name, value in stats.items()}, gradients


def optimise(args, step: int, policy: Policy, optimizer, gradients_of, rollout: Rollout, advantages, returns, kl_coef):
    """Update the policy on one rollout. Returns the stats, averaged over its mini batches."""
    history: list[dict[str, float]] = []
    skipped = 0
    for pieces in ppo_step.mini_batches(args, step):
        loss, stats, gradients = accumulate(gradients_of, rollout, advantages, returns, pieces, mx.array(kl_coef))
        verdict = ppo_step.rejected(args, stats)
        if verdict == "stop":
            break
        norm = update(policy, optimizer, loss, gradients, args.max_grad_norm) if not verdict else math.nan
        if math.isnan(norm):
            skipped += 1
        else:
            history.append({**stats, "grad_norm": norm})
    mx.synchronize()  # the last update is this step's time, too
    return ppo_step.mean_stats(history, skipped)


def train(
    args, loaded: LoadedModel, prompts, reward, trainee: Trainee, reference, optimizer, progress, folder: Path
) -> None:
    """Run the steps that are left: rollout, score, advantages, update, save; then leave adapter and picture."""
    true_reward = digit_reward(ppo_step.digit_rule(args))
    gradients_of = loss_and_gradients(trainee.module, make_loss(args))
    log = RunLog(folder, args.num_steps, progress.step, args.log_with, "ppo")
    optimizer_used = ppo_flags.optimizer_of(args, trainee.adapter.fine_tune_type)
    device = cpu.describe_device(mx.default_device())
    log.say(describe(trainee.sizes(), trainee.adapter.fine_tune_type, optimizer_used, device))
    figures: dict[str, float] = {}
    with StopSignal() as stop:
        while progress.step < args.num_steps and not stop.requested:
            started, kl_coef = time.perf_counter(), progress.controller.value
            mx.random.seed(step_seed(args.seed, progress.step))
            rollout, scored, figures = roll_out(
                args, trainee, reference, loaded.tokenizer, prompts.batch(progress.step), reward, progress.moments
            )
            sampled = time.perf_counter()
            advantages, returns = ppo_step.advantages_and_returns(args, rollout, kl_coef)
            stats = optimise(
                args, progress.step, trainee.module, optimizer, gradients_of, rollout, advantages, returns, kl_coef
            )
            progress.controller.update(figures["kl"], args.batch_size)
            ended = time.perf_counter()
            progress.step += 1
            progress.seconds += ended - started
            if not args.ground_truth_reward and not args.prompts:
                figures["true_score"] = float(np.mean(true_reward(scored.prompts, scored.completions)))
            figures |= {"kl_coef": kl_coef, **ppo_step.value_figures(args, rollout, returns), **stats}
            figures |= {"rollout_seconds": sampled - started, "update_seconds": ended - sampled}
            log.report(progress.step, {**figures, "seconds": progress.seconds})
            log.samples(progress.step, ppo_step.sample_rows(args, progress.step, scored))
            if args.custom_hf_dataset:
                log.say(transformer_lab.reader_line(progress.step, figures, rollout.scores.tolist()))
            log.advance(score=figures["mean_score"], kl=figures["kl"])
            if stats["skipped_updates"]:
                skipped = f"step {progress.step}: {stats['skipped_updates']} updates skipped"
                log.say(f"{skipped} (not finite, or ratio past its limit)")
            if progress.step % args.save_every == 0 or progress.step == args.num_steps or stop.requested:
                save_checkpoint(folder, progress.step, trainee, optimizer, progress.state(), args.keep_checkpoints)
    if progress.step < args.num_steps:
        log.close()
        done = f"{progress.step} of {args.num_steps} steps are done"
        raise Stopped(f"{done}; go on with: python ppo_training.py --resume {folder}")
    summary = ppo_step.summary(args, progress, figures, plot_run(folder))
    trainee.adapter.provenance.append(provenance("ppo_training.py", vars(args), summary))
    save_adapter(args.save_file, trainee.model, trainee.adapter)
    if args.fused_model:
        save_fused(loaded, args.fused_model)
        log.say(f"the fused model is in {args.fused_model}")
    log.close(summary)


def parse_args() -> argparse.Namespace:
    """The flags of PPO, and those that serve Transformer Lab."""
    parser = ppo_flags.ppo_parser(__doc__)
    transformer_lab.add_flags(parser)
    return parser.parse_args()


def check_fused_model(args: argparse.Namespace, adapter: AdapterConfig) -> None:
    """Raise UserError where the model could not be written to --fused-model after training."""
    if args.fused_model:
        check_free(args.fused_model, again=bool(args.resume))
        if adapter.fine_tune_type == "soft_prompt":
            raise UserError("--fused-model has no weight to put a soft prompt into; train a LoRA, or leave it out")


def main() -> None:
    args = parse_args()
    args = resumed(args, resumed_config(args.resume)) if args.resume else transformer_lab.own_flags(args)
    ppo_flags.check(args)
    if Path(args.save_file).suffix not in SINGLE_FILE_SUFFIXES:
        check_replaceable(args.save_file, CONFIG_FILE)
    loaded = load(args.model)
    prompts, reward = ppo_step.Prompts(args, loaded.tokenizer), build_reward(args, loaded)
    trainee, reference = build_policies(args, loaded)
    check_fused_model(args, trainee.adapter)
    name, rate = ppo_flags.optimizer_of(args, trainee.adapter.fine_tune_type)
    schedule = (ppo_step.total_updates(args), args.lr_schedule, args.warmup_steps, args.weight_decay)
    head_rate = args.value_head_learning_rate or min(rate, HEAD_RATE)
    optimizer = make_optimizer(rate, *schedule, name, head_rate)
    progress = ppo_step.Progress(ppo_step.make_controller(args))
    if args.resume:
        folder = Path(args.resume)
        say_if_another_blas(folder, cpu.BLAS)
        progress.restore(restore_checkpoint(last_checkpoint(folder), trainee, optimizer))
    else:
        optimizer.init(trainee.module.trainable_parameters())
        folder = start_run_folder(args.output_dir or default_output_dir("ppo"), vars(args), cpu.BLAS)
        save_checkpoint(folder, 0, trainee, optimizer, progress.state())
    train(args, loaded, prompts, reward, trainee, reference, optimizer, progress, folder)


if __name__ == "__main__":
    run(main)
