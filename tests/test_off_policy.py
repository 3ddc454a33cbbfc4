"""Another policy's value from logs: unbiased, by going through every episode there can be."""

import itertools

import numpy as np
import pytest

from synth.evolution.off_policy import episode_values, value_interval

LOGGING, JUDGED = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])


def reward(path):
    """Of the last choice of a path: it depends on all before it."""
    return 1.0 + sum((place + 1) * action for place, action in enumerate(path))


def test_the_expected_estimate_is_the_judged_policys_value():
    """Episodes of two choices, action 2 ends one at once: all 7 of them, each with its probability."""
    paths = [(2,), *itertools.product((0, 1), (0, 1, 2))]
    rewards, propensities, targets, mask = (np.zeros((len(paths), 2)) for _ in range(4))
    chances = {name: np.array([np.prod(policy[list(path)]) for path in paths])
               for name, policy in (("logging", LOGGING), ("judged", JUDGED))}  # fmt: skip
    for row, path in enumerate(paths):
        for place, action in enumerate(path):
            rewards[row, place], mask[row, place] = reward(path[: place + 1]), 1
            propensities[row, place], targets[row, place] = LOGGING[action], JUDGED[action]
    returns = (rewards * [1, 0.5]).sum(axis=1)
    estimates = episode_values(rewards, propensities, targets, mask, gamma=0.5)
    assert chances["logging"].sum() == pytest.approx(1) and chances["judged"].sum() == pytest.approx(1)
    assert chances["logging"] @ estimates == pytest.approx(chances["judged"] @ returns)
    assert abs(chances["logging"] @ returns - chances["judged"] @ returns) > 0.3  # the policies do differ
    assert episode_values(rewards, propensities, propensities, mask, 0.5) == pytest.approx(returns)


def test_one_choice_by_hand():
    """Rewards 1 and 3, logged with 1/2 and 1/4, judged with 1/4 and 1/2: (0.5 · 1 + 2 · 3) / 2."""
    rewards, logged, judged = np.array([[1.0], [3.0]]), np.array([[0.5], [0.25]]), np.array([[0.25], [0.5]])
    found = episode_values(rewards, logged, judged, np.ones((2, 1)))
    assert found.tolist() == [0.5, 6.0] and value_interval(found).mean == 3.25


def test_what_the_log_cannot_tell_is_refused_and_pads_are_not_read():
    nothing = np.array([[0.0, 0.0]])
    with pytest.raises(ValueError, match="floor"):
        episode_values(np.ones((1, 2)), nothing, nothing, np.array([[1, 0]]))
    found = episode_values(
        np.array([[1.0, np.nan]]), np.array([[0.5, 0.0]]), np.array([[0.5, np.nan]]), np.array([[1, 0]])
    )
    assert found.tolist() == [1.0]
