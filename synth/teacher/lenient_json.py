"""JSON as language models write it: in prose, with trailing commas, other quotes, bare words, or no end.

Linear in the length of the text, whatever it holds; nothing is executed. For valid JSON use the json module.

    list(objects_in("Sure: {'question': 'a', answer: 2,} Enjoy!"))  ->  [{"question": "a", "answer": 2}]
"""

import json
import re
from collections.abc import Iterator
from typing import Any

DEEPEST = 32
MOST = 4  # objects of a text that are read
QUOTES = {'"': '"', "'": "'", "“": "”"}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
NUMBER = re.compile(r"-?(0|[1-9]\d{0,30})(\.\d{1,30})?([eE][+-]?\d{1,3})?")
WORDS = {"true": True, "false": False, "null": None, "none": None}
SPACE = re.compile(r"\s*")
GAP = re.compile(r"[\s,]*")
BARE_KEY = re.compile(r"[^\s:,{}\[\]\"'“]+")
BARE_VALUE = re.compile(r"[^,{}\[\]\n]+")
# A quote ends a string only where one could end; others are part of it. So is a backslash that escapes nothing.
PART = {
    quote: re.compile(rf"[^\\{end}]+|\\u[0-9a-fA-F]{{4}}|\\.|(?P<end>{end}(?=\s*(?:[,:}}\]]|\Z)))|.", re.DOTALL)
    for quote, end in QUOTES.items()
}


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """The objects that a text holds, one after the other, at most MOST. Raises ValueError where one is too deep."""
    at = 0
    for _ in range(MOST):
        at = text.find("{", at)
        if at < 0:
            return
        found, at = _object(text, at + 1, 1)
        yield found


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """What begins at `at`, which is no space, and where it ends."""
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    first = text[at : at + 1]
    if first == "{":
        return _object(text, at + 1, depth + 1)
    if first == "[":
        return _list(text, at + 1, depth + 1)
    if first in QUOTES:
        return _string(text, at + 1, first)
    bare = BARE_VALUE.match(text, at)
    if not bare:
        return None, at
    word = bare[0].strip()
    value = json.loads(word) if NUMBER.fullmatch(word) else WORDS.get(word.lower(), word)
    return value, bare.end()


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    while True:
        at = _after(GAP, text, at)
        if at == len(text) or text[at] == "]":  # of a list around it
            return found, at
        if text[at] == "}":
            return found, at + 1
        bare = BARE_KEY.match(text, at)
        if text[at] in QUOTES:
            key, at = _string(text, at + 1, text[at])
        elif bare:
            key, at = bare[0], bare.end()
        else:
            at += 1  # no key can begin so
            continue
        at = _after(SPACE, text, at)
        if text[at : at + 1] == ":":
            found[key], at = _value(text, _after(SPACE, text, at + 1), depth)


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    while True:
        at = _after(GAP, text, at)
        if at == len(text) or text[at] == "}":  # of an object around it
            return found, at
        if text[at] == "]":
            return found, at + 1
        value, at = _value(text, at, depth)
        found.append(value)


def _string(text: str, at: int, quote: str) -> tuple[str, int]:
    parts: list[str] = []
    while found := PART[quote].match(text, at):
        at = found.end()
        if found["end"]:
            break
        parts.append(_unescaped(found[0]))
    # Escapes in two halves are one character.
    return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"), at


def _unescaped(part: str) -> str:
    """A run of characters, or what an escape stands for."""
    if part[0] != "\\" or len(part) == 1:
        return part
    if len(part) == 6:
        return chr(int(part[2:], 16))
    return ESCAPES.get(part[1], part[1] if part[1] in "\"'\\/" else part)


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at
