"""From flags to a reward function, for the MLX scripts."""

import argparse
from collections.abc import Callable, Sequence

from data.prompts import jsonl_answers
from models.loading import LoadedModel
from rewards.answer_reward import AnswerReward, answer_from_flag
from rewards.digits import DigitRule
from rewards.function import load_reward_function
from rewards.reward_model import load_reward_model

Reward = Callable[[list[str], list[str]], Sequence[float]]


def build_reward(args: argparse.Namespace, base: LoadedModel) -> Reward:
    """f(prompts, completions) -> scores, by the reward flags. base: the open model, without an adapter as yet."""
    if args.ground_truth_reward:
        return DigitRule(not args.decreasing, args.multiple_of).reward
    if args.reward_model:
        return load_reward_model(args.reward_model, base).reward
    if args.answer:
        return AnswerReward(answer_from_flag(args.answer), jsonl_answers(args.prompts)).reward
    return load_reward_function(args.reward_function)
