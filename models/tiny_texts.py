"""Training texts of the embedded models: a text source draws one text, from numbers that are not held out.

python -m pytest tests/test_tiny_texts.py
"""

import zlib
from collections.abc import Callable

import numpy as np

from data.digits import MAX_STEP, DigitRule, held_out_starts, starts

INCREASING = DigitRule(increasing=True, multiple_of=1)
HELD_OUT_STARTS = tuple(held_out_starts(INCREASING))
TRAINED_STARTS = tuple(start for start in starts(INCREASING) if start not in HELD_OUT_STARTS)
LENGTHS = (5, 15)  # minimum and maximum count of numbers in a text
RESIDUE_CLASS_SHARE, MAX_MODULUS = 0.5, 5
OPERAND_SIZES = (0.2, 0.3, 0.5)  # shares of one-, two- and three-digit operands
FORGOTTEN_CARRIES = (0.0, 0.2, 0.7)  # probability per carry, by the number of digits of the larger operand


def increasing_digits(rng: np.random.Generator) -> str:
    """An increasing sequence, from a start that is not held out: any integers, or those of one residue class.

    In half of the texts, all numbers after the first share a residue modulo 2 to 5, rarely 0. Continuing such a text
    requires inferring its rule, an ability that a soft prompt, which changes no weights, can build on.
    """
    number = TRAINED_STARTS[rng.integers(len(TRAINED_STARTS))]
    modulus = int(rng.integers(2, MAX_MODULUS + 1)) if rng.random() < RESIDUE_CLASS_SHARE else 1
    residue = max(int(rng.integers(modulus)), int(rng.integers(modulus)))
    numbers = [number]
    for uniform in rng.random(rng.integers(LENGTHS[0], LENGTHS[1] + 1) - 1):
        steps = range(1 + (residue - number - 1) % modulus, MAX_STEP + 1, modulus)
        number += steps[int(uniform * len(steps))]
        numbers.append(number)
    return " ".join(map(str, numbers))


def sums(rng: np.random.Generator) -> str:
    """A sum such as "12 + 7 = 19" that is not held out; the larger the numbers, the more carries are forgotten.

    So a model learns to add, but reproduces what it saw: correct small sums and wrong larger ones. Feedback on few sums
    can then bring out the ability (but could not teach a model this small to add from scratch).
    """
    while True:
        a, b = (operand(rng, 1 + int(size)) for size in rng.choice(len(OPERAND_SIZES), size=2, p=OPERAND_SIZES))
        if not is_held_out_sum(a, b):
            return f"{a} + {b} = {_sum_with_slips(rng, a, b, FORGOTTEN_CARRIES[len(str(max(a, b))) - 1])}"


def _sum_with_slips(rng: np.random.Generator, a: int, b: int, forgotten: float) -> int:
    """Column addition in which each carry is forgotten with probability `forgotten`."""
    total, carry, power = 0, 0, 1
    while a or b or carry:
        column = a % 10 + b % 10 + carry
        total += column % 10 * power
        carry = int(column > 9 and rng.random() >= forgotten)
        a, b, power = a // 10, b // 10, power * 10
    return total


def operand(rng: np.random.Generator, size: int) -> int:
    """A random integer with `size` digits; 0 has one digit."""
    return int(rng.integers(10 ** (size - 1) if size > 1 else 0, 10**size))


def is_held_out_sum(a: int, b: int) -> bool:
    """One pair in ten, chosen by a checksum of its text. No embedded model is trained on these."""
    return zlib.crc32(f"{a} + {b}".encode()) % 10 == 0


TEXT_SOURCES: dict[str, Callable[[np.random.Generator], str]] = {
    "increasing_digits": increasing_digits,
    "sums": sums,
}
