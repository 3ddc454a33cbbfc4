"""The digit rule: how much of a text is a strictly increasing (or decreasing) run of multiples of n.

The only scoring function of the digit task: the data generator labels rows with it, rewards/digits.py wraps it as a
reward, and the demo evaluates with it. Also the possible first numbers, and those that are held out.

    DigitRule(increasing=True, multiple_of=2).score("8 20 22 30 36")  ->  1.0
"""

import re
from dataclasses import dataclass

from common.errors import UserError

INCREASING_STARTS = (0, 200)  # both ends included
DECREASING_STARTS = (100, 1000)
MAX_STEP = 50

FULL_LENGTH = 5  # shorter texts cannot score 1; otherwise stopping after one good number would be optimal

# Plain decimal integers only: `int` alone would also accept "1_000", "+4" and digits of other scripts. 640 digits is
# the lowest limit that `int` can be configured to, so it cannot raise.
_INTEGER = re.compile(r"-?[0-9]{1,640}")


@dataclass(frozen=True)
class DigitRule:
    """Strictly increasing (or strictly decreasing) integers, each a multiple of `multiple_of`.

    Raises ValueError if `multiple_of` is below 1.
    """

    increasing: bool = True
    multiple_of: int = 2

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of must be at least 1, not {self.multiple_of}")

    @property
    def name(self) -> str:
        """The rule as used in file names: `increasing_mult_2`."""
        return f"{'increasing' if self.increasing else 'decreasing'}_mult_{self.multiple_of}"

    def score(self, text: str) -> float:
        """Length of the leading run that follows the rule, divided by max(number of words, 5); in 0..1.

        Words are separated by white space. A word that is not a plain decimal integer is skipped but still counts as a
        word. Never raises; the empty text scores 0.
        """
        words = text.split()
        run = 0
        previous: int | None = None
        for word in words:
            if _INTEGER.fullmatch(word) is None:
                continue
            number = int(word)
            if number % self.multiple_of != 0 or not self._follows(number, previous):
                break
            run += 1
            previous = number
        return run / max(len(words), FULL_LENGTH)

    def _follows(self, number: int, previous: int | None) -> bool:
        if previous is None:
            return True
        return number > previous if self.increasing else number < previous


def starts(rule: DigitRule) -> list[int]:
    """All first numbers that the digit rule allows."""
    low, high = INCREASING_STARTS if rule.increasing else DECREASING_STARTS
    return [start for start in range(low, high + 1) if start % rule.multiple_of == 0]


def held_out_starts(rule: DigitRule) -> list[int]:
    """The starts that PPO does not train on: every tenth multiple of n, beginning with the eighth.

    If there are fewer than eight multiples, the last one; a single multiple is not held out. For n = 1 they come in
    pairs (14, 15, 34, 35, ...), which include those of n = 2; the embedded model is not trained on these.
    """
    every = starts(rule)
    if rule.multiple_of == 1:
        return [start for start in every if start // 2 % 10 == 7]
    return every[min(7, len(every) - 1) :: 10] if len(every) > 1 else []


def digit_prompts(rule: DigitRule) -> list[str]:
    """One prompt per start that is not held out."""
    held_out = held_out_starts(rule)
    prompts = [str(start) for start in starts(rule) if start not in held_out]
    if not prompts:
        raise UserError(f"no start within the rule's range is a multiple of {rule.multiple_of}; use a smaller one")
    return prompts
