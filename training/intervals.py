"""95 % confidence intervals of scores: of one model's mean, and of the difference of two on the same questions.

Where every score is 0 or 1, Wilson's interval and Agresti and Min's, else the bootstrap over the questions.
These do not include how much a result varies from seed to seed; `over_seeds` does.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959964  # of the normal distribution, two-sided 95 %
RESAMPLES = 10_000
# Of the t distribution, two-sided 95 %, by degrees of freedom from 1 to 19.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Difference(NamedTuple):
    """Second minus first mean. gained, lost: questions on which the second, or the first, scored higher.

    p_value: McNemar's exact test, two-sided: the probability of a split this uneven if neither model is better.
    """

    interval: Interval
    gained: int
    lost: int
    p_value: float


def wilson(successes: int, count: int) -> Interval:
    """Wilson's score interval of a share (J. Am. Stat. Assoc. 22, 1927). Raises ValueError for a count of 0."""
    if count < 1:
        raise ValueError("an interval needs at least one score")
    share, square = successes / count, Z * Z / count
    centre = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def mean_interval(scores: Sequence[float]) -> Interval:
    """The mean of one model's scores: Wilson's interval of a share, else by the bootstrap."""
    if set(scores) <= {0.0, 1.0}:
        return wilson(round(sum(scores)), len(scores))
    return bootstrap(scores)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean and the 2.5th and 97.5th percentile of the means of resampled values (Efron, 1979)."""
    if not len(values):
        raise ValueError("an interval needs at least one score")
    given, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [given[rng.integers(len(given), size=len(given))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(given.mean()), float(low), float(high))


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of one figure a run, or of one difference a seed, and Student's interval: 2 to 20 runs.

    Raises ValueError for another number of runs.
    """
    if not 2 <= len(values) <= len(STUDENT) + 1:
        raise ValueError(f"{len(values)} runs; an interval needs 2 to {len(STUDENT) + 1}")
    mean = float(np.mean(values))
    half = STUDENT[len(values) - 2] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """How much better the second model is on the same questions. first, second: a score per question, in one order."""
    deltas = [b - a for a, b in zip(first, second, strict=True)]
    gained, lost = sum(delta > 0 for delta in deltas), sum(delta < 0 for delta in deltas)
    shares = set(first) | set(second) <= {0.0, 1.0}
    interval = agresti_min(gained, lost, len(deltas)) if shares else bootstrap(deltas)
    return Difference(interval, gained, lost, mcnemar(gained, lost))


def agresti_min(gained: int, lost: int, count: int) -> Interval:
    """The difference of two paired shares: Wald's interval with half a question added to each of the four outcomes.

    Agresti and Min, Statistics in Medicine 24 (2005). Unlike the bootstrap it has a width even if no question differs.
    """
    if count < 1:
        raise ValueError("an interval needs at least one score")
    centre = (gained - lost) / (count + 2)
    half = Z * math.sqrt((gained + lost + 1) / (count + 2) - centre * centre) / math.sqrt(count + 2)
    return Interval((gained - lost) / count, max(-1.0, centre - half), min(1.0, centre + half))


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of a split of gained + lost questions (McNemar, 1947; a binomial test at 1/2)."""
    total = gained + lost
    tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total
    return min(1.0, 2 * tail)
