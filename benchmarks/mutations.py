# ruff: noqa: E501
"""Damaged copies of examples, from a seed: what a fuzzer gives to a reader, at 10 µs each.

    Mutator(random.Random(0), ['{"step": 3}']).next()  ->  '{"step": 1e999}'

An example is text, bytes or a value of JSON. Texts lose, repeat and exchange spans, and take in pieces that mean
something to the reader; where a text is JSON, a part of its value is replaced, dropped or added instead. Every 500th
input is long, as what is quadratic shows only there.
"""

import copy
import json
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

LONG = 500  # every which input repeats a span until it is LONGEST
LONGEST = 100_000  # characters
ODD: list[Any] = [
    None, True, False, 0, 1, -1, -0.0, 0.5, 1e308, math.inf, -math.inf, math.nan, 2**31, 2**63, 2**64, -(2**63) - 1,
    10**400, "", " ", "1", "-1", "1e5", "nan", "inf", "true", "\0", "\n", "\ud800", "\u2028", "x" * 300, "../..", "~nosuchuser",
    "é", [], {}, [[]], [{}], [None], [0], [""], {"": ""}, {"a": 1}, {"a": {"a": []}},
]  # fmt: skip
PIECES = [
    "{", "}", "[", "]", ":", ",", '"', "'", "\\", "\\ud800", "\n", " ", "\t", "\r", "&a ", "*a", "<<: *a", "- ", "? ", "!!int ",
    "|\n ", ">", "%", "#", "1e999", "-0", "9" * 40, "9" * 5000, "0x", "null", "true", "NaN", "-Infinity", "\ufeff", "prompt",
    "completion", "messages", "tools", "role", "user", "content", "text", "reward", "chosen", "rejected", "instruction", "answer",
    "number", "input", "output", "\\boxed{", "\\frac{", "\\sqrt[", "^", "(", ")", "+", "-", "/", "!", "%", "<answer>", "</answer>",
    "####", "The answer is ", "Answer: ", "```json\n", "```", "<think>", "</think>", "é", "\u2028", "\x00", "\x85", "http://",
    "127.0.0.1", ":99999", "/v1", "@", "[::1]", "~", "..", "/",
]  # fmt: skip


class Mutator:
    """Inputs made of `good` examples, which must not be empty, and a quarter of them of others."""

    def __init__(self, rng: random.Random, good: Sequence[Any], others: Sequence[Any] = ()):
        self.rng, self.made = rng, 0
        self.examples, self.good = [*good, *others], len(good)
        self.values: dict[int, Any] = {}  # of the examples that are JSON
        for number, example in enumerate(self.examples):
            with suppress(TypeError, ValueError, RecursionError):
                self.values[number] = json.loads(example)

    def next(self) -> Any:
        """The next input: one of the examples, damaged once to four times."""
        rng = self.rng
        self.made += 1
        chosen = rng.randrange(self.good if rng.random() < 0.75 else len(self.examples))
        example = self.examples[chosen]
        if not isinstance(example, str | bytes):
            return self._value(copy.deepcopy(example))
        if chosen in self.values and rng.random() < 0.6:
            text = json.dumps(self._value(copy.deepcopy(self.values[chosen])), ensure_ascii=rng.random() < 0.8)
            return text.encode(errors="replace") if isinstance(example, bytes) else text
        if isinstance(example, bytes):
            return self._bytes(example)
        for _ in range(rng.choice((1, 1, 2, 4))):
            example = self._text(example)
        return self._long(example) if self.made % LONG == 0 else example

    def _text(self, text: str) -> str:
        rng = self.rng
        start = rng.randint(0, len(text))
        end = min(len(text), start + rng.choice((1, 1, 2, 4, 8, 64)))
        match rng.randrange(6):
            case 0:
                return text[:start] + text[end:]
            case 1:
                return text[:end] + text[start:end] * rng.randint(1, 3) + text[end:]
            case 2:
                other = self.examples[rng.randrange(len(self.examples))]
                place = rng.randint(0, len(other)) if isinstance(other, str) else 0
                return text[:start] + (other[place : place + 20] if isinstance(other, str) else "") + text[end:]
            case 3:
                return text[:start]
            case 4:
                return text[:start] + chr(rng.choice((rng.randrange(128), rng.randrange(0xD7FF)))) + text[end:]
            case _:
                return text[:start] + rng.choice(PIECES) + text[start if rng.random() < 0.5 else end :]

    def _long(self, text: str) -> str:
        start = self.rng.randint(0, len(text))
        span = text[start : start + self.rng.randint(1, 12)] or self.rng.choice(PIECES)
        return text[:start] + span * (LONGEST // len(span)) + text[start:]

    def _bytes(self, data: bytes) -> bytes:
        rng = self.rng
        for _ in range(rng.randint(1, 4)):
            start = rng.randint(0, len(data))
            match rng.randrange(4):
                case 0:
                    data = data[:start] + bytes([rng.randrange(256)]) + data[start + 1 :]
                case 1:
                    data = data[:start] + rng.randbytes(rng.randint(1, 8)) + data[start:]
                case 2:
                    data = data[:start] + data[start + rng.randint(1, 16) :]
                case _:
                    data = data[:start]
        return data

    def _value(self, value: Any) -> Any:
        """A value of JSON with one or two of its parts changed, in place."""
        for _ in range(self.rng.choice((1, 1, 2))):
            value = self._changed(value)
        return value

    def _changed(self, value: Any) -> Any:
        rng, inner = self.rng, value
        while True:
            if not (isinstance(inner, dict | list) and inner):
                return self._odd()
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            key = rng.choice(keys)
            if isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.7:
                inner = inner[key]
                continue
            match rng.randrange(6):
                case 0:
                    del inner[key]
                case 1 if isinstance(inner, dict):
                    inner[rng.choice(PIECES)] = self._odd()
                case 1 if isinstance(inner, list):
                    inner.insert(key, self._odd())
                case 2:
                    inner[key] = [inner[key]]
                case 3:
                    inner[key] = str(inner[key])
                case _:
                    inner[key] = self._odd()
            return value

    def _odd(self) -> Any:
        """A value that is rarely expected; one in a hundred is up to 200 levels deep."""
        if self.rng.random() < 0.01:
            deep: Any = []
            for _ in range(self.rng.choice((30, 70, 200))):
                deep = [deep] if self.rng.random() < 0.5 else {"a": deep}
            return deep
        return copy.deepcopy(self.rng.choice(ODD)) if self.rng.random() < 0.9 else self.rng.choice(PIECES)
