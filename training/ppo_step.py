"""The parts of a PPO step that are the same in both frameworks, between the flags and the pure maths of training.ppo.

Arrays are those of the caller, mlx or torch. Leaves out sampling, forward passes and the optimizer: the scripts.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.digits import DigitRule, digit_prompts
from data.prompts import PromptPlan, read_prompts
from data.records import feature_names
from rewards.combined import Scored
from training import ppo
from training.rollout import Rollout

Array = Any
SAMPLES_SHOWN = 8  # completions in a table of samples


def digit_rule(args: argparse.Namespace) -> DigitRule:
    """The rule that --decreasing and --multiple-of name."""
    return DigitRule(not args.decreasing, args.multiple_of)


def choose_prompts(args: argparse.Namespace, tokenizer: Any) -> list[str]:
    """The prompts that --prompts names, or else starts of the digit rule."""
    if args.prompts:
        return read_prompts(args.prompts, tokenizer, feature_names(args))
    return digit_prompts(digit_rule(args))


class Prompts:
    """The prompts of every step: those of --prompts, or starts of the digit rule, each as often as a group needs."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any = None):
        """tokenizer: renders prompts that are messages."""
        prompts = choose_prompts(args, tokenizer)
        self.repeats = 1 if args.advantage == "gae" else args.num_generations
        self.count = args.batch_size // self.repeats
        self.plan = PromptPlan(prompts, args.seed)

    def batch(self, step: int) -> list[str]:
        """batch_size prompts; the completions of one prompt stand side by side."""
        return [prompt for prompt in self.plan.batch(step, self.count) for _ in range(self.repeats)]


def make_controller(args: argparse.Namespace) -> ppo.AdaptiveKLController | ppo.FixedKLController:
    """The controller of the KL coefficient that --adap-kl-ctrl asks for."""
    if args.adap_kl_ctrl:
        return ppo.AdaptiveKLController(args.init_kl_coef, args.target, args.horizon)
    return ppo.FixedKLController(args.init_kl_coef)


@dataclass
class Progress:
    """What a run carries from step to step besides weights and optimizer; a checkpoint holds all of it."""

    controller: ppo.AdaptiveKLController | ppo.FixedKLController
    moments: ppo.RunningMoments = field(default_factory=ppo.RunningMoments)
    step: int = 0
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        """For a checkpoint, which adds the step."""
        return {"kl_coef": self.controller.value, "moments": vars(self.moments), "seconds": self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.step, self.seconds, self.controller.value = state["step"], state["seconds"], state["kl_coef"]
        self.moments = ppo.RunningMoments(**state["moments"])


def total_updates(args: argparse.Namespace) -> int:
    """Optimizer steps of the whole run, at which the learning rate's schedule ends."""
    return args.num_steps * args.ppo_epochs * args.batch_size // args.mini_batch_size


def summary(args: argparse.Namespace, progress: Progress, figures: dict[str, float], picture: object) -> dict[str, Any]:
    """The last word on a run. figures: those of its last step."""
    last: dict[str, Any] = {
        name: figures[name] for name in ("mean_score", "true_score", "kl", "kl_coef") if name in figures
    }
    ran = {"steps": progress.step, "seconds": round(progress.seconds, 1)}
    return {**ran, **last, "adapter": args.save_file, "picture": str(picture)}


def shape_scores(
    args: argparse.Namespace, scores: np.ndarray, ended: Sequence[bool], moments: ppo.RunningMoments
) -> np.ndarray:
    """Scores (B,) as training sees them: penalised without an EOS, scaled, clipped. Takes them into `moments`."""
    shaped = scores - args.missing_eos_penalty * ~np.asarray(ended, dtype=bool)
    moments.update(shaped.tolist())
    if args.scale_scores or args.normalize_scores:
        shaped = ppo.scale_scores(shaped, moments, center=args.normalize_scores)
    if args.score_clip:
        shaped = np.clip(shaped, -args.score_clip, args.score_clip)
    return shaped.astype(np.float32)


def token_kl(args: argparse.Namespace, logits: Array, ref_logits: Array, logprobs: Array, ref_logprobs: Array) -> Array:
    """KL per token (B, C) by the estimator of --kl-penalty; logits (B, C, V), logprobs (B, C)."""
    if args.kl_penalty == "full":
        return ppo.full_kl(logits, ref_logits, args.temperature)
    return ppo.kl_penalty(logprobs, ref_logprobs, args.kl_penalty)


def advantages_and_returns(args: argparse.Namespace, rollout: Rollout, kl_coef: float) -> tuple[Array, Array]:
    """Advantages and returns (B, C) of a rollout.

    gae: of the KL-shaped rewards, advantages whitened. A value is the head's plus the batch's mean, and returns are
    what is left for the head to learn: one linear map would take many steps to learn the mean, by features that vary
    with the token, and be worse than none meanwhile. group and rloo: each completion's own, at all its tokens; the KL
    stays out of them, as it stands in the loss, and returns are 0.
    """
    mask = rollout.mask
    if args.advantage == "gae":
        rewards = ppo.kl_shaped_rewards(
            rollout.scores, rollout.old_logprobs, rollout.ref_logprobs, mask, kl_coef, kl=rollout.kl
        )
        if args.whiten_rewards:
            rewards = ppo.masked_whiten(rewards, mask, center=False)
        mean = rewards.sum(axis=1).mean()
        advantages, returns = ppo.gae(rewards, rollout.old_values + mean, mask, args.gamma, args.gae_lambda)
        return ppo.masked_whiten(advantages, mask), (returns - mean) * mask
    if args.advantage == "rloo":
        per_completion = ppo.rloo_advantages(rollout.scores, args.num_generations)
    else:
        per_completion = ppo.group_advantages(rollout.scores, args.num_generations, not args.no_group_scale)
    return per_completion[:, None] * mask, 0.0 * mask


def value_figures(args: argparse.Namespace, rollout: Rollout, returns: Array) -> dict[str, float]:
    """What a step reports of its value head, if it has one."""
    if args.advantage != "gae":
        return {}
    return {"explained_variance": float(ppo.explained_variance(rollout.old_values, returns, rollout.mask))}


def policy_loss(
    args: argparse.Namespace,
    logits: Array,
    values: Array | None,
    rollout: Rollout,
    advantages: Array,
    returns: Array,
    denominator: Array,
    kl_coef: Array,
) -> tuple[Array, dict[str, Array]]:
    """PPO's loss on one piece of a mini batch, from the policy's logits (B, C, V) and values (B, C) or None."""
    return ppo.ppo_loss(
        ppo.logprobs_from_logits(logits, rollout.completions, args.temperature),
        values,
        rollout.old_logprobs,
        None if values is None else rollout.old_values,
        advantages,
        None if values is None else returns,
        rollout.mask,
        args.clip_range,
        args.value_clip_range,
        args.vf_coef,
        denominator=denominator,
        entropy=ppo.entropy_from_logits(logits, args.temperature) if args.entropy_coef else None,
        entropy_coef=args.entropy_coef,
        ref_logprobs=None if args.advantage == "gae" else rollout.ref_logprobs,
        kl_coef=kl_coef,
    )


def mini_batches(args: argparse.Namespace, step: int) -> Iterator[list[np.ndarray]]:
    """Row indices of every mini batch of a step's update, each cut into its accumulation pieces."""
    for epoch in range(args.ppo_epochs):
        order = np.random.default_rng((args.seed, step, epoch)).permutation(args.batch_size)
        for rows in np.split(order, args.batch_size // args.mini_batch_size):
            yield np.split(rows, args.gradient_accumulation_steps)


def rejected(args: argparse.Namespace, stats: dict[str, float]) -> str:
    """What the stats of a mini batch say before its update: "stop" the step's updates, "skip" this one, or ""."""
    if args.target_kl and stats["approx_kl"] > 1.5 * args.target_kl:
        return "stop"
    return "skip" if not stats["ratio_mean"] <= args.ratio_threshold else ""


def rollout_figures(scored: Scored, ended: Sequence[bool], rollout: Rollout, entropy: Array) -> dict[str, float]:
    """What a step reports of its rollout. scored: as the reward gave it; entropy (B, C) nats per token."""
    return {
        "mean_score": float(np.mean(scored.scores)),
        **scored.part_means(),
        "kl": float(ppo.sum_per_completion(rollout.kl, rollout.mask).mean()),
        "entropy": float(ppo.masked_mean(entropy, rollout.mask)),
        "completion_length": float(rollout.mask.sum(axis=1).mean()),
        "eos_share": float(np.mean(ended)),
    }


def sample_rows(args: argparse.Namespace, step: int, scored: Scored) -> list[dict[str, Any]]:
    """The rows of the table of samples that a step (from 1) reports: a few, spread over its batch, or none."""
    every = args.steps_per_samples
    if not every or not (step % every == 0 or step in (1, args.num_steps)):
        return []
    count = min(SAMPLES_SHOWN, len(scored.scores))
    return [scored.row(index * len(scored.scores) // count) for index in range(count)]


def mean_stats(history: Sequence[dict[str, float]], skipped: int) -> dict[str, float]:
    """The stats of a step's updates, averaged, and how many there were."""
    names = history[0] if history else {}
    means = {name: float(np.mean([stats[name] for stats in history])) for name in names}
    return {**means, "updates": len(history), "skipped_updates": skipped}
