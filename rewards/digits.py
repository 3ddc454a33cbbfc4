"""The digit rule (data/digits.py) as a reward: the ground truth of the digit task."""

from collections.abc import Callable, Sequence

from data.digits import DigitRule


def digit_reward(rule: DigitRule) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """f(prompts, completions) -> the score (0..1) of each prompt + completion. ValueError if lengths differ."""

    def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [rule.score(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]

    reward.top = 1.0  # type: ignore[attr-defined]
    return reward
