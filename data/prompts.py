"""Prompts for PPO: the rows of a file or data set, with or without answers (starts of the digit rule: data/digits.py).

The prompts of a step are a function of (seed, step).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from data.batching import encode_prompt
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


def say_beyond_context(tokenizer: Any, prompts: Sequence[str], max_tokens: int, context: int | None) -> None:
    """Print one line if prompts with completions of `max_tokens` are longer than what the model reads.

    context: tokens (max_position_embeddings); None where the model has no such limit.
    """
    room = (context or 0) - max_tokens
    # A token is at least one byte, so most prompts need not be encoded; 8 for what a tokenizer adds.
    asked = {prompt for prompt in prompts if context and len(prompt.encode(errors="replace")) + 8 > room}
    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in asked]
    if beyond := [length for length in lengths if length > room]:
        print(
            f"warning: {len(beyond):,} of {len(set(prompts)):,} prompts, of up to {max(beyond):,} tokens, and "
            f"completions of {max_tokens:,} exceed the {context:,} tokens that the model reads "
            "(max_position_embeddings); shorten the prompts, or --max-completion-length",
            flush=True,
        )


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
