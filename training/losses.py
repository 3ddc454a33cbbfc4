"""The losses of supervised fine-tuning, reward modelling and preference tuning, written once for MLX and for PyTorch.

Pure functions on arrays of either framework, as in `training/ppo.py`, which has PPO's loss and the helpers
used here.
"""

from training.ppo import Array, array_module, at_least_float32, check_shapes, count_tokens

PREFERENCE_LOSSES = ("sigmoid", "ipo", "orpo")  # DPO's own, IPO's, ORPO's


def pairwise_reward_loss(
    chosen: Array,
    rejected: Array,
    margin: Array | None = None,
    center_coef: float = 0.0,
    weights: Array | None = None,
) -> tuple[Array, Array]:
    """Bradley–Terry loss of preference pairs, and the share of them that the reward model ranks right.

        loss = mean(−log σ(chosen − rejected − margin)) + center_coef · mean((chosen + rejected)²)

    chosen, rejected: scores by the reward model, (B,) or any one shape; margin: by how much they should differ;
    weights: how much each pair counts in the means (default: alike), with a sum above 0. The second term holds
    scores about 0, where the first does not care (arXiv:2312.09244, eq. 2). Returns two scalar arrays: the loss,
    and the share of pairs with chosen above rejected. A tie counts as half, so a model that scores everything
    alike is as good as a coin. Raises ValueError if shapes differ. Source: arXiv:2307.09288, eq. 2.
    """
    check_shapes(chosen=chosen, rejected=rejected, margin=margin, weights=weights)
    xp = array_module(chosen)
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)

    def mean(values: Array) -> Array:
        return values.mean() if weights is None else (weights * values).sum() / weights.sum()

    difference = chosen - rejected
    loss = mean(-_log_sigmoid(difference if margin is None else difference - margin))
    if center_coef:
        loss = loss + center_coef * mean((chosen + rejected) ** 2)
    accuracy = 0.5 * mean(xp.where(difference > 0, 1.0, 0.0) + xp.where(difference >= 0, 1.0, 0.0))
    return loss, accuracy


def sft_loss(logprobs: Array, mask: Array, denominator: float | Array | None = None) -> tuple[Array, Array]:
    """Cross-entropy of the tokens that are trained, in nats a token.

    logprobs: of the tokens, any shape; mask: of the same shape, 1 where a token is trained, 0 at pads (any value may
    stand there). The sum is divided by `denominator`, or else by the number of trained tokens: with the count of a
    whole batch as the denominator, the losses and gradients of its pieces add up to those of the whole. Returns two
    scalar arrays: the loss, 0 where nothing is trained, and the number of trained tokens in `mask`. Raises ValueError
    if shapes differ.
    """
    check_shapes(logprobs=logprobs, mask=mask)
    xp = array_module(logprobs)
    count = count_tokens(mask)
    loss = xp.where(mask > 0, -logprobs, 0.0).sum()
    return loss / (xp.clip(count, 1, None) if denominator is None else denominator), count


def dpo_losses(chosen: Array, rejected: Array, beta: float, label_smoothing: float = 0.0) -> Array:
    """DPO's loss of each preference pair (arXiv:2305.18290, eq. 7).

        −(1 − ε) · log σ(beta · (chosen − rejected)) − ε · log σ(−beta · (chosen − rejected))

    chosen, rejected: (B,) log ratios in nats, of the policy to the reference, summed over a completion; beta: reward
    units a nat; label_smoothing: ε, the share of pairs whose labels are taken to be wrong. Returns (B,). Raises
    ValueError if shapes differ.
    """
    check_shapes(chosen=chosen, rejected=rejected)
    logits = beta * (at_least_float32(chosen) - at_least_float32(rejected))
    return -(1 - label_smoothing) * _log_sigmoid(logits) - label_smoothing * _log_sigmoid(-logits)


def ipo_losses(chosen: Array, rejected: Array, beta: float) -> Array:
    """IPO's loss of each preference pair, (chosen − rejected − 1 / (2 · beta))² (arXiv:2310.12036, eq. 17).

    chosen, rejected: (B,) log ratios in nats a token, of the policy to the reference: the mean over a completion, as
    sums would make the target depend on its length; beta: the paper's τ. Returns (B,). Raises ValueError if shapes
    differ.
    """
    check_shapes(chosen=chosen, rejected=rejected)
    return (at_least_float32(chosen) - at_least_float32(rejected) - 1 / (2 * beta)) ** 2


def odds_ratio_losses(chosen: Array, rejected: Array, beta: float) -> Array:
    """ORPO's odds ratio term of each preference pair, −beta · log σ(log odds ratio) (arXiv:2403.07691, eqs. 6 and 7).

    chosen, rejected: (B,) logprobs in nats a token: the mean over a completion, below 0; beta: the paper's λ. The odds
    of p are p / (1 − p). Returns (B,), to which the chosen completions' `sft_loss` is added. Raises ValueError if
    shapes differ.
    """
    check_shapes(chosen=chosen, rejected=rejected)
    return -beta * _log_sigmoid(_log_odds(at_least_float32(chosen)) - _log_odds(at_least_float32(rejected)))


def _log_sigmoid(x: Array) -> Array:
    """log σ(x) = −log(1 + exp(−x)) = −logaddexp(0, −x), which neither overflows nor loses its gradient."""
    xp = array_module(x)
    return -xp.logaddexp(xp.zeros_like(x), -x)


def _log_odds(logprobs: Array) -> Array:
    """log(p / (1 − p)); a p of 1, whose odds are infinite, counts as one just below it."""
    xp = array_module(logprobs)
    logprobs = xp.clip(logprobs, None, -1e-6)
    return logprobs - xp.log(-xp.expm1(logprobs))
