"""Policies: what they see, their gradients against finite differences, their estimators by hand, saved and loaded."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from common.errors import UserError
from common.files import read_json, write_json
from synth.evolution.features import BUCKETS, SIZE, Situation, features
from synth.evolution.files import KINDS, load_policy, make_policy, save_policy
from synth.evolution.gradient import (
    PPO,
    Network,
    Reinforce,
    floored_logprobs,
    leave_one_out,
    ppo_policy_loss,
    reinforce_loss,
)
from synth.evolution.operators import ACTIONS, OPERATORS
from synth.evolution.policy import Batch, Constant, LinUCB, PolicySettings, fixed, marginal

LAST = (*OPERATORS, None)  # the features of the previous operator


def some_batch(seed=0, episodes=8, choices=3, group=4):
    rng = np.random.default_rng(seed)
    shape = (episodes, choices)
    mask = np.ones(shape, dtype=np.float32)
    mask[1, 2:] = mask[-1, 1:] = 0
    seen = rng.standard_normal((*shape, SIZE)).astype(np.float32) / 4
    seen[..., -1] = 1
    return Batch(
        seen,
        rng.integers(len(ACTIONS), size=shape),
        np.full(shape, 1 / len(ACTIONS), dtype=np.float32),
        rng.standard_normal(shape).astype(np.float32),
        mask,
        group,
    )


def test_features_say_what_is_known():
    text, other = "Name 12 rivers.", "Name 34 rivers."
    first, second, third = features(
        [Situation(text, 1, 3), Situation(other, 3, 3, "deepen", True, 0.25, 0.0), Situation("", 2, 3)]
    )
    assert first.shape == (SIZE,) and np.linalg.norm(first[:BUCKETS]) == pytest.approx(1)
    assert (first[:BUCKETS] == second[:BUCKETS]).all()  # numbers count by their digits
    assert not (features([Situation("Name rivers 12.", 1, 3)])[0, :BUCKETS] == first[:BUCKETS]).all()  # order counts
    assert LAST[int(first[BUCKETS : BUCKETS + len(LAST)].argmax())] is None
    assert LAST[int(second[BUCKETS : BUCKETS + len(LAST)].argmax())] == "deepen"
    length, round_share, failed, novelty, known, rate, one = second[-7:]
    assert length == pytest.approx(np.log(4) / 5) and (round_share, failed, novelty) == (1, 1, 0.25)
    assert (known, rate, one) == (1, 0, 1) and first[-3] == 0  # a pass rate of 0 is known
    assert not third[:BUCKETS].any() and (first < 0).any() and (first[:BUCKETS] > 0).any()  # hashed with a sign


@pytest.mark.parametrize("kind", [*KINDS, "uniform"])
def test_no_action_is_preferred_at_the_start(kind):
    x = np.random.default_rng(0).standard_normal((5, SIZE))
    assert make_policy(kind).probabilities(x) == pytest.approx(np.full((5, len(ACTIONS)), 1 / len(ACTIONS)))


@pytest.mark.parametrize("kind", ["linucb", "reinforce", "ppo"])
def test_the_floor_holds_however_sure_a_policy_is(kind):
    policy = make_policy(kind, PolicySettings(floor=0.05, learning_rate=0.1))
    batch = some_batch()
    rng = np.random.default_rng(3)
    for _ in range(40):
        shares = policy.probabilities(batch.features.reshape(-1, SIZE))
        actions = np.array([rng.choice(len(ACTIONS), p=share) for share in shares])
        own = shares[range(len(shares)), actions].astype(np.float32).reshape(batch.mask.shape)
        actions = actions.reshape(batch.mask.shape)
        rewards = (actions == 3).astype(np.float32)
        policy.learn(batch._replace(actions=actions, propensities=own, rewards=rewards))
    policy.freeze()
    shares = policy.probabilities(batch.features.reshape(-1, SIZE))
    assert shares.sum(axis=1) == pytest.approx(1) and shares.min() >= 0.05 - 1e-9
    assert shares[:, 3].mean() > 0.55  # of 0.7 at most


def test_constant_policies():
    assert fixed(2).probabilities(np.zeros((2, SIZE))).tolist() == [[0, 0, 1, 0, 0, 0, 0]] * 2
    policy = Reinforce(PolicySettings(learning_rate=0.1))
    batch = some_batch()
    for _ in range(5):
        policy.learn(batch)
    x = batch.features.reshape(-1, SIZE)
    assert marginal(policy, x).probabilities(x[:1])[0] == pytest.approx(policy.probabilities(x).mean(axis=0))
    assert Constant().learn(batch) == {} and not Constant().learns


def test_floored_logprobs_are_of_the_mixture():
    logits = mx.array([[0.0, np.log(3.0)]])
    assert np.exp(np.array(floored_logprobs(logits, 0.1)))[0] == pytest.approx([0.8 * 0.25 + 0.1, 0.8 * 0.75 + 0.1])


def losses(learning):
    batch = some_batch(1)
    rng = np.random.default_rng(2)
    noise = [rng.standard_normal(batch.mask.shape) for _ in range(4)]
    shared = (batch.features, batch.actions)
    plain = (*shared, noise[1], batch.mask)
    # Old log probabilities less those at the start: ratios of 1, 1.4 and 0.6, none near the edge of the clipping.
    apart = rng.choice([0.0, -0.35, 0.5], size=batch.mask.shape)
    whole = (*shared, apart, noise[2], noise[1], noise[3], batch.mask)
    return {
        "reinforce": (lambda net, given: reinforce_loss(net, given, learning.floor, learning.entropy_coef), plain),
        "ppo": (lambda net, given: ppo_policy_loss(net, given, learning), whole),
    }


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_gradients_agree_with_finite_differences(name):
    """Along 20 random directions, at weights that are nowhere 0; mlx's exp has 7 digits in float64, too."""
    learning = PolicySettings(entropy_coef=0.1)
    loss, arrays = losses(learning)[name]
    with mx.stream(mx.cpu):
        given = tuple(
            mx.array(array, dtype=mx.int32 if array.dtype.kind == "i" else mx.float64)
            for array in map(np.array, arrays)
        )
        network, rng = Network(SIZE, 8, len(ACTIONS)), np.random.default_rng(0)
        start = {
            key: mx.array(0.3 * rng.standard_normal(array.shape), dtype=mx.float64)
            for key, array in tree_flatten(network.parameters())
        }

        def value(step, direction):
            moved = [(key, array + step * direction[key]) for key, array in start.items()]
            network.update(tree_unflatten(moved))
            return float(loss(network, given).item())

        network.update(tree_unflatten(list(start.items())))
        if name == "ppo":
            now = floored_logprobs(network.logits(given[0]), learning.floor)
            now = mx.take_along_axis(now, given[1][..., None], axis=-1)[..., 0]
            given = (*given[:2], given[2] + mx.stop_gradient(now), *given[3:])
        _, gradients = nn.value_and_grad(network, lambda *some: loss(network, some))(*given)
        flat = dict(tree_flatten(gradients))
        for _ in range(20):
            direction = {k: mx.array(rng.standard_normal(a.shape), dtype=mx.float64) for k, a in start.items()}
            norm = sum(float((array * array).sum().item()) for array in direction.values()) ** 0.5
            direction = {key: array / norm for key, array in direction.items()}
            slope = sum(float((flat[key] * direction[key]).sum().item()) for key in start)
            found = (value(0.1, direction) - value(-0.1, direction)) / 0.2
            assert found == pytest.approx(slope, rel=2e-3, abs=1e-6)


def test_leave_one_out_by_hand():
    """Two episodes of two choices, γ = 1/2; the second ends after one."""
    batch = some_batch(episodes=2, choices=2, group=2)
    mask = np.array([[1, 1], [1, 0]], dtype=np.float32)
    batch = batch._replace(rewards=np.array([[1, 4], [2, 99]], dtype=np.float32), mask=mask)
    assert leave_one_out(batch, 0.5).tolist() == [[3 - 2, 4 - 0], [2 - 3, 0]]


def test_the_leave_one_out_gradient_is_unbiased():
    """Over all pairs of actions of two episodes, weighted by their chances: the gradient of the expected reward."""
    worth, x = np.array([1.0, -2.0, 0.5]), np.ones((1, 1, SIZE), dtype=np.float32)
    mx.random.seed(0)
    network = Network(SIZE, 4, 3)
    network.actor[-1].bias = mx.array([0.3, -0.2, 0.1])

    def expected_reward(network):
        return (mx.exp(floored_logprobs(network.logits(mx.array(x)), 0.05)) * mx.array(worth.astype(np.float32))).sum()

    chances = np.exp(np.array(floored_logprobs(network.logits(mx.array(x)), 0.05)))[0, 0]
    total: dict[str, mx.array] = {}
    for pair in itertools.product(range(3), repeat=2):
        batch = Batch(np.repeat(x, 2, axis=0), np.array(pair)[:, None], np.ones((2, 1)),
                      worth[list(pair), None].astype(np.float32), np.ones((2, 1), dtype=np.float32), 2)  # fmt: skip
        given = tuple(map(mx.array, (batch.features, batch.actions, leave_one_out(batch, 1.0), batch.mask)))
        _, gradients = nn.value_and_grad(network, lambda *some: reinforce_loss(network, some, 0.05, 0.0))(*given)
        for key, array in tree_flatten(gradients["actor"]):
            total[key] = total.get(key, mx.array(0.0)) + float(chances[pair[0]] * chances[pair[1]]) * array
    _, exact = nn.value_and_grad(network, lambda: expected_reward(network))()
    for key, array in tree_flatten(exact["actor"]):
        assert np.array(total[key]) == pytest.approx(-np.array(array), abs=1e-6)
    assert abs(np.array(exact["actor"][-1]["bias"])).max() > 0.1


def test_linucb_by_hand():
    """One feature: A = 1 + Σx², b = Σxr; action 0 was seen with x = 2, r = 3, so its estimate is 6/5."""
    policy = LinUCB(PolicySettings(alpha=2.0, floor=0.0), actions=2, size=1)
    ones = np.ones((1, 1), dtype=np.float32)
    policy.learn(Batch(np.array([[[2.0]]]), np.array([[0]]), ones, 3 * ones, ones, 1))
    assert policy.covariances.tolist() == [[[5.0]], [[1.0]]] and policy.sums.tolist() == [[6.0], [0.0]]
    # x = 1: 6/5 + 2 √(1/5) = 2.09 against 0 + 2; with a bonus of 5: 3.44 against 5.
    assert policy.probabilities(np.array([[1.0]])).tolist() == [[1, 0]]
    policy.alpha = 5.0
    assert policy.probabilities(np.array([[1.0]])).tolist() == [[0, 1]]
    policy.freeze()
    assert policy.probabilities(np.array([[1.0], [-1.0], [0.0]])).tolist() == [[1, 0], [0, 1], [0.5, 0.5]]


def test_ppo_learns_nothing_from_what_its_critic_expected():
    policy, batch = PPO(PolicySettings(gamma=0.0, entropy_coef=0.0)), some_batch()
    policy.network.critic[-1].weight = mx.array(np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32))
    values = np.array(policy.network.values(mx.array(batch.features)))
    before = policy.arrays()
    policy.learn(batch._replace(rewards=values))
    assert values.std() > 0.1 and (policy.arrays()["network.actor.2.weight"] == before["network.actor.2.weight"]).all()
    policy.learn(batch._replace(rewards=-values))
    assert (policy.arrays()["network.actor.2.weight"] != before["network.actor.2.weight"]).any()


def test_ppo_learns_the_value_of_a_situation():
    policy, batch = PPO(PolicySettings(learning_rate=0.02, gamma=0.0)), some_batch()
    batch = batch._replace(rewards=batch.features[..., 0] * 4)
    for _ in range(60):
        policy.learn(batch)
    values = np.array(policy.network.values(mx.array(batch.features)))
    assert np.corrcoef(values[batch.mask > 0], batch.rewards[batch.mask > 0])[0, 1] > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_goes_on_bit_for_bit(tmp_path, kind):
    learning = PolicySettings(floor=0.03, seed=5)
    policy = make_policy(kind, learning)
    for number in range(2):
        policy.learn(some_batch(number))
    save_policy(tmp_path / "p", policy)
    other = load_policy(tmp_path / "p")
    assert type(other) is type(policy) and other.settings == learning
    for number in range(2, 4):
        for one in (policy, other):
            one.learn(some_batch(number))
    x = some_batch(9).features.reshape(-1, SIZE)
    assert (policy.probabilities(x) == other.probabilities(x)).all()
    found, expected = other.arrays(), policy.arrays()
    assert found.keys() == expected.keys() and all((found[key] == expected[key]).all() for key in expected)


def test_a_folder_that_is_no_policy_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_policy(tmp_path)
    save_policy(tmp_path / "p", make_policy("ppo"))
    saved = read_json(tmp_path / "p" / "policy.json")
    for change, message in (
        ({"format": 9}, "format"),
        ({"format": "1"}, "'1' as format"),
        ({"features": None}, "features"),
        ({"learning": []}, "learning"),
        ({"learning": {"hidden": "32"}}, "'32' as learning.hidden"),
        ({"learning": {"floor": 2}}, "--floor"),
        ({"learning": {"hidden": 10**400}}, "hidden is 10{19};"),
        ({"learning": {"seed": -(10**400)}}, "seed is -10{18};"),
        ({"actions": ["a"]}, "operators"),
        ({"kind": "linucb"}, "arrays"),
    ):
        write_json(tmp_path / "p" / "policy.json", {**saved, **change})
        with pytest.raises(UserError, match=message):
            load_policy(tmp_path / "p")
    write_json(tmp_path / "p" / "policy.json", saved)
    (tmp_path / "p" / "policy.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="readable"):
        load_policy(tmp_path / "p")


@pytest.mark.parametrize("wrong", [{"floor": 0.2}, {"floor": -0.1}, {"gamma": 1.5}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        make_policy("ppo", PolicySettings(**wrong))
