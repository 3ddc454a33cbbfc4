"""From rows to examples: the tokens of a row, and which of them are trained.

Text is used as it is; messages are rendered by the chat template (data.chat).

    python -m pytest tests/test_examples.py
"""

from collections.abc import Sequence
from typing import Any

from common.errors import UserError
from data.batching import Example, encode_pair, encode_text
from data.chat import Message, encode_messages, render
from data.records import Row

LANGUAGE_ROWS = [("prompt", "completion"), ("messages",), ("text",)]
PREFERENCE_ROWS = [
    ("prompt", "chosen", "rejected"), ("messages", "chosen", "rejected"), ("chosen", "rejected"), ("text", "reward"),
]  # fmt: skip
PROMPT_ROWS = [("prompt", "answer"), ("messages", "answer"), ("prompt",), ("messages",)]


def language_examples(tokenizer: Any, row: Row, prefix: Sequence[int] = (), mask_prompt: bool = True) -> list[Example]:
    """The examples of a row of LANGUAGE_ROWS: usually one (see data.chat).

    The completion, the assistant's turns, or all of a plain text are trained; without mask_prompt, all of every row.
    """
    if "messages" in row:
        examples = encode_messages(tokenizer, row["messages"], row.get("tools"), prefix)
    elif "text" in row:
        return [encode_text(tokenizer, row["text"], prefix)]
    elif isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        examples = [encode_pair(tokenizer, row["prompt"], row["completion"], prefix)]
    else:
        prompt = as_messages(row["prompt"], "user")
        messages = [*prompt, *as_messages(row["completion"], "assistant")]
        examples = encode_messages(tokenizer, messages, row.get("tools"), prefix, len(prompt))
    if mask_prompt:
        return examples
    own = [len(prefix) + int(e.tokens[len(prefix) : len(prefix) + 1] == [tokenizer.bos_token_id]) for e in examples]
    return [Example(example.tokens, max(first, 1)) for example, first in zip(examples, own, strict=True)]


def preference_examples(tokenizer: Any, row: Row, prefix: Sequence[int] = ()) -> list[Example]:
    """Chosen and rejected text of a row of PREFERENCE_ROWS, each after the prompt; or the text of a scored row.

    Trained, for who trains tokens, is what follows the prompt. Raises UserError for a pair of equal texts, which
    prefers nothing.
    """
    if "text" in row:
        return [encode_text(tokenizer, row["text"], prefix)]
    prompt: Any = row.get("messages", row.get("prompt", ""))
    replies = [row["chosen"], row["rejected"]]
    if all(isinstance(part, str) for part in (prompt, *replies)):
        pair = [encode_pair(tokenizer, prompt, reply, prefix) for reply in replies]
    else:
        before = as_messages(prompt, "user") if prompt else []
        whole = [[*before, *as_messages(reply, "assistant")] for reply in replies]
        pair = [encode_messages(tokenizer, each, row.get("tools"), prefix, len(each) - 1)[0] for each in whole]
    if pair[0] == pair[1]:
        raise UserError("chosen and rejected are the same; take the row out, or correct one of them")
    return pair


def row_prompt(tokenizer: Any, row: Row) -> str:
    """The prompt of a row of PROMPT_ROWS; for messages, everything before the assistant's final turn."""
    prompt = row["messages"] if "messages" in row else row["prompt"]
    if isinstance(prompt, str):
        return prompt
    end = next((i for i in range(len(prompt), 0, -1) if prompt[i - 1]["role"] != "assistant"), 0)
    return render(tokenizer, prompt[:end], row.get("tools"), reply=True)


def as_messages(part: str | list[Message], role: str) -> list[Message]:
    """Messages unchanged; text as one message of `role`."""
    return part if isinstance(part, list) else [{"role": role, "content": part}]
