"""PPO's mathematics a second time: float64 NumPy, one token at a time, straight from the formulas.

Shares no code and no trick with `training/ppo.py`, which the tests hold to it. Slow on purpose.
"""

import math
from collections.abc import Callable

import numpy as np


def real_tokens(mask):
    return [(b, t) for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]


def whiten(values, mask, center):
    tokens = real_tokens(mask)
    mean = sum(values[token] for token in tokens) / len(tokens)
    variance = sum((values[token] - mean) ** 2 for token in tokens) / (len(tokens) - 1)
    out = np.zeros(values.shape)
    for token in tokens:
        out[token] = (values[token] - mean) / math.sqrt(variance + 1e-8) + (0 if center else mean)
    return out


def logprob(logits, token, temperature):
    weights = [math.exp(logit / temperature) for logit in logits]
    return math.log(weights[token] / sum(weights))


def entropy(logits, temperature):
    logprobs = [logprob(logits, token, temperature) for token in range(len(logits))]
    return -sum(math.exp(p) * p for p in logprobs)


def kl_over_vocabulary(logits, ref_logits, temperature):
    total = 0.0
    for token in range(len(logits)):
        p, q = logprob(logits, token, temperature), logprob(ref_logits, token, temperature)
        total += math.exp(p) * (p - q)
    return total


def kl_of_token(p, q, kind):
    """p, q: logprobs of one sampled token under the policy and the reference."""
    return {
        "k1": p - q,
        "kl": p - q,
        "k3": math.exp(q) / math.exp(p) - 1 - (q - p),
        "abs": abs(p - q),
        "mse": (p - q) ** 2 / 2,
    }[kind]


def rewards(scores, logprobs, ref_logprobs, mask, kl_coef, kind):
    out = np.zeros(mask.shape)
    for b, t in real_tokens(mask):
        out[b, t] = -kl_coef * kl_of_token(logprobs[b, t], ref_logprobs[b, t], kind)
    for b, score in enumerate(scores):
        out[b, max(t for row, t in real_tokens(mask) if row == b)] += score
    return out


def gae(rewards, values, mask, gamma, gae_lambda):
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        advantage = next_value = 0.0
        for t in reversed(range(int(mask[b].sum()))):
            delta = rewards[b, t] + gamma * next_value - values[b, t]
            advantage = delta + gamma * gae_lambda * advantage
            next_value = values[b, t]
            advantages[b, t], returns[b, t] = advantage, advantage + values[b, t]
    return advantages, returns


def ppo_loss(
    logprobs,
    values,
    old_logprobs,
    old_values,
    advantages,
    returns,
    mask,
    clip_range,
    value_clip_range,
    vf_coef,
    entropy,
    entropy_coef,
    ref_logprobs,
    kl_coef,
):
    tokens = real_tokens(mask)
    total = 0.0
    for token in tokens:
        ratio = math.exp(logprobs[token] - old_logprobs[token])
        near_ratio = min(max(ratio, 1 - clip_range), 1 + clip_range)
        total -= min(ratio * advantages[token], near_ratio * advantages[token])
        step = min(max(values[token] - old_values[token], -value_clip_range), value_clip_range)
        error, near_error = values[token] - returns[token], old_values[token] + step - returns[token]
        total += vf_coef * max(error**2, near_error**2) / 2
        total -= entropy_coef * entropy[token]
        total += kl_coef * kl_of_token(logprobs[token], ref_logprobs[token], "k3")
    return total / len(tokens)


def gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Gradient of a scalar function of an array, by central differences."""
    out = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        nudge = np.zeros(at.shape)
        nudge[index] = step
        out[index] = (function(at + nudge) - function(at - nudge)) / (2 * step)
    return out
