"""PPO on MLX: rollout, score, advantages, update, save; with a KL penalty to the reference policy.

    python ppo_training.py --model ./sft_fine_tune/ --ground_truth_reward
    python ppo_training.py --model ./sft_fine_tune/ --reward_model ./reward_model/

The loop is training/ppo_loop.py, its stages on MLX training/ppo_learner.py, the maths training/ppo.py. In a notebook:
training.ppo_learner.train_ppo. pytorch_ppo_training.py is the same in PyTorch. Not here: supervised fine-tuning
(sft.py), merging the adapter into its base (fuse.py).
"""

from models import cpu

cpu.enable()  # before mlx is imported

import argparse

import mlx.core as mx

from common.cli import StopSignal, run
from common.errors import UserError
from common.files import say_replaced
from data.prompts import say_beyond_context
from models.adapter_base import base_of
from models.adapter_config import check_adapter_path
from models.adapters import AdapterConfig, save_adapter
from models.export.fused import check_free, save_fused
from models.gpu import memory_meter
from models.loading import load, resolve
from rewards.build import build_reward
from rewards.combined import try_once
from rewards.digits import digit_reward
from training import checkpoint, ppo_flags
from training.flags import adapter_settings, parse_or_resume
from training.mlx_ranks import launched, weights_digest
from training.optimizer import bytes_of_numpy
from training.planning import add_plan_flags, planned_peak, show_plan
from training.plots import plot_run
from training.ppo_learner import PPOLearner, build_policies, make_ppo_optimizer
from training.ppo_loop import PPORun, ppo_steps
from training.ppo_step import Prompts, check_ranks
from training.ranks import Ranks, digest_of


def parse_args() -> argparse.Namespace:
    """The flags of both PPO scripts, and those of this alone."""
    parser = ppo_flags.ppo_parser(__doc__)
    parser.add_argument("--fused-model", metavar="DIR", help="also write the fused model there, at the end")
    add_plan_flags(parser)
    return parse_or_resume(parser, "num_steps")


def check_fused_model(args: argparse.Namespace, adapter: AdapterConfig) -> None:
    """Raise UserError where --fused-model could not be written in the end."""
    if args.fused_model:
        check_free(args.fused_model, again=bool(args.resume))
        if adapter.fine_tune_type == "soft_prompt":
            raise UserError("--fused-model has no weight to put a soft prompt into; train a LoRA, or leave it out")


def main() -> None:
    with launched() as ranks:
        train(ranks)


def train(ranks: Ranks) -> None:
    """PPO by the flags, by all processes of a launch together."""
    # Flags
    args = argparse.Namespace(**ranks.from_writer(lambda: vars(parse_args())))
    settings = ppo_flags.ppo_settings(args)
    args.model = base_of(args.model, args.resume_file, resolve)
    if show_plan("ppo_training.py", args):
        return
    check_ranks(settings, ranks)
    if ranks.writes:
        check_adapter_path(args.save_file)
        say_replaced(args.save_file)

    # Model, prompts, reward, policy and reference
    planned_memory = planned_peak("ppo_training.py", args) if ranks.writes else None
    loaded = load(args.model)
    trained_on, held_out = ppo_flags.hold_out(args, ppo_flags.choose_prompts(args, loaded.tokenizer))
    context = loaded.config.get("max_position_embeddings")
    say_beyond_context(loaded.tokenizer, trained_on, settings.max_completion_length, context)
    prompts = Prompts(trained_on, settings)
    reward = build_reward(args, loaded)
    if not args.resume:
        try_once(reward, prompts.batch(0))
    adapter = args.resume_file or AdapterConfig(**adapter_settings(args))
    policy, reference = build_policies(loaded, settings, adapter, args.grad_checkpoint)
    if ranks.writes:
        check_fused_model(args, policy.adapter)
    optimizer = make_ppo_optimizer(policy, settings)
    learner = PPOLearner(policy.module, reference, loaded.tokenizer, optimizer, settings, ranks)
    if ranks.size > 1:
        digests = {"settings": digest_of([str(settings)]), "data": digest_of([trained_on, held_out])}
        ranks.check_same(**digests, base_model=weights_digest(reference), policy=weights_digest(policy.module))

    # Rollout, score, advantages, update: until the last step or a stop
    meter = memory_meter(lambda: bytes_of_numpy(optimizer))
    ppo_run = PPORun(
        "ppo_training.py", args, settings, policy, optimizer, checkpoint, cpu.BLAS, meter, ranks, planned_memory
    )  # fmt: skip
    device = cpu.describe_device(mx.default_device())
    ppo_run.describe(device)
    known = args.ground_truth_reward or args.prompts
    true_reward = None if known else digit_reward(ppo_flags.digit_rule(args))
    with StopSignal() as stop:
        for step in ppo_steps(learner, loaded.tokenizer, prompts, reward, ppo_run.progress, true_reward, held_out):
            stopping = ppo_run.record(step, stop)
            if stopping:
                break

    # Save, after a stop, too, which ends here
    summary = ppo_run.leave(save_adapter, plot_run)
    if args.fused_model and ranks.writes:
        save_fused(loaded, args.fused_model)
        ppo_run.log.say(f"the fused model is in {args.fused_model}")
    ppo_run.log.close(summary)


if __name__ == "__main__":
    run(main)
