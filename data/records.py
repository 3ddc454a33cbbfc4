"""Reading and validating rows: the accepted forms, and errors that name the line.

A row is one of
    {"text"}                                  plain text
    {"prompt", "completion"}                  trained on the completion only
    {"messages"} or with "tools"              a conversation, trained on the assistant's turns
    {"text", "reward"}                        for a reward model: any two rows with unequal rewards make a pair
    {"chosen", "rejected"} or with "prompt"   preference pairs
    {"prompt"} or {"prompt", "answer"}        prompts for PPO

Where the caller allows it, prompt, completion, chosen and rejected may also be messages: [{"role", "content"}, ...].
Some other key names are recognised (SPELLINGS); a user's own are passed as `features`.

    python -m pytest tests/test_records.py
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from common.errors import UserError
from common.json_text import parse_json
from data.sources import Source, contents

T = TypeVar("T")
Row = dict[str, Any]
Message = dict[str, Any]

# Names to try for a missing key: those of data sets with "Input" and "Output", and of ShareGPT.
SPELLINGS = {"prompt": "Input", "completion": "Output", "answer": "Output", "messages": "conversations"}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
MESSAGE_KEYS = ("prompt", "completion", "chosen", "rejected", "messages")
# The flags that rename keys, --text-feature and so on (mlx-lm's names), and the key of each.
FEATURE_FLAGS = {"text": "text", "prompt": "prompt", "completion": "completion", "chat": "messages"}
FEATURE_FLAGS |= {key: key for key in ("reward", "chosen", "rejected", "answer")}


def read_rows(
    source: Source, required: Sequence[Sequence[str]], features: Mapping[str, str] | None = None, chat: bool = False
) -> list[Row]:
    """The rows of `source`. Each must have all keys of at least one alternative in `required`.

    features: key → its name in the source, where that differs. chat: whether MESSAGE_KEYS may hold messages, which are
    returned as lists of {"role", "content", ...}. Blank lines are skipped. Raises UserError with file and line number
    for the first invalid row, and if the source is missing or empty.
    """
    return [row for _, row in located_rows(source, required, features, chat)]


def located_rows(
    source: Source, required: Sequence[Sequence[str]], features: Mapping[str, str] | None = None, chat: bool = False
) -> list[tuple[str, Row]]:
    """Like `read_rows`, with the place of each row: FILE:LINE, or NAME, row N."""
    rows = []
    for place, row in checked_rows(source, required, features, chat):
        if isinstance(row, UserError):
            raise row
        rows.append((place, row))
    if not rows:
        raise UserError(f"{source} holds no rows; each line is a JSON object such as {_example(required[0], features)}")
    return rows


def checked_rows(
    source: Source, required: Sequence[Sequence[str]], features: Mapping[str, str] | None = None, chat: bool = False
) -> Iterator[tuple[str, Row | UserError]]:
    """Like `located_rows`, but an invalid row is yielded as its UserError, and the source may be empty."""
    for place, content in contents(source):
        try:
            yield place, _row(content, place, required, features or {}, chat)
        except UserError as error:
            yield place, error


def feature_names(flags: object) -> dict[str, str]:
    """The `features` argument of `read_rows` from a script's flags (attributes `text_feature` and so on)."""
    given = {key: getattr(flags, f"{kind}_feature", None) for kind, key in FEATURE_FLAGS.items()}
    return {key: name for key, name in given.items() if name}


def located(place: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call `function(*arguments)`; a UserError it raises is prefixed with `place`."""
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _row(content: Any, place: str, required: Sequence[Sequence[str]], features: Mapping[str, str], chat: bool) -> Row:
    if isinstance(content, UserError):
        raise content
    if not isinstance(content, dict):
        raise UserError(f"{place} is {type(content).__name__}, not an object; write {_example(required[0], features)}")
    row = _renamed(content, features, {key for keys in required for key in keys})
    # If a row fits several alternatives, the one with keys that the user named wins.
    ranked = sorted(required, key=lambda keys: -sum(key in features for key in keys))
    keys = next((keys for keys in ranked if all(key in row for key in keys)), None)
    if keys is None:
        wanted = " or ".join(_example(keys, features) for keys in required)
        raise UserError(f"{place} has the keys {sorted(map(str, content))}; write {wanted}")
    not_taken = {key for other in required for key in other} - set(keys)
    others = {key: value for key, value in row.items() if key not in not_taken}
    if chat and row.get("tools") is not None:
        others["tools"] = _tools(row["tools"], place)
    return {**others, **{key: _checked(row[key], key, place, chat) for key in keys}}


def _renamed(content: Row, features: Mapping[str, str], wanted: set[str]) -> Row:
    row = {key: value for key, value in content.items() if key not in features}
    row |= {key: content[feature] for key, feature in features.items() if feature in content}
    spelled = {key: name for key, name in SPELLINGS.items() if key in wanted and key not in features}
    return {**{key: content[name] for key, name in spelled.items() if name in content}, **row}


def _checked(value: Any, key: str, place: str, chat: bool) -> Any:
    if key == "reward":
        return _number(value, place)
    if key == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if chat and key == "answer" and isinstance(value, list | dict):
        return str(_messages(value if isinstance(value, list) else [value], key, place)[-1]["content"])
    if chat and key in MESSAGE_KEYS and isinstance(value, list | dict):
        return _messages(value if isinstance(value, list) else [value], key, place)
    if key == "messages" or not isinstance(value, str):
        wanted = "a string" if key != "messages" else 'a list such as [{"role": "user", "content": "..."}]'
        raise UserError(f"{place} has {key!r} of type {type(value).__name__}; it must be {wanted}")
    return value


def _messages(value: list[Any], key: str, place: str) -> list[Message]:
    if not value:
        raise UserError(f"{place} has no message in {key!r}; write at least one")
    messages = []
    for number, message in enumerate(value, 1):
        where = f"{place} has an invalid message {number} in {key!r}: "
        if not isinstance(message, dict):
            raise UserError(f'{where}{message!r:.60}; write {{"role": "user", "content": "..."}}')
        # Arrow fills keys that only some messages have with null.
        given = {name: part for name, part in message.items() if part is not None}
        if "from" in given and "role" not in given:
            role = given["from"] if isinstance(given["from"], str) else None
            given = {"role": ROLES.get(role, role) if role else None, "content": given.get("value")}
        if not isinstance(given.get("role"), str):
            raise UserError(f'{where}one without a "role"; write {{"role": "user", "content": "..."}}')
        if not isinstance(given.get("content", ""), str | list) or not ({"content", "tool_calls"} & given.keys()):
            raise UserError(f'{where}one whose "content" is {given.get("content")!r:.40}; it must be a string')
        messages.append({"content": "", **given})
    return messages


def _tools(value: Any, place: str) -> list[Any]:
    try:
        tools = parse_json(value) if isinstance(value, str) else value
    except ValueError:
        tools = None
    if not isinstance(tools, list):
        raise UserError(f"{place} has the tools {value!r:.60}; they must be a list of JSON schemas")
    return tools


def _number(value: Any, place: str) -> float:
    """A reward as a finite float; "0.9" and 0.9 are the same number."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{place} has the reward {value!r:.80}; it must be a finite number")
    return number


def _example(keys: Sequence[str], features: Mapping[str, str] | None) -> str:
    keys = keys or ("input", "output")  # of a task, which may name its columns
    values: dict[str, Any] = {"reward": 1.0, "messages": [{"role": "user", "content": "..."}]}
    return json.dumps({(features or {}).get(key, key): values.get(key, "...") for key in keys})
