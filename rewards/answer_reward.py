"""A reward that knows each prompt's answer: 1 where the completion gives it, else 0.

It reads answers as the vote, the pass rate and the evaluation do (rewards/answers.py). The answers come from the rows
that the prompts come from, {"prompt", "answer"}, so the prompts have to be as they stand there.

    python ppo_training.py --prompts sums.jsonl --answer number      python -m pytest tests/test_answer_reward.py
"""

from collections.abc import Mapping
from typing import Any

import yaml

from common.errors import UserError
from rewards.answers import AnswerType, answer_type


class AnswerReward:
    """f(prompts, completions) -> scores. answers: of every prompt. Raises UserError where one cannot be a truth."""

    def __init__(self, answer: AnswerType, answers: Mapping[str, str]):
        for prompt, truth in answers.items():
            if not answer.readable(truth):
                raise UserError(f"the answer {truth!r:.60} of the prompt {prompt!r:.60} is no {answer.name}; mend it")
        self.answer, self.answers = answer, answers

    def reward(self, prompts: list[str], completions: list[str]) -> list[float]:
        """1.0 or 0.0 for each completion. The prompts are those of the rows."""
        return [
            self.answer.score(completion, self.answers[prompt])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def answer_from_flag(spec: str) -> AnswerType:
    """The answer type of `--answer`. Raises UserError as `answer_options` and `answer_type` do."""
    options = answer_options(spec)
    return answer_type(options.pop("type"), **options)


def answer_options(spec: str) -> dict[str, Any]:
    """`--answer` as a mapping: of a name, or of the text of one, as a task file has it: {type: label, labels: [a, b]}.

    Raises UserError where it is neither.
    """
    try:
        given = yaml.safe_load(spec)
    except yaml.YAMLError:
        given = None
    options = {"type": given} if isinstance(given, str) else given
    if not isinstance(options, dict) or not isinstance(options.get("type"), str):
        raise UserError(f"--answer is {spec!r:.60}; write a type such as number, or {{type: label, labels: [a, b]}}")
    return {str(key): value for key, value in options.items()}
