"""The advantage estimators: one function and one row of ESTIMATORS each.

    python ppo_training.py --ground-truth-reward --advantage rloo

Arrays are those of the caller, mlx or torch. The formulas stand in training.ppo.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from common.errors import UserError
from training import ppo
from training.rollout import Rollout
from training.settings import PPOSettings

Array = Any


class Estimator(NamedTuple):
    """How advantages are made, and what that asks of the rest of a run."""

    estimate: Callable[[Rollout, PPOSettings, float, float], tuple[Array, Array]]  # → advantages and returns (B, C)
    uses_value_head: bool  # else returns are not used
    kl_in_loss: bool  # the KL to the reference is a term of the loss, not part of the rewards
    compares_completions: bool  # needs several completions of a prompt, side by side


def gae(rollout: Rollout, settings: PPOSettings, kl_coef: float, least: float) -> tuple[Array, Array]:
    """Generalised advantage estimation on the KL-shaped rewards, whitened.

    A value is the head's plus the mean return of the batch, discounted from the last token, where the score is given:
    γ^left · mean. Returns are what is left for the head to learn: one linear map would need many steps to learn the
    mean from features that vary with the token, and its values would be worse than none meanwhile.
    """
    mask = rollout.mask
    rewards = ppo.kl_shaped_rewards(
        rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, mask, kl_coef, rollout.kl
    )
    if settings.whiten_rewards:
        rewards = ppo.masked_whiten(rewards, mask, center=False)
    baseline = 0.0 * mask
    if settings.center_values:
        left = mask.sum(axis=1)[:, None] - mask.cumsum(axis=1)  # tokens still to come after this one
        baseline = settings.gamma**left * rewards.sum(axis=1).mean()
    values = rollout.old_values + baseline
    advantages, returns = ppo.gae(rewards, values, mask, settings.gamma, settings.gae_lambda)
    return ppo.masked_whiten(advantages, mask, least=least), (returns - baseline) * mask


def group(rollout: Rollout, settings: PPOSettings, kl_coef: float, least: float) -> tuple[Array, Array]:
    """Each completion's score against the others of its prompt (GRPO, arXiv:2402.03300), at all its tokens."""
    scores = ppo.group_advantages(rollout.scores, settings.num_generations, not settings.no_group_scale)
    return scores[:, None] * rollout.mask, 0.0 * rollout.mask


def rloo(rollout: Rollout, settings: PPOSettings, kl_coef: float, least: float) -> tuple[Array, Array]:
    """Each completion's score less the mean of the others of its prompt (arXiv:2402.14740), at all its tokens."""
    scores = ppo.rloo_advantages(rollout.scores, settings.num_generations)
    return scores[:, None] * rollout.mask, 0.0 * rollout.mask


ESTIMATORS = {
    "gae": Estimator(gae, uses_value_head=True, kl_in_loss=False, compares_completions=False),
    "group": Estimator(group, uses_value_head=False, kl_in_loss=True, compares_completions=True),
    "rloo": Estimator(rloo, uses_value_head=False, kl_in_loss=True, compares_completions=True),
}


def estimator(name: str) -> Estimator:
    """The estimator of --advantage. Raises UserError for another name."""
    if name not in ESTIMATORS:
        raise UserError(f"--advantage is {name!r}; use one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def advantages_and_returns(
    rollout: Rollout, settings: PPOSettings, kl_coef: float, least: float = 0.0
) -> tuple[Array, Array]:
    """Advantages and returns (B, C) of a rollout, zero at pads, by the estimator that `settings` names.

    kl_coef: score units per nat, where the KL is part of the rewards. least: score units, the least deviation by which
    advantages are whitened (`training.ppo_step.least_deviation`).
    """
    return estimator(settings.advantage).estimate(rollout, settings, kl_coef, least)
