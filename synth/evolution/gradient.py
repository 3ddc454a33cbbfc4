"""Policies trained by gradient: a small MLP in MLX, by REINFORCE or PPO.

    reinforce   with the leave-one-out baseline over a group of episodes with the same start (arXiv:2402.14740)
    ppo         with a critic, by the maths of training/ppo.py; a choice takes the place of a token

Log probabilities and gradients are those of the floored distribution, which actions are sampled from.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from synth.evolution.features import SIZE
from synth.evolution.operators import ACTIONS
from synth.evolution.policy import DEFAULT, Batch, OperatorPolicy, PolicySettings
from training import ppo
from training.optimizer import Adam, optimizer_arrays, restore_optimizer, update


class Network(nn.Module):
    """Situations (..., F) → logits (..., A) and values (...). The last layers start at 0: uniform actions."""

    def __init__(self, size: int, hidden: int, actions: int):
        super().__init__()
        self.actor = [nn.Linear(size, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, actions)]
        self.critic = [nn.Linear(size, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)]
        for layers in (self.actor, self.critic):
            layers[-1].weight, layers[-1].bias = mx.zeros_like(layers[-1].weight), mx.zeros_like(layers[-1].bias)

    def logits(self, features: mx.array) -> mx.array:
        return _through(self.actor, features)

    def values(self, features: mx.array) -> mx.array:
        return _through(self.critic, features)[..., 0]


def _through(layers: Sequence[Callable[[mx.array], mx.array]], x: mx.array) -> mx.array:
    for layer in layers[:-1]:
        x = mx.tanh(layer(x))
    return layers[-1](x)


def floored_logprobs(logits: mx.array, floor: float) -> mx.array:
    """ln of (1 − A · floor) · softmax + floor, of logits (..., A), in nats."""
    return mx.log((1 - logits.shape[-1] * floor) * mx.softmax(logits, axis=-1) + floor)


def reinforce_loss(network: Network, batch: tuple[mx.array, ...], floor: float, entropy_coef: float) -> mx.array:
    """−Σ A ln π / n − entropy_coef · entropy. batch: features (E, C, F), actions, advantages and mask (E, C)."""
    features, actions, advantages, mask = batch
    logprobs, entropy = _chosen(network, features, actions, floor)
    return -ppo.masked_mean(advantages * logprobs, mask) - entropy_coef * ppo.masked_mean(entropy, mask)


def ppo_policy_loss(network: Network, batch: tuple[mx.array, ...], settings: PolicySettings) -> mx.array:
    """training/ppo.py's loss. batch: features, actions, old logprobs and values, advantages, returns, mask."""
    features, actions, old_logprobs, old_values, advantages, returns, mask = batch
    logprobs, entropy = _chosen(network, features, actions, settings.floor)
    values = network.values(features)
    loss, _ = ppo.ppo_loss(
        *(logprobs, values, old_logprobs, old_values, advantages, returns, mask),
        clip_range=settings.clip_range,
        value_clip_range=float("inf"),
        vf_coef=0.5,
        entropy=entropy,
        entropy_coef=settings.entropy_coef,
    )
    return loss


def _chosen(network: Network, features: mx.array, actions: mx.array, floor: float) -> tuple[mx.array, mx.array]:
    """Log probabilities of the actions, and entropies, both (E, C)."""
    logprobs = floored_logprobs(network.logits(features), floor)
    chosen = mx.take_along_axis(logprobs, actions[..., None], axis=-1)[..., 0]
    return chosen, -(mx.exp(logprobs) * logprobs).sum(axis=-1)


class Reinforce(OperatorPolicy):
    """One Adam step per batch, with leave-one-out advantages of the discounted returns from each choice on."""

    kind = "reinforce"
    learns = True

    def __init__(self, settings: PolicySettings = DEFAULT, actions: int = len(ACTIONS), size: int = SIZE):
        super().__init__(settings, actions, size)
        mx.random.seed(settings.seed)
        self.network = Network(size, settings.hidden, actions)
        mx.eval(self.network.parameters())
        self.optimizer = Adam(settings.learning_rate)
        self.optimizer.init(self.network.trainable_parameters())

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        logits = np.array(self.network.logits(mx.array(features, dtype=mx.float32)), dtype=np.float64)
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        return (1 - self.actions * self.settings.floor) * shares + self.settings.floor

    def learn(self, batch: Batch) -> dict[str, float]:
        advantages = leave_one_out(batch, self.settings.gamma)
        arrays = tuple(map(mx.array, (batch.features, batch.actions, advantages, batch.mask)))
        loss_and_grad = nn.value_and_grad(
            self.network,
            lambda *given: reinforce_loss(self.network, given, self.settings.floor, self.settings.entropy_coef),
        )
        return {"grad_norm": self._step(*loss_and_grad(*arrays))}

    def _step(self, loss: mx.array, gradients: dict) -> float:
        return update(self.network, self.optimizer, loss, gradients, self.settings.max_grad_norm)

    def arrays(self) -> dict[str, np.ndarray]:
        weights = {f"network.{name}": array for name, array in tree_flatten(self.network.parameters())}
        moments = {f"optimizer.{name}": array for name, array in optimizer_arrays(self.optimizer).items()}
        return {name: np.array(array) for name, array in {**weights, **moments}.items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        parts: dict[str, dict[str, mx.array]] = {"network": {}, "optimizer": {}}
        for name, array in arrays.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = mx.array(array)
        self.network.update(tree_unflatten(list(parts["network"].items())))
        restore_optimizer(self.optimizer, self.network, parts["optimizer"])


class PPO(Reinforce):
    """A few steps per batch on training/ppo.py's clipped loss; whitened GAE advantages with a critic."""

    kind = "ppo"

    def learn(self, batch: Batch) -> dict[str, float]:
        given = self.settings
        features, actions, mask = map(mx.array, (batch.features, batch.actions, batch.mask))
        values = mx.stop_gradient(self.network.values(features))
        advantages, returns = ppo.gae(mx.array(batch.rewards), values, mask, given.gamma, given.gae_lambda)
        old_logprobs = mx.array(np.log(np.where(batch.mask > 0, batch.propensities, 1.0)).astype(np.float32))
        arrays = (features, actions, old_logprobs, values, ppo.masked_whiten(advantages, mask), returns, mask)
        loss_and_grad = nn.value_and_grad(
            self.network, lambda *arrays: ppo_policy_loss(self.network, arrays, self.settings)
        )
        norms = [self._step(*loss_and_grad(*arrays)) for _ in range(given.ppo_epochs)]
        return {"grad_norm": float(np.mean(norms))}


def leave_one_out(batch: Batch, gamma: float) -> np.ndarray:
    """(E, C): the discounted returns from each choice on, minus their mean over the other episodes of the group.

    An episode that has ended has a return of 0 in the others' mean.
    """
    to_go = np.zeros_like(batch.rewards)
    later = np.zeros(len(to_go), dtype=to_go.dtype)
    for place in reversed(range(to_go.shape[1])):
        later = batch.rewards[:, place] * batch.mask[:, place] + gamma * later
        to_go[:, place] = later
    columns = [ppo.rloo_advantages(mx.array(column), batch.group_size) for column in to_go.T]
    return np.array(mx.stack(columns, axis=1)) * batch.mask
