"""The stats of a PPO step under TRL 0.11's names, of arrays of either framework. docs/from_trl.md has the table.

Not here: the figures under our own names (training.ppo_step), which stand beside them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.rollout import Rollout
from training.settings import PPOSettings

Array = Any
# Our name in the stats of an update → TRL's.
UPDATE_NAMES = {
    "policy_loss": "ppo/loss/policy",
    "value_loss": "ppo/loss/value",
    "approx_kl": "ppo/policy/approxkl",
    "policy_kl": "ppo/policy/policykl",
    "clip_fraction": "ppo/policy/clipfrac",
    "ratio_mean": "ppo/policy/ratio",
    "value_clip_fraction": "ppo/val/clipfrac",
}


def as_numpy(array: Array) -> np.ndarray:
    """An mlx array, a torch tensor on any device, or what NumPy takes, as a NumPy array."""
    return np.array(array.detach().cpu() if hasattr(array, "detach") else array)


def deviation(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation (Bessel's), NaN of a single value as in torch."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def rollout_stats(rollout: Rollout, advantages: Array, returns: Array, kl_coef: float) -> dict[str, Any]:
    """What TRL reports of a rollout: numbers, and arrays where TRL has arrays.

    kl is by the run's estimator, as it is in the rewards. Values are those before the update; means and variances are
    over all tokens of the batch.
    """
    mask = as_numpy(rollout.mask) > 0
    fields = (rollout.old_logprobs, rollout.ref_logprobs, rollout.kl, rollout.old_values, advantages, returns)
    logprobs, ref_logprobs, kl, values, advantages, returns = (np.where(mask, as_numpy(field), 0.0) for field in fields)
    scores, kl_dist = as_numpy(rollout.scores), kl.sum(axis=1)
    error = float(np.square(values - returns)[mask].mean())
    variance = float(np.var(returns[mask], ddof=1)) if mask.sum() > 1 else float("nan")
    return {
        "objective/kl": float(kl_dist.mean()),
        "objective/kl_dist": kl_dist,
        "objective/logprobs": logprobs,
        "objective/ref_logprobs": ref_logprobs,
        "objective/kl_coef": kl_coef,
        "objective/entropy": float(-logprobs.sum(axis=1).mean()),
        "ppo/mean_non_score_reward": float(-kl_coef * kl[mask].mean()),
        "ppo/mean_scores": float(scores.mean()),
        "ppo/std_scores": deviation(scores),
        "ppo/policy/advantages": advantages[mask],
        "ppo/policy/advantages_mean": float(advantages[mask].mean()),
        "ppo/returns/mean": float(returns[mask].mean()),
        "ppo/returns/var": variance,
        "ppo/val/mean": float(values[mask].mean()),
        "ppo/val/var": float(np.var(values[mask], ddof=1)) if mask.sum() > 1 else float("nan"),
        "ppo/val/error": error,
        "ppo/val/var_explained": 1 - error / variance if variance else float("nan"),
    }


def update_stats(updates: Mapping[str, float], settings: PPOSettings) -> dict[str, float]:
    """What TRL reports of the updates of a step, averaged over them; NaN where none was made."""
    stats = {theirs: updates.get(ours, float("nan")) for ours, theirs in UPDATE_NAMES.items()}
    return {**stats, "ppo/loss/total": stats["ppo/loss/policy"] + settings.vf_coef * stats["ppo/loss/value"]}


def length_stats(queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Lengths of queries and responses, in tokens."""
    stats: dict[str, Any] = {}
    for name, rows in (("queries", queries), ("responses", responses)):
        lengths = np.array([len(row) for row in rows], dtype=np.float32)
        stats |= {f"tokens/{name}_len_mean": float(lengths.mean()), f"tokens/{name}_len_std": deviation(lengths)}
        stats[f"tokens/{name}_dist"] = lengths
    return stats
