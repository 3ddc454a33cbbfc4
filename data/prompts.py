"""Prompts for PPO: the rows of a file or data set, with or without answers (starts of the digit rule: data/digits.py).

The prompts of a step are a function of (seed, step).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from data.examples import PROMPT_ROWS, row_prompt
from data.records import Row, located, located_rows
from data.sources import whole


def read_prompts(source: str | Path, tokenizer: Any = None, features: Mapping[str, str] | None = None) -> list[str]:
    """The prompt of every row; messages are rendered by the tokenizer's chat template."""
    return [prompt for prompt, _ in _prompt_rows(source, tokenizer, features)]


def read_answers(
    source: str | Path, tokenizer: Any = None, features: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Prompt → answer. Raises UserError if a row has no answer, or a prompt has two different ones."""
    answers: dict[str, str] = {}
    for prompt, row in _prompt_rows(source, tokenizer, features, PROMPT_ROWS[:2]):
        if answers.setdefault(prompt, row["answer"]) != row["answer"]:
            raise UserError(f"{source} has two answers for the prompt {prompt!r:.60}; keep one of its rows")
    return answers


def _prompt_rows(
    source: str | Path, tokenizer: Any, features: Mapping[str, str] | None, kinds: Sequence[Sequence[str]] = PROMPT_ROWS
) -> list[tuple[str, Row]]:
    rows = located_rows(whole(source), kinds, features, chat=True)
    return [(located(place, row_prompt, tokenizer, row), row) for place, row in rows]


class PromptPlan:
    """The prompts of each step: every prompt once before any is repeated, in a new order each time."""

    def __init__(self, prompts: Sequence[str], seed: int):
        self.prompts, self.seed = prompts, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def batch(self, step: int, count: int) -> list[str]:
        """The `count` prompts of `step` (from 0)."""
        return [self._prompt(index) for index in range(step * count, (step + 1) * count)]

    def _prompt(self, index: int) -> str:
        epoch, place = divmod(index, len(self.prompts))
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch, 2))
            self._epoch, self._order = epoch, rng.permutation(len(self.prompts))
        return self.prompts[self._order[place]]
