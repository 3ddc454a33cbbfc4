"""The numbers that flags take: each flag's `type` says which, so that the range stands where the flag is defined.

    parser.add_argument("--gamma", type=SHARE, help="discount per token")

The same check serves YAML files and the config.json of a resumed run (common.parser). None of them is infinite or NaN.
"""

import argparse
import math
from dataclasses import dataclass

LARGEST = 2**53  # whole numbers up to it are exact as floats, too, and sums of a few fit 64 bits


@dataclass(frozen=True)
class Numbers:
    """A range of whole or of real numbers, called on text. above, below: bounds that are not part of it."""

    whole: bool = False
    least: float = -LARGEST
    most: float = LARGEST
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: object) -> bool:
        """Whether `value` is such a number, by its type as well: True and "1" are none."""
        types = (int,) if self.whole else (int, float)
        if type(value) not in types or not isinstance(value, int | float):
            return False
        return self.least <= value <= self.most and value > self.above and not value >= self.below < math.inf

    def __call__(self, text: str) -> int | float:
        """The number that `text` says. Raises ArgumentTypeError for another, and for what is none."""
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(str(self)) from None
        if value not in self:
            raise argparse.ArgumentTypeError(str(self))
        return value

    def __str__(self) -> str:
        """What a number has to be."""
        kind = "a whole number" if self.whole else "a number"
        bounds = [f"above {self.above:g}"] if self.above > -math.inf else []
        bounds += [f"at least {self.least:.16g}"] if self.least > -LARGEST else []
        bounds += [f"at most {self.most:.16g}"] if self.most < LARGEST else []
        bounds += [f"below {self.below:g}"] if self.below < math.inf else []
        return f"{kind} {' and '.join(bounds)}" if bounds else kind


COUNT = Numbers(whole=True, above=0)
NATURAL = Numbers(whole=True, least=0)
COUNT_OR_ALL = Numbers(whole=True, least=-1)  # -1: all
SEED = Numbers(whole=True, least=0, most=2**32 - 1)  # what NumPy takes, and what a step's own seed leaves room for
FINITE = Numbers()
POSITIVE = Numbers(above=0)
NOT_NEGATIVE = Numbers(least=0)
SHARE = Numbers(least=0, most=1)
SHARE_BELOW_1 = Numbers(least=0, below=1)
