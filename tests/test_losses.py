"""`training/losses.py` in MLX and in PyTorch: the worked cases, extremes, masks and accumulation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests import numpy_ppo
from tests.frameworks import FRAMEWORKS
from training.losses import pairwise_reward_loss, sft_loss
from training.ppo import array_module, logprobs_from_logits

BT = json.loads((Path(__file__).parent / "oracles/ppo_cases.json").read_text(encoding="utf-8"))["bt"]

in_every_framework = pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


# --- the pairwise loss ---


@in_every_framework
def test_pairwise_loss_of_the_oracle(framework):
    chosen, rejected, margin = (framework.array(BT[name]) for name in ("chosen", "rejected", "margin"))
    framework.close(pairwise_reward_loss(chosen, rejected)[0], BT["mean"])
    framework.close(pairwise_reward_loss(chosen, rejected, margin)[0], BT["mean_margin"])
    framework.close(pairwise_reward_loss(chosen, rejected, center_coef=0.01)[0], BT["mean_center_0p01"])
    for row, expected in enumerate(BT["per_pair"]):
        pair = slice(row, row + 1)
        framework.close(pairwise_reward_loss(chosen[pair], rejected[pair])[0], expected)


@in_every_framework
def test_weights_say_how_much_each_pair_counts(framework):
    chosen, rejected = framework.array([1.0, 0.0, 5.0]), framework.array([0.0, 1.0, -5.0])
    loss, accuracy = pairwise_reward_loss(chosen, rejected, center_coef=0.1, weights=framework.array([3.0, 1.0, 0.0]))
    low, high = np.log1p(np.exp(-1.0)), np.log1p(np.exp(1.0))
    framework.close(loss, (3 * low + high) / 4 + 0.1)
    framework.close(accuracy, 0.75)


@in_every_framework
def test_pairwise_gradient(framework):
    chosen, rejected, margin = (np.array(BT[name]) for name in ("chosen", "rejected", "margin"))

    def loss(a, b):
        return pairwise_reward_loss(a, b, framework.array(margin), center_coef=0.01)[0]

    by_chosen, by_rejected = framework.gradients(loss, chosen, rejected)
    pull, to_zero = sigmoid(margin - (chosen - rejected)) / 4, 0.01 * 2 * (chosen + rejected) / 4
    framework.close(framework.array(by_chosen), -pull + to_zero)
    framework.close(framework.array(by_rejected), pull + to_zero)


@in_every_framework
def test_pairs_far_apart_neither_overflow_nor_lose_their_gradient(framework):
    far = [1e4, 0.0]
    loss, _ = pairwise_reward_loss(framework.array(far), framework.array(far[::-1]))
    framework.close(loss, 5e3)
    by_chosen, _ = framework.gradients(lambda a, b: pairwise_reward_loss(a, b)[0], far, far[::-1])
    framework.close(framework.array(by_chosen), [0.0, -0.5])


@in_every_framework
def test_a_tie_is_ranked_half_right(framework):
    def accuracy(chosen, rejected):
        return pairwise_reward_loss(framework.array(chosen), framework.array(rejected))[1]

    framework.close(accuracy([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, -1.0]), 2.5 / 4)
    framework.close(accuracy([0.3] * 3, [0.3] * 3), 0.5)


@in_every_framework
def test_scores_of_other_shapes_are_errors(framework):
    with pytest.raises(ValueError, match=r"shapes differ: chosen \(2,\), rejected \(1,\)"):
        pairwise_reward_loss(framework.array([1.0, 2.0]), framework.array([1.0]))


# --- the SFT loss ---


def sft_batch(seed):
    rng = np.random.default_rng(seed)
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]])
    return rng.normal(0, 2, (3, 4, 6)), rng.integers(0, 6, (3, 4)), mask


def loss_of(logits, tokens, mask, **arguments):
    """The loss by logits (B, L, V) and tokens (B, L)."""
    ids = array_module(logits).where(mask > 0, tokens, 0)
    return sft_loss(logprobs_from_logits(logits, ids), mask, **arguments)


def sft_reference(logits, tokens, mask):
    trained = numpy_ppo.real_tokens(mask)
    return -sum(numpy_ppo.logprob(logits[token], tokens[token], 1.0) for token in trained) / len(trained)


@in_every_framework
@pytest.mark.parametrize("seed", range(3))
def test_sft_loss_and_gradient_equal_the_reference(framework, seed):
    logits, tokens, mask = sft_batch(seed)
    loss, count = loss_of(*(framework.array(x) for x in (logits, tokens, mask)))
    framework.close(loss, sft_reference(logits, tokens, mask))
    assert framework.numpy(count) == 7
    ours = framework.gradients(lambda x: loss_of(x, framework.array(tokens), framework.array(mask))[0], logits)[0]
    framework.close(framework.array(ours), numpy_ppo.gradient(lambda x: sft_reference(x, tokens, mask), logits))


@in_every_framework
@pytest.mark.parametrize("label", [-100, 10_000])
def test_tokens_that_are_not_trained_do_not_matter(framework, label):
    """Neither which they are, be it no id at all (−100 is usual), nor how well they are predicted."""
    logits, tokens, mask = sft_batch(3)
    changed_logits = np.where(mask[..., None] > 0, logits, 1e4 * logits)
    changed_tokens = np.where(mask > 0, tokens, label)
    results = []
    for x, y in ((logits, tokens), (changed_logits, changed_tokens)):
        target, trained = framework.array(y), framework.array(mask)
        (gradient,) = framework.gradients(lambda x, t=target, m=trained: loss_of(x, t, m)[0], x)
        assert (gradient[mask == 0] == 0).all()
        results.append((framework.numpy(loss_of(framework.array(x), target, trained)[0]), gradient[mask > 0]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@in_every_framework
def test_a_batch_without_trained_tokens_has_a_loss_of_zero(framework):
    logits, tokens, mask = sft_batch(4)
    nothing = framework.array(mask * 0)
    loss, count = loss_of(framework.array(logits), framework.array(tokens), nothing)
    assert framework.numpy(loss) == 0 and framework.numpy(count) == 0
    (gradient,) = framework.gradients(lambda x: loss_of(x, framework.array(tokens), nothing)[0], logits)
    assert (gradient == 0).all()


@in_every_framework
def test_accumulated_pieces_equal_the_whole(framework):
    """By tokens, not by means: the rows have 4, 2 and 1 trained tokens."""
    logits, tokens, mask = sft_batch(5)
    whole, _ = loss_of(*(framework.array(x) for x in (logits, tokens, mask)))
    pieces = []
    for row in (slice(0, 1), slice(1, 2), slice(2, 3)):
        piece = [framework.array(x[row]) for x in (logits, tokens, mask)]
        pieces.append(loss_of(piece[0], piece[1], piece[2], denominator=7))
    framework.close(sum(loss for loss, _ in pieces), framework.numpy(whole))
    assert [int(framework.numpy(count)) for _, count in pieces] == [4, 2, 1]


@in_every_framework
def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary(framework):
    loss, _ = loss_of(
        framework.array(np.zeros((2, 3, 50))), framework.array([[7] * 3] * 2), framework.array([[1] * 3] * 2)
    )
    framework.close(loss, math.log(50))


@in_every_framework
def test_logprobs_and_mask_of_other_shapes_are_errors(framework):
    _, tokens, mask = sft_batch(6)
    with pytest.raises(ValueError, match="shapes differ"):
        sft_loss(framework.array(tokens), framework.array(mask[:1]))
