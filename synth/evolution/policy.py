"""Policies that choose the operator: their interface, constant probabilities, and LinUCB.

    constant    one distribution for all situations: uniform, a single operator, or another policy's marginals
    linucb      ridge regression of the reward per action, with a bonus for uncertainty (arXiv:1003.0146)

All but the constant give every action at least probability `floor`, so that other policies can be evaluated from their
logs (synth/evolution/off_policy.py). Before training no action is preferred.

Not here: policies trained by gradient (see synth/evolution/gradient.py).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from synth.evolution.features import SIZE, size_of
from synth.evolution.operators import ACTIONS


class Batch(NamedTuple):
    """E episodes of up to C choices; the `group_size` episodes of one start side by side.

    features: (E, C, F) float32; actions: (E, C) int; propensities, rewards, mask: (E, C) float32, mask 1 at a choice.
    """

    features: np.ndarray
    actions: np.ndarray
    propensities: np.ndarray
    rewards: np.ndarray
    mask: np.ndarray
    group_size: int


MOST_UNITS = 4096  # of a hidden layer: more than that only a damaged file asks for


@dataclass(frozen=True)
class PolicySettings:
    """How a policy learns. Raises UserError for invalid settings.

    floor: minimum probability of an action; gamma: discount per choice (linucb: always 0); alpha: linucb's bonus, in
    standard deviations; hidden: units of each of the MLP's two hidden layers.
    """

    floor: float = 0.02
    gamma: float = 0.5
    learning_rate: float = 0.01
    hidden: int = 32
    entropy_coef: float = 0.01
    alpha: float = 0.5
    clip_range: float = 0.2
    ppo_epochs: int = 4
    gae_lambda: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.floor < 1:
            raise UserError(f"--floor is {self.floor}; it must be at least 0 and below 1/{len(ACTIONS)}")
        if not 0 <= self.gamma <= 1:
            raise UserError(f"--gamma is {self.gamma}; it must be between 0 and 1")
        if not 1 <= self.hidden <= MOST_UNITS:
            raise UserError(f"hidden is {self.hidden!s:.20}; it must be between 1 and {MOST_UNITS}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed!s:.20}; it must be between 0 and 2^32 - 1")


DEFAULT = PolicySettings()


class OperatorPolicy:
    """The interface of all policies. actions: A of them; size: F features."""

    kind = ""
    learns = False
    names: tuple[str, ...] = ACTIONS  # of the actions

    def __init__(self, settings: PolicySettings = DEFAULT, actions: int = len(ACTIONS), size: int = SIZE):
        if not settings.floor < 1 / actions:
            raise UserError(f"--floor is {settings.floor}; it must be at least 0 and below 1/{actions}")
        self.settings, self.actions, self.size = settings, actions, size

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(N, F) → (N, A) float64, each row of sum 1."""
        raise NotImplementedError

    def learn(self, batch: Batch) -> dict[str, float]:
        """Learn from a batch; returns figures to report."""
        return {}

    def freeze(self) -> None:
        """Explore no further than by the floor and the policy's own randomness."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All of its state."""
        return {}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what `arrays` gave."""


class Constant(OperatorPolicy):
    """The same probabilities in every situation: uniform, or `shares` (A,)."""

    kind = "constant"

    def __init__(self, settings: PolicySettings = DEFAULT, actions: int = len(ACTIONS), size: int = SIZE, shares=None):
        super().__init__(settings, actions, size)
        self.shares = np.full(actions, 1 / actions) if shares is None else np.asarray(shares, dtype=np.float64)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        return np.tile(self.shares, (len(features), 1))

    def arrays(self) -> dict[str, np.ndarray]:
        return {"shares": self.shares}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.shares = arrays["shares"]


def fixed(action: int, actions: int = len(ACTIONS), size: int = SIZE, names: tuple[str, ...] = ACTIONS) -> Constant:
    """A policy that always chooses one action."""
    made = Constant(actions=actions, size=size, shares=np.eye(actions)[action])
    made.names = names
    return made


def without_stop(names: tuple[str, ...] = ACTIONS) -> Constant:
    """All operators with equal probability, and no stop."""
    count = len(names) - 1
    made = Constant(actions=len(names), size=size_of(names[:-1]), shares=[1 / count] * count + [0.0])
    made.names = names
    return made


def marginal(policy: OperatorPolicy, features: np.ndarray) -> Constant:
    """A policy's mean action probabilities over some situations: the same policy without state."""
    return Constant(actions=policy.actions, shares=policy.probabilities(features).mean(axis=0))


class LinUCB(OperatorPolicy):
    """Per action a ridge regression (λ = 1) of the immediate reward; the highest upper bound wins, ties at random."""

    kind = "linucb"
    learns = True

    def __init__(self, settings: PolicySettings = DEFAULT, actions: int = len(ACTIONS), size: int = SIZE):
        super().__init__(settings, actions, size)
        self.alpha = settings.alpha
        self.covariances = np.tile(np.eye(size), (actions, 1, 1))  # (A, F, F)
        self.sums = np.zeros((actions, size))

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        x = features.astype(np.float64)
        means = x @ np.linalg.solve(self.covariances, self.sums[..., None])[..., 0].T  # (N, A)
        solved = np.linalg.solve(self.covariances, np.broadcast_to(x.T, (self.actions, *x.T.shape)))  # (A, F, N)
        spread = np.einsum("nf,afn->na", x, solved)
        bounds = means + self.alpha * np.sqrt(spread)
        best = bounds >= bounds.max(axis=1, keepdims=True) - 1e-9
        greedy = best / best.sum(axis=1, keepdims=True)
        return (1 - self.actions * self.settings.floor) * greedy + self.settings.floor

    def learn(self, batch: Batch) -> dict[str, float]:
        real = batch.mask > 0
        x, actions, rewards = batch.features[real].astype(np.float64), batch.actions[real], batch.rewards[real]
        for action in range(self.actions):
            own = x[actions == action]
            self.covariances[action] += own.T @ own
            self.sums[action] += own.T @ rewards[actions == action]
        return {}

    def freeze(self) -> None:
        self.alpha = 0.0

    def arrays(self) -> dict[str, np.ndarray]:
        return {"covariances": self.covariances, "sums": self.sums}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.covariances, self.sums = arrays["covariances"].copy(), arrays["sums"].copy()
