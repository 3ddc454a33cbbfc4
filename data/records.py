"""Reading and validating rows: what a user's rows may look like, and where they are wrong.

A row is one of
    {"text"}                                  plain text
    {"prompt", "completion"}                  trained on the completion only
    {"messages"} or with "tools"              a conversation, trained on the assistant's turns
    {"text", "reward"}                        for a reward model: any two rows with unequal rewards make a pair
    {"chosen", "rejected"} or with "prompt"   preference pairs
    {"prompt"} or {"prompt", "answer"}        prompts for PPO

Where a caller allows it, prompt, completion, chosen and rejected may be messages, too: [{"role", "content"}, ...].
Other names of the same things are understood (SPELLINGS), and a user's own are given as `features`.

    python -m pytest tests/test_records.py
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from common.errors import UserError
from data.sources import Source, contents

T = TypeVar("T")
Row = dict[str, Any]
Message = dict[str, Any]

# What a key is called where it is missing: the data sets that say "Input" and "Output", and ShareGPT's conversations.
SPELLINGS = {"prompt": "Input", "completion": "Output", "answer": "Output", "messages": "conversations"}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
MESSAGE_KEYS = ("prompt", "completion", "chosen", "rejected", "messages")
# The flags by which a user names keys, --text-feature and so on (mlx-lm's names), and the key of each.
FEATURE_FLAGS = {"text": "text", "prompt": "prompt", "completion": "completion", "chat": "messages"}
FEATURE_FLAGS |= {key: key for key in ("reward", "chosen", "rejected", "answer")}


def read_rows(
    source: Source, required: Sequence[Sequence[str]], features: Mapping[str, str] | None = None, chat: bool = False
) -> list[Row]:
    """The rows of `source`, each of which must have all keys of at least one alternative in `required`.

    features: what the source calls a key, where it has another name. chat: whether MESSAGE_KEYS may hold messages; they
    come as lists of {"role", "content", ...}. Blank lines are skipped. Raises UserError with file and line number at
    the first row that does not fit, and where the source is missing or has no row.
    """
    return [row for _, row in located_rows(source, required, features, chat)]


def located_rows(
    source: Source, required: Sequence[Sequence[str]], features: Mapping[str, str] | None = None, chat: bool = False
) -> list[tuple[str, Row]]:
    """As `read_rows`, each row with its place: FILE:LINE, or NAME, row N."""
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
    """As `located_rows`, but a row that does not fit comes as its UserError, and there may be none."""
    for place, content in contents(source):
        try:
            yield place, _row(content, place, required, features or {}, chat)
        except UserError as error:
            yield place, error


def feature_names(flags: object) -> dict[str, str]:
    """The `features` of `read_rows` that a script's flags name, by the attributes `text_feature` and so on."""
    given = {key: getattr(flags, f"{kind}_feature", None) for kind, key in FEATURE_FLAGS.items()}
    return {key: name for key, name in given.items() if name}


def located(place: str, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, in whose UserError the place of the row it is about is named."""
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
    # What the user has named is what is meant, where a row would serve for several.
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
        raise UserError(f"{place} has {key!r} of type {type(value).__name__}; it has to be {wanted}")
    return value


def _messages(value: list[Any], key: str, place: str) -> list[Message]:
    if not value:
        raise UserError(f"{place} has no message in {key!r}; write at least one")
    messages = []
    for number, message in enumerate(value, 1):
        where = f"{place} has as message {number} of {key!r} "
        if not isinstance(message, dict):
            raise UserError(f'{where}{message!r:.60}; write {{"role": "user", "content": "..."}}')
        # Arrow fills the keys that only some messages have with null.
        given = {name: part for name, part in message.items() if part is not None}
        if "from" in given and "role" not in given:
            given = {"role": ROLES.get(given["from"], given["from"]), "content": given.get("value")}
        if not isinstance(given.get("role"), str):
            raise UserError(f'{where}one without a "role"; write {{"role": "user", "content": "..."}}')
        if not isinstance(given.get("content", ""), str | list) or not ({"content", "tool_calls"} & given.keys()):
            raise UserError(f'{where}one whose "content" is {given.get("content")!r:.40}; it has to be a string')
        messages.append({"content": "", **given})
    return messages


def _tools(value: Any, place: str) -> list[Any]:
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        tools = None
    if not isinstance(tools, list):
        raise UserError(f"{place} has the tools {value!r:.60}; they have to be a list of JSON schemas")
    return tools


def _number(value: Any, place: str) -> float:
    """A reward as a finite float; "0.9" and 0.9 are the same number."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{place} has the reward {value!r:.80}; it has to be a finite number")
    return number


def _example(keys: Sequence[str], features: Mapping[str, str] | None) -> str:
    values: dict[str, Any] = {"reward": 1.0, "messages": [{"role": "user", "content": "..."}]}
    return json.dumps({(features or {}).get(key, key): values.get(key, "...") for key in keys})
