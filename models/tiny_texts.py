"""What the embedded models are trained on: a text source draws one text, from numbers that are not held out.

Leaves out the training (models/tiny.py) and what a trained model can do (models/tiny_measures.py).

    python -m pytest tests/test_tiny_texts.py
"""

import zlib
from collections.abc import Callable

import numpy as np

from data.digits import MAX_STEP, DigitRule, held_out_starts, starts

INCREASING = DigitRule(increasing=True, multiple_of=1)
HELD_OUT_STARTS = tuple(held_out_starts(INCREASING))
TRAINED_STARTS = tuple(start for start in starts(INCREASING) if start not in HELD_OUT_STARTS)
LENGTHS = (5, 15)  # fewest and most numbers in a text
RESIDUE_CLASS_SHARE, MAX_MODULUS = 0.5, 5
OPERAND_SIZES = (0.2, 0.3, 0.5)  # shares of operands of one, two and three digits
FORGOTTEN_CARRIES = (0.0, 0.2, 0.7)  # share of them, by the digits of the larger operand


def increasing_digits(rng: np.random.Generator) -> str:
    """An increasing sequence, from a start that is not held out: any integers, or those of one residue class.

    In half of the texts all numbers after the first are alike modulo 2 to 5, whatever the first is: seldom
    multiples. To continue such a text is to read its rule off its numbers, which is what a soft prompt, as it
    changes no weight, can build on.
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
    """A sum such as "12 + 7 = 19" that is not held out; the larger its numbers, the more carries are forgotten.

    So a model learns how to add, but mostly writes what it saw: right small sums and wrong larger ones. Feedback on
    few sums can then bring out what it knows of all (it cannot teach a model this small to add from nothing).
    """
    while True:
        a, b = (operand(rng, 1 + int(size)) for size in rng.choice(len(OPERAND_SIZES), size=2, p=OPERAND_SIZES))
        if not is_held_out_sum(a, b):
            return f"{a} + {b} = {_sum_with_slips(rng, a, b, FORGOTTEN_CARRIES[len(str(max(a, b))) - 1])}"


def _sum_with_slips(rng: np.random.Generator, a: int, b: int, forgotten: float) -> int:
    """Column addition in which each carry is forgotten with this probability."""
    total, carry, power = 0, 0, 1
    while a or b or carry:
        column = a % 10 + b % 10 + carry
        total += column % 10 * power
        carry = int(column > 9 and rng.random() >= forgotten)
        a, b, power = a // 10, b // 10, power * 10
    return total


def operand(rng: np.random.Generator, size: int) -> int:
    """A whole number of `size` digits; 0 is one of one digit."""
    return int(rng.integers(10 ** (size - 1) if size > 1 else 0, 10**size))


def is_held_out_sum(a: int, b: int) -> bool:
    """One pair in ten, drawn by a checksum of its text: no embedded model is trained on it."""
    return zlib.crc32(f"{a} + {b}".encode()) % 10 == 0


TEXT_SOURCES: dict[str, Callable[[np.random.Generator], str]] = {
    "increasing_digits": increasing_digits,
    "sums": sums,
}
