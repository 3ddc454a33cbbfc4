"""PPO in PyTorch: rollout, score, advantages, update, save; with a KL penalty to the reference policy.

    python pytorch_ppo_training.py --model ./sft_fine_tune/ --ground_truth_reward
    python pytorch_ppo_training.py --model ./sft_fine_tune/ --reward_model ./reward_model/ --device cuda

The twin of ppo_training.py, stage by stage, over transformers and peft: same flags, report, run folder and adapters.
The mathematics stands in training/ppo.py, which both call. Never imports mlx. On CUDA, kernels that add in no fixed
order can make a resumed run differ in the last bit; on CPU it does not.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.cli import Stopped, StopSignal, run
from common.files import check_replaceable
from data.batching import encode_prompt, in_order
from data.decoding import completion_texts
from models.adapter_config import CONFIG_FILE, SINGLE_FILE_SUFFIXES, AdapterConfig
from models.torch_adapters import attach_adapter, load_adapter, save_adapter
from models.torch_generation import sample
from models.torch_grad_checkpoint import checkpoint_layers
from models.torch_loading import DEVICES, LoadedModel, choose_device, load, twin
from models.torch_soft_prompt import soft_prompt_ids
from models.torch_value_head import Policy, new_value_head
from rewards.combined import Reward, rewards_from_flags, score
from rewards.digits import digit_reward
from rewards.torch_reward_model import load_reward_model
from training import ppo, ppo_flags, ppo_step
from training.checkpoint_folders import last_checkpoint
from training.flags import adapter_settings, default_output_dir, describe, resumed, step_seed
from training.metrics import RunLog, provenance, resumed_config, start_run_folder
from training.optimizer_groups import HEAD_RATE
from training.plots import plot_run
from training.rollout import Rollout, has_eos, pack
from training.torch_checkpoint import Trainee, restore_checkpoint, save_checkpoint
from training.torch_optimizer import loss_and_gradients, make_optimizer, update


def build_reward(args: argparse.Namespace, base: LoadedModel) -> Reward:
    """f(prompts, completions) -> scores, by the reward flags. base: the open model, without an adapter as yet."""
    device = base.model.device
    return rewards_from_flags(args, base.tokenizer, lambda path: load_reward_model(path, device, base).reward)


def build_policies(args: argparse.Namespace, loaded: LoadedModel) -> tuple[Trainee, nn.Module]:
    """The policy with its adapter and value head, and the reference policy: the same weights as they are now."""
    model = loaded.model
    base = twin(model)
    if args.resume_file:
        adapter = load_adapter(model, args.resume_file).config
        adapter.lora_parameters["dropout"] = 0.0
    else:
        adapter = AdapterConfig(**adapter_settings(args))
        attach_adapter(model, adapter, args.seed)
    reference = base if args.use_peft else twin(model)
    if args.grad_checkpoint:
        checkpoint_layers(model)
    head = new_value_head(model) if args.advantage == "gae" else None
    policy = Policy(model, head)
    policy.eval()  # no dropout anywhere: the policy that is trained is the one that sampled
    reference.eval()
    return Trainee(model, adapter, policy, head), reference


@torch.no_grad()
def roll_out(args, trainee: Trainee, reference: nn.Module, loaded: LoadedModel, prompts: list[str], reward, moments):
    """Sample one completion per prompt, score it, and recompute the logprobs of policy and reference.

    Returns the Rollout, the texts with their scores, and figures for the report.
    """
    tokenizer, eos_token_ids, device = loaded.tokenizer, loaded.eos_token_ids, loaded.model.device
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    completions = sample(
        trainee.model, prompt_ids, eos_token_ids, args.max_completion_length, args.temperature, len(prompts)
    )
    texts = completion_texts(tokenizer, prompt_ids, completions)
    ended = [has_eos(completion, eos_token_ids) for completion in completions]
    # The prompts as they were given, by which a reward knows them; decoding may change a space.
    scored = score(reward, prompts, texts)
    scores = ppo_step.shape_scores(args, np.asarray(scored.scores, dtype=np.float32), ended, moments)

    prefix = soft_prompt_ids(trainee.model)
    packed = pack([prefix + ids for ids in prompt_ids], completions, eos_token_ids, tokenizer.pad_token_id or 0)
    tokens, positions, completion_ids, mask = (torch.from_numpy(field).to(device) for field in packed)
    tokens, positions = tokens.long(), positions.long()
    pieces = []
    for rows in in_order(len(prompts), args.mini_batch_size):
        piece = slice(rows.start, rows.stop)
        logits, values = trainee.module(tokens[piece], positions[piece])
        ref_logits = reference_logits(args, reference, tokens[piece], positions[piece], prefix)
        logprobs = ppo.logprobs_from_logits(logits, completion_ids[piece], args.temperature)
        ref_logprobs = ppo.logprobs_from_logits(ref_logits, completion_ids[piece], args.temperature)
        kl = ppo_step.token_kl(args, logits, ref_logits, logprobs, ref_logprobs)
        entropy = ppo.entropy_from_logits(logits, args.temperature)
        pieces.append((logprobs, ref_logprobs, kl, torch.zeros_like(kl) if values is None else values, entropy))
    logprobs, ref_logprobs, kl, values, entropy = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    rollout = Rollout(
        tokens,
        positions,
        completion_ids,
        mask,
        logprobs,
        ref_logprobs,
        kl,
        old_values=values,
        scores=torch.from_numpy(scores).to(device),
    )
    return rollout, scored, ppo_step.rollout_figures(scored, ended, rollout, entropy)


def reference_logits(args, reference: nn.Module, tokens: Tensor, positions: Tensor, prefix: list[int]) -> Tensor:
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


def accumulate(gradients_of, rollout: Rollout, advantages, returns, pieces, kl_coef: float):
    """Loss, stats and gradients of a mini batch, summed over its pieces: equal to those of the whole."""
    pieces = [torch.from_numpy(rows).to(rollout.mask.device) for rows in pieces]
    denominator = sum(rollout.mask[rows].sum() for rows in pieces)
    loss, gradients = torch.zeros((), device=rollout.mask.device), None
    stats: dict[str, Tensor] = {}
    for rows in pieces:
        (piece_loss, piece_stats), piece_gradients = gradients_of(
            rollout.rows(rows), advantages[rows], returns[rows], denominator, kl_coef
        )
        loss = loss + piece_loss
        for name, value in piece_stats.items():
            so_far = stats.get(name, torch.zeros_like(value))
            stats[name] = torch.maximum(so_far, value) if name == "ratio_max" else so_far + value
        gradients = piece_gradients if gradients is None else list(map(torch.add, gradients, piece_gradients))
    return loss, {name: float(value) for name, value in stats.items()}, gradients


def optimise(args, step: int, optimizer, gradients_of, rollout: Rollout, advantages, returns, kl_coef):
    """Update the policy on one rollout. Returns the stats, averaged over its mini batches."""
    history: list[dict[str, float]] = []
    skipped = 0
    for pieces in ppo_step.mini_batches(args, step):
        loss, stats, gradients = accumulate(gradients_of, rollout, advantages, returns, pieces, kl_coef)
        verdict = ppo_step.rejected(args, stats)
        if verdict == "stop":
            break
        norm = update(optimizer, loss, gradients, args.max_grad_norm) if not verdict else math.nan
        if math.isnan(norm):
            skipped += 1
        else:
            history.append({**stats, "grad_norm": norm})
    return ppo_step.mean_stats(history, skipped)


def parse_args() -> argparse.Namespace:
    """The flags of ppo_training.py, and two of PyTorch's own."""
    parser = ppo_flags.ppo_parser(__doc__)
    parser.add_argument("--tokenizer", help="folder or Hugging Face name of the tokenizer (default: that of --model)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: cuda, else mps, else cpu")
    return parser.parse_args()


def train(
    args, loaded: LoadedModel, prompts, reward, trainee: Trainee, reference, optimizer, progress, folder: Path
) -> None:
    """Run the steps that are left: rollout, score, advantages, update, save; then leave adapter and picture."""
    true_reward = digit_reward(ppo_step.digit_rule(args))
    gradients_of = loss_and_gradients(trainee.module, make_loss(args))
    log = RunLog(folder, args.num_steps, progress.step, args.log_with, "ppo")
    optimizer_used, device = ppo_flags.optimizer_of(args, trainee.adapter.fine_tune_type), loaded.model.device
    log.say(describe(trainee.sizes(), trainee.adapter.fine_tune_type, optimizer_used, device))
    figures: dict[str, float] = {}
    with StopSignal() as stop:
        while progress.step < args.num_steps and not stop.requested:
            started, kl_coef = time.perf_counter(), progress.controller.value
            torch.manual_seed(step_seed(args.seed, progress.step))
            rollout, scored, figures = roll_out(
                args, trainee, reference, loaded, prompts.batch(progress.step), reward, progress.moments
            )
            sampled = time.perf_counter()
            advantages, returns = ppo_step.advantages_and_returns(args, rollout, kl_coef)
            stats = optimise(args, progress.step, optimizer, gradients_of, rollout, advantages, returns, kl_coef)
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
            log.advance(score=figures["mean_score"], kl=figures["kl"])
            if stats["skipped_updates"]:
                skipped = f"step {progress.step}: {stats['skipped_updates']} updates skipped"
                log.say(f"{skipped} (not finite, or ratio past its limit)")
            if progress.step % args.save_every == 0 or progress.step == args.num_steps or stop.requested:
                save_checkpoint(folder, progress.step, trainee, optimizer, progress.state(), args.keep_checkpoints)
    if progress.step < args.num_steps:
        log.close()
        done = f"{progress.step} of {args.num_steps} steps are done"
        raise Stopped(f"{done}; go on with: python pytorch_ppo_training.py --resume {folder}")
    summary = ppo_step.summary(args, progress, figures, plot_run(folder))
    trainee.adapter.provenance.append(provenance("pytorch_ppo_training.py", vars(args), summary))
    save_adapter(args.save_file, trainee.model, trainee.adapter)
    log.close(summary)


def main() -> None:
    args = parse_args()
    if args.resume:
        args = resumed(args, resumed_config(args.resume))
    ppo_flags.check(args)
    if Path(args.save_file).suffix not in SINGLE_FILE_SUFFIXES:
        check_replaceable(args.save_file, CONFIG_FILE)
    loaded = load(args.model, choose_device(args.device), args.tokenizer)
    prompts, reward = ppo_step.Prompts(args, loaded.tokenizer), build_reward(args, loaded)
    trainee, reference = build_policies(args, loaded)
    name, rate = ppo_flags.optimizer_of(args, trainee.adapter.fine_tune_type)
    schedule = (ppo_step.total_updates(args), args.lr_schedule, args.warmup_steps, args.weight_decay)
    head_rate = args.value_head_learning_rate or min(rate, HEAD_RATE)
    optimizer = make_optimizer(trainee.module, rate, *schedule, name, head_rate)
    progress = ppo_step.Progress(ppo_step.make_controller(args))
    if args.resume:
        folder = Path(args.resume)
        progress.restore(restore_checkpoint(last_checkpoint(folder), trainee, optimizer))
    else:
        folder = start_run_folder(args.output_dir or default_output_dir("ppo"), vars(args))
        save_checkpoint(folder, 0, trainee, optimizer, progress.state())
    train(args, loaded, prompts, reward, trainee, reference, optimizer, progress, folder)


if __name__ == "__main__":
    run(main)
