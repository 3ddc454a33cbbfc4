"""From flags to a reward function, for the MLX scripts."""

import argparse
from collections.abc import Callable, Sequence

from data.prompts import read_answers
from data.records import feature_names
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
        answers = read_answers(args.prompts, base.tokenizer, feature_names(args))
        return AnswerReward(answer_from_flag(args.answer), answers).reward
    return load_reward_function(args.reward_function)
