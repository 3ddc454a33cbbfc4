"""The offline teacher's reviews: short texts, and whether they praise or complain.

A text holds one to three opinions; the majority decides its label. Common opinion words are drawn more often than rare
ones, so a learner must see many texts to know them all.
"""

import re
from collections.abc import Sequence
from random import Random

from synth.offline.rules import Sample

LABELS = ("positive", "negative")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS = {  # from common to rare
    "positive": _words(
        "good great lovely excellent friendly clean tasty quick superb pleasant charming delightful fair solid cosy "
        "brilliant splendid generous cheerful flawless spotless gracious sublime heavenly exquisite prompt tender "
        "crisp wonderful helpful"
    ),
    "negative": _words(
        "bad awful dirty rude slow bland terrible cold noisy poor stale greasy broken dreadful shabby dismal cramped "
        "careless soggy rotten grim filthy hostile lousy tedious clumsy sour burnt horrible pricey"
    ),
}
SUBJECTS = _words("room food service staff soup bed breakfast waiter garden view lift bathroom coffee music bill")
FRAMES = ("the {} was {}", "we found the {} {}", "i would call the {} {}", "their {} is simply {}")
RARITY = 0.5  # a word's probability falls with its rank to this power


class Reviews:
    """Texts such as "the soup was bland and their staff is simply rude". A Rule (synth/offline/rules.py)."""

    keywords = ("review", "opinion", "hotel", "restaurant")
    summary = (
        "A short review with one to three opinions; the output says whether most of them are positive or negative."
    )

    def sample(self, rng: Random, passage: str | None) -> Sample:
        return self._text(rng, rng.choice((1, 2)))

    def changed(self, rng: Random, input: str, step: int, passage: str | None) -> Sample:
        """Harder: three opinions, one of which contradicts the others. Easier: one."""
        return self._text(rng, 3 if step > 0 else 1)

    def solve(self, rng: Random, input: str, passage: str | None) -> str | None:
        votes = {label: sum(word in WORDS[label] for word in re.findall(r"\w+", input.lower())) for label in LABELS}
        return None if not any(votes.values()) else max(LABELS, key=lambda label: votes[label])

    def wrong(self, rng: Random, input: str, output: str) -> str:
        return other(output)

    @staticmethod
    def _text(rng: Random, opinions: int) -> Sample:
        label = rng.choice(LABELS)
        labels = [label] * opinions if opinions < 3 else [label, other(label), label]
        parts = [rng.choice(FRAMES).format(rng.choice(SUBJECTS), _word(rng, WORDS[one])) for one in labels]
        return Sample(" and ".join(parts), label)


def other(label: str) -> str:
    """The opposite label."""
    return LABELS[1 - LABELS.index(label)]


def _word(rng: Random, words: Sequence[str]) -> str:
    return rng.choices(words, [place**-RARITY for place in range(1, len(words) + 1)])[0]
