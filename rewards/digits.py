"""The digit rule: how far a text is a strictly increasing (or decreasing) run of multiples of n.

The one scoring function of the digit task: the data generator labels rows with it, PPO takes it as the
ground-truth reward, and the demo measures with it. It reads text only; it needs no model and no mlx.

    DigitRule(increasing=True, multiple_of=2).score("8 20 22 30 36")  ->  1.0
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

FULL_LENGTH = 5  # a shorter text cannot score 1, else stopping after one good number were the best policy

# Plain decimal integers only: `int` alone would also take "1_000", "+4" and the digits of other scripts, none
# of which the data holds. 640 digits is the lowest limit that `int` can be set to, so it cannot raise.
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
        """The rule as it stands in file names: `increasing_mult_2`."""
        return f"{'increasing' if self.increasing else 'decreasing'}_mult_{self.multiple_of}"

    def score(self, text: str) -> float:
        """Length of the leading run that keeps the rule, over max(number of words, 5); in 0..1.

        Words are what white space separates. A word that is no plain decimal integer is passed over, but counts as
        a word; no text raises. The empty text scores 0.
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

    def reward(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """One score per completion, of prompt + completion. Raises ValueError if the lengths differ."""
        pairs = zip(prompts, completions, strict=True)
        return [self.score(prompt + completion) for prompt, completion in pairs]
