"""A policy's features: the instruction as hashed n-grams, and the state of its chain.

Words and word pairs are hashed with a sign (feature hashing, arXiv:0902.2206), numbers by their number of digits. A
model's embeddings would cost a forward pass per choice.
"""

import itertools
import math
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from synth.evolution.operators import OPERATORS
from synth.near_duplicates import tokens

BUCKETS = 64
SCALARS = ("length", "round", "failed", "novelty", "pass rate known", "pass rate", "one")


def size_of(operators: Sequence[str]) -> int:
    """The number of features: those of the text, the previous operator or none, and the scalars."""
    return BUCKETS + len(operators) + 1 + len(SCALARS)


SIZE = size_of(OPERATORS)


class Situation(NamedTuple):
    """The state before a choice. round: from 1, of `rounds`; last: the previous operator; failed: it was dropped.

    novelty: of the instruction when it joined the pool; pass_rate: None if unknown.
    """

    instruction: str
    round: int
    rounds: int
    last: str | None = None
    failed: bool = False
    novelty: float = 1.0
    pass_rate: float | None = None


def features(situations: Sequence[Situation], operators: Sequence[str] = OPERATORS) -> np.ndarray:
    """(N, size_of(operators)) float32. A text's n-gram counts have norm 1; all other features are within about 0..1."""
    return np.stack([_one(situation, operators) for situation in situations]).astype(np.float32)


def _one(situation: Situation, operators: Sequence[str]) -> np.ndarray:
    words = [re.sub(r"\d+", lambda found: "0" * len(found[0]), word) for word in tokens(situation.instruction)]
    grams = np.zeros(BUCKETS)
    for gram in (*words, *map(" ".join, itertools.pairwise(words))):
        code = zlib.crc32(gram.encode())
        grams[code % BUCKETS] += 1.0 if code >> 31 else -1.0
    norm = float(np.linalg.norm(grams))
    known = situation.pass_rate is not None
    scalars = (
        math.log1p(len(words)) / 5,
        situation.round / situation.rounds,
        float(situation.failed),
        situation.novelty,
        float(known),
        situation.pass_rate or 0.0,
        1.0,
    )
    last = [float(situation.last == name) for name in (*operators, None)]  # None at the start of a chain
    return np.concatenate([grams / norm if norm else grams, last, scalars])
