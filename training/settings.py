"""The settings of PPO and of SFT: one frozen object each, with every default.

The scripts make it from their flags once (`training.ppo_flags.ppo_settings`, `training.sft_flags.sft_settings`); in a
notebook it is written down. A field has the name of its flag. What a run writes, and where, is not in here: that is
the scripts' business.

    PPOSettings(num_steps=20, advantage="rloo")
"""

import argparse
from dataclasses import dataclass, fields
from typing import Any, TypeVar

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """What PPO and SFT share: the seed, and how gradients become steps."""

    seed: int = 0  # of everything random

    # Optimizer. None: the default for what is trained and its size (training.optimizer_groups).
    optimizer: str | None = None  # adam or muon
    learning_rate: float | None = None
    # The schedule counts planned updates: one that is skipped, or left out by target_kl, does not delay it.
    lr_schedule: str = "constant"  # a key of training.schedules
    warmup_steps: int = 0  # updates over which the rate rises from 0
    weight_decay: float = 0.0  # decoupled, as AdamW's
    max_grad_norm: float = 1.0  # of all gradients together; 0: no clipping

    logits_memory: int = 256  # MB (10⁶ bytes) of all logits that exist at once (models.token_stats)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Field → default."""
        return {field.name: field.default for field in fields(cls)}

    @classmethod
    def from_flags(cls: type[S], args: argparse.Namespace) -> S:
        """The settings that the flags of the same names say."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class PPOSettings(Settings):
    """Everything PPO does besides loading, scoring and saving. `training.ppo_step.check_settings` says what fits.

    Scores and rewards are in the reward's own units, KL and entropy in nats. Where names are TRL 0.11's, so is the
    meaning; defaults were chosen on the digit task (docs/ppo_training.md).
    """

    lr_schedule: str = "wsd"
    # The learning rate adapts, so that a step's updates move the policy by so many nats per completion, on average over
    # them; a rate that fits one task or model is wrong for the next. 0: the rate as it is. None: by the model's size
    # (optimizer_groups.step_kl).
    step_kl: float | None = None
    value_head_learning_rate: float | None = None  # None: learning_rate, but at most optimizer_groups.HEAD_RATE

    # Rollout: batch_size completions a step, of at most max_completion_length tokens. The temperature is that of
    # sampling and of every logprob.
    num_steps: int = 200
    batch_size: int = 128
    max_completion_length: int = 48
    temperature: float = 1.0

    # Every so many steps (0: never) batch_size completions of prompts that are not trained on are scored, too;
    # early_stopping ends a run after so many such scores without a better one (0: never).
    steps_per_eval: int = 0
    early_stopping: int = 0

    # Scores (B,), before training sees them: a penalty for those without an EOS, then division by the running standard
    # deviation (normalize_scores: after subtracting the running mean), then clipping to ±score_clip (0: none).
    missing_eos_penalty: float = 0.0
    scale_scores: bool = False
    normalize_scores: bool = False
    score_clip: float = 0.0

    # Advantages (B, C), by a name in training.advantages.ESTIMATORS. num_generations: completions of one prompt, for
    # estimators that compare them. gamma and gae_lambda: arXiv:1506.02438. center_values: the mean return of the batch
    # is part of every value, so that the head learns only what differs from it; off, the values are the head's alone.
    advantage: str = "gae"
    num_generations: int = 8
    no_group_scale: bool = False  # group: don't divide by the group's standard deviation (arXiv:2503.20783)
    gamma: float = 1.0
    gae_lambda: float = 1.0
    whiten_rewards: bool = False
    center_values: bool = True

    # Update: ppo_epochs passes over the rollout, one optimizer step per mini_batch_size completions, whose gradient is
    # summed over gradient_accumulation_steps pieces. Ranges as in arXiv:1707.06347; value_clip_range in score units.
    mini_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    ppo_epochs: int = 2
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    vf_coef: float = 0.5
    entropy_coef: float = 0.0
    target_kl: float = 0.0  # ends a step's updates where approx_kl exceeds 1.5 times this; 0: never
    ratio_threshold: float = 10.0  # a mini batch with a higher mean ratio is skipped

    # KL to the reference policy. The coefficient, in score units per nat, is fixed or adapted to `target` nats per
    # completion over `horizon` completions (arXiv:1909.08593). init_kl_coef None: 0.02 standard deviations of the
    # scores so far (ppo_step.kl_unit), of group 0.01. target None: 6, but the coefficient never exceeds its first
    # value; held at 6 nats, a policy that needs 20 for a rule loses again what it has learned. A reward model wants
    # both held tighter, which the scripts do (training.ppo_flags). kl_penalty: a kind of ppo.kl_penalty; None: k1 where
    # the KL is part of the rewards, k3 where it is part of the loss. use_peft: the reference is the base, adapter off.
    init_kl_coef: float | None = None
    adap_kl_ctrl: bool = True
    target: float | None = None
    horizon: float = 2000
    kl_penalty: str | None = None
    use_peft: bool = False


@dataclass(frozen=True)
class SFTSettings(Settings):
    """Everything SFT, reward modelling and DPO do besides loading and saving. A row is a text, or a pair of texts."""

    iters: int = 1000  # optimizer steps
    epochs: float = 0.0  # passes over the rows, which then set iters; 0: as iters says
    batch_size: int = 4  # rows (of a reward model: pairs) a step
    gradient_accumulation_steps: int = 1  # pieces a batch is cut into, one after another: the same step in less memory
    pack: bool = False  # SFT: rows of a batch end to end, without pads (models.packing)
    max_length: int = 2048  # tokens a row is truncated to
    mask_prompt: bool = True  # train on completions and the assistant's turns only
    center_coef: float = 0.01  # keeps a reward model's scores about 0 (arXiv:2312.09244)

    # Preference tuning: a loss of losses.PREFERENCE_LOSSES. beta: of the log ratio, or ORPO's λ.
    dpo: bool = False
    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    # Reports, in steps; a validation takes val_batches batches of rows drawn once (-1: all rows).
    steps_per_report: int = 10
    steps_per_eval: int = 200
    val_batches: int = 25
    early_stopping: int = 0  # ends a run after so many validations without a lower loss; 0: never
