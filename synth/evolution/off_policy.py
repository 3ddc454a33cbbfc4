"""Off-policy evaluation: what a policy would have earned, estimated from another's logs by importance sampling.

Needs only the logging policy's propensities, none of which may be 0 where the evaluated policy may choose; the floor of
synth/evolution/policy.py ensures that. There is no reward model, so estimates are not doubly robust.
"""

import numpy as np

from training.intervals import Interval, bootstrap


def episode_values(
    rewards: np.ndarray, propensities: np.ndarray, targets: np.ndarray, mask: np.ndarray, gamma: float = 1.0
) -> np.ndarray:
    """(E,): an unbiased estimate of the evaluated policy's return from each episode.

        Σ_t γ^t (Π_{s ≤ t} targets_s / propensities_s) r_t        by Precup, Sutton and Singh (2000), per decision

    rewards, propensities, targets, mask: (E, C); propensities: with which the logged actions were chosen; targets: with
    which the evaluated policy would have chosen them. Raises ValueError if a choice's propensity is not above 0.
    """
    real = mask > 0
    if not (propensities[real] > 0).all():
        raise ValueError("an action was logged with a propensity of 0; log with a floor")
    ratios = np.where(real, targets / np.where(real, propensities, 1.0), 1.0)
    discounts = gamma ** np.arange(rewards.shape[1])
    return (discounts * np.cumprod(ratios, axis=1) * np.where(real, rewards, 0.0)).sum(axis=1)


def value_interval(values: np.ndarray) -> Interval:
    """The mean of `episode_values` and its 95 % interval, by the bootstrap over episodes."""
    return bootstrap(values.tolist())
