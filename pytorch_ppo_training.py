"""PPO in PyTorch: rollout, score, advantages, update, save; with a KL penalty to the reference policy.

    python pytorch_ppo_training.py --model ./sft_fine_tune/ --ground_truth_reward
    python pytorch_ppo_training.py --model ./sft_fine_tune/ --reward_model ./reward_model/ --device cuda

The twin of ppo_training.py over transformers and peft: same flags, loop, report, run folder and adapters. Its stages
are training/torch_ppo_learner.py. Never imports mlx. On CUDA, kernels that add in no fixed order can make a resumed run
differ in the last bit; on CPU it does not.
"""

from common.cli import StopSignal, run  # first, so that Ctrl-C among the imports is one line

# isort: split
import argparse

from common.errors import UserError
from common.files import say_replaced
from data.prompts import say_beyond_context
from models.adapter_base import base_of
from models.adapter_config import AdapterConfig, check_adapter_path
from rewards.combined import Reward, rewards_from_flags, try_once
from rewards.digits import digit_reward
from training import ppo_flags
from training.flags import adapter_settings, parse_or_resume
from training.plots import plot_run
from training.ppo_loop import PPORun, ppo_steps
from training.ppo_step import Prompts, check_ranks
from training.ranks import Ranks, digest_of

ABSENT = ""  # the package that is missing, without which --help works all the same
try:
    from models.torch_adapters import save_adapter
    from models.torch_loading import LoadedModel, choose_device, describe_device, load, memory_meter, resolve
    from rewards.torch_reward_model import load_reward_model
    from training import torch_checkpoint
    from training.torch_ppo_learner import PPOLearner, build_policies, make_ppo_optimizer
    from training.torch_ranks import launched, own_device, weights_digest
except ModuleNotFoundError as error:
    if error.name not in ("torch", "transformers", "peft"):
        raise
    ABSENT = error.name

DEVICES = ("auto", "cuda", "mps", "cpu")


def parse_args() -> argparse.Namespace:
    """The flags of ppo_training.py, and two of PyTorch's own."""
    parser = ppo_flags.ppo_parser(__doc__)
    parser.add_argument("--tokenizer", help="folder or Hugging Face name of the tokenizer (default: that of --model)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: cuda, else mps, else cpu")
    return parse_or_resume(parser, "num_steps")


def build_reward(args: argparse.Namespace, base: "LoadedModel") -> Reward:
    """f(prompts, completions) -> scores, by the reward flags. base: the open model, without an adapter as yet."""
    device = base.model.device
    return rewards_from_flags(args, base.tokenizer, lambda path: load_reward_model(path, device, base).reward)


def main() -> None:
    if ABSENT:
        parse_args()  # so that --help works all the same
        raise UserError(f"{ABSENT} is not installed; run: pip install -r requirements-torch.txt, or make setup-torch")
    with launched() as ranks:
        train(ranks)


def train(ranks: Ranks) -> None:
    """PPO by the flags, by all processes of a launch together."""
    # Flags
    args = argparse.Namespace(**ranks.from_writer(lambda: vars(parse_args())))
    settings = ppo_flags.ppo_settings(args)
    check_ranks(settings, ranks)
    if ranks.writes:
        check_adapter_path(args.save_file)
        say_replaced(args.save_file)
    args.model = base_of(args.model, args.resume_file, resolve)

    # Model, prompts, reward, policy and reference
    loaded = load(args.model, own_device(ranks, choose_device(args.device)), args.tokenizer)
    trained_on, held_out = ppo_flags.hold_out(args, ppo_flags.choose_prompts(args, loaded.tokenizer))
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    say_beyond_context(loaded.tokenizer, trained_on, settings.max_completion_length, context)
    prompts = Prompts(trained_on, settings)
    reward = build_reward(args, loaded)
    if not args.resume:
        try_once(reward, prompts.batch(0))
    adapter = args.resume_file or AdapterConfig(**adapter_settings(args))
    policy, reference = build_policies(loaded, settings, adapter, args.grad_checkpoint)
    optimizer = make_ppo_optimizer(policy, settings)
    learner = PPOLearner(policy.module, reference, loaded, optimizer, settings, ranks)
    if ranks.size > 1:
        digests = {"settings": digest_of([str(settings)]), "data": digest_of([trained_on, held_out])}
        ranks.check_same(**digests, base_model=weights_digest(reference), policy=weights_digest(policy.module))

    # Rollout, score, advantages, update: until the last step or a stop
    device = loaded.model.device
    ppo_run = PPORun(
        "pytorch_ppo_training.py",
        args,
        settings,
        policy,
        optimizer,
        torch_checkpoint,
        peak_memory=memory_meter(device),
        ranks=ranks,
    )
    ppo_run.describe(describe_device(device))
    known = args.ground_truth_reward or args.prompts
    true_reward = None if known else digit_reward(ppo_flags.digit_rule(args))
    with StopSignal() as stop:
        for step in ppo_steps(learner, loaded.tokenizer, prompts, reward, ppo_run.progress, true_reward, held_out):
            if ppo_run.record(step, stop):
                break

    # Save, after a stop, too, which ends here
    summary = ppo_run.leave(save_adapter, plot_run)
    ppo_run.log.close(summary)


if __name__ == "__main__":
    run(main)
