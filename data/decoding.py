"""From token ids back to text, for both frameworks."""

from collections.abc import Sequence
from typing import Any


def completion_texts(
    tokenizer: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> tuple[list[str], list[str]]:
    """The texts of prompts and completions, such that prompt + completion is the decoded sequence.

    A completion decoded by itself would lose its leading space, so it is taken as the rest of the decoded sequence.
    Special tokens such as EOS are dropped. For scoring and display only; training keeps the ids.
    """
    prompt_texts = [tokenizer.decode(list(p), skip_special_tokens=True) for p in prompts]
    wholes = [tokenizer.decode([*p, *c], skip_special_tokens=True) for p, c in zip(prompts, completions, strict=True)]
    return prompt_texts, [
        whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.decode(list(c), skip_special_tokens=True)
        for prompt, whole, c in zip(prompt_texts, wholes, completions, strict=True)
    ]
