"""PPO on MLX, without flags and files: build a policy and its reference, sample, score with both, update.

    loaded, settings = load("tiny-digits"), PPOSettings(num_steps=20, batch_size=32, mini_batch_size=32)
    policy, reference = build_policies(loaded, settings, AdapterConfig())
    history = train_ppo(policy, reference, loaded.tokenizer, prompts, reward, settings)

Its twin is training.torch_ppo_learner. Not here: the loop (training.ppo_loop), the maths (training.ppo).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from data.batching import in_order
from models.adapters import AdapterConfig, attach_adapter, load_adapter, turn_dropout_off
from models.cpu.process import on_one_core
from models.frozen_layers import SampledStates, lower_states, num_frozen_layers, shares_lower_layers
from models.generation import sample
from models.grad_checkpoint import checkpoint_layers, is_checkpointed
from models.gradient_trace import as_in_a_gradient
from models.loading import LoadedModel, twin
from models.packing import packs
from models.row_keys import row_keys
from models.soft_prompt import soft_prompt_ids
from models.token_stats import TokenStats, token_stats
from models.value_head import Policy, new_value_head
from rewards.combined import Reward
from training import ppo_step
from training.advantages import estimator
from training.checkpoint import Trainee
from training.flags import step_seed
from training.mlx_ranks import sum_tree
from training.optimizer import Optimizer, compiling_pays, loss_and_gradients, make_optimizer, read, take_step
from training.optimizer_groups import HEAD_RATE, ppo_optimizer
from training.passes import PaddedRows, Pass, reading, rows_of
from training.ppo_loop import first_progress, ppo_steps
from training.ranks import ALONE, Ranks
from training.rollout import Rollout, pack, through_eos
from training.settings import PPOSettings


def build_policies(
    loaded: LoadedModel, settings: PPOSettings, adapter: AdapterConfig | str | Path, grad_checkpoint: bool = False
) -> tuple[Trainee, nn.Module]:
    """The policy, with an adapter and perhaps a value head on `loaded`, and the reference policy.

    adapter: a new one by its configuration, or the path of one to start from. The reference is the policy as it is
    now, or, with `settings.use_peft`, the base; it shares all frozen weights with the policy.
    """
    model = loaded.model
    base = twin(model)
    if isinstance(adapter, AdapterConfig):
        attach_adapter(model, adapter, settings.seed)
    else:
        adapter = load_adapter(model, adapter).config
        adapter.model = loaded.name
        adapter.lora_parameters["dropout"] = 0.0
        turn_dropout_off(model)
    reference = base if settings.use_peft else twin(model)
    reference.freeze()
    if grad_checkpoint:
        checkpoint_layers(model)
    head = new_value_head(model) if estimator(settings.advantage).uses_value_head else None
    policy = Policy(model, head)
    # Without dropout. Some families of mlx-lm have a gradient in this mode only, and round differently in the other.
    policy.train()
    reference.train()
    return Trainee(model, adapter, policy, head), reference


def make_ppo_optimizer(policy: Trainee, settings: PPOSettings) -> Optimizer:
    """The optimizer of a policy with its schedule over the planned updates, ready to step."""
    name, rate = ppo_optimizer(settings, policy.adapter.fine_tune_type, policy.sizes()[1])
    schedule = (ppo_step.total_updates(settings), settings.lr_schedule, settings.warmup_steps, settings.weight_decay)
    head_rate = settings.value_head_learning_rate or min(rate, HEAD_RATE)
    optimizer = make_optimizer(rate, *schedule, name, head_rate)
    optimizer.init(policy.module.trainable_parameters())
    return optimizer


class PPOLearner:
    """A policy that learns by PPO: MLX's `training.ppo_loop.Learner`."""

    def __init__(
        self,
        policy: Policy,
        reference: nn.Module,
        tokenizer: Any,
        optimizer: Optimizer,
        settings: PPOSettings,
        ranks: Ranks = ALONE,
    ):
        """reference: a model over the same vocabulary; tokenizer: for its EOS and pad alone; ranks: by mlx_ranks.

        Every rank has the whole rollout, but for the states of frozen layers: those of its own rows, which it samples,
        scores and differentiates.
        """
        self.ranks = ranks
        self.policy, self.reference, self.optimizer, self.settings = policy, reference, optimizer, settings
        self.eos_token_ids, self.pad_token_id = tokenizer.eos_token_ids, tokenizer.pad_token_id or 0
        self.frozen_layers = num_frozen_layers(policy.model)
        self.kept_for_reference = shares_lower_layers(policy.model, reference, self.frozen_layers)
        prefix_for_one = settings.use_peft and soft_prompt_ids(policy.model)  # the reference does not see it
        self.may_pack = not prefix_for_one and not is_checkpointed(policy.model) and packs(policy.model)
        self.gradients_of = loss_and_gradients(policy, make_loss(settings, self.frozen_layers))
        self._sampled: tuple = (None, None, None)  # prompts and completions of the last sampling, and its states

    def seed(self, step: int) -> None:
        """Seed mlx's random numbers for `step`, so that a resumed run draws what it would have drawn."""
        mx.random.seed(step_seed(self.settings.seed, step))

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """One completion per prompt, as token ids, its EOS included."""
        limits = (self.settings.max_completion_length, self.settings.temperature, len(prompts))
        own, keys = self._own(len(prompts)), row_keys(len(prompts))
        states = SampledStates(self.frozen_layers) if self.frozen_layers else None
        completions = sample(
            self.policy.model, prompts[own], self.eos_token_ids, *limits, keys=keys[own], states=states
        )  # fmt: skip
        self._sampled = (prompts[own], completions, states)
        return self.ranks.gather(completions)

    def _sampled_states(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> SampledStates | None:
        """The states of the frozen layers of this rank's rows, if it has sampled these last. They are given away, as
        nothing else needs them."""
        (asked, sampled, states), self._sampled = self._sampled, (None, None, None)
        return states if (asked, sampled) == (prompts, completions) else None

    def _own(self, count: int) -> slice:
        """The rows, of `count`, that are this rank's."""
        return ppo_step.own_rows(self.settings, self.ranks, count)

    @on_one_core()
    def experience(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], scores: np.ndarray
    ) -> tuple[Rollout, mx.array]:
        """The rollout of completions with their scores (B,), by forward passes of policy and reference.

        Layers below the first trained one are run once, for both of them and for the update: as `sample` has run them,
        where these are its completions.

        prompts, completions: token ids, without the soft prompt. Returns the entropy (B, C) of the policy as well.
        """
        prefix, few_shapes = soft_prompt_ids(self.policy.model), compiling_pays()
        asked = [prefix + list(prompt) for prompt in prompts]
        ended = [through_eos(completion, self.eos_token_ids) for completion in completions]
        arrays = pack(asked, ended, self.eos_token_ids, self.pad_token_id, few_shapes=few_shapes)
        tokens, positions, ids, mask = map(mx.array, arrays)
        own, states, pieces = self._own(len(prompts)), [], []
        sampled = self._sampled_states(prompts[own], completions[own])
        padded = PaddedRows(tokens[own], positions[own], ids[own])
        rows = rows_of(padded, asked[own], ended[own], sampled, self.may_pack, few_shapes)
        for index in map(np.array, in_order(own.stop - own.start, ppo_step.rows_to_score(self.settings))):
            part = rows[index]
            if self.frozen_layers and part.states is None:
                with reading(self.policy.model, part, 0):
                    part = part._replace(states=lower_states(self.policy.model, part.tokens, self.frozen_layers))
                states.append((index, part.states))
            pieces.append(as_in_a_gradient(partial(self._estimates, part, prefix)))
            mx.eval(pieces[-1], part.states)
        if states:
            rows.keep(states)
        computed = [mx.concatenate(arrays) for arrays in zip(*pieces, strict=True)]
        logprobs, ref_logprobs, kl, values, entropy = self._of_all(computed, own, len(prompts))
        estimates = (logprobs, ref_logprobs, kl, values, mx.array(scores))
        return Rollout(tokens, positions, ids, mask, *estimates, rows), entropy

    def _of_all(self, estimates: list[mx.array], own: slice, count: int) -> list[mx.array]:
        """The estimates (count, C) of all rows, of which this rank has computed those of its `own`."""
        if self.ranks.size == 1:
            return estimates
        whole = [mx.zeros((count, array.shape[1]), array.dtype) for array in estimates]
        for array, computed in zip(whole, estimates, strict=True):
            array[own] = computed
        return self.ranks.sum(whole)

    def _estimates(self, part: Pass, prefix: list[int]) -> list[mx.array]:
        """Logprobs of policy and reference, KL, values (0 without a head) and entropy, all (B, C)."""
        settings, count = self.settings, self.frozen_layers
        with reading(self.policy.model, part, count):
            hidden, values = self.policy(part.tokens, part.positions)
        with reading(self.reference, part, count, self.kept_for_reference):
            ref_hidden = reference_states(settings, self.reference, part.tokens, part.positions, prefix)
        whole = (self.reference, ref_hidden) if ppo_step.kl_kind(settings) == "full" else None
        stats = stats_of(settings, self.policy.model, hidden, part.targets, entropy=True, reference=whole)
        if whole is None:
            ref_stats = stats_of(settings, self.reference, ref_hidden, part.targets)
            stats = stats._replace(ref_logprobs=ref_stats.logprobs)
        kl = ppo_step.token_kl(settings, stats)
        values = mx.zeros_like(kl) if values is None else values
        return [part.by_row(each) for each in (stats.logprobs, stats.ref_logprobs, kl, values, stats.entropy)]

    @on_one_core()
    def update(
        self,
        step: int,
        rollout: Rollout,
        advantages: mx.array,
        returns: mx.array,
        kl_coef: float,
        lr_factor: float = 1.0,
    ) -> dict[str, float]:
        """Update the policy on the rollout of `step` (from 0), at `lr_factor` times the schedule's rate.

        Returns the stats, averaged over the mini batches.
        """
        own = ppo_step.own_rows(self.settings, self.ranks, len(rollout.mask))

        def gradients(pieces: Sequence[np.ndarray]) -> tuple[dict[str, float], dict]:
            estimates = (rollout, advantages, returns)
            return accumulate(self.gradients_of, *estimates, pieces, mx.array(kl_coef), self.ranks, own)[1:]

        take = partial(take_step, self.policy, self.optimizer)
        stats = ppo_step.update(self.settings, step, gradients, take, lr_factor)
        mx.synchronize()  # the last update is this step's time, too
        return stats


def stats_of(settings: PPOSettings, model: nn.Module, hidden: mx.array, ids: mx.array, **which: Any) -> TokenStats:
    """The token stats of completions by the run's temperature and memory. which: more arguments of `token_stats`."""
    limit = settings.logits_memory * 10**6
    return token_stats(model, hidden, ids, settings.temperature, logits_bytes=limit, **which)


def reference_states(
    settings: PPOSettings, reference: nn.Module, tokens: mx.array, positions: mx.array, prefix: list[int]
) -> mx.array:
    """Hidden states (B, C, H) of the reference policy; with `use_peft` it never saw the soft prompt: cut that off."""
    if settings.use_peft and prefix:
        tokens, positions = tokens[:, len(prefix) :], positions - len(prefix)
    return Policy(reference)(tokens, positions)[0]


def make_loss(settings: PPOSettings, frozen_layers: int = 0) -> Callable:
    """PPO's loss as a function of the policy and arrays alone. frozen_layers: those that a rollout's states replace."""

    def loss(policy: Policy, rollout: Rollout, advantages, returns, denominator, kl_coef):
        part = rollout.passes or Pass(rollout.tokens, rollout.positions, rollout.completions)
        with reading(policy.model, part, frozen_layers):
            hidden, values = policy(part.tokens, part.positions)
        which = {"entropy": bool(settings.entropy_coef), "training": True}
        stats = stats_of(settings, policy.model, hidden, part.targets, **which)
        stats = TokenStats(*(None if figures is None else part.by_row(figures) for figures in stats))
        values = None if values is None else part.by_row(values)
        return ppo_step.policy_loss(settings, stats, values, rollout, advantages, returns, denominator, kl_coef)

    return loss


def accumulate(
    gradients_of: Callable, rollout: Rollout, advantages: mx.array, returns: mx.array, pieces: Sequence[np.ndarray],
    kl_coef: mx.array, ranks: Ranks = ALONE, own: slice = slice(0, None),
) -> tuple[mx.array, dict[str, float], dict]:  # fmt: skip
    """Loss, stats and gradients of a mini batch, summed over its pieces and the ranks: equal to those of the whole.

    own: the rows of the rollout that are this rank's. Each piece is computed before the next begins. Stats have the
    "grad_norm" of `training.optimizer.read`.
    """
    denominator = sum(rollout.mask[mx.array(rows)].sum() for rows in pieces)
    whole: Any = None
    parts = list(own_parts(rollout, pieces, ranks, own))
    for rows, part in parts:
        piece = gradients_of(part, advantages[rows], returns[rows], denominator, kl_coef)
        if whole is not None:
            largest = mx.maximum(whole[0][1]["ratio_max"], piece[0][1]["ratio_max"])
            piece = tree_map(mx.add, whole, piece)
            piece[0][1]["ratio_max"] = largest
        whole = piece
        if part is not parts[-1][1]:
            mx.eval(whole)
    (loss, stats), gradients = whole if ranks.size == 1 else of_all_ranks(ranks, whole)
    return loss, read(loss, gradients, stats), gradients


def own_parts(
    rollout: Rollout, pieces: Sequence[np.ndarray], ranks: Ranks, own: slice
) -> Iterator[tuple[mx.array, Rollout]]:
    """What a rank computes of a mini batch: row indices and the rollout of these rows, piece by piece.

    Pieces are no larger than those given. A rank that has no row in it gets one of which no token counts.
    """
    if ranks.size == 1:
        for rows in map(mx.array, pieces):
            yield rows, rollout.rows(rows)
        return
    rows, size = np.concatenate(pieces), len(pieces[0])
    mine = rows[(own.start <= rows) & (rows < own.stop)]
    for piece in np.split(mine, range(size, len(mine), size)) if len(mine) else [np.array([own.start])]:
        index = mx.array(piece)
        part = rollout._replace(passes=None).rows(index)
        if rollout.passes is not None:
            part = part._replace(passes=rollout.passes[piece - own.start])
        yield index, part if len(mine) else part._replace(mask=0 * part.mask)


def of_all_ranks(ranks: Ranks, own: Any) -> Any:
    """Loss, stats and gradients as sums over the ranks, and of "ratio_max" the largest."""
    largest = mx.zeros(ranks.size)
    largest[ranks.rank] = own[0][1]["ratio_max"]
    ((loss, stats), gradients), largest = sum_tree(ranks, (own, largest))
    return (loss, {**stats, "ratio_max": largest.max()}), gradients


def train_ppo(
    policy: Trainee,
    reference: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Reward,
    settings: PPOSettings,
    ranks: Ranks = ALONE,
) -> list[dict[str, float]]:
    """Train a policy by PPO; returns the figures of every step, by the names of a run's metrics.jsonl.

    policy, reference: from `build_policies`; the policy's weights change in place. reward: f(prompts, completions) →
    one score per completion. ranks: of training.mlx_ranks.launched, where several processes call this. Nothing is
    printed or written; `models.adapters.save_adapter` saves the result. Raises UserError for settings that do not fit
    together. For one step at a time: training.ppo_loop.ppo_steps.
    """
    ppo_step.check_settings(settings)
    ppo_step.check_ranks(settings, ranks)
    learner = PPOLearner(policy.module, reference, tokenizer, make_ppo_optimizer(policy, settings), settings, ranks)
    progress = first_progress(settings, policy)
    steps = ppo_steps(learner, tokenizer, ppo_step.Prompts(prompts, settings), reward, progress)
    return [step.figures for step in steps]
