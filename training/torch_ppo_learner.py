"""PPO in PyTorch, without flags and files: build a policy and its reference, sample, score with both, update.

The twin of training.ppo_learner, function by function. Never imports mlx.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.batching import in_order
from models.adapter_config import AdapterConfig
from models.torch_adapters import attach_adapter, load_adapter
from models.torch_generation import sample
from models.torch_grad_checkpoint import checkpoint_layers
from models.torch_loading import LoadedModel, twin
from models.torch_soft_prompt import soft_prompt_ids
from models.torch_token_stats import TokenStats, largest_pass, token_stats
from models.torch_value_head import Policy, new_value_head
from training import ppo_step
from training.advantages import estimator
from training.flags import step_seed
from training.optimizer_groups import HEAD_RATE, ppo_optimizer
from training.ranks import ALONE, Ranks
from training.rollout import Rollout, pack
from training.settings import PPOSettings
from training.torch_checkpoint import Trainee
from training.torch_optimizer import ScheduledOptimizer, loss_and_gradients, make_optimizer, read, take_step


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
    reference = base if settings.use_peft else twin(model)
    if grad_checkpoint:
        checkpoint_layers(model)
    head = new_value_head(model) if estimator(settings.advantage).uses_value_head else None
    policy = Policy(model, head)
    policy.eval()  # no dropout anywhere: the policy that is trained is the one that sampled
    reference.eval()
    return Trainee(model, adapter, policy, head), reference


def make_ppo_optimizer(policy: Trainee, settings: PPOSettings) -> ScheduledOptimizer:
    """The optimizer of a policy with its schedule over the planned updates, ready to step."""
    name, rate = ppo_optimizer(settings, policy.adapter.fine_tune_type, policy.sizes()[1])
    schedule = (ppo_step.total_updates(settings), settings.lr_schedule, settings.warmup_steps, settings.weight_decay)
    head_rate = settings.value_head_learning_rate or min(rate, HEAD_RATE)
    return make_optimizer(policy.module, rate, *schedule, name, head_rate)


class PPOLearner:
    """A policy that learns by PPO: PyTorch's `training.ppo_loop.Learner`."""

    def __init__(
        self, policy: Policy, reference: nn.Module, loaded: LoadedModel, optimizer: ScheduledOptimizer,
        settings: PPOSettings, ranks: Ranks = ALONE,
    ):  # fmt: skip
        """reference: a model over the same vocabulary; loaded: for its EOS, pad and device; ranks: by torch_ranks.

        Every process has the whole rollout: it is small, and the rows of a mini batch are any. Each samples, scores and
        differentiates its share of rows.
        """
        self.ranks = ranks
        self.policy, self.reference, self.optimizer, self.settings = policy, reference, optimizer, settings
        self.eos_token_ids, self.pad_token_id = loaded.eos_token_ids, loaded.tokenizer.pad_token_id or 0
        self.device = loaded.model.device
        self.gradients_of = loss_and_gradients(policy, make_loss(settings))

    def seed(self, step: int) -> None:
        """Seed torch's random numbers for `step`, so that a resumed run draws what it would have drawn."""
        torch.manual_seed(step_seed(self.settings.seed, step))

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """One completion per prompt, as token ids, its EOS included."""
        limits = (self.settings.max_completion_length, self.settings.temperature, len(prompts))
        own = ppo_step.own_rows(self.settings, self.ranks, len(prompts))
        among = (own, len(prompts))
        return self.ranks.gather(sample(self.policy.model, prompts[own], self.eos_token_ids, *limits, among=among))

    @torch.no_grad()
    def experience(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], scores: np.ndarray
    ) -> tuple[Rollout, Tensor]:
        """The rollout of completions with their scores (B,), by forward passes of policy and reference.

        prompts, completions: token ids, without the soft prompt. Returns the entropy (B, C) of the policy as well.
        """
        settings, prefix = self.settings, soft_prompt_ids(self.policy.model)
        rows = [prefix + list(prompt) for prompt in prompts]
        few_shapes = self.device.type != "cpu"  # torch keeps memory for every shape that occurs
        packed = pack(rows, completions, self.eos_token_ids, self.pad_token_id, few_shapes=few_shapes)
        tokens, positions, ids, mask = (torch.from_numpy(field).to(self.device) for field in packed)
        tokens, positions = tokens.long(), positions.long()
        own = ppo_step.own_rows(self.settings, self.ranks, len(prompts))
        pieces = []
        most = min(ppo_step.rows_to_score(settings), self._rows(tokens))
        for rows_of in in_order(own.stop - own.start, most):
            piece = slice(own.start + rows_of.start, own.start + rows_of.stop)
            pieces.append(self._score(tokens[piece], positions[piece], ids[piece], prefix))
        figures = torch.stack([torch.cat(parts) for parts in zip(*pieces, strict=True)])
        logprobs, ref_logprobs, kl, values, entropy = self._of_all(figures, own, len(prompts))
        given = torch.from_numpy(scores).to(self.device)
        return Rollout(
            tokens, positions, ids, mask, logprobs, ref_logprobs, kl, old_values=values, scores=given
        ), entropy  # fmt: skip

    def _rows(self, tokens: Tensor) -> int:
        """The most rows of `tokens` (B, L) that a pass may take on this device."""
        return max(1, largest_pass(self.policy.model, tokens.shape[1]) // tokens.shape[1])

    def _of_all(self, figures: Tensor, own: slice, count: int) -> Tensor:
        """The figures (n, count, C) of all rows, of which this process has made those of its `own`."""
        if self.ranks.size == 1:
            return figures
        whole = figures.new_zeros(len(figures), count, figures.shape[2])
        whole[:, own] = figures
        return self.ranks.sum([whole])[0]

    def _score(self, tokens: Tensor, positions: Tensor, ids: Tensor, prefix: list[int]) -> tuple[Tensor, ...]:
        """Logprobs of policy and reference, KL, values (0 without a head) and entropy, all (B, C)."""
        settings = self.settings
        hidden, values = self.policy(tokens, positions)
        ref_hidden = reference_states(settings, self.reference, tokens, positions, prefix)
        whole = (self.reference, ref_hidden) if ppo_step.kl_kind(settings) == "full" else None
        stats = stats_of(settings, self.policy.model, hidden, ids, entropy=True, reference=whole)
        if whole is None:
            ref_stats = stats_of(settings, self.reference, ref_hidden, ids)
            stats = stats._replace(ref_logprobs=ref_stats.logprobs)
        kl = ppo_step.token_kl(settings, stats)
        values = torch.zeros_like(kl) if values is None else values
        return stats.logprobs, stats.ref_logprobs, kl, values, stats.entropy

    def update(
        self, step: int, rollout: Rollout, advantages: Tensor, returns: Tensor, kl_coef: float, lr_factor: float = 1.0
    ) -> dict[str, float]:
        """Update the policy on the rollout of `step` (from 0), at `lr_factor` times the schedule's rate.

        Returns the stats, averaged over the mini batches.
        """
        rows = self._rows(rollout.tokens)

        def gradients(pieces: Sequence[np.ndarray]) -> tuple[dict[str, float], list[Tensor]]:
            parts = [part for piece in pieces for part in np.split(piece, range(rows, len(piece), rows))]
            return accumulate(self.gradients_of, rollout, advantages, returns, parts, kl_coef, self.ranks)[1:]

        return ppo_step.update(self.settings, step, gradients, partial(take_step, self.optimizer), lr_factor)


def stats_of(settings: PPOSettings, model: nn.Module, hidden: Tensor, ids: Tensor, **which: Any) -> TokenStats:
    """The token stats of completions by the run's temperature and memory. which: more arguments of `token_stats`."""
    limit = settings.logits_memory * 10**6
    return token_stats(model, hidden, ids, settings.temperature, logits_bytes=limit, **which)


def reference_states(
    settings: PPOSettings, reference: nn.Module, tokens: Tensor, positions: Tensor, prefix: list[int]
) -> Tensor:
    """Hidden states (B, C, H) of the reference policy; with `use_peft` it never saw the soft prompt: cut that off."""
    if settings.use_peft and prefix:
        tokens, positions = tokens[:, len(prefix) :], positions - len(prefix)
    return Policy(reference)(tokens, positions)[0]


def make_loss(settings: PPOSettings) -> Callable:
    """PPO's loss as a function of the policy and arrays alone."""

    def loss(policy: Policy, rollout: Rollout, advantages, returns, denominator, kl_coef):
        hidden, values = policy(rollout.tokens, rollout.positions)
        which = {"entropy": bool(settings.entropy_coef)}
        stats = stats_of(settings, policy.model, hidden, rollout.completions, **which)
        return ppo_step.policy_loss(settings, stats, values, rollout, advantages, returns, denominator, kl_coef)

    return loss


def accumulate(
    gradients_of: Callable, rollout: Rollout, advantages: Tensor, returns: Tensor, pieces: Sequence[np.ndarray],
    kl_coef: float, ranks: Ranks = ALONE,
) -> tuple[Tensor, dict[str, float], list[Tensor]]:  # fmt: skip
    """Loss, stats and gradients of a mini batch, summed over its pieces and the ranks: equal to those of the whole.

    Stats have the "grad_norm" of `training.torch_optimizer.read`.
    """
    device = rollout.mask.device
    denominator = sum(rollout.mask[torch.from_numpy(rows).to(device)].sum() for rows in pieces)
    loss = torch.zeros((), device=device)
    gradients: list[Tensor] = []
    stats: dict[str, Tensor] = {}
    for rows in own_pieces(pieces, ranks):
        index = torch.from_numpy(rows).to(device)
        (piece_loss, piece_stats), piece_gradients = gradients_of(
            rollout.rows(index), advantages[index], returns[index], denominator, kl_coef
        )
        loss = loss + piece_loss
        for name, value in piece_stats.items():
            so_far = stats.get(name, torch.zeros_like(value))
            stats[name] = torch.maximum(so_far, value) if name == "ratio_max" else so_far + value
        gradients = list(map(torch.add, gradients, piece_gradients)) if gradients else list(piece_gradients)
    if ranks.size > 1:
        loss, stats, gradients = of_all_ranks(loss, stats, gradients, ranks)
    return loss, read(loss, gradients, stats), gradients


def own_pieces(pieces: Sequence[np.ndarray], ranks: Ranks) -> Sequence[np.ndarray]:
    """The rows of a mini batch that are this process's, in pieces no larger than the given ones."""
    if ranks.size == 1:
        return pieces
    rows = np.concatenate(pieces)
    own = rows[ranks.share(len(rows))]
    return np.split(own, range(len(pieces[0]), len(own), len(pieces[0])))


def of_all_ranks(
    loss: Tensor, stats: dict[str, Tensor], gradients: list[Tensor], ranks: Ranks
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """The sums over all ranks, and of "ratio_max" the largest, in one exchange."""
    largest = loss.new_zeros(ranks.size)
    largest[ranks.rank] = stats["ratio_max"]
    loss, largest, *sums = ranks.sum([loss, largest, *stats.values(), *gradients])
    return loss, {**dict(zip(stats, sums, strict=False)), "ratio_max": largest.max()}, sums[len(stats) :]
