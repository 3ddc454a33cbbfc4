"""The policies: log probabilities and returns by hand, gradients against finite differences, learning, and resuming."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from synth.sampler import METHODS, Settings, Space
from synth.tuning.agents import Outcome
from synth.tuning.gradient_agents import HIDDEN, AgentSettings, PolicyAgent, SettingsPolicy

SPACE = Space((0.0, 2.0), (0.1, 1.0), ("plain", "varied", "careful"), METHODS)
KINDS = {"reinforce": {}, "ppo": {"epochs": 4, "value_head": True}}


def agent_of(kind="reinforce", seed=0, features=0, **changes):
    return PolicyAgent(SPACE, AgentSettings(**{**KINDS[kind], **changes}), features, seed)


def play(agent, count, metric, last=None):
    """Let an agent propose and learn; returns the outcomes."""
    last, found = last or Outcome(Settings(), metric(Settings())), []
    for _ in range(count):
        settings = agent.propose(last)
        last = Outcome(settings, metric(settings), metric(settings) - last.metric, last.features)
        agent.learn(last)
        found.append(last)
    return found


def test_the_log_probability_of_an_action_by_hand():
    policy = SettingsPolicy(3, (2, 1))
    policy.log_std = mx.array([0.0, math.log(2.0)])
    states = mx.array([[0.1, -0.2, 0.3]])
    hidden = np.tanh(np.array(policy.hidden.weight) @ [0.1, -0.2, 0.3] + np.array(policy.hidden.bias))
    out = np.array(policy.out.weight) @ hidden + np.array(policy.out.bias)
    assert out.shape == (2 + 2 + 1 + 1,) and hidden.shape == (HIDDEN,)
    steps, picks = mx.array([[0.5, -1.0]]), mx.array([[1, 0]])
    expected = sum(
        -0.5 * ((x - m) / s) ** 2 - math.log(s) - 0.5 * math.log(2 * math.pi)
        for x, m, s in zip((0.5, -1.0), out[:2], (1.0, 2.0), strict=True)
    )
    expected += out[3] - math.log(math.exp(out[2]) + math.exp(out[3]))
    logprobs, values = policy.logprobs(states, steps, picks)
    assert logprobs.item() == pytest.approx(expected, abs=1e-5) and values.item() == pytest.approx(out[5], abs=1e-6)


def test_discounted_returns_by_hand():
    agent = agent_of(gamma=0.5, update_every=99)
    agent.episode = [{"reward": reward, "value": 0.0} for reward in (1.0, 0.0, 2.0)]
    advantages, returns = agent.advantages()
    assert returns.tolist()[0] == pytest.approx([1.5, 1.0, 2.0])  # 1 + 0.5·0 + 0.25·2; 0 + 0.5·2; 2
    assert advantages.tolist()[0] == pytest.approx([0.0, -1.0, 1.0], abs=1e-5)  # less their mean, over their deviation


def test_ppos_advantages_subtract_the_value():
    agent = agent_of("ppo", gamma=0.5, gae_lambda=1.0, update_every=99)
    agent.episode = [{"reward": 1.0, "value": 1.5}, {"reward": 0.0, "value": 0.0}, {"reward": 2.0, "value": 2.0}]
    advantages, returns = agent.advantages()
    assert returns.tolist()[0] == pytest.approx([1.5, 1.0, 2.0])
    raw = np.array([0.0, 1.0, 0.0])
    assert advantages.tolist()[0] == pytest.approx(((raw - raw.mean()) / raw.std(ddof=1)).tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind):
    agent = agent_of(kind, update_every=99)
    play(agent, 6, lambda settings: settings.temperature)
    advantages, returns = agent.advantages()
    if kind == "ppo":  # away from ratio 1, at which the clip has a kink
        agent.policy.log_std = mx.array([0.05, -0.05])
    _, gradients = nn.value_and_grad(agent.policy, agent.loss)(advantages, returns)
    flat = dict(tree_flatten(gradients))
    assert set(flat) == {"hidden.weight", "hidden.bias", "out.weight", "out.bias", "log_std"}
    rng = np.random.default_rng(0)
    parameters = dict(tree_flatten(agent.policy.parameters()))
    for name, array in parameters.items():
        direction = mx.array(rng.standard_normal(array.shape).astype(np.float32))
        along = (flat[name] * direction).sum().item()
        ends = []
        for sign in (1, -1):
            agent.policy.update(tree_unflatten([(name, array + sign * 1e-3 * direction)]))
            ends.append(agent.loss(advantages, returns).item())
        agent.policy.update(tree_unflatten([(name, array)]))
        assert along == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.03, abs=2e-3), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_makes_rewarded_actions_likelier(kind):
    """The fault of the design this comes from: its gradient is cut, so nothing moves."""
    agent = agent_of(kind, update_every=4, gamma=0.0, learning_rate=0.01)
    before = {name: np.array(array) for name, array in tree_flatten(agent.policy.parameters())}
    last = Outcome(Settings(), 0.0)
    for reward in (1.0, -1.0, 1.0):
        last = Outcome(agent.propose(last), 0.0, reward)
        agent.learn(last)
    episode = agent.episode
    last = agent.propose(last)
    old = agent._evaluated(episode)[0].tolist()
    agent.learn(Outcome(last, 0.0, -1.0))
    new = agent._evaluated(episode)[0].tolist()
    assert [later > earlier for earlier, later in zip(old, new, strict=True)] == [True, False, True, False]
    after = dict(tree_flatten(agent.policy.parameters()))
    assert all(not np.array_equal(before[name], np.array(after[name])) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_learns_which_template_is_better(kind):
    agent = agent_of(kind, learning_rate=0.01, gamma=0.0, update_every=10)
    found = []
    last = Outcome(Settings(), 0.0)
    for _ in range(200):
        settings = agent.propose(last)
        last = Outcome(settings, 0.0, 1.0 if settings.template == "careful" else 0.0)
        agent.learn(last)
        found.append(settings.template)
    assert found[:20].count("careful") < 14 and found[-20:].count("careful") > 17


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_learns_which_way_a_number_has_to_go(kind):
    agent = agent_of(kind, learning_rate=0.01, gamma=0.0, update_every=10)
    last, moves = Outcome(Settings(), 0.0), []
    for _ in range(200):
        settings = agent.propose(last)
        moves.append((1.0 - settings.temperature) / 0.05)
        last = Outcome(Settings(), 0.0, -abs(moves[-1] - 1.5))  # the best step is one and a half of them downwards
        agent.learn(last)
    assert abs(np.mean(moves[:20])) < 0.6 and 0.9 < np.mean(moves[-50:]) < 2.1


def test_the_state_is_what_it_is_said_to_be():
    agent = agent_of(features=2)
    agent.propose(Outcome(Settings(), 0.5, 0.0, (0.1, 0.2)))
    agent.learn(Outcome(Settings(0.5, 0.55, "varied"), 0.7, 0.2, (0.3, 0.4)))
    agent.propose(Outcome(Settings(0.5, 0.55, "varied"), 0.7, 0.2, (0.3, 0.4)))
    # moving average 0.3 · 0.2 and last reward; temperature, top_p; three templates, two methods; two features
    assert agent.episode[1]["state"] == pytest.approx([0.06, 0.2, 0.25, 0.5, 0, 1, 0, 1, 0, 0.3, 0.4])


def test_without_any_reward_nothing_is_learned():
    agent = agent_of(learning_rate=0.1)
    before = np.array(agent.policy.out.weight)
    play(agent, 20, lambda settings: 0.5)
    assert np.array_equal(before, np.array(agent.policy.out.weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [3, 5, 13])
def test_a_restored_policy_goes_on_to_the_bit(kind, cut, tmp_path):
    def metric(settings):
        return -abs(settings.temperature - 0.3)

    whole = play(agent_of(kind), 20, metric)
    agent = agent_of(kind)
    begun = play(agent, cut, metric)
    path = str(tmp_path / "agent.safetensors")
    mx.save_safetensors(path, agent.arrays())
    state = json.loads(json.dumps(agent.state()))
    other = agent_of(kind, seed=9)
    other.restore(state, dict(mx.load(path)))
    assert begun + play(other, 20 - cut, metric, begun[-1]) == whole
