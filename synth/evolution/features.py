"""What a policy sees when it chooses an operator, as numbers: the text by hashed n-grams, and where its chain stands.

Words and pairs of words are hashed with a sign (feature hashing, arXiv:0902.2206), numbers by how many digits they
have. Leaves out embeddings by a model, which would cost a forward for each choice.

    python -m pytest tests/test_policy.py -k features
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
LAST = (*OPERATORS, None)  # the operator before this choice, None at the start of a chain
SCALARS = ("length", "round", "failed", "novelty", "pass rate known", "pass rate", "one")
SIZE = BUCKETS + len(LAST) + len(SCALARS)


class Situation(NamedTuple):
    """Before a choice. round: from 1, of `rounds`; last: the chain's last operator; failed: what it made was dropped.

    novelty: of the instruction to the pool, when it joined; pass_rate: of it, None where unknown.
    """

    instruction: str
    round: int
    rounds: int
    last: str | None = None
    failed: bool = False
    novelty: float = 1.0
    pass_rate: float | None = None


def features(situations: Sequence[Situation]) -> np.ndarray:
    """(N, SIZE) float32. The n-grams of a text have norm 1 together; every other number lies within about 0..1."""
    return np.stack([_one(situation) for situation in situations]).astype(np.float32)


def _one(situation: Situation) -> np.ndarray:
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
    last = [float(situation.last == name) for name in LAST]
    return np.concatenate([grams / norm if norm else grams, last, scalars])
