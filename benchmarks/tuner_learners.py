"""Agents for benchmarks/tuner_controls.py that the library does not have: ways to learn from few, noisy measurements.

docs/tuner.md says what each was worth. An agent here may have a method `chosen`: the index of the outcome whose
settings it takes for the best.
"""

from collections.abc import Callable, Sequence
from random import Random
from statistics import mean

import numpy as np

from synth.sampler import Settings, Space
from synth.tuning.agents import Defaults, Outcome

FIRST = 4  # measurements, the baseline's among them, before the model chooses
CANDIDATES = 256  # random settings, of which the most promising is proposed
# Of standardised metrics; settings are numbers in 0..1. Chosen on simulated metrics (docs/tuner.md).
TREND, REST, LENGTH, NOISE = 25.0, 0.3, 0.3, 0.1  # variances of weights, process and noise; the process's length scale

# (N, D) measured points, their (N,) values, (M, D) new points -> (M,) expected values, (M,) standard deviations
Model = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def quadratic_terms(points: np.ndarray) -> np.ndarray:
    """1, the columns, their squares and products. points: (N, D)."""
    columns = points.shape[1]
    products = [points[:, i] * points[:, j] for i in range(columns) for j in range(i, columns)]
    return np.column_stack([np.ones(len(points)), points, *products])


def trend_and_process(known: np.ndarray, values: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A Model: the posterior of a Gaussian process whose covariance is a random quadratic's plus an RBF kernel."""

    def covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        distances = ((a[:, None] - b[None]) ** 2).sum(axis=-1)
        trend = TREND * quadratic_terms(a) @ quadratic_terms(b).T
        return np.asarray(trend + REST * np.exp(-distances / (2 * LENGTH**2)))

    across = covariance(new, known)
    weights = np.linalg.solve(covariance(known, known) + NOISE * np.eye(len(known)), across.T)  # (N, M)
    own = TREND * (quadratic_terms(new) ** 2).sum(axis=1) + REST
    return weights.T @ values, np.sqrt(np.maximum(own - (weights * across.T).sum(axis=0), 0))


def gaussian_process(known: np.ndarray, values: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A Model: RBF kernel, whose length and share of noise maximise the likelihood."""

    def kernel(a: np.ndarray, b: np.ndarray, length: float, noise: float) -> np.ndarray:
        return (1 - noise) * np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * length**2))

    def likelihood(length: float, noise: float) -> float:
        covariance = kernel(known, known, length, noise) + noise * np.eye(len(known))
        return -float(values @ np.linalg.solve(covariance, values) + np.linalg.slogdet(covariance)[1])

    grid = [(length, noise) for length in (0.2, 0.4, 0.8, 1.6) for noise in (0.03, 0.1, 0.3, 0.6)]
    length, noise = max(grid, key=lambda one: likelihood(*one))
    inverse = np.linalg.inv(kernel(known, known, length, noise) + noise * np.eye(len(known)))
    across = kernel(new, known, length, noise)
    variances = 1 - noise - np.einsum("nk,kl,nl->n", across, inverse, across)
    return across @ inverse @ values, np.sqrt(np.maximum(variances, 0))


def linear(known: np.ndarray, values: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A Model: Bayesian regression on the columns, their squares and products; wide prior, noise of variance 0.3."""
    x, z = quadratic_terms(known), quadratic_terms(new)
    covariance = np.linalg.inv(x.T @ x / 0.3 + np.eye(x.shape[1]) / 25)
    return z @ covariance @ x.T @ values / 0.3, np.sqrt(np.einsum("nk,kl,nl->n", z, covariance, z))


def drawn(space: Space, rng: Random) -> Settings:
    """Settings drawn uniformly from the whole space."""
    temperature, top_p = (rng.uniform(*limits) for limits in (space.temperature, space.top_p))
    return space.within(Settings(temperature, top_p, rng.choice(space.templates), rng.choice(space.methods)))


class UniformDraws(Defaults):
    """Settings drawn uniformly from the whole space, whatever the last outcome."""

    def __init__(self, space: Space, seed: int):
        self.space, self.rng = space, Random(seed)

    def propose(self, last: Outcome) -> Settings:
        return drawn(self.space, self.rng)


class Repeated(Defaults):
    """The same settings in every iteration."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def propose(self, last: Outcome) -> Settings:
        return self.settings

    def chosen(self, outcomes: Sequence[Outcome]) -> int:
        return len(outcomes) - 1


class Bandit(Defaults):
    """An agent that proposes by upper confidence bounds, as LinUCB (arXiv:1003.0146) and GP-UCB (arXiv:0912.3995) do.

    It chooses the tried settings of the highest expected metric, not of the highest metric, which is often luck.

    model: of the metric; earlier: outcomes of an earlier run, which it knows as well.
    """

    def __init__(self, space: Space, seed: int = 0, model: Model = trend_and_process, earlier: Sequence[Outcome] = ()):
        self.space, self.seed, self.model, self.earlier = space, seed, model, [*earlier]
        self.seen: list[Outcome] = []

    def propose(self, last: Outcome) -> Settings:
        if not self.seen:
            self.seen.append(last)  # the baseline is a measurement as well
        rng = Random(f"{self.seed} {len(self.seen)}")  # so that draws depend only on the number of measurements
        if len(self.seen) + len(self.earlier) < FIRST:
            return drawn(self.space, rng)
        candidates = [drawn(self.space, rng) for _ in range(CANDIDATES)]
        expected, deviations = self.posterior(self.seen, candidates)
        return candidates[int((expected + deviations).argmax())]

    def learn(self, outcome: Outcome) -> None:
        self.seen.append(outcome)

    def chosen(self, outcomes: Sequence[Outcome]) -> int:
        """The index of the outcome whose settings have the highest expected metric."""
        return int(self.posterior(outcomes, [one.settings for one in outcomes])[0].argmax())

    def posterior(self, outcomes: Sequence[Outcome], settings: Sequence[Settings]) -> tuple[np.ndarray, np.ndarray]:
        """Expected metrics of settings and their standard deviations, given some outcomes: (M,) each."""
        known = [*self.earlier, *outcomes]
        metrics = np.array([one.metric for one in known])
        scale = metrics.std() or 1.0
        points, new = self._points(known, settings)
        expected, deviations = self.model(points, (metrics - metrics.mean()) / scale, new)
        return expected * scale + metrics.mean(), deviations * scale

    def _points(self, outcomes: Sequence[Outcome], settings: Sequence[Settings]) -> tuple[np.ndarray, np.ndarray]:
        """Settings of the outcomes, and those asked about, as the model's points."""
        known = np.array([self.space.as_vector(one.settings) for one in outcomes])
        return known, np.array([self.space.as_vector(one) for one in settings])


class BanditChooses(UniformDraws):
    """Uniform draws, of which the bandit's model chooses the best at the end."""

    def chosen(self, outcomes: Sequence[Outcome]) -> int:
        return Bandit(self.space).chosen(outcomes)


class BatchFeatures(Bandit):
    """The bandit, with the features of each batch among its points; those of a batch not yet made are predicted."""

    def _points(self, outcomes: Sequence[Outcome], settings: Sequence[Settings]) -> tuple[np.ndarray, np.ndarray]:
        known, new = super()._points(outcomes, settings)
        features = np.array([one.features for one in outcomes])
        average = features.mean(axis=0)
        predicted = average + np.column_stack([linear(known, column, new)[0] for column in (features - average).T])
        return np.column_stack([known, features]), np.column_stack([new, predicted])


class Halving(UniformDraws):
    """Sequential halving: uniform draws at first, then the better half of those left is measured again.

    Each round measures as often as it has places; the best mean of those left is chosen.
    """

    def __init__(self, space: Space, seed: int, first: int):
        super().__init__(space, seed)
        self.left = [drawn(self.space, self.rng) for _ in range(max(2, first))]
        self.measured: dict[Settings, list[float]] = {one: [] for one in self.left}
        self.queue = [*self.left]

    def propose(self, last: Outcome) -> Settings:
        if not self.queue:
            self.left = sorted(self.left, key=self._mean, reverse=True)[: max(2, len(self.left) // 2)]
            self.queue = [*self.left]
        return self.queue.pop(0)

    def learn(self, outcome: Outcome) -> None:
        self.measured[outcome.settings].append(outcome.metric)

    def chosen(self, outcomes: Sequence[Outcome]) -> int:
        return [one.settings for one in outcomes].index(max(self.left, key=self._mean))

    def _mean(self, settings: Settings) -> float:
        return mean(self.measured[settings]) if self.measured[settings] else float("-inf")
