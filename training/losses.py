"""The losses of supervised fine-tuning and of reward modelling, written once for MLX and for PyTorch.

Pure functions on arrays of either framework, as in `training/ppo.py`, which has PPO's loss and the helpers
used here.
"""

from training.ppo import Array, array_module, at_least_float32, check_shapes, count_tokens


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
    logits = difference if margin is None else difference - margin
    # −log σ(x) = log(1 + exp(−x)) = logaddexp(0, −x), which neither overflows nor loses its gradient.
    loss = mean(xp.logaddexp(xp.zeros_like(logits), -logits))
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
