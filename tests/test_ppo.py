"""`training/ppo.py` in MLX and in PyTorch: worked cases, a NumPy reference, the faults found in others."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from tests import numpy_ppo
from tests.frameworks import FRAMEWORKS
from training import ppo, ppo_step
from training.settings import PPOSettings

ROOT = Path(__file__).parent.parent
ORACLE = json.loads((ROOT / "tests/oracles/ppo_cases.json").read_text(encoding="utf-8"))
CLIPPING: dict[str, Any] = {"clip_range": 0.2, "value_clip_range": 0.2, "vf_coef": 0.1}

in_every_framework = pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)


def ragged_mask(rng, rows, columns):
    """Right-padded; one row of a single token and one without pads."""
    lengths = rng.integers(1, columns + 1, rows)
    lengths[0], lengths[-1] = 1, columns
    return (np.arange(columns) < lengths[:, None]).astype(float)


def random_batch(seed, rows=5, columns=7):
    """Everything `ppo_loss` takes, by name, with ratios and values on both sides of the clipping."""
    rng = np.random.default_rng(seed)

    def normal(scale):
        return rng.normal(0, scale, (rows, columns))

    old_logprobs, old_values = -np.abs(normal(2.0)), normal(1.0)
    return {
        "logprobs": old_logprobs + normal(0.3),
        "values": old_values + normal(0.3),
        "old_logprobs": old_logprobs,
        "old_values": old_values,
        "advantages": normal(1.0),
        "returns": normal(1.0),
        "mask": ragged_mask(rng, rows, columns),
        "entropy": np.abs(normal(1.0)),
        "ref_logprobs": old_logprobs + normal(0.3),
    }


def arrays(framework, batch):
    return {name: framework.array(content) for name, content in batch.items()}


def loss_and_gradients(framework, batch, **settings):
    """Loss, stats, and the gradients by logprobs and values."""
    data = arrays(framework, batch)
    settings = {**CLIPPING, "entropy_coef": 0.01, "kl_coef": 0.05, **settings}
    loss, stats = ppo.ppo_loss(**data, **settings)

    def loss_of(logprobs, values):
        return ppo.ppo_loss(**{**data, "logprobs": logprobs, "values": values}, **settings)[0]

    return loss, stats, framework.gradients(loss_of, batch["logprobs"], batch["values"])


# --- the worked cases ---


@in_every_framework
def test_whitening_of_the_oracle(framework):
    case = ORACLE["whiten"]
    x, mask = framework.array(np.array(case["x"], dtype=float)), framework.array(case["mask"])
    framework.close(ppo.masked_mean(x, mask), case["mean"])
    framework.close(ppo.masked_whiten(x, mask), case["out"])
    framework.close(ppo.masked_whiten(x, mask, center=False), case["out_keep_mean"])


@in_every_framework
@pytest.mark.parametrize("case", ORACLE["gae"]["cases"], ids=["plain", "discounted", "whitened"])
def test_rewards_and_advantages_of_the_oracle(framework, case):
    names = ("scores", "logprobs", "ref_logprobs", "values", "mask")
    scores, logprobs, ref_logprobs, values, mask = (framework.array(ORACLE["gae"][name]) for name in names)
    rewards = ppo.kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, case["kl_coef"])
    framework.close(rewards, case["rewards"])
    if case["whiten_rewards"]:
        rewards = ppo.masked_whiten(rewards, mask, center=False)
    framework.close(rewards, case["gae_rewards"])
    advantages, returns = ppo.gae(rewards, values, mask, case["gamma"], case["lam"])
    framework.close(advantages, case["raw_adv"])
    framework.close(returns, case["returns"])
    framework.close(ppo.masked_whiten(advantages, mask), case["adv"])


@in_every_framework
def test_loss_of_the_oracle(framework):
    case, rollout = ORACLE["loss"], ORACLE["gae"]
    batch = {
        "logprobs": case["new_logprobs"],
        "values": case["new_values"],
        "old_logprobs": rollout["logprobs"],
        "old_values": rollout["values"],
        "advantages": rollout["cases"][0]["adv"],
        "returns": rollout["cases"][0]["returns"],
        "mask": rollout["mask"],
    }
    loss, stats, (by_logprobs, by_values) = loss_and_gradients(framework, batch)
    framework.close(loss, case["total"])
    framework.close(stats["policy_loss"], case["pg"])
    framework.close(stats["value_loss"], case["vf"])
    for name in ("approx_kl", "policy_kl", "clip_fraction", "value_clip_fraction"):
        framework.close(stats[name], case[name])
    framework.close(framework.array(by_logprobs), case["dlogp"])
    framework.close(framework.array(by_values), case["dvalue"])


@in_every_framework
def test_logprobs_of_the_oracle(framework):
    logits, token = (
        framework.array([[np.array(ORACLE["logprob"]["logits"], dtype=float)]]),
        framework.array([[1]]),
    )
    for case in ORACLE["logprob"]["cases"]:
        framework.close(ppo.logprobs_from_logits(logits, token, case["temperature"]), [[case["logprob"]]])


@in_every_framework
def test_explained_variance_by_hand(framework):
    """Of the returns 1, 2, 3; the last place is a pad."""
    mask, returns = framework.array([[1.0, 1, 1, 0]]), framework.array([[1.0, 2, 3, 1e6]])
    for values, expected in (
        ([1.0, 2, 3, 0], 1.0),
        ([7.0, 7, 7, 0], 0.0),
        ([3.0, 2, 1, 0], -3.0),
        ([2.0, 2, 3, 0], 2 / 3),
    ):
        framework.close(ppo.explained_variance(framework.array([values]), returns, mask), expected)
    framework.close(ppo.explained_variance(returns, 0.0 * returns + 5.0, mask), 0.0)


def test_kl_controllers():
    case = ORACLE["kl_ctl"]
    adaptive = ppo.AdaptiveKLController(case["init"], case["target"], case["horizon"])
    fixed = ppo.FixedKLController(case["init"])
    for kl, batch_size, expected in case["trace"]:
        adaptive.update(kl, batch_size)
        fixed.update(kl, batch_size)
        assert adaptive.value == pytest.approx(expected, rel=1e-12)
    assert fixed.value == case["init"]


def test_a_kl_coefficient_may_have_a_limit():
    limited = ppo.AdaptiveKLController(0.1, target=6.0, horizon=100, most=0.1)
    for kl, expected in ((3.0, 0.09), (30.0, 0.099), (30.0, 0.1), (30.0, 0.1), (3.0, 0.09)):  # ± 10 % of 50 completions
        limited.update(kl, 50)
        assert limited.value == pytest.approx(expected)


@pytest.mark.parametrize(("target", "reached"), [(None, 0.1), (6.0, 0.1 * 1.1**10)])
def test_a_coefficient_exceeds_its_first_value_only_for_a_target_that_was_given(target, reached):
    controller = ppo_step.make_controller(PPOSettings(init_kl_coef=0.1, target=target, horizon=1000))
    for _ in range(10):
        controller.update(30.0, 500)
    assert controller.value == pytest.approx(reached)


@pytest.mark.parametrize(
    ("settings", "unit"),
    [
        ({}, 0.5),
        ({"advantage": "rloo"}, 0.5),
        ({"advantage": "group", "no_group_scale": True}, 0.5),
        ({"advantage": "group"}, 1.0),  # these are in deviations already
        ({"scale_scores": True}, 1.0),
        ({"normalize_scores": True}, 1.0),
        ({"init_kl_coef": 0.02}, 1.0),  # in the user's own units
    ],
)
def test_the_default_kl_coefficient_is_in_deviations_of_the_scores(settings, unit):
    moments = ppo.RunningMoments()
    moments.update([0.0, 0.5, 1.0])  # std 0.5
    assert ppo_step.kl_unit(PPOSettings(**settings), moments) == pytest.approx(unit)
    in_groups = settings == {"advantage": "group"}
    assert ppo_step.make_controller(PPOSettings(**settings)).value == (0.01 if in_groups else 0.02)


def test_the_signal_is_what_scores_differ_by_beside_all_before():
    moments = ppo.RunningMoments()
    moments.update([0.0, 0.5, 1.0])  # std 0.5
    signal = partial(ppo_step.score_signal, settings=PPOSettings(missing_eos_penalty=0.5), moments=moments)
    assert signal([0.0, 0.5], [True, True]) == pytest.approx(0.25 / 0.5)
    assert signal([0.0, 0.0], [True, False]) == pytest.approx(0.25 / 0.5)
    assert signal([0.0, 5.0], [True, True]) == 1
    assert np.std([0.1] * 3) > 0 and signal([0.1] * 3, [True] * 3) == 0


SCALED = ({"scale_scores": True}, 1.0), ({"normalize_scores": True}, 1.0)


@pytest.mark.parametrize(("scaling", "expected"), [({}, 0.5), *SCALED])
def test_equal_scores_are_whitened_by_no_less_than_those_before_varied(scaling, expected):
    moments = ppo.RunningMoments()
    moments.update([0.0, 0.5, 1.0])  # std 0.5
    assert ppo_step.least_deviation(PPOSettings(**scaling), moments, 0.0) == pytest.approx(expected)
    assert ppo_step.least_deviation(PPOSettings(**scaling), moments, 1e-6) == 0


def test_the_step_size_follows_the_root_of_the_kl_within_its_limits():
    controller = ppo.StepSizeController(0.4)
    # moved, entropy, share → change of the factor; of an entropy of 16 nats 0.2 may be moved
    for moved, entropy, share, change in (
        (0.3, 100.0, 1.0, (0.4 / 0.3) ** 0.5),
        (0.3, 16.0, 1.0, (0.2 / 0.3) ** 0.5),
        (0.08, 100.0, 0.5, (0.1 / 0.08) ** 0.5),
        (1e-6, 100.0, 1.0, 1.5),
        (0.0, 100.0, 1.0, 1.5),
        (0.0, 100.0, 0.0, 1.0),
        (100.0, 100.0, 1.0, 1 / 1.5),
        (math.nan, 100.0, 1.0, 1 / 1.5),
        (0.3, 100.0, 0.0, 1.0),
        (0.3, 0.0, 1.0, 1 / 1.5),
    ):
        before = controller.value
        controller.update(moved, entropy, share)
        assert controller.value == pytest.approx(before * change, rel=1e-12)
    for _ in range(20):
        controller.update(0.0, 100.0)
    assert controller.value == 32.0
    off = ppo.StepSizeController(0.0)
    off.update(100.0, 100.0)
    assert off.value == 1.0


@pytest.mark.parametrize("rate", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
def test_the_step_size_finds_the_rate_that_moves_as_far_as_it_should(rate):
    """Where the KL is the square of the step, and a rate of 1e-3 is right; 32 times as far it does not reach."""
    controller = ppo.StepSizeController(0.25)
    for _ in range(20):
        controller.update(0.25 * (rate * controller.value / 1e-3) ** 2, entropy=100.0)
    assert rate * controller.value == pytest.approx(min(max(1e-3, rate / 32), 32 * rate), rel=1e-9)


# --- random cases against the NumPy reference ---


@in_every_framework
@pytest.mark.parametrize(("least", "deviation"), [(0.0, 0.5), (0.25, 0.5), (2.0, 2.0)])
def test_what_varies_less_than_the_least_is_divided_by_that(framework, least, deviation):
    """½, ½, −½, −½ and 0 have the variance ¼ by Bessel; the pad does not count."""
    values, mask = framework.array([[0.5, 0.5, -0.5], [-0.5, 0.0, 9.0]]), framework.array([[1.0, 1, 1], [1, 1, 0]])
    found = ppo.masked_whiten(values, mask, least=least)
    framework.close(found, np.array([[0.5, 0.5, -0.5], [-0.5, 0.0, 0.0]]) / deviation)


@in_every_framework
@pytest.mark.parametrize("center", [True, False])
def test_whitening_equals_the_reference(framework, center):
    batch = random_batch(0)
    expected = numpy_ppo.whiten(batch["values"], batch["mask"], center)
    data = arrays(framework, batch)
    framework.close(ppo.masked_whiten(data["values"], data["mask"], center), expected)


@in_every_framework
@pytest.mark.parametrize("kind", ["k1", "kl", "k3", "abs", "mse"])
def test_rewards_equal_the_reference(framework, kind):
    batch = random_batch(1)
    batch = {name: batch[name] for name in ("logprobs", "ref_logprobs", "mask")}
    batch["scores"] = np.array([1.0, -0.5, 0.0, 2.0, 0.25])
    data = arrays(framework, batch)
    kl = ppo.kl_penalty(data["logprobs"], data["ref_logprobs"], kind)
    actual = ppo.kl_shaped_rewards(**data, kl_coef=0.3, kl=kl)
    framework.close(actual, numpy_ppo.rewards(**batch, kl_coef=0.3, kind=kind))
    framework.close(ppo.kl_shaped_rewards(**data, kl_coef=0.3), numpy_ppo.rewards(**batch, kl_coef=0.3, kind="k1"))


@in_every_framework
@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.0])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.95, 0.5, 0.0])
@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (4, 8), (3, 1), (2, 1024)])
def test_gae_equals_the_reference(framework, gamma, gae_lambda, rows, columns):
    batch = random_batch(2, rows, columns)
    batch = {"rewards": batch["returns"], "values": batch["values"], "mask": batch["mask"]}
    discounts = {"gamma": gamma, "gae_lambda": gae_lambda}
    expected = numpy_ppo.gae(**batch, **discounts)
    actual = ppo.gae(**arrays(framework, batch), **discounts)
    for ours, theirs in zip(actual, expected, strict=True):
        framework.close(ours, theirs)


@in_every_framework
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_equal_the_reference(framework, seed):
    batch = random_batch(seed)

    def reference(**changed):
        return numpy_ppo.ppo_loss(**{**batch, **changed}, **CLIPPING, entropy_coef=0.01, kl_coef=0.05)

    loss, stats, (by_logprobs, by_values) = loss_and_gradients(framework, batch)
    assert 0 < framework.numpy(stats["clip_fraction"]) < 1 and 0 < framework.numpy(stats["value_clip_fraction"]) < 1
    framework.close(loss, reference())
    framework.close(
        framework.array(by_logprobs), numpy_ppo.gradient(lambda x: reference(logprobs=x), batch["logprobs"])
    )
    framework.close(framework.array(by_values), numpy_ppo.gradient(lambda x: reference(values=x), batch["values"]))


@in_every_framework
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_temperature_enters_logprob_entropy_and_kl_alike(framework, temperature):
    rng = np.random.default_rng(3)
    logits, ref_logits = rng.normal(0, 2, (2, 2, 3, 11))
    tokens = rng.integers(0, 11, (2, 3))
    ours, reference = framework.array(logits), framework.array(ref_logits)

    def at_each(function):
        return [[function(b, t) for t in range(3)] for b in range(2)]

    framework.close(
        ppo.logprobs_from_logits(ours, framework.array(tokens), temperature),
        at_each(lambda b, t: numpy_ppo.logprob(logits[b, t], tokens[b, t], temperature)),
    )
    framework.close(
        ppo.entropy_from_logits(ours, temperature),
        at_each(lambda b, t: numpy_ppo.entropy(logits[b, t], temperature)),
    )
    framework.close(
        ppo.full_kl(ours, reference, temperature),
        at_each(lambda b, t: numpy_ppo.kl_over_vocabulary(logits[b, t], ref_logits[b, t], temperature)),
    )


# --- logits ---


@in_every_framework
def test_gradients_from_logits(framework):
    rng = np.random.default_rng(4)
    logits, ref_logits = rng.normal(0, 2, (2, 1, 1, 5))
    token = framework.array([[3]])
    cases = [
        (lambda x: ppo.logprobs_from_logits(x, token, 0.7), lambda x: numpy_ppo.logprob(x[0, 0], 3, 0.7)),
        (lambda x: ppo.entropy_from_logits(x, 0.7), lambda x: numpy_ppo.entropy(x[0, 0], 0.7)),
        (
            lambda x: ppo.full_kl(x, framework.array(ref_logits), 0.7),
            lambda x: numpy_ppo.kl_over_vocabulary(x[0, 0], ref_logits[0, 0], 0.7),
        ),
    ]
    for ours, reference in cases:
        (actual,) = framework.gradients(lambda x, f=ours: f(x).sum(), logits)
        framework.close(framework.array(actual), numpy_ppo.gradient(reference, logits))


@in_every_framework
def test_a_token_ruled_out_has_no_probability_and_breaks_nothing(framework):
    logits, shorter = np.array([[[1.0, 2.0, -np.inf]]]), np.array([[[1.0, 2.0]]])
    ours = framework.array(logits)
    framework.close(ppo.entropy_from_logits(ours), [[numpy_ppo.entropy(shorter[0, 0], 1.0)]])
    framework.close(ppo.full_kl(ours, ours), [[0.0]])
    for function in (ppo.entropy_from_logits, lambda x: ppo.full_kl(x, framework.array(logits))):
        (gradient,) = framework.gradients(lambda x, f=function: f(x).sum(), logits)
        assert np.isfinite(gradient).all() and gradient[0, 0, 2] == 0


def test_half_precision_is_computed_in_float32():
    logits, token = [[[1.0, 2.0, 0.5, -1.0]]], [[1]]
    in_mlx = ppo.logprobs_from_logits(mx.array(logits, dtype=mx.bfloat16), mx.array(token), 0.7)
    in_torch = ppo.logprobs_from_logits(torch.tensor(logits, dtype=torch.bfloat16), torch.tensor(token), 0.7)
    assert in_mlx.dtype == mx.float32 and in_torch.dtype == torch.float32
    assert in_mlx.item() == pytest.approx(-0.31534635, abs=1e-6)
    assert in_torch.item() == pytest.approx(-0.31534635, abs=1e-6)


# --- KL ---


@in_every_framework
def test_kl_to_itself_is_zero_and_k3_and_full_never_negative(framework):
    rng = np.random.default_rng(5)
    logprobs, ref_logprobs = (framework.array(rng.normal(-2, 1, (20, 20))) for _ in range(2))
    logits, ref_logits = (framework.array(rng.normal(0, 3, (20, 20, 8))) for _ in range(2))
    for kind in ("k1", "kl", "k3", "abs", "mse"):
        assert (framework.numpy(ppo.kl_penalty(logprobs, logprobs, kind)) == 0).all()
    assert (framework.numpy(ppo.full_kl(logits, logits)) == 0).all()
    assert (framework.numpy(ppo.kl_penalty(logprobs, ref_logprobs, "k3")) >= 0).all()
    assert (framework.numpy(ppo.full_kl(logits, ref_logits)) > 0).all()


@in_every_framework
def test_the_kl_penalty_lowers_the_reward_where_the_policy_is_above_the_reference(framework):
    logprobs, ref_logprobs = framework.array([[-1.0, -3.0, -1.0]]), framework.array([[-2.0, -2.0, -1.0]])
    rewards = ppo.kl_shaped_rewards(framework.array([0.0]), logprobs, ref_logprobs, framework.array([[1, 1, 1]]), 0.1)
    framework.close(rewards, [[-0.1, 0.1, 0.0]])


@in_every_framework
def test_the_kl_in_the_loss_pulls_towards_the_reference(framework):
    mask, ref_logprobs = framework.array([[1, 1, 1]]), framework.array([[-2.0, -2.0, -1.0]])
    logprobs = [[-1.0, -3.0, -1.0]]
    old_logprobs, advantages = framework.array(logprobs), framework.array([[0.0, 0.0, 0.0]])

    def loss(x):
        return ppo.ppo_loss(
            x,
            None,
            old_logprobs,
            None,
            advantages,
            None,
            mask,
            **CLIPPING,
            ref_logprobs=ref_logprobs,
            kl_coef=1.0,
        )[0]

    (gradient,) = framework.gradients(loss, logprobs)
    framework.close(framework.array(gradient), [[(1 - math.exp(-1)) / 3, (1 - math.exp(1)) / 3, 0.0]])


@in_every_framework
@pytest.mark.parametrize(("kind", "expected"), [("mse", [2 / 3, -1 / 3, 0.0]), ("abs", [1 / 3, -1 / 3, 0.0])])
def test_the_kl_in_the_loss_is_by_the_estimator_that_is_named(framework, kind, expected):
    """The gradient of d² / 2 is d, that of |d| its sign; d = logprobs − ref_logprobs is 2, −1 and 0."""
    mask, ref_logprobs = framework.array([[1, 1, 1]]), framework.array([[-3.0, -2.0, -1.0]])
    logprobs = [[-1.0, -3.0, -1.0]]
    old_logprobs, advantages = framework.array(logprobs), framework.array([[0.0, 0.0, 0.0]])

    def loss(x):
        kl: dict[str, Any] = {"ref_logprobs": ref_logprobs, "kl_coef": 1.0, "kl_kind": kind}
        return ppo.ppo_loss(x, None, old_logprobs, None, advantages, None, mask, **CLIPPING, **kl)[0]

    (gradient,) = framework.gradients(loss, logprobs)
    framework.close(framework.array(gradient), [expected])


@in_every_framework
def test_a_kl_computed_elsewhere_takes_the_place_of_the_estimate(framework):
    batch = arrays(framework, random_batch(6))
    given, scores = batch["entropy"], framework.array([0.0] * 5)
    rewards = ppo.kl_shaped_rewards(
        scores, batch["logprobs"], batch["ref_logprobs"], batch["mask"], 0.5, kl=given
    )
    framework.close(rewards, -0.5 * framework.numpy(given) * framework.numpy(batch["mask"]))


def test_unknown_kl_estimators_are_named():
    logprobs = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="unknown KL estimator 'k2'; choose one of k1, kl, k3"):
        ppo.kl_penalty(logprobs, logprobs, "k2")
    with pytest.raises(ValueError, match="full_kl"):
        ppo.kl_penalty(logprobs, logprobs, "full")


# --- masks ---


@in_every_framework
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_at_a_pad_does_not_matter(framework, garbage):
    batch = random_batch(7)
    dirty = {name: np.where(batch["mask"] > 0, x, garbage) for name, x in batch.items() if name != "mask"}
    dirty["mask"] = batch["mask"]
    loss, stats, gradients = loss_and_gradients(framework, batch)
    dirty_loss, dirty_stats, dirty_gradients = loss_and_gradients(framework, dirty)
    assert framework.numpy(dirty_loss) == framework.numpy(loss)
    assert {k: framework.numpy(v) for k, v in dirty_stats.items()} == {k: framework.numpy(v) for k, v in stats.items()}
    for clean_gradient, dirty_gradient in zip(gradients, dirty_gradients, strict=True):
        np.testing.assert_array_equal(dirty_gradient, clean_gradient)
        assert (dirty_gradient[batch["mask"] == 0] == 0).all()

    def before_the_loss(data):
        data = arrays(framework, data)
        mask, scores = data["mask"], framework.array([1.0, 2.0, 3.0, 4.0, 5.0])
        yield ppo.masked_mean(data["values"], mask)
        yield ppo.sum_per_completion(data["values"], mask)
        yield ppo.masked_whiten(data["values"], mask)
        yield ppo.masked_whiten(data["values"], mask, center=False)
        yield ppo.kl_shaped_rewards(scores, data["logprobs"], data["ref_logprobs"], mask, 0.1)
        yield from ppo.gae(data["returns"], data["values"], mask, 0.99, 0.95)

    for clean, ours in zip(before_the_loss(batch), before_the_loss(dirty), strict=True):
        np.testing.assert_array_equal(framework.numpy(ours), framework.numpy(clean))


@in_every_framework
def test_entropy_at_a_pad_gets_no_gradient(framework):
    batch = random_batch(7)
    data = arrays(framework, batch)

    def loss(entropy):
        return ppo.ppo_loss(**{**data, "entropy": entropy}, **CLIPPING, entropy_coef=0.5)[0]

    entropy = np.where(batch["mask"] > 0, batch["entropy"], math.nan)
    (gradient,) = framework.gradients(loss, entropy)
    framework.close(framework.array(gradient), -0.5 * batch["mask"] / batch["mask"].sum())


@in_every_framework
def test_more_pads_and_another_order_of_the_batch_change_nothing(framework):
    batch = random_batch(8)
    order = [3, 0, 4, 1, 2]
    changed = {name: np.pad(x, [(0, 0), (0, 6)])[order] for name, x in batch.items()}
    loss, _, gradients = loss_and_gradients(framework, batch)
    changed_loss, _, changed_gradients = loss_and_gradients(framework, changed)
    framework.close(changed_loss, framework.numpy(loss))
    for gradient, other in zip(gradients, changed_gradients, strict=True):
        framework.close(framework.array(other[:, :7]), gradient[order])
        assert (other[:, 7:] == 0).all()


@in_every_framework
def test_integer_and_boolean_masks_serve_as_well(framework):
    batch = random_batch(9)
    loss, _, _ = loss_and_gradients(framework, batch)
    for kind in (int, bool):
        same, _, _ = loss_and_gradients(framework, {**batch, "mask": batch["mask"].astype(kind)})
        assert framework.numpy(same) == framework.numpy(loss)
        data = arrays(framework, {**batch, "mask": batch["mask"].astype(kind)})
        expected = numpy_ppo.whiten(batch["values"], batch["mask"], True)
        framework.close(ppo.masked_whiten(data["values"], data["mask"]), expected)


@in_every_framework
def test_whitening_removes_the_mean_only_when_told_and_masks_again(framework):
    values, mask = framework.array([[9.0, 11.0, 40.0]]), framework.array([[1.0, 1.0, 0.0]])
    half = math.sqrt(0.5)
    framework.close(ppo.masked_whiten(values, mask, center=True), [[-half, half, 0.0]])
    framework.close(ppo.masked_whiten(values, mask, center=False), [[10 - half, 10 + half, 0.0]])
    rewards = ppo.masked_whiten(values, mask, center=False)
    advantages, _ = ppo.gae(rewards, framework.array([[0.0, 0.0, 0.0]]), mask, 1.0, 1.0)
    framework.close(advantages, [[20.0, 10 + half, 0.0]])


@in_every_framework
def test_one_real_token_gives_no_nan(framework):
    values, mask = framework.array([[3.0, 8.0]]), framework.array([[1.0, 0.0]])
    framework.close(ppo.masked_whiten(values, mask), [[0.0, 0.0]])
    framework.close(ppo.masked_whiten(values, mask, center=False), [[3.0, 0.0]])


@in_every_framework
def test_no_real_token_gives_zero(framework):
    batch = {**random_batch(10), "mask": np.zeros((5, 7))}
    loss, stats, gradients = loss_and_gradients(framework, batch)
    assert framework.numpy(loss) == 0 and all(framework.numpy(x) == 0 for x in stats.values())
    assert all((gradient == 0).all() for gradient in gradients)
    data = arrays(framework, batch)
    assert framework.numpy(ppo.masked_mean(data["values"], data["mask"])) == 0
    scores = framework.array([1.0] * 5)
    rewards = ppo.kl_shaped_rewards(scores, data["logprobs"], data["ref_logprobs"], data["mask"], 0.1)
    assert (framework.numpy(rewards) == 0).all()


@in_every_framework
def test_kl_is_summed_per_completion(framework):
    values, mask = (
        framework.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]),
        framework.array([[1, 1, 1], [1, 0, 0]]),
    )
    framework.close(ppo.sum_per_completion(values, mask), [7.0, 8.0])


# --- scores and rewards ---


@in_every_framework
def test_the_score_is_never_added_in_place(framework):
    batch = arrays(framework, random_batch(11))
    scores, kl = framework.array([1.0, 2.0, 3.0, 4.0, 5.0]), batch["entropy"]
    before = {name: framework.numpy(x).copy() for name, x in {**batch, "scores": scores}.items()}
    arguments = (batch["logprobs"], batch["ref_logprobs"], batch["mask"], 0.2)
    penalty = ppo.kl_shaped_rewards(scores * 0.0, *arguments, kl=kl)
    penalty_before = framework.numpy(penalty).copy()
    rewards = ppo.kl_shaped_rewards(scores, *arguments, kl=kl)
    np.testing.assert_array_equal(framework.numpy(penalty), penalty_before)
    for name, x in {**batch, "scores": scores}.items():
        np.testing.assert_array_equal(framework.numpy(x), before[name])
    framework.close((rewards - penalty).sum(axis=1), [1.0, 2.0, 3.0, 4.0, 5.0])


@in_every_framework
def test_an_empty_completion_has_a_score_of_its_own(framework):
    """Its only real token is the EOS. Elsewhere one such row made all the batch's scores a single scalar."""
    mask = framework.array([[1, 0, 0], [1, 1, 0], [1, 0, 0]])
    zeros = framework.array([[0.0] * 3] * 3)
    rewards = ppo.kl_shaped_rewards(framework.array([0.1, 0.2, 0.3]), zeros, zeros, mask, 0.2)
    framework.close(rewards, [[0.1, 0, 0], [0, 0.2, 0], [0.3, 0, 0]])
    for wrong in (0.1, [0.1], [[0.1], [0.2], [0.3]], [0.1, 0.2]):
        with pytest.raises(ValueError, match="one for each of 3 rows"):
            ppo.kl_shaped_rewards(framework.array(wrong), zeros, zeros, mask, 0.2)


@in_every_framework
def test_score_scaling_and_clipping(framework):
    steps = [[1.0, 4.0, 4.0], [-2.0], [0.5, 3.5]]
    moments = ppo.RunningMoments()
    for scores in steps:
        moments.update(scores)
        moments = ppo.RunningMoments(**json.loads(json.dumps(asdict(moments))))
    seen = np.concatenate(steps)
    assert moments.mean == pytest.approx(seen.mean()) and moments.std == pytest.approx(seen.std(ddof=1))
    scores = framework.array(steps[0])
    framework.close(ppo.scale_scores(scores, moments), (np.array(steps[0]) - seen.mean()) / seen.std(ddof=1))
    framework.close(ppo.scale_scores(scores, moments, center=False), np.array(steps[0]) / seen.std(ddof=1))


def test_equal_scores_are_not_blown_up_by_their_missing_spread():
    moments = ppo.RunningMoments()
    moments.update([0.1])
    assert moments.std == 1.0
    moments.update([0.1] * 6)
    assert moments.std == 1.0 and moments.mean == pytest.approx(0.1)


# --- advantages ---


@in_every_framework
def test_group_and_leave_one_out_advantages(framework):
    scores = framework.array([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    deviations = np.array([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0])
    std = np.array([math.sqrt(7)] * 3 + [math.sqrt(3)] * 3)
    framework.close(ppo.group_advantages(scores, 3), deviations / (std + 1e-4))
    framework.close(ppo.group_advantages(scores, 3, scale=False), deviations)
    framework.close(ppo.rloo_advantages(scores, 3), [1 - 4, 2 - 3.5, 6 - 1.5, 0 - 1.5, 0 - 1.5, 3.0])


@in_every_framework
@pytest.mark.parametrize("score", [0.1, 0.7, -1 / 3, 1e6])
def test_equal_scores_give_no_group_advantage(framework, score):
    scores = framework.array([score] * 14)
    for advantages in (
        ppo.group_advantages(scores, 7),
        ppo.group_advantages(scores, 7, scale=False),
        ppo.rloo_advantages(scores, 7),
    ):
        assert (framework.numpy(advantages) == 0).all()


@in_every_framework
def test_a_constant_score_gives_no_advantage_and_flipped_scores_the_opposite(framework):
    """By gae with γ = λ = 1, values and KL 0; then whitened, as the policy gradient sees it."""
    mask = framework.array(random_batch(12)["mask"])
    zeros = mask * 0.0

    def advantages(scores):
        rewards = ppo.kl_shaped_rewards(framework.array(scores), zeros, zeros, mask, 0.2)
        return framework.numpy(ppo.masked_whiten(ppo.gae(rewards, zeros, mask, 1.0, 1.0)[0], mask))

    np.testing.assert_allclose(advantages([0.75] * 5), 0, atol=1e-6)
    scores = np.array([0.3, -1.0, 0.5, 2.0, 0.0])
    np.testing.assert_allclose(advantages(-scores), -advantages(scores), atol=1e-6)
    assert np.abs(advantages(scores)).max() > 0.5


@pytest.mark.parametrize("function", [ppo.group_advantages, ppo.rloo_advantages])
@pytest.mark.parametrize("group_size", [0, 1, 4])
def test_groups_that_cannot_be_are_errors(function, group_size):
    with pytest.raises(ValueError, match=f"6 scores do not fall into groups of {group_size}"):
        function(torch.zeros(6), group_size)


# --- the loss ---


@in_every_framework
def test_at_the_first_minibatch_the_ratio_is_one_and_flipped_advantages_flip_the_gradient(framework):
    batch = random_batch(13)
    batch["logprobs"] = batch["old_logprobs"]
    del batch["ref_logprobs"]
    _, stats, (gradient, _) = loss_and_gradients(framework, batch)
    for name, expected in {
        "ratio_mean": 1, "ratio_max": 1, "approx_kl": 0, "policy_kl": 0, "clip_fraction": 0
    }.items():  # fmt: skip
        framework.close(stats[name], float(expected))
    framework.close(framework.array(gradient), -batch["advantages"] * batch["mask"] / batch["mask"].sum())
    _, _, (flipped, _) = loss_and_gradients(framework, {**batch, "advantages": -batch["advantages"]})
    np.testing.assert_array_equal(flipped, -gradient)
    assert np.abs(gradient).max() > 0.01


@in_every_framework
def test_accumulated_pieces_equal_the_whole(framework):
    batch = random_batch(14)
    count = int(batch["mask"].sum())
    loss, stats, gradients = loss_and_gradients(framework, batch)
    pieces = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 1), slice(1, 3), slice(3, 5))]
    done = [loss_and_gradients(framework, piece, denominator=count) for piece in pieces]
    framework.close(sum(piece[0] for piece in done), framework.numpy(loss))
    for which in (0, 1):
        whole = np.concatenate([piece[2][which] for piece in done])
        framework.close(framework.array(whole), gradients[which])
    assert {"value_loss", "value_clip_fraction", "entropy", "kl_loss"} < stats.keys()
    for name, expected in stats.items():
        combined = [framework.numpy(piece[1][name]) for piece in done]
        actual = max(combined) if name == "ratio_max" else sum(combined)
        assert actual == pytest.approx(float(framework.numpy(expected)), abs=1e-6)


@in_every_framework
def test_optional_terms(framework):
    batch = random_batch(15)
    data = arrays(framework, batch)
    names = ("values", "old_values", "returns", "entropy", "ref_logprobs")
    bare = {**data, **dict.fromkeys(names)}
    policy_loss, stats = ppo.ppo_loss(**bare, **CLIPPING)
    assert not {"value_loss", "value_clip_fraction", "entropy", "kl_loss"} & stats.keys()
    loss, stats = ppo.ppo_loss(**data, **CLIPPING, entropy_coef=0.3, kl_coef=0.7)
    total = stats["policy_loss"] + 0.1 * stats["value_loss"] - 0.3 * stats["entropy"] + 0.7 * stats["kl_loss"]
    framework.close(stats["policy_loss"], framework.numpy(policy_loss))
    framework.close(loss, framework.numpy(total))
    framework.close(stats["entropy"], framework.numpy(ppo.masked_mean(data["entropy"], data["mask"])))


@in_every_framework
def test_an_infinite_clip_range_turns_clipping_off(framework):
    batch = random_batch(16)
    _, stats, _ = loss_and_gradients(framework, batch, clip_range=math.inf, value_clip_range=math.inf)
    ratio = np.exp(batch["logprobs"] - batch["old_logprobs"])
    framework.close(stats["policy_loss"], -(ratio * batch["advantages"])[batch["mask"] > 0].mean())
    framework.close(stats["value_loss"], ((batch["values"] - batch["returns"]) ** 2)[batch["mask"] > 0].mean() / 2)
    assert framework.numpy(stats["clip_fraction"]) == 0 and framework.numpy(stats["value_clip_fraction"]) == 0


@in_every_framework
def test_coefficients_may_be_arrays(framework):
    batch = random_batch(17)
    loss, _, _ = loss_and_gradients(framework, batch, denominator=20)
    settings = {"clip_range": 0.2, "value_clip_range": 0.2, "vf_coef": 0.1, "denominator": 20.0,
                "entropy_coef": 0.01, "kl_coef": 0.05}  # fmt: skip
    same, _ = ppo.ppo_loss(**arrays(framework, batch), **arrays(framework, settings))
    framework.close(same, framework.numpy(loss))


@in_every_framework
def test_shapes_that_differ_are_errors(framework):
    batch = arrays(framework, random_batch(18))
    row = batch["values"][:1]
    with pytest.raises(ValueError, match=r"shapes differ: rewards \(5, 7\), values \(1, 7\)"):
        ppo.gae(batch["returns"], row, batch["mask"], 1.0, 0.95)
    with pytest.raises(ValueError, match="shapes differ"):
        ppo.ppo_loss(**{**batch, "advantages": batch["advantages"][:, :1]}, **CLIPPING)
    for function in (ppo.masked_mean, ppo.masked_whiten, ppo.sum_per_completion, ppo.kl_penalty, ppo.full_kl):
        with pytest.raises(ValueError, match="shapes differ"):
            function(row, batch["mask"])


def test_other_arrays_are_refused():
    with pytest.raises(TypeError, match="expected an mlx array or a torch tensor, got ndarray"):
        ppo.masked_mean(np.zeros((1, 1)), np.ones((1, 1)))


def test_neither_framework_is_imported():
    check = "import sys, training.losses; sys.exit(bool({'mlx', 'mlx.core', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
