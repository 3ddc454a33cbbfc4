"""From flags to what scores completions: one reward, or a weighted sum of several, each reported under its own name.

A reward's name is digit_rule, answer, its function's own, or its reward model's folder; a second of one name is NAME_2.
Where there are several, --reward-weights gives each a weight by name. A reward model is opened by its framework
(rewards.reward_model, rewards.torch_reward_model).

    python ppo_training.py --ground-truth-reward --reward-function mine.py:short --reward-weights digit_rule=1 short=0.5
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.parser import Collect
from data.digits import DigitRule
from data.prompts import read_answers
from data.records import feature_names
from rewards.answer_reward import AnswerReward, answer_from_flag
from rewards.digits import digit_reward
from rewards.function import load_reward_function

Reward = Callable[[list[str], list[str]], Sequence[float]]


def top_of(reward: Reward) -> float | None:
    """The highest score that a reward can give, where it declares one (`reward.top`); only then can one be perfect.

    A user's own function may: score.top = 5.0.
    """
    return getattr(reward, "top", None)


class Scored(NamedTuple):
    """Completions and their scores."""

    prompts: list[str]
    completions: list[str]
    scores: list[float]
    parts: dict[str, list[float]]  # name → the scores of each reward of a sum, unweighted; empty for a single reward

    def row(self, index: int) -> dict[str, Any]:
        """One completion as a row of a table of samples."""
        parts = {f"score_{name}": scores[index] for name, scores in self.parts.items()}
        texts = {"prompt": self.prompts[index], "completion": self.completions[index]}
        return {"score": self.scores[index], **parts, **texts}

    def part_means(self) -> dict[str, float]:
        """What a report says of the rewards of a sum."""
        return {f"score_{name}": float(np.mean(scores)) for name, scores in self.parts.items()}


class WeightedSum:
    """f(prompts, completions) -> scores, the weighted sum of several. rewards, weights: by name."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]):
        self.rewards, self.weights = rewards, weights

    def parts(self, prompts: list[str], completions: list[str]) -> dict[str, list[float]]:
        """The scores of each reward by itself, unweighted."""
        return {name: [float(score) for score in f(prompts, completions)] for name, f in self.rewards.items()}

    def total(self, parts: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted sum of the parts."""
        rows = zip(*(parts[name] for name in self.weights), strict=True)
        return [math.fsum(w * s for w, s in zip(self.weights.values(), row, strict=True)) for row in rows]

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        return self.total(self.parts(prompts, completions))


def score(reward: Reward, prompts: Sequence[str], texts: tuple[list[str], list[str]]) -> Scored:
    """Score completions. prompts: as given, by which a reward knows them; texts: prompts and completions as decoded."""
    if isinstance(reward, WeightedSum):
        parts = reward.parts(list(prompts), texts[1])
        return Scored(*texts, reward.total(parts), parts)
    return Scored(*texts, [float(value) for value in reward(list(prompts), texts[1])], {})


def try_once(reward: Reward, prompts: Sequence[str]) -> None:
    """Score two empty completions, as training may have some: a reward that fails does so before a run has a folder."""
    score(reward, prompts[:2], (list(prompts[:2]), [""] * len(prompts[:2])))


class Sources(NamedTuple):
    """What opening a reward may need besides the value of its flag."""

    args: argparse.Namespace
    tokenizer: Any  # renders prompts that are messages, by which answers are found
    load_model: Callable[[str], Reward]  # opens a --reward-model


class Kind(NamedTuple):
    """A kind of reward: its flag, which rewards of the kind the flags name, and how one is opened."""

    flag: str
    settings: dict[str, Any]  # of the flag, as add_argument takes them
    named: Callable[[argparse.Namespace], list[tuple[str, str]]]  # → name and value of each
    opened: Callable[[str, Sources], Reward]

    def add_flag(self, group: argparse._ActionsContainer) -> None:
        """Put the flag into a group of flags."""
        group.add_argument(self.flag, **self.settings)


def _digit_rule(value: str, sources: Sources) -> Reward:
    return digit_reward(DigitRule(not sources.args.decreasing, sources.args.multiple_of))


def _answer(value: str, sources: Sources) -> Reward:
    answers = read_answers(sources.args.prompts, sources.tokenizer, feature_names(sources.args))
    return AnswerReward(answer_from_flag(value), answers).reward


SEVERAL: dict[str, Any] = {"nargs": "+", "action": Collect}  # a flag that takes several values
# A new reward is one row here. In the order of the help.
KINDS = (
    Kind(
        "--ground-truth-reward",
        {"action": "store_true", "help": "score by the digit rule"},
        lambda args: [("digit_rule", "")] if args.ground_truth_reward else [],
        _digit_rule,
    ),
    Kind(
        "--reward-model",
        {"metavar": "DIR", **SEVERAL, "help": "score by a reward model: a fused folder, or an adapter; or by several"},
        lambda args: [(Path(path).name or "reward_model", path) for path in args.reward_model or ()],
        lambda path, sources: sources.load_model(path),
    ),
    Kind(
        "--reward-function",
        {"metavar": "FILE.py:NAME", **SEVERAL, "help": "score by your own f(prompts, completions), or by several"},
        lambda args: [(spec.rpartition(":")[2], spec) for spec in args.reward_function or ()],
        lambda spec, sources: load_reward_function(spec, sources.args.reward_timeout),
    ),
    Kind(
        "--answer",
        {"metavar": "TYPE", "help": 'score 1 for the "answer" of the prompt\'s row; number, say, or {type: ...}'},
        lambda args: [("answer", args.answer)] if args.answer else [],
        _answer,
    ),
)


def named_rewards(args: argparse.Namespace) -> dict[str, tuple[Kind, str]]:
    """Name → kind and flag's value of every reward that the flags name."""
    named: dict[str, tuple[Kind, str]] = {}
    for kind in KINDS:
        for name, value in kind.named(args):
            plain, number = re.sub(r"\W+", "_", name), 1
            while (unique := plain if number == 1 else f"{plain}_{number}") in named:
                number += 1
            named[unique] = (kind, value)
    return named


def reward_weights(args: argparse.Namespace) -> dict[str, float]:
    """Name → weight of every reward; of a single one 1, unless it is given.

    Raises UserError where no reward is named, or where the weights are not one finite number for each of several.
    """
    names = list(named_rewards(args))
    if not names:
        raise UserError(
            "none of --ground-truth-reward, --reward-model DIR, --reward-function FILE.py:NAME and --answer TYPE is "
            "given; give one, or several with --reward-weights"
        )
    given: dict[str, float] = {}
    for word in args.reward_weights or ():
        name, _, number = word.rpartition("=")
        if name in given or not _finite(number) or name not in names:
            wrong = "names a reward a second time" if name in given else "is not NAME=NUMBER for one of the rewards"
            raise UserError(f"--reward-weights has {word!r}, which {wrong}; the rewards are {', '.join(names)}")
        given[name] = float(number)
    if not given and len(names) == 1:
        return {names[0]: 1.0}
    if missing := [name for name in names if name not in given]:
        example = " ".join(f"{name}={given.get(name, 1):g}" for name in names)
        raise UserError(
            f"{len(names)} rewards are given, but no weight for {', '.join(missing)}; keep one reward, or sum them by "
            f"--reward-weights {example}"
        )
    if not any(given.values()):
        raise UserError("--reward-weights are all 0, so every score would be 0; give at least one reward a weight")
    return {name: given[name] for name in names}


def _finite(number: str) -> bool:
    try:
        return math.isfinite(float(number))
    except ValueError:
        return False


def rewards_from_flags(args: argparse.Namespace, tokenizer: Any, load_model: Callable[[str], Reward]) -> Reward:
    """f(prompts, completions) -> scores, by the reward flags. tokenizer, load_model: see `Sources`."""
    weights, sources = reward_weights(args), Sources(args, tokenizer, load_model)
    rewards = {name: kind.opened(value, sources) for name, (kind, value) in named_rewards(args).items()}
    return WeightedSum(rewards, weights) if args.reward_weights else next(iter(rewards.values()))
