"""Policies that choose the operator: fixed shares, LinUCB, REINFORCE and PPO, and what they learn from.

    constant    one distribution for all situations: uniform, a single operator, or a policy's own marginal frequencies
    linucb      ridge regression of the reward by action, with a bonus for what is uncertain (arXiv:1003.0146)
    reinforce   an MLP, by the leave-one-out baseline over a group of episodes with one start (arXiv:2402.14740)
    ppo         an MLP with a critic, by the maths of training/ppo.py: a choice is what a token is there

All but the constant give every action at least the propensity `floor`, so that another policy can be judged from their
logs (synth/off_policy.py); log probabilities and gradients are of the floored distribution, which is the one that was
sampled from. No action is preferred at the start. Leaves out what the situations are (synth/policy_features.py).

    python -m pytest tests/test_policy.py tests/test_policy_learns.py
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import models.fast_blas  # noqa: F401  (before mlx)
from data.errors import UserError
from data.files import atomic_folder, read_json, write_json
from synth.operators import ACTIONS
from synth.policy_features import SIZE
from training import ppo
from training.optimizer import Adam, optimizer_arrays, restore_optimizer, update

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

FORMAT = 1
ARRAYS, SETTINGS = "policy.safetensors", "policy.json"


class Batch(NamedTuple):
    """E episodes of up to C choices; the `group_size` episodes of one start side by side.

    features: (E, C, F) float32; actions: (E, C) int; propensities, rewards, mask: (E, C) float32, mask 1 at a choice.
    """

    features: np.ndarray
    actions: np.ndarray
    propensities: np.ndarray
    rewards: np.ndarray
    mask: np.ndarray
    group_size: int


@dataclass(frozen=True)
class Learning:
    """How a policy learns. Raises UserError for settings that cannot be.

    floor: the least propensity of an action; gamma: discount by the choice (linucb: always 0); alpha: linucb's bonus,
    in standard deviations; hidden: units of each of the MLP's two hidden layers.
    """

    floor: float = 0.02
    gamma: float = 0.5
    learning_rate: float = 0.01
    hidden: int = 32
    entropy_coef: float = 0.01
    alpha: float = 0.5
    clip_range: float = 0.2
    ppo_epochs: int = 4
    gae_lambda: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.floor < 1 / len(ACTIONS):
            raise UserError(f"--floor is {self.floor}; from 0 to below 1/{len(ACTIONS)}, the share of one action")
        if not 0 <= self.gamma <= 1:
            raise UserError(f"--gamma is {self.gamma}; it has to lie between 0 and 1")


class Policy:
    """What all policies have in common. actions: A of them; size: F features."""

    kind = ""
    learns = False

    def __init__(self, learning: Learning = Learning(), actions: int = len(ACTIONS), size: int = SIZE):
        self.learning, self.actions, self.size = learning, actions, size

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(N, F) → (N, A) float64, each row of sum 1."""
        raise NotImplementedError

    def learn(self, batch: Batch) -> dict[str, float]:
        """Take in a batch; returns figures to report."""
        return {}

    def freeze(self) -> None:
        """Explore no more than by the floor and the policy's own randomness."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All of its state."""
        return {}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what `arrays` gave."""


class Constant(Policy):
    """The same shares whatever the situation: evenly, or `shares` (A,)."""

    kind = "constant"

    def __init__(self, learning: Learning = Learning(), actions: int = len(ACTIONS), size: int = SIZE, shares=None):
        super().__init__(learning, actions, size)
        self.shares = np.full(actions, 1 / actions) if shares is None else np.asarray(shares, dtype=np.float64)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        return np.tile(self.shares, (len(features), 1))

    def arrays(self) -> dict[str, np.ndarray]:
        return {"shares": self.shares}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.shares = arrays["shares"]


def fixed(action: int, actions: int = len(ACTIONS)) -> Constant:
    """A policy that always chooses one action."""
    return Constant(actions=actions, shares=np.eye(actions)[action])


def marginal(policy: Policy, features: np.ndarray) -> Constant:
    """The mean frequencies of a policy's actions over some situations: what it would be if it saw no situation."""
    return Constant(actions=policy.actions, shares=policy.probabilities(features).mean(axis=0))


class LinUCB(Policy):
    """Per action a ridge regression (λ = 1) of the immediate reward; the highest upper bound is chosen, ties evenly."""

    kind = "linucb"
    learns = True

    def __init__(self, learning: Learning = Learning(), actions: int = len(ACTIONS), size: int = SIZE):
        super().__init__(learning, actions, size)
        self.alpha = learning.alpha
        self.covariances = np.tile(np.eye(size), (actions, 1, 1))  # (A, F, F)
        self.sums = np.zeros((actions, size))

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        x = features.astype(np.float64)
        means = x @ np.linalg.solve(self.covariances, self.sums[..., None])[..., 0].T  # (N, A)
        solved = np.linalg.solve(self.covariances, np.broadcast_to(x.T, (self.actions, *x.T.shape)))  # (A, F, N)
        spread = np.einsum("nf,afn->na", x, solved)
        bounds = means + self.alpha * np.sqrt(spread)
        best = bounds >= bounds.max(axis=1, keepdims=True) - 1e-9
        greedy = best / best.sum(axis=1, keepdims=True)
        return (1 - self.actions * self.learning.floor) * greedy + self.learning.floor

    def learn(self, batch: Batch) -> dict[str, float]:
        real = batch.mask > 0
        x, actions, rewards = batch.features[real].astype(np.float64), batch.actions[real], batch.rewards[real]
        for action in range(self.actions):
            own = x[actions == action]
            self.covariances[action] += own.T @ own
            self.sums[action] += own.T @ rewards[actions == action]
        return {}

    def freeze(self) -> None:
        self.alpha = 0.0

    def arrays(self) -> dict[str, np.ndarray]:
        return {"covariances": self.covariances, "sums": self.sums}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.covariances, self.sums = arrays["covariances"].copy(), arrays["sums"].copy()


class Network(nn.Module):
    """Situations (..., F) → logits (..., A) and values (...). The last layers start at 0: all actions are alike."""

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


def ppo_policy_loss(network: Network, batch: tuple[mx.array, ...], learning: Learning) -> mx.array:
    """training/ppo.py's loss. batch: features, actions, old logprobs and values, advantages, returns, mask."""
    features, actions, old_logprobs, old_values, advantages, returns, mask = batch
    logprobs, entropy = _chosen(network, features, actions, learning.floor)
    values = network.values(features)
    loss, _ = ppo.ppo_loss(
        *(logprobs, values, old_logprobs, old_values, advantages, returns, mask),
        clip_range=learning.clip_range,
        value_clip_range=float("inf"),
        vf_coef=0.5,
        entropy=entropy,
        entropy_coef=learning.entropy_coef,
    )
    return loss


def _chosen(network: Network, features: mx.array, actions: mx.array, floor: float) -> tuple[mx.array, mx.array]:
    """Log probabilities of the actions, and entropies, both (E, C)."""
    logprobs = floored_logprobs(network.logits(features), floor)
    chosen = mx.take_along_axis(logprobs, actions[..., None], axis=-1)[..., 0]
    return chosen, -(mx.exp(logprobs) * logprobs).sum(axis=-1)


class Reinforce(Policy):
    """One Adam step a batch, by leave-one-out advantages of the discounted rewards from each choice on."""

    kind = "reinforce"
    learns = True

    def __init__(self, learning: Learning = Learning(), actions: int = len(ACTIONS), size: int = SIZE):
        super().__init__(learning, actions, size)
        mx.random.seed(learning.seed)
        self.network = Network(size, learning.hidden, actions)
        mx.eval(self.network.parameters())
        self.optimizer = Adam(learning.learning_rate)
        self.optimizer.init(self.network.trainable_parameters())

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        logits = np.array(self.network.logits(mx.array(features, dtype=mx.float32)), dtype=np.float64)
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        return (1 - self.actions * self.learning.floor) * shares + self.learning.floor

    def learn(self, batch: Batch) -> dict[str, float]:
        advantages = leave_one_out(batch, self.learning.gamma)
        arrays = tuple(map(mx.array, (batch.features, batch.actions, advantages, batch.mask)))
        loss_and_grad = nn.value_and_grad(
            self.network,
            lambda *given: reinforce_loss(self.network, given, self.learning.floor, self.learning.entropy_coef),
        )
        return {"grad_norm": self._step(*loss_and_grad(*arrays))}

    def _step(self, loss: mx.array, gradients: dict) -> float:
        return update(self.network, self.optimizer, loss, gradients, self.learning.max_grad_norm)

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
    """A few steps a batch on training/ppo.py's clipped loss; advantages by GAE with a critic, whitened."""

    kind = "ppo"

    def learn(self, batch: Batch) -> dict[str, float]:
        given = self.learning
        features, actions, mask = map(mx.array, (batch.features, batch.actions, batch.mask))
        values = mx.stop_gradient(self.network.values(features))
        advantages, returns = ppo.gae(mx.array(batch.rewards), values, mask, given.gamma, given.gae_lambda)
        old_logprobs = mx.array(np.log(np.where(batch.mask > 0, batch.propensities, 1.0)).astype(np.float32))
        arrays = (features, actions, old_logprobs, values, ppo.masked_whiten(advantages, mask), returns, mask)
        loss_and_grad = nn.value_and_grad(
            self.network, lambda *arrays: ppo_policy_loss(self.network, arrays, self.learning)
        )
        norms = [self._step(*loss_and_grad(*arrays)) for _ in range(given.ppo_epochs)]
        return {"grad_norm": float(np.mean(norms))}


def leave_one_out(batch: Batch, gamma: float) -> np.ndarray:
    """(E, C): the discounted rewards from each choice on, less their mean over the other episodes of the group.

    An episode that has ended has nothing more to come and counts as 0 in the others' mean.
    """
    to_go = np.zeros_like(batch.rewards)
    later = np.zeros(len(to_go), dtype=to_go.dtype)
    for place in reversed(range(to_go.shape[1])):
        later = batch.rewards[:, place] * batch.mask[:, place] + gamma * later
        to_go[:, place] = later
    columns = [ppo.rloo_advantages(mx.array(column), batch.group_size) for column in to_go.T]
    return np.array(mx.stack(columns, axis=1)) * batch.mask


KINDS: dict[str, type[Policy]] = {kind.kind: kind for kind in (Constant, LinUCB, Reinforce, PPO)}


def make_policy(kind: str, learning: Learning = Learning()) -> Policy:
    """A policy that has learned nothing; "uniform" is a constant one."""
    return KINDS["constant" if kind == "uniform" else kind](learning)


def write_policy(folder: Path, policy: Policy) -> None:
    """Write policy.safetensors and policy.json into a folder that is there."""
    save_file({name: np.array(array, order="C") for name, array in policy.arrays().items()}, folder / ARRAYS)
    settings = {"format": FORMAT, "kind": policy.kind, "actions": list(ACTIONS), "features": policy.size}
    write_json(folder / SETTINGS, {**settings, "learning": asdict(policy.learning)})


def save_policy(path: str | Path, policy: Policy) -> None:
    """Write a policy's folder, whole or not at all."""
    with atomic_folder(path, SETTINGS) as temporary:
        write_policy(temporary, policy)


def load_policy(path: str | Path) -> Policy:
    """The policy of a folder, exact to the bit. Raises UserError where it is none, or was made for other actions."""
    saved = read_json(Path(path) / SETTINGS)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or saved.get("kind") not in KINDS:
        raise UserError(f"{path} holds no policy of format {FORMAT}; train one by synth.evolve")
    if saved["actions"] != list(ACTIONS) or saved["features"] != SIZE:
        raise UserError(f"{path} was made for other operators or features than this version's; train it anew")
    policy = KINDS[saved["kind"]](Learning(**saved["learning"]))
    try:
        found = load_file(Path(path) / ARRAYS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} has no readable {ARRAYS} ({error}); train the policy anew") from None
    expected = {name: array.shape for name, array in policy.arrays().items()}
    if {name: array.shape for name, array in found.items()} != expected:
        raise UserError(f"{path} holds other arrays than its {SETTINGS} says; train the policy anew")
    policy.restore(found)
    return policy
