"""The mathematics of PPO on language models, written once for MLX and for PyTorch.

Pure functions on arrays: `ppo_training.py` hands in `mlx.core` arrays, `pytorch_ppo_training.py` torch
tensors, and both get arrays of their own kind back, on the same device. Nothing is changed in place, nothing
is read back to the host, and neither framework is imported here: `array_module` finds it from the arguments.
NumPy arrays are not served.

Shapes: B completions, C tokens a completion, V vocabulary. Logprobs, KL and entropy are in nats. `mask`
(B, C) is 1 (or True) at sampled tokens up to and including the first EOS, 0 at the pads to their right. What
stands at a pad, inf and NaN included, does not matter to a function that takes the mask; its gradient there is
exactly 0.

Callers detach whatever is not being trained, and decide whether to skip an update.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Array = Any  # an mlx.core.array or a torch.Tensor

KL_KINDS = ("k1", "kl", "k3", "abs", "mse", "full")


def array_module(array: Array) -> Any:
    """The framework of `array`: the module `mlx.core` or `torch`. Raises TypeError for anything else."""
    name = {"mlx": "mlx.core", "torch": "torch"}.get(type(array).__module__.partition(".")[0])
    if name is None:
        raise TypeError(f"expected an mlx array or a torch tensor, got {type(array).__name__}")
    return sys.modules[name]


def check_shapes(**arrays: Array) -> None:
    """Raise ValueError unless all arrays (None aside) have one shape: broadcasting would hide a mistake."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items() if array is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def at_least_float32(x: Array) -> Array:
    """Half precision and integers become float32; float32 and float64 stay."""
    xp = array_module(x)
    if x.dtype in (xp.float32, xp.float64):
        return x
    return x.to(xp.float32) if hasattr(x, "to") else x.astype(xp.float32)


# --- masks ---


def count_tokens(mask: Array) -> Array:
    """Number of real tokens in `mask` (any shape), as an integer scalar array."""
    return array_module(mask).where(mask > 0, 1, 0).sum()


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of `values` over real tokens: a scalar array, 0 where there is none.

    values, mask: one shape. Raises ValueError if shapes differ.
    """
    check_shapes(values=values, mask=mask)
    xp = array_module(values)
    return xp.where(mask > 0, values, 0.0).sum() / xp.clip(count_tokens(mask), 1, None)


def sum_per_completion(values: Array, mask: Array) -> Array:
    """Sum of `values` over the real tokens of each completion: of per-token KL, the completion's `kl`.

    values, mask: (B, C). Returns (B,). Raises ValueError if shapes differ.
    """
    check_shapes(values=values, mask=mask)
    return array_module(values).where(mask > 0, values, 0.0).sum(axis=1)


def masked_whiten(values: Array, mask: Array, center: bool = True, least: float = 0.0) -> Array:
    """Scale to unit variance over all real tokens, and to mean 0 where `center`: (x − mean) / √(var + 1e-8).

    values, mask: (B, C). The variance is Bessel's (n − 1); that of a single real token counts as 0. With
    `center=False` the mean is put back, as is usual for rewards. least: of the standard deviation, in the unit of
    values; what varies less is divided by it. Returns (B, C), zero where mask is 0.
    Raises ValueError if shapes differ. Source: TRL 0.11, `core.masked_whiten`.
    """
    xp = array_module(values)
    check_shapes(values=values, mask=mask)
    # The mean of equal values may differ from them by rounding, which the division would blow up; that of zeros is 0.
    pivot = xp.where(mask > 0, values, -math.inf).max()
    shifted = xp.where(mask > 0, values - pivot, 0.0)
    mean = masked_mean(shifted, mask)
    deviations = xp.where(mask > 0, shifted - mean, 0.0)
    variance = (deviations * deviations).sum() / xp.clip(count_tokens(mask) - 1, 1, None)
    whitened = deviations * xp.rsqrt(xp.clip(variance, least**2, None) + 1e-8)
    return whitened if center else xp.where(mask > 0, whitened + (mean + pivot), 0.0)


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """1 − var(returns − values) / var(returns) over real tokens: a scalar array.

    values, returns, mask: (B, C). 1 where values predict the returns, 0 where they are no better than a constant
    (and where all returns are equal), below 0 where they add noise. Raises ValueError if shapes differ.
    Source: CleanRL, `ppo.py`.
    """
    xp = array_module(values)

    def squares(x: Array) -> Array:
        deviations = xp.where(mask > 0, x - masked_mean(x, mask), 0.0)
        return (deviations * deviations).sum()

    left, whole = squares(returns - values), squares(returns)
    return xp.where(whole > 0, 1.0 - left / xp.where(whole > 0, whole, 1.0), 0.0)


# --- from logits to nats ---


def logprobs_from_logits(logits: Array, tokens: Array, temperature: float | Array = 1.0) -> Array:
    """Log probability of each token under the tempered policy: log softmax(logits / temperature)[token].

    logits: (B, C, V), finite or −inf; tokens: (B, C) ids; temperature > 0. Returns (B, C), at least float32.
    """
    xp = array_module(logits)
    logits = at_least_float32(logits) / temperature
    index = tokens[..., None]
    if hasattr(xp, "take_along_axis"):
        chosen = xp.take_along_axis(logits, index, axis=-1)
    else:
        chosen = xp.take_along_dim(logits, index.long(), dim=-1)
    return chosen[..., 0] - xp.logsumexp(logits, axis=-1)


def _log_softmax(logits: Array, temperature: float | Array) -> Array:
    logits = at_least_float32(logits) / temperature
    return logits - array_module(logits).logsumexp(logits, axis=-1, keepdims=True)


def entropy_from_logits(logits: Array, temperature: float | Array = 1.0) -> Array:
    """Entropy of the tempered policy at each position: −Σ p log p.

    logits: (B, C, V), finite or −inf; temperature > 0. Returns (B, C), at least float32.
    """
    xp = array_module(logits)
    logprobs = _log_softmax(logits, temperature)
    probs = xp.exp(logprobs)
    return -(probs * xp.where(probs > 0, logprobs, 0.0)).sum(axis=-1)


# --- KL against the reference policy ---


def kl_penalty(logprobs: Array, ref_logprobs: Array, kind: str = "k1") -> Array:
    """Estimate of KL(policy‖reference) at each sampled token, from its two logprobs alone.

    With d = ref_logprobs − logprobs: "k1" (also "kl") is −d, unbiased; "k3" is exp(d) − 1 − d, unbiased and
    never negative; "abs" is |d|; "mse" is d² / 2. The exact one, "full", needs logits: `full_kl`.

    logprobs, ref_logprobs: one shape, which is returned. Raises ValueError if shapes differ, or for another
    kind. Source: joschu.net/blog/kl-approx.html; the other names are TRL 0.11's, `PPOTrainer._kl_penalty`.
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    xp = array_module(logprobs)
    difference = ref_logprobs - logprobs
    if kind in ("k1", "kl"):
        return -difference
    if kind == "k3":
        return xp.expm1(difference) - difference
    if kind == "abs":
        return xp.abs(difference)
    if kind == "mse":
        return 0.5 * difference * difference
    if kind == "full":
        raise ValueError("the full KL needs logits, not logprobs; compute it with full_kl")
    raise ValueError(f"unknown KL estimator {kind!r}; choose one of {', '.join(KL_KINDS)}")


def full_kl(logits: Array, ref_logits: Array, temperature: float | Array = 1.0) -> Array:
    """Exact KL(policy‖reference) at each position, over the vocabulary: Σ p (log p − log p_ref).

    logits, ref_logits: (B, C, V), finite or −inf; temperature > 0, of both. Returns (B, C), at least float32.
    Raises ValueError if shapes differ.
    """
    check_shapes(logits=logits, ref_logits=ref_logits)
    xp = array_module(logits)
    logprobs = _log_softmax(logits, temperature)
    probs = xp.exp(logprobs)
    log_ratio = logprobs - _log_softmax(ref_logits, temperature)
    return (probs * xp.where(probs > 0, log_ratio, 0.0)).sum(axis=-1)


class FixedKLController:
    """A constant KL coefficient, with the interface of `AdaptiveKLController`."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, kl: float, n: int) -> None:
        """Change nothing."""


class AdaptiveKLController:
    """A KL coefficient that grows while the KL is above its target and shrinks while it is below.

    target: nats per completion; horizon: completions over which the coefficient changes by at most 20 %; most: what it
    never exceeds. `value` is the coefficient and the whole state, which a checkpoint saves and restores.
    Source: arXiv:1909.08593, section 2.2; TRL 0.11, `AdaptiveKLController`; `most` is ours.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float, most: float = math.inf) -> None:
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon
        self.most = most

    def update(self, kl: float, n: int) -> None:
        """Adapt to the mean KL, in nats per completion, of `n` completions."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value = min(self.value * (1 + error * n / self.horizon), self.most)


# --- how far a step moves the policy ---


class StepSizeController:
    """A factor on the learning rate by which a step moves the policy as far as it should.

    target: nats per completion between the policy that sampled and itself during the step's updates, averaged over
    them; at most `ENTROPY_SHARE` of a completion's entropy, since a policy that is nearly certain has less to change.
    For small steps the KL grows with the square of the rate, hence the root. `value` is the factor and the whole state.
    Source: arXiv:2109.11978 (rsl_rl), where it changes by fixed factors.
    """

    ENTROPY_SHARE = 0.0125
    CHANGE = 1.5  # of the factor in one step, at most, either way
    REACH = 32.0  # of the factor, either way

    def __init__(self, target: float) -> None:
        self.value = 1.0
        self.target = target

    def update(self, moved: float, entropy: float, share: float = 1.0) -> None:
        """Adapt to a step that moved the policy by `moved` nats per completion (NaN: no update was made).

        entropy: nats per completion. share: 0..1, of the full step: what the schedule leaves of it, whose decay is not
        to be made up for, and what the scores still differ by, compared to before. Where they hardly differ, a full
        step would follow noise; where they do not, nothing was learned, and the factor remains.
        """
        if not self.target or not share:
            return
        wanted = min(self.target, self.ENTROPY_SHARE * entropy) * share**2
        if math.isnan(moved):
            moved = math.inf
        change = math.sqrt(wanted / moved) if moved else self.CHANGE
        change = min(max(change, 1 / self.CHANGE), self.CHANGE)
        self.value = min(max(self.value * change, 1 / self.REACH), self.REACH)


# --- scores and rewards ---


@dataclass
class RunningMoments:
    """Mean and standard deviation (Bessel's) of all scores so far. Its three fields are its whole state.

    Source: Welford, Technometrics 4(3), 1962; replaces TRL 0.11's `core.RunningMoments`.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def update(self, scores: Sequence[float]) -> None:
        """Add the scores of one step."""
        for score in scores:
            self.count += 1
            deviation = score - self.mean
            self.mean += deviation / self.count
            self.squares += deviation * (score - self.mean)

    @property
    def std(self) -> float:
        """Standard deviation; 1 as long as all scores are equal, so that dividing by it is safe."""
        return math.sqrt(self.squares / (self.count - 1)) if self.squares > 0 else 1.0


def scale_scores(scores: Array, moments: RunningMoments, center: bool = True) -> Array:
    """Scores in units of their running standard deviation, and about their running mean where `center`.

    scores: (B,), already part of `moments`. Returns (B,).
    Source: TRL 0.11, `use_score_scaling` and (center) `use_score_norm`.
    """
    return (scores - (moments.mean if center else 0.0)) / moments.std


def kl_shaped_rewards(
    scores: Array,
    logprobs: Array,
    ref_logprobs: Array,
    mask: Array,
    kl_coef: float | Array,
    kl: Array | None = None,
) -> Array:
    """Reward of each token: −kl_coef · KL, and the score of the completion on top at its last real token.

    scores: (B,); logprobs, ref_logprobs, mask: (B, C); kl: (B, C), by another estimator than k1 (`kl_penalty`,
    `full_kl`). Returns a new (B, C) array, zero where mask is 0; with scores of 0 it is the KL term alone. A row
    without real tokens has no place for its score and stays zero (an empty completion is no such row: its EOS is
    real). Raises ValueError if shapes differ or there is not one score for each completion.
    Source: TRL 0.11, `PPOTrainer.compute_rewards`.
    """
    if kl is None:
        kl = kl_penalty(logprobs, ref_logprobs)
    check_shapes(kl=kl, logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    if tuple(scores.shape) != (mask.shape[0],):
        raise ValueError(f"scores {tuple(scores.shape)}: there must be one for each of {mask.shape[0]} rows")
    xp = array_module(kl)
    real = mask > 0
    so_far = xp.cumsum(xp.where(real, 1, 0), axis=1)
    last = real & (so_far == so_far[:, -1:])
    return xp.where(real, -kl_coef * kl, 0.0) + xp.where(last, scores[:, None], 0.0)


# --- advantages ---


def _shift_left(x: Array, steps: int) -> Array:
    """x[:, t + steps] at t, and 0 where that lies beyond the end."""
    xp = array_module(x)
    return xp.concatenate([x[:, steps:], xp.zeros_like(x[:, :steps])], axis=1)


def gae(rewards: Array, values: Array, mask: Array, gamma: float, gae_lambda: float) -> tuple[Array, Array]:
    """Advantages and returns by generalised advantage estimation (arXiv:1506.02438, eq. 16).

        δ_t = r_t + γ V_{t+1} − V_t        A_t = Σ_{j ≥ t} (γλ)^{j−t} δ_j        R_t = A_t + V_t

    rewards, values: (B, C), in score units; mask: (B, C), pads on the right: the text ends there, so the
    value after the last real token is 0. Returns two (B, C) arrays, not whitened, zero where mask is 0.
    Raises ValueError if shapes differ.

    The sum is built by doubling: sums over n tokens ahead, and the same shifted by n, make the sums over 2n.
    So log₂ C array operations do what a loop over tokens would, without its cost and with less rounding.
    """
    check_shapes(rewards=rewards, values=values, mask=mask)
    xp = array_module(rewards)
    rewards, values = xp.where(mask > 0, rewards, 0.0), xp.where(mask > 0, values, 0.0)
    advantages = rewards + gamma * _shift_left(values, 1) - values
    reach = 1
    while reach < mask.shape[1]:
        advantages = advantages + (gamma * gae_lambda) ** reach * _shift_left(advantages, reach)
        reach *= 2
    return advantages, advantages + values


def _group_deviations(scores: Array, group_size: int) -> Array:
    """Scores less the mean of their group: (B / group_size, group_size), exactly 0 where all are equal."""
    if group_size < 2 or scores.shape[0] % group_size:
        raise ValueError(
            f"{scores.shape[0]} scores do not fall into groups of {group_size}; "
            "the group size must be at least 2 and divide the number of scores"
        )
    groups = scores.reshape(-1, group_size)
    # The mean of equal scores may differ from them by rounding; the mean of zeros is 0.
    groups = groups - groups[:, :1]
    return groups - groups.sum(axis=1, keepdims=True) / group_size


def group_advantages(scores: Array, group_size: int, scale: bool = True) -> Array:
    """Group-relative advantage: (score − mean) / (std + 1e-4) over the completions of one prompt.

    scores: (B,), the `group_size` completions of a prompt side by side. The std is Bessel's; `scale=False`
    leaves it out (arXiv:2503.20783). Returns (B,), 0 for a group of equal scores:
    `advantages[:, None] * mask` gives every token its own. Raises ValueError unless group_size ≥ 2 divides B.
    Source: GRPO, arXiv:2402.03300, section 4.1.2.
    """
    deviations = _group_deviations(scores, group_size)
    if scale:
        variance = (deviations * deviations).sum(axis=1, keepdims=True) / (group_size - 1)
        deviations = deviations / (array_module(scores).sqrt(variance) + 1e-4)
    return deviations.reshape(-1)


def rloo_advantages(scores: Array, group_size: int) -> Array:
    """Leave-one-out advantage: the score less the mean score of the prompt's other completions.

    scores: (B,), the `group_size` completions of a prompt side by side. Returns (B,), 0 for a group of equal
    scores. Raises ValueError unless group_size ≥ 2 divides B. Source: RLOO, arXiv:2402.14740.
    """
    return (_group_deviations(scores, group_size) * (group_size / (group_size - 1))).reshape(-1)


# --- the loss ---


def ppo_loss(
    logprobs: Array,
    values: Array | None,
    old_logprobs: Array,
    old_values: Array | None,
    advantages: Array,
    returns: Array | None,
    mask: Array,
    clip_range: float | Array,
    value_clip_range: float | Array,
    vf_coef: float | Array,
    denominator: float | Array | None = None,
    entropy: Array | None = None,
    entropy_coef: float | Array = 0.0,
    ref_logprobs: Array | None = None,
    kl_coef: float | Array = 0.0,
    kl_kind: str = "k3",
) -> tuple[Array, dict[str, Array]]:
    """PPO's clipped loss, to be minimised (arXiv:1707.06347, eq. 7 and 9; value clipping as in CleanRL).

        ratio  = exp(logprobs − old_logprobs)
        policy = Σ max(−A · ratio, −A · clip(ratio, 1 ± clip_range)) / n
        value  = Σ ½ max((V − R)², (clip(V, V_old ± value_clip_range) − R)²) / n
        loss   = policy + vf_coef · value − entropy_coef · entropy + kl_coef · kl_loss

    All arrays are (B, C) float32. The gradient is that of logprobs, values and entropy; the other arrays are
    data, detached by the caller. Without a value head `values`, `old_values` and `returns` are None and the
    value term is left out. `ref_logprobs` puts the KL to the reference into the loss, by the estimator `kl_kind`
    (k3: GRPO, arXiv:2402.03300, eq. 4). An infinite clip range turns that clipping off.

    n is `denominator`, or else the number of real tokens in `mask`. With the token count of a whole batch as
    the denominator, the losses, gradients and stats of its pieces sum to those of the whole.

    Returns the loss and its stats, scalar arrays (in torch still on the graph). Stats are sums over tokens
    divided by n: policy_loss; value_loss, value_clip_fraction, entropy, kl_loss where they are defined;
    approx_kl, of ½ (log ratio)²; policy_kl, of −log ratio; clip_fraction, of tokens where the clipped term
    is the larger; ratio_mean. ratio_max alone is a maximum. Raises ValueError if shapes differ.
    """
    check_shapes(
        logprobs=logprobs,
        values=values,
        old_logprobs=old_logprobs,
        old_values=old_values,
        advantages=advantages,
        returns=returns,
        mask=mask,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
    )
    xp = array_module(logprobs)
    n = xp.clip(count_tokens(mask), 1, None) if denominator is None else denominator
    real = mask > 0

    def at_real(x: Array) -> Array:
        # Inputs pass through here before any arithmetic: behind it, a pad's gradient could be 0 × inf.
        return xp.where(real, x, 0.0)

    def mean(x: Array) -> Array:
        return at_real(x).sum() / n

    def share(condition: Array) -> Array:
        return mean(xp.where(condition, 1.0, 0.0))

    logprobs, advantages = at_real(logprobs), at_real(advantages)
    log_ratio = logprobs - at_real(old_logprobs)
    ratio = xp.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * xp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    loss = mean(xp.maximum(unclipped, clipped))
    stats = {
        "policy_loss": loss,
        "approx_kl": mean(0.5 * log_ratio * log_ratio),
        "policy_kl": mean(-log_ratio),
        "clip_fraction": share(clipped > unclipped),
        "ratio_mean": mean(ratio),
        "ratio_max": at_real(ratio).max(),
    }
    if values is not None:
        values, old_values, returns = at_real(values), at_real(old_values), at_real(returns)
        near_values = xp.clip(values, old_values - value_clip_range, old_values + value_clip_range)
        unclipped, clipped = (values - returns) ** 2, (near_values - returns) ** 2
        stats["value_loss"] = 0.5 * mean(xp.maximum(unclipped, clipped))
        stats["value_clip_fraction"] = share(clipped > unclipped)
        loss = loss + vf_coef * stats["value_loss"]
    if entropy is not None:
        stats["entropy"] = mean(entropy)
        loss = loss - entropy_coef * stats["entropy"]
    if ref_logprobs is not None:
        stats["kl_loss"] = mean(kl_penalty(logprobs, at_real(ref_logprobs), kl_kind))
        loss = loss + kl_coef * stats["kl_loss"]
    return loss, stats
