"""A reward by known answers: 1 if the completion gives the answer of its prompt, else 0.

It reads answers like the vote, the pass rate and the evaluation (rewards/answers.py). Prompts and answers come from the
same rows, {"prompt", "answer"}, and a prompt must be spelled as in its row.

    python ppo_training.py --prompts sums.jsonl --answer number      python -m pytest tests/test_answer_reward.py
"""

from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from common.yaml_files import parse_yaml
from rewards.answers import AnswerType, answer_type


class AnswerReward:
    """f(prompts, completions) -> scores. answers: prompt → answer. Raises UserError for an unreadable answer."""

    def __init__(self, answer: AnswerType, answers: Mapping[str, str]):
        for prompt, truth in answers.items():
            if not answer.readable(truth):
                raise UserError(
                    f"the answer {truth!r:.60} of the prompt {prompt!r:.60} is not a valid {answer.name} answer; fix it"
                )
        self.answer, self.answers = answer, answers

    def reward(self, prompts: list[str], completions: list[str]) -> list[float]:
        """A score in 0..1 for each completion, of most types 1.0 or 0.0. The prompts must be those of the rows."""
        return [
            self.answer.score(completion, self.answers[prompt])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    reward.top = 1.0  # type: ignore[attr-defined]


def answer_from_flag(spec: str) -> AnswerType:
    """The answer type of `--answer`. Raises UserError as `answer_options` and `answer_type` do."""
    options = answer_options(spec)
    return answer_type(options.pop("type"), **options)


def answer_options(spec: str) -> dict[str, Any]:
    """`--answer` as a mapping: from a type's name, or from YAML as in a task file: {type: label, labels: [a, b]}.

    Raises UserError if it is neither.
    """
    try:
        given = parse_yaml(spec, "--answer")
    except UserError:
        given = None
    options = {"type": given} if isinstance(given, str) else given
    if not isinstance(options, dict) or not isinstance(options.get("type"), str):
        raise UserError(f"--answer is {spec!r:.60}; write a type such as number, or {{type: label, labels: [a, b]}}")
    return {str(key): value for key, value in options.items()}
