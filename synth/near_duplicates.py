"""Near-duplicates: texts that are equal once normalised, or whose ROUGE-L (the F1 of the longest common subsequence
of tokens) reaches a threshold: 0.7, the rule of Self-Instruct (arXiv:2212.10560).

Meaning plays no part: a paraphrase in other words is no near-duplicate, nor is the same question in longer wording.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq

from common.errors import UserError

THRESHOLD = 0.7
# Words as in rouge-score, and symbols as well: 12 + 5 and 12 - 5 are two questions. Punctuation is no token.
TOKEN = re.compile(r"\w+|[^\w\s.,;:!?'\"()]")


class Duplicate(NamedTuple):
    """texts[number] repeats `texts[of]`, or `against[of]` where in_against is true; score is their ROUGE-L."""

    number: int
    of: int
    in_against: bool
    score: float

    @property
    def reason(self) -> str:
        return "same words" if self.score == 1.0 else f"ROUGE-L {self.score:.2f}"


def normalise(text: str) -> str:
    """The text in lower case, with single spaces and composed accents (NFC)."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def tokens(text: str) -> list[str]:
    """The words and symbols that ROUGE-L compares."""
    return TOKEN.findall(normalise(text))


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """ROUGE-L of two token lists, 0 to 1: 2 LCS / (len + len). 0 if both are empty."""
    return 2 * LCSseq.similarity(one, other) / max(len(one) + len(other), 1)


def find_duplicates(texts: Sequence[str], against: Sequence[str] = (), threshold: float = THRESHOLD) -> list[Duplicate]:
    """The texts that repeat one of `against`, or an earlier text that is itself kept; in order.

    Each is reported with the first text that is equal once normalised, else with the first whose ROUGE-L is at least
    the threshold; `against` comes before texts. Exact: pairs that are skipped cannot reach the threshold.
    Raises UserError unless 0 < threshold <= 1.
    """
    partners = _Partners([*against, *texts], checked_threshold(threshold))
    found = []
    for number in range(len(against) + len(texts)):
        match = partners.first_match(number) if number >= len(against) else None
        if match is None:
            partners.keep(number)
        else:
            of, score = match
            in_against = of < len(against)
            found.append(Duplicate(number - len(against), of if in_against else of - len(against), in_against, score))
    return found


def checked_threshold(threshold: float) -> float:
    """The threshold. Raises UserError unless 0 < threshold <= 1."""
    if not 0 < threshold <= 1:
        raise UserError(f"the ROUGE-L threshold {threshold} is not above 0 and at most 1; 0.7 is usual")
    return threshold


class _Partners:
    """The texts kept so far, indexed by their tokens.

    An LCS is at most the number of tokens that two texts share (the k-th occurrence of a token counts as its own
    item), so shared tokens are counted first, for all partners at once, and the LCS is computed for few pairs.
    """

    def __init__(self, texts: Iterable[str], threshold: float):
        self.threshold = threshold
        self.normalised = [normalise(text) for text in texts]
        self.by_text: dict[str, int] = {}
        numbers: dict[str, int] = {}
        items: dict[tuple[str, int], int] = {}
        self.strings, self.items = list[str](), list[np.ndarray]()
        for text in self.normalised:  # the tokens of all at once would take more than all of this
            row = TOKEN.findall(text)
            # rapidfuzz compares strings fastest: each distinct token becomes one character (there are 1.1 million).
            self.strings.append("".join([chr(numbers.setdefault(token, len(numbers))) for token in row]))
            self.items.append(_item_numbers(row, items))
        self.lengths = np.array([len(string) for string in self.strings], dtype=np.int64)
        # Room for each item's partners, filled as texts are kept: item i has room[start[i] : start[i] + filled[i]].
        sizes = np.bincount(np.concatenate([np.zeros(0, np.int32), *self.items]), minlength=len(items))
        self.start = np.cumsum(sizes) - sizes
        self.filled = np.zeros(len(items), dtype=np.int64)
        self.room = np.zeros(int(sizes.sum()), dtype=np.int32)

    def keep(self, number: int) -> None:
        """Compare later texts with this one."""
        items = self.items[number]
        self.room[self.start[items] + self.filled[items]] = number
        self.filled[items] += 1
        self.by_text.setdefault(self.normalised[number], number)

    def first_match(self, number: int) -> tuple[int, float] | None:
        """The first kept text that this one repeats, and their ROUGE-L."""
        same = self.by_text.get(self.normalised[number])
        if same is not None:
            return same, 1.0
        items = self.items[number]
        ends = (self.start[items] + self.filled[items]).tolist()
        slices = [self.room[a:b] for a, b in zip(self.start[items].tolist(), ends, strict=True) if b > a]
        if not slices:
            return None
        shared = np.bincount(np.concatenate(slices))
        # The smallest LCS of a duplicate; the tiny term undoes rounding where the product is a whole number.
        needed = np.ceil((self.lengths[: len(shared)] + len(items)) * (self.threshold / 2) - 1e-9).clip(1)
        for partner in np.flatnonzero(shared >= needed).tolist():
            least = int(needed[partner])
            length = LCSseq.similarity(self.strings[number], self.strings[partner], score_cutoff=least)
            if length >= least:
                return partner, 2 * length / float(self.lengths[partner] + len(items))
        return None


def _item_numbers(row: list[str], items: dict[tuple[str, int], int]) -> np.ndarray:
    """A text's tokens as distinct numbers: (token, its occurrences so far) → number."""
    before: Counter[str] = Counter()
    numbers = []
    for token in row:
        numbers.append(items.setdefault((token, before[token]), len(items)))
        before[token] += 1
    return np.array(numbers, dtype=np.int32)
