"""From flags to a reward function, for the MLX scripts."""

import argparse

from models.loading import LoadedModel
from rewards.combined import Reward, rewards_from_flags
from rewards.reward_model import load_reward_model


def build_reward(args: argparse.Namespace, base: LoadedModel, shared: bool = True) -> Reward:
    """f(prompts, completions) -> scores, by the reward flags.

    base: the open model, without an adapter as yet; shared: whether reward models may be adapters on its weights.
    """
    beside = base if shared else None
    return rewards_from_flags(args, base.tokenizer, lambda path: load_reward_model(path, beside).reward)
