"""The parts of a PPO step that need neither model nor optimizer: between the settings and the maths of training.ppo.

Arrays are those of the caller, mlx or torch. Not here: advantages (training.advantages), sampling, forward passes and
the update (training.ppo_learner, training.torch_ppo_learner), the loop (training.ppo_loop).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from common.parser import positive
from data.prompts import PromptPlan
from rewards.combined import Scored
from training import ppo
from training.advantages import estimator
from training.optimizer_groups import step_kl
from training.ranks import Ranks
from training.rollout import Rollout
from training.schedules import schedule_share
from training.settings import PPOSettings

Array = Any
Stats = Any  # models.token_stats.TokenStats or its twin, each figure (B, C)
# Where none are given. The coefficient per nat: in standard deviations of the scores or, if advantages are divided by
# that of their group, in these units. The target: nats per completion.
KL_COEF, GROUP_KL_COEF, KL_TARGET = 0.02, 0.01, 6.0
LOSS_KINDS = ("k3", "abs", "mse")  # of KL that has a gradient towards the reference where it is a term of the loss


def check_settings(settings: PPOSettings) -> None:
    """Raise UserError for settings that cannot work, alone or together."""
    for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "num_steps",
                 "max_completion_length", "temperature", "horizon", "logits_memory"):  # fmt: skip
        positive(_flag(name), getattr(settings, name))
    for name in ("clip_range", "value_clip_range", "vf_coef", "target_kl", "score_clip",
                 "steps_per_eval", "early_stopping"):  # fmt: skip
        positive(_flag(name), getattr(settings, name), zero=True)
    for name in ("learning_rate", "value_head_learning_rate", "target", "init_kl_coef", "step_kl"):
        if getattr(settings, name) is not None:
            positive(_flag(name), getattr(settings, name), zero=name in ("init_kl_coef", "step_kl"))
    pieces = settings.gradient_accumulation_steps
    _check_divides("batch-size", settings.batch_size, "mini-batch-size", settings.mini_batch_size)
    _check_divides("mini-batch-size", settings.mini_batch_size, "gradient-accumulation-steps", pieces)
    if estimator(settings.advantage).compares_completions:
        if settings.num_generations < 2:
            raise UserError(f"--num-generations is {settings.num_generations}; {settings.advantage} needs 2 or more")
        _check_divides("batch-size", settings.batch_size, "num-generations", settings.num_generations, least=2)
    kl_kind(settings)


def _flag(field: str) -> str:
    return field.replace("_", "-")


def _check_divides(name: str, value: int, divisor_name: str, divisor: int, least: int = 1) -> None:
    if value % divisor:
        divisors = [d for d in range(least, value + 1) if value % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - divisor))[:2]
        remedy = f"try {' or '.join(map(str, sorted(near)))}" if near else f"raise --{name}"
        raise UserError(f"--{name} {value} is not divisible by --{divisor_name} {divisor}; {remedy}")


def kl_kind(settings: PPOSettings) -> str:
    """The KL estimator of a run: that of --kl-penalty, or the default of where the KL is used.

    Raises UserError for one that would not work there: in expectation the gradient of k1 is 0, and the full KL would
    need the reference's logits in every update.
    """
    in_loss = estimator(settings.advantage).kl_in_loss
    kind = settings.kl_penalty or ("k3" if in_loss else "k1")
    if kind not in ppo.KL_KINDS:
        raise UserError(f"--kl-penalty is {kind!r}; use one of {', '.join(ppo.KL_KINDS)}")
    if in_loss and kind not in LOSS_KINDS:
        raise UserError(
            f"--kl-penalty {kind} does not serve --advantage {settings.advantage}, where the KL is a term of the loss; "
            f"use {', '.join(LOSS_KINDS)}"
        )
    return kind


class Prompts:
    """The prompts of every step, each as often as the advantage estimator compares completions of it."""

    def __init__(self, prompts: Sequence[str], settings: PPOSettings):
        self.repeats = completions_per_prompt(settings)
        self.count = settings.batch_size // self.repeats
        self.plan = PromptPlan(prompts, settings.seed)

    def batch(self, step: int) -> list[str]:
        """batch_size prompts; the completions of one prompt stand side by side."""
        return [prompt for prompt in self.plan.batch(step, self.count) for _ in range(self.repeats)]


def completions_per_prompt(settings: PPOSettings) -> int:
    """How many completions of a prompt stand side by side in a step."""
    return settings.num_generations if estimator(settings.advantage).compares_completions else 1


def own_rows(settings: PPOSettings, ranks: Ranks, count: int) -> slice:
    """The rows, of `count` completions, that this process samples and scores: all those of a prompt, or none."""
    return ranks.share(count, completions_per_prompt(settings))


def check_ranks(settings: PPOSettings, ranks: Ranks) -> None:
    """Raise UserError where a rank would have nothing to do."""
    prompts = settings.batch_size // completions_per_prompt(settings)
    for flag, count, what in (("batch", prompts, "prompts"), ("mini-batch", settings.mini_batch_size, "rows")):
        if count < ranks.size:
            raise UserError(
                f"--{flag}-size gives {count} {what} to share, fewer than the {ranks.size} processes; raise it, or "
                "start fewer"
            )


def make_controller(settings: PPOSettings) -> ppo.AdaptiveKLController | ppo.FixedKLController:
    """The controller of the KL coefficient."""
    first = first_kl_coef(settings)
    if not settings.adap_kl_ctrl:
        return ppo.FixedKLController(first)
    target, most = (KL_TARGET, first) if settings.target is None else (settings.target, math.inf)
    return ppo.AdaptiveKLController(first, target, settings.horizon, most)


def first_kl_coef(settings: PPOSettings) -> float:
    """The first value of the controller of the KL coefficient, in units of `kl_unit` per nat."""
    if settings.init_kl_coef is not None:
        return settings.init_kl_coef
    return GROUP_KL_COEF if _has_group_units(settings) else KL_COEF


def _has_group_units(settings: PPOSettings) -> bool:
    return settings.advantage == "group" and not settings.no_group_scale


def kl_unit(settings: PPOSettings, moments: ppo.RunningMoments) -> float:
    """What the controller's value is multiplied by to be a KL coefficient: 1 if the first was given, in score units.

    By default it is the standard deviation of the scores so far, where advantages are in units of the scores. So a
    reward that is nearly always 0, of which a nat gains little at first, is not held down, and a reward is the same in
    any unit.
    """
    in_deviations = settings.scale_scores or settings.normalize_scores or _has_group_units(settings)
    return 1.0 if settings.init_kl_coef is not None or in_deviations else moments.std


def least_deviation(settings: PPOSettings, moments: ppo.RunningMoments, signal: float) -> float:
    """The least deviation by which advantages are whitened, in the unit of scores as training sees them.

    That of all scores so far, where those of a step are equal: what then differs, the errors of the values and the KL,
    counts for what it is beside them. Whitened by its own it would move the policy as far as scores do.
    """
    if signal:
        return 0.0
    return 1.0 if settings.scale_scores or settings.normalize_scores else moments.std


def make_step_size(settings: PPOSettings, kind: str, weights: int) -> ppo.StepSizeController:
    """The controller of the learning rate. A single update a step shows nothing of how far it moves.

    kind, weights: of the adapter, and the number of all of the model's.
    """
    return ppo.StepSizeController(step_kl(settings, kind, weights) if updates_per_step(settings) > 1 else 0.0)


def rate_share(settings: PPOSettings, step: int) -> float:
    """The share of the highest learning rate that the schedule has at the first update of `step` (from 0)."""
    planned = step * updates_per_step(settings)
    return schedule_share(planned, total_updates(settings), settings.lr_schedule, settings.warmup_steps)


def updates_per_step(settings: PPOSettings) -> int:
    """Optimizer steps planned for one rollout."""
    return settings.ppo_epochs * settings.batch_size // settings.mini_batch_size


def total_updates(settings: PPOSettings) -> int:
    """Optimizer steps planned for the whole run, after which a decaying learning rate is 0."""
    return settings.num_steps * updates_per_step(settings)


def shape_scores(
    scores: np.ndarray, ended: Sequence[bool], settings: PPOSettings, moments: ppo.RunningMoments
) -> np.ndarray:
    """Scores (B,) as training sees them: penalised without an EOS, scaled, clipped. Updates `moments` with them."""
    shaped = penalised(scores, ended, settings)
    moments.update(shaped.tolist())
    if settings.scale_scores or settings.normalize_scores:
        shaped = ppo.scale_scores(shaped, moments, center=settings.normalize_scores)
    if settings.score_clip:
        shaped = np.clip(shaped, -settings.score_clip, settings.score_clip)
    return shaped.astype(np.float32)


def penalised(scores: Sequence[float] | np.ndarray, ended: Sequence[bool], settings: PPOSettings) -> np.ndarray:
    """Scores (B,) less the penalty of completions without an EOS."""
    return np.asarray(scores) - settings.missing_eos_penalty * ~np.asarray(ended, dtype=bool)


def score_signal(
    scores: Sequence[float], ended: Sequence[bool], settings: PPOSettings, moments: ppo.RunningMoments
) -> float:
    """How much the scores (B,) of a step differ, as a share (0..1) of how much all scores so far do.

    moments: with these scores.
    """
    shaped = penalised(scores, ended, settings)
    equal = bool((shaped == shaped[0]).all())  # whose deviation by np.std is often some 1e-16
    return 0.0 if equal else min(float(np.std(shaped)) / moments.std, 1.0)


def rows_to_score(settings: PPOSettings) -> int:
    """Completions per scoring pass: what an update pass takes, whose memory is needed anyway."""
    return settings.mini_batch_size // settings.gradient_accumulation_steps


def token_kl(settings: PPOSettings, stats: Stats) -> Array:
    """KL per token (B, C) by the run's estimator. stats: with the reference's logprobs or, for the full KL, with it."""
    kind = kl_kind(settings)
    return stats.kl if kind == "full" else ppo.kl_penalty(stats.logprobs, stats.ref_logprobs, kind)


def value_figures(settings: PPOSettings, rollout: Rollout, returns: Array) -> dict[str, float]:
    """What a step reports of its value head, if it has one."""
    if not estimator(settings.advantage).uses_value_head:
        return {}
    return {"explained_variance": float(ppo.explained_variance(rollout.old_values, returns, rollout.mask))}


def policy_loss(
    settings: PPOSettings,
    stats: Stats,
    values: Array | None,
    rollout: Rollout,
    advantages: Array,
    returns: Array,
    denominator: Array,
    kl_coef: Array,
) -> tuple[Array, dict[str, Array]]:
    """PPO's loss on one piece of a mini batch, from the policy's token stats and values, (B, C) or None.

    stats: with the entropy where `entropy_coef` is not 0.
    """
    in_loss = estimator(settings.advantage).kl_in_loss
    return ppo.ppo_loss(
        stats.logprobs,
        values,
        rollout.old_logprobs,
        None if values is None else rollout.old_values,
        advantages,
        None if values is None else returns,
        rollout.mask,
        settings.clip_range,
        settings.value_clip_range,
        settings.vf_coef,
        denominator=denominator,
        entropy=stats.entropy if settings.entropy_coef else None,
        entropy_coef=settings.entropy_coef,
        ref_logprobs=rollout.ref_logprobs if in_loss else None,
        kl_coef=kl_coef,
        kl_kind=kl_kind(settings),
    )


def mini_batches(settings: PPOSettings, step: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The mini batches of a step's update: the number of each in the whole run's plan, and its pieces' row indices.

    Each takes one row, drawn by lot, of every so many that follow each other. So however many ranks share the rows of a
    rollout, every rank has its share of each mini batch, and completions of one prompt go to different ones.
    """
    planned, count = step * updates_per_step(settings), settings.batch_size // settings.mini_batch_size
    for epoch in range(settings.ppo_epochs):
        neighbours = np.arange(settings.batch_size).reshape(-1, count)  # (mini_batch_size, count)
        order = np.random.default_rng((settings.seed, step, epoch)).permuted(neighbours, axis=1)
        for rows in order.T:
            yield planned, np.split(rows, settings.gradient_accumulation_steps)
            planned += 1


def update(
    settings: PPOSettings,
    step: int,
    gradients_of: Callable[[list[np.ndarray]], tuple[dict[str, float], Any]],
    take_step: Callable[..., None],
    lr_factor: float,
) -> dict[str, float]:
    """Take the optimizer steps of a rollout by the stats and gradients of its mini batches, as pieces of row indices.

    take_step: that of either framework's optimizer, from the gradients on. Returns the stats, averaged.
    """
    history: list[dict[str, float]] = []
    skipped = 0
    for planned, pieces in mini_batches(settings, step):
        stats, gradients = gradients_of(pieces)
        verdict = rejected(settings, stats)
        if verdict == "stop":
            break
        norm = stats["grad_norm"]
        if verdict or math.isnan(norm):
            skipped += 1
        else:
            take_step(gradients, norm, settings.max_grad_norm, planned, lr_factor)
            history.append(stats)
        del gradients  # before those of the next mini batch are computed
    return mean_stats(history, skipped)


def rejected(settings: PPOSettings, stats: dict[str, float]) -> str:
    """What the stats of a mini batch say before its update: "stop" the step's updates, "skip" this one, or ""."""
    if settings.target_kl and stats["approx_kl"] > 1.5 * settings.target_kl:
        return "stop"
    return "skip" if not stats["ratio_mean"] <= settings.ratio_threshold else ""


def rollout_figures(scored: Scored, ended: Sequence[bool], rollout: Rollout, entropy: Array) -> dict[str, float]:
    """What a step reports of its rollout. scored: as the reward gave it; entropy (B, C) nats per token.

    kl is in nats per completion whatever estimator penalises it: it is what is held against the target.
    """
    kl = ppo.kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, "k1")
    return {
        "mean_score": float(np.mean(scored.scores)),
        "score_std": float(np.std(scored.scores)) if len(set(scored.scores)) > 1 else 0.0,
        **scored.part_means(),
        "kl": float(ppo.sum_per_completion(kl, rollout.mask).mean()),
        "entropy": float(ppo.masked_mean(entropy, rollout.mask)),
        "completion_length": float(rollout.mask.sum(axis=1).mean()),
        "eos_share": float(np.mean(ended)),
    }


def group_figures(settings: PPOSettings, scores: Sequence[float]) -> dict[str, float]:
    """What a step reports of its groups, if completions of a prompt are compared: the share without a difference."""
    if not estimator(settings.advantage).compares_completions:
        return {}
    groups = np.reshape(scores, (-1, settings.num_generations))
    return {"equal_groups": float(np.mean(groups.min(axis=1) == groups.max(axis=1)))}


def mean_stats(history: Sequence[dict[str, float]], skipped: int) -> dict[str, float]:
    """The stats of a step's updates, averaged, and how many there were.

    Without the entropy, whose name in a report is the rollout's: it would change with --entropy-coef.
    """
    names = [name for name in (history[0] if history else {}) if name != "entropy"]
    means = {name: float(np.mean([stats[name] for stats in history])) for name in names}
    return {**means, "updates": len(history), "skipped_updates": skipped}
