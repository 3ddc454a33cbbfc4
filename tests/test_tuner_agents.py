"""Random search, TPE and no search: their steps by hand, what they find, and that they go on to the bit."""

import json
import sys
from collections import Counter

import numpy as np
import pytest

from common.errors import UserError
from synth.sampler import METHODS, Settings, Space
from synth.tuning.agents import Defaults, Outcome, RandomSearch, TreeParzen, rng_from, rng_state

SPACE = Space((0.0, 2.0), (0.1, 1.0), ("plain", "careful"), METHODS)
PLAIN = Space((0.0, 2.0), (0.1, 1.0))


def quality(settings):
    return -((settings.temperature - 0.6) ** 2) - (settings.top_p - 0.7) ** 2 + 0.1 * (settings.template == "careful")


def search(agent, count, start=None):
    """The settings that an agent proposes where the metric is `quality`."""
    start = start or Settings()
    last, found = Outcome(start, quality(start)), []
    for _ in range(count):
        settings = agent.propose(last)
        last = Outcome(settings, quality(settings), quality(settings) - last.metric)
        agent.learn(last)
        found.append(settings)
    return found


def test_random_search_steps_by_a_twentieth_up_or_down():
    agent, start = RandomSearch(PLAIN, seed=1), Settings(0.5, 0.5)
    steps: Counter[tuple[float, float]] = Counter()
    for _ in range(200):
        found = agent.propose(Outcome(start, 1.0))
        steps[round(found.temperature - 0.5, 9), round(found.top_p - 0.5, 9)] += 1
        agent.learn(Outcome(found, 0.0))
    assert set(steps) == {(a, b) for a in (-0.05, 0.05) for b in (-0.05, 0.05)} and min(steps.values()) > 30


def test_random_search_keeps_what_is_better_and_undoes_the_rest():
    agent = RandomSearch(PLAIN, seed=0)
    first = agent.propose(Outcome(Settings(0.5, 0.5), 0.7))
    agent.learn(Outcome(first, 0.5))  # worse than 0.7: undone
    second = agent.propose(Outcome(first, 0.5, -0.2))
    assert abs(second.temperature - 0.5) == pytest.approx(0.05)
    agent.learn(Outcome(second, 0.6, 0.1))  # better than the last, not than what is kept
    assert agent.kept is not None and agent.kept.settings == Settings(0.5, 0.5)
    third = agent.propose(Outcome(second, 0.6, 0.1))
    agent.learn(Outcome(third, 0.7))  # as good is not better
    assert agent.kept.settings == Settings(0.5, 0.5)
    agent.learn(Outcome(third, 0.71))
    assert agent.kept.settings == third
    assert abs(agent.propose(Outcome(third, 0.71)).temperature - third.temperature) == pytest.approx(0.05)


def test_random_search_draws_names_too_and_stays_within_the_space():
    agent = RandomSearch(SPACE, step_size=0.5, seed=3)
    found = search(agent, 300)
    assert {one.template for one in found} == {"plain", "careful"} and {one.method for one in found} == set(METHODS)
    for one in found:
        SPACE.check(one)
    still = Space((1.0, 1.0), (1.0, 1.0))
    assert RandomSearch(still).propose(Outcome(Settings(), 0.0)) == Settings()  # nowhere to go


def test_random_search_and_tpe_find_the_better_settings():
    pytest.importorskip("optuna", reason="optuna, which is optional, is not installed")
    start = quality(Settings())
    for agent in (RandomSearch(SPACE, 0.1, seed=0), TreeParzen(SPACE, seed=0)):
        assert max(map(quality, search(agent, 60))) > start + 0.25


def test_defaults_stay():
    assert search(Defaults(), 3, Settings(0.3)) == [Settings(0.3)] * 3


def agents():
    yield "random search", lambda: RandomSearch(SPACE, 0.1, seed=5)
    yield "tpe", lambda: TreeParzen(SPACE, seed=5)
    yield "defaults", Defaults


@pytest.mark.parametrize(("name", "make"), list(agents()))
def test_a_restored_agent_goes_on_to_the_bit(name, make):
    if name == "tpe":
        pytest.importorskip("optuna", reason="optuna, which is optional, is not installed")
    whole = search(make(), 25)
    agent = make()
    begun = search(agent, 13)
    state = json.loads(json.dumps(agent.state(), allow_nan=False))
    other = make()
    other.restore(state, agent.arrays())
    last, rest = Outcome(begun[-1], quality(begun[-1])), []
    for _ in range(12):
        settings = other.propose(last)
        last = Outcome(settings, quality(settings))
        other.learn(last)
        rest.append(settings)
    assert begun + rest == whole


def test_tpe_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="needs optuna, which is not installed; pip install optuna"):
        TreeParzen(SPACE)


def test_a_generators_state_survives_json():
    rng = np.random.default_rng(3)
    rng.standard_normal(5)
    other = rng_from(json.loads(json.dumps(rng_state(rng))))
    assert rng.standard_normal(4).tolist() == other.standard_normal(4).tolist()
