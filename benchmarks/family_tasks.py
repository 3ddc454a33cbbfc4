"""The tasks of benchmarks/families.py: rules over words that the embedded models can write, as texts and as rewards.

A word rule scores prompt + completion, numbers separated by spaces; the prompt is the first number. Each is there
twice: by degrees, and all or nothing. A reward is named as `--reward-function benchmarks/family_tasks.py:palindrome`.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data.digits import DigitRule
from models.tiny_texts import operand

TOTAL = 50  # of the rule `total`
LEAST_NUMBERS = 5  # of a palindrome and an alternation
LENGTHS = (4, 9)  # that the first number of the rule `length` may name
WRONG = 0.3  # share of the numbers that are replaced in the texts of SFT; their count stays, which the model has to get


# --- scores of the numbers of a text, in 0..1 ---


def palindrome_score(numbers: Sequence[int]) -> float:
    """Share of the numbers before the middle that are mirrored; 0 for fewer than 5 numbers or 3 different ones."""
    half = len(numbers) // 2
    if len(numbers) < LEAST_NUMBERS or len(set(numbers)) < 3:
        return 0.0
    return sum(numbers[i] == numbers[-1 - i] for i in range(half)) / half


def total_score(numbers: Sequence[int]) -> float:
    """1 if at least 5 numbers add up to 50, less by their relative distance from it."""
    return max(0.0, 1 - abs(sum(numbers) - TOTAL) / TOTAL) if len(numbers) >= LEAST_NUMBERS else 0.0


def alternation_score(numbers: Sequence[int]) -> float:
    """Share of the leading numbers whose parity differs from the one before, of at least 5."""
    run = next((i for i in range(1, len(numbers)) if (numbers[i] - numbers[i - 1]) % 2 == 0), len(numbers))
    return run / max(len(numbers), LEAST_NUMBERS)


def length_score(numbers: Sequence[int]) -> float:
    """1 if there are as many numbers as the first one says, less by the relative distance from it."""
    return max(0.0, 1 - abs(len(numbers) - numbers[0]) / numbers[0]) if numbers and numbers[0] > 0 else 0.0


def _numbers(text: str) -> list[int] | None:
    words = text.split()
    return [int(word) for word in words] if all(w.isascii() and w.isdigit() and len(w) < 6 for w in words) else None


def _reward(score: Callable[[Sequence[int]], float], whole: bool) -> Callable[[list[str], list[str]], list[float]]:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        texts = (_numbers(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True))
        scores = (0.0 if numbers is None else score(numbers) for numbers in texts)
        return [float(score == 1) if whole else score for score in scores]

    return reward


palindrome, palindrome_whole = _reward(palindrome_score, False), _reward(palindrome_score, True)
total, total_whole = _reward(total_score, False), _reward(total_score, True)
alternation, alternation_whole = _reward(alternation_score, False), _reward(alternation_score, True)
length, length_whole = _reward(length_score, False), _reward(length_score, True)


# --- texts that follow a word rule, before some of their numbers are replaced ---


def palindrome_text(rng: np.random.Generator) -> list[int]:
    """5 to 9 numbers of one digit, none more than twice."""
    count = int(rng.integers(5, 10))
    half = rng.choice(10, size=(count + 1) // 2, replace=False).tolist()
    return half + half[::-1][count % 2 :]


def total_text(rng: np.random.Generator) -> list[int]:
    """5 to 8 positive numbers."""
    cuts = sorted(rng.choice(np.arange(1, TOTAL), size=int(rng.integers(4, 8)), replace=False).tolist())
    return np.diff([0, *cuts, TOTAL]).tolist()


def alternation_text(rng: np.random.Generator) -> list[int]:
    """5 to 9 numbers of one or two digits."""
    count, first = int(rng.integers(5, 10)), int(rng.integers(2))
    return [2 * int(rng.integers(0, 50)) + (first + i) % 2 for i in range(count)]


def length_text(rng: np.random.Generator) -> list[int]:
    """4 to 9 numbers."""
    count = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
    return [count, *rng.integers(0, 100, size=count - 1).tolist()]


WORD_RULES = {"palindrome": palindrome_text, "total": total_text,
              "alternation": alternation_text, "length": length_text}  # fmt: skip
FIRST_NUMBERS = {"palindrome": range(10), "total": range(1, 21), "alternation": range(100),
                 "length": range(LENGTHS[0], LENGTHS[1] + 1)}  # fmt: skip


def noisy_text(rng: np.random.Generator, rule: str) -> str:
    """A text of a word rule in which each number after the first is replaced with probability `WRONG`."""
    numbers = WORD_RULES[rule](rng)
    replaced = rng.random(len(numbers)) < WRONG
    others = rng.integers(0, 10 if rule == "palindrome" else 30, size=len(numbers))
    replaced[0] = False
    return " ".join(map(str, np.where(replaced, others, numbers)))


def sum_rows(rng: np.random.Generator, digits: int, count: int) -> list[dict[str, str]]:
    """Sums of two numbers of at most `digits` digits, at least one of which has so many, each with its answer."""
    pairs = ((operand(rng, digits), operand(rng, int(rng.integers(1, digits + 1)))) for _ in range(count))
    return [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in pairs]


# --- the tasks ---


class Task(NamedTuple):
    """One task: where it starts, and what scores it."""

    name: str
    digit_rule: DigitRule | None = None
    word_rule: str = ""  # a key of WORD_RULES
    whole: bool = False  # all or nothing
    operand_digits: int = 0  # sums with answers, from tiny-arithmetic as it is
    learned: bool = False  # the reward is a reward model of 500 pairs


def _digits(increasing: bool, multiple_of: int, learned: bool = False) -> Task:
    rule = DigitRule(increasing, multiple_of)
    return Task(rule.name + (" learned" if learned else ""), digit_rule=rule, learned=learned)


def _words(rule: str, whole: bool = False) -> Task:
    return Task(rule + (" whole" if whole else ""), word_rule=rule, whole=whole)


# The halves were written down before the first run. Defaults are chosen on the first; the second is looked at once.
HALVES = {
    "choosing": [
        _digits(True, 3), _digits(True, 7), _digits(False, 2), _words("palindrome"), _words("total", whole=True),
        _words("alternation"), _words("length"), Task("sums of two digits", operand_digits=2),
        _digits(True, 2, learned=True),
    ],
    "held out": [
        _digits(True, 5), _digits(False, 3), _digits(False, 6), _words("palindrome", whole=True), _words("total"),
        _words("alternation", whole=True), _words("length", whole=True), Task("sums of three digits", operand_digits=3),
        _digits(True, 3, learned=True),
    ],
}  # fmt: skip
NAMES = [task.name for half in HALVES.values() for task in half]
