"""Agents trained by policy gradient: REINFORCE and PPO, with a small MLP in MLX and the maths of training/ppo.py.

State: a moving average of the rewards and the last reward, the current settings, optionally features of the last batch.
Action: a Gaussian step for temperature and for top_p, in units of step_size, and a template and a method, each drawn
from a softmax. REINFORCE (Williams 1992) uses the mean of the episode's returns as its baseline, PPO a value head with
GAE. An episode is `update_every` iterations; an iteration takes the place of a token in the loss.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from synth.sampler import Settings, Space
from synth.tuning.agents import Outcome, rng_from, rng_state
from training.optimizer import make_optimizer, optimizer_arrays, restore_optimizer, update
from training.ppo import RunningMoments, gae, masked_whiten, ppo_loss

HIDDEN = 32
NUMBERS = 2  # continuous actions: temperature, top_p
MOVING = 0.7  # decay of the moving average of rewards
VF_COEF, VALUE_CLIP = 0.5, math.inf
MAX_GRAD_NORM = 1.0
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class AgentSettings:
    """The fields of RLTuningConfig that an agent needs. value_head: PPO, whose critic is the MLP's last output."""

    learning_rate: float = 0.001
    step_size: float = 0.05
    update_every: int = 5
    gamma: float = 0.9
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    epochs: int = 1
    value_head: bool = False


class SettingsPolicy(nn.Module):
    """Two layers: state (T, n) → two means, the logits of both choices, a value. log_std: (2,), state-independent."""

    def __init__(self, state_size: int, choices: tuple[int, ...]):
        super().__init__()
        self.hidden = nn.Linear(state_size, HIDDEN)
        self.out = nn.Linear(HIDDEN, NUMBERS + sum(choices) + 1)
        self.out.weight = 0.1 * self.out.weight  # initially no state prefers an action
        self.out.bias = mx.zeros_like(self.out.bias)
        self.log_std = mx.zeros((NUMBERS,))
        self.choices = choices

    def __call__(self, states: mx.array) -> tuple[mx.array, list[mx.array], mx.array]:
        """Means (T, 2), logits (T, k) of each choice, values (T,). states: (T, n) float32."""
        parts = mx.split(self.out(mx.tanh(self.hidden(states))), np.cumsum([NUMBERS, *self.choices]).tolist(), axis=-1)
        return parts[0], parts[1:-1], parts[-1][:, 0]

    def logprobs(self, states: mx.array, steps: mx.array, picks: mx.array) -> tuple[mx.array, mx.array]:
        """Log probability (density) of whole actions, in nats, and the values: both (T,).

        steps: (T, 2) Gaussian actions; picks: (T, number of choices) indices.
        """
        means, logits, values = self(states)
        normed = (steps - means) / mx.exp(self.log_std)
        logprobs = (-0.5 * normed * normed - self.log_std - HALF_LOG_2PI).sum(axis=-1)
        for column, scores in enumerate(logits):
            chosen = mx.take_along_axis(scores, picks[:, column : column + 1], axis=-1)[:, 0]
            logprobs = logprobs + chosen - mx.logsumexp(scores, axis=-1)
        return logprobs, values


class PolicyAgent:
    """An agent (synth/tuning/agents.py) that learns by policy gradient.

    features: how many numbers describe a batch. Rewards are divided by their running standard deviation; an episode's
    advantages are whitened.
    """

    def __init__(self, space: Space, settings: AgentSettings, features: int = 0, seed: int = 0):
        self.space, self.settings, self.features = space, settings, features
        self.rng = np.random.default_rng(seed)
        mx.random.seed(seed)
        choices = (len(space.templates), len(space.methods))
        self.policy = SettingsPolicy(2 + NUMBERS + sum(choices) + features, choices)
        self.optimizer = make_optimizer(settings.learning_rate, 1)
        self.optimizer.init(self.policy.trainable_parameters())
        self.moments = RunningMoments()
        self.average = self.last_reward = 0.0
        self.episode: list[dict[str, Any]] = []  # iterations since the last update
        mx.eval(self.policy.parameters())

    def propose(self, last: Outcome) -> Settings:
        state = self._state(last)
        means, logits, _ = self.policy(mx.array([state]))
        std = np.exp(np.array(self.policy.log_std))
        steps = (np.array(means)[0] + std * self.rng.standard_normal(NUMBERS)).astype(np.float32)
        picks = [int(self.rng.choice(len(p), p=p)) for p in (_softmax(np.array(one)[0]) for one in logits)]
        self.episode.append({"state": state, "steps": steps.tolist(), "picks": picks})
        logprob, value = self._evaluated(self.episode[-1:])
        self.episode[-1] |= {"logprob": logprob.item(), "value": value.item()}
        size = self.settings.step_size
        settings = Settings(
            last.settings.temperature + size * float(steps[0]),
            last.settings.top_p + size * float(steps[1]),
            self.space.templates[picks[0]],
            self.space.methods[picks[1]],
        )
        return self.space.within(settings)

    def learn(self, outcome: Outcome) -> None:
        self.moments.update([outcome.reward])
        self.average = MOVING * self.average + (1 - MOVING) * outcome.reward
        self.last_reward = outcome.reward
        self.episode[-1]["reward"] = outcome.reward
        if len(self.episode) >= self.settings.update_every:
            self._update()
            self.episode = []

    def _state(self, last: Outcome) -> list[float]:
        """Rewards, divided by their standard deviation; the settings; the batch's features."""
        scale = self.moments.std
        features = [*last.features, *[0.0] * self.features][: self.features]
        return [self.average / scale, self.last_reward / scale, *self.space.as_vector(last.settings), *features]

    def _evaluated(self, episode: list[dict[str, Any]]) -> tuple[mx.array, mx.array]:
        columns = (mx.array([moment[name] for moment in episode]) for name in ("state", "steps", "picks"))
        return self.policy.logprobs(*columns)

    def advantages(self) -> tuple[mx.array, mx.array]:
        """Whitened advantages and discounted returns of the episode, both (1, T).

        Without a value head an advantage is a return minus the episode's mean.
        """
        rewards = mx.array([[moment["reward"] / self.moments.std for moment in self.episode]])
        mask = mx.ones_like(rewards)
        if self.settings.value_head:
            values = mx.array([[moment["value"] for moment in self.episode]])
            advantages, returns = gae(rewards, values, mask, self.settings.gamma, self.settings.gae_lambda)
        else:
            advantages, returns = gae(rewards, mx.zeros_like(rewards), mask, self.settings.gamma, 1.0)
        return masked_whiten(advantages, mask), returns

    def loss(self, advantages: mx.array, returns: mx.array) -> mx.array:
        """The episode's loss. REINFORCE's is PPO's without clipping: while the ratio is 1, the gradients are equal."""
        settings, (logprobs, values) = self.settings, self._evaluated(self.episode)
        old = {name: mx.array([[moment[name] for moment in self.episode]]) for name in ("logprob", "value")}
        with_values = settings.value_head
        return ppo_loss(
            logprobs[None],
            values[None] if with_values else None,
            old["logprob"],
            old["value"] if with_values else None,
            advantages,
            returns if with_values else None,
            mx.ones_like(advantages),
            settings.clip_range if with_values else math.inf,
            VALUE_CLIP,
            VF_COEF,
        )[0]

    def _update(self) -> None:
        advantages, returns = self.advantages()
        gradients_of = nn.value_and_grad(self.policy, self.loss)
        for _ in range(self.settings.epochs):
            loss, gradients = gradients_of(advantages, returns)
            update(self.policy, self.optimizer, loss, gradients, MAX_GRAD_NORM)
        mx.eval(self.policy.parameters(), self.optimizer.state)

    def state(self) -> dict[str, Any]:
        return {
            "rng": rng_state(self.rng),
            "moments": dict(vars(self.moments)),
            "average": self.average,
            "last_reward": self.last_reward,
            "episode": [dict(moment) for moment in self.episode],
        }

    def arrays(self) -> dict[str, Any]:
        parameters = {f"policy.{name}": array for name, array in tree_flatten(self.policy.parameters())}
        return parameters | {f"optimizer.{name}": array for name, array in optimizer_arrays(self.optimizer).items()}

    def restore(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        self.rng = rng_from(state["rng"])
        self.moments = RunningMoments(**state["moments"])
        self.average, self.last_reward = state["average"], state["last_reward"]
        self.episode = [dict(moment) for moment in state["episode"]]
        groups: dict[str, dict[str, mx.array]] = {"policy": {}, "optimizer": {}}
        for name, array in arrays.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = array
        self.policy.load_weights(list(groups["policy"].items()), strict=True)
        restore_optimizer(self.optimizer, self.policy, groups["optimizer"])
        mx.eval(self.policy.parameters(), self.optimizer.state)


def _softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits.astype(np.float64) - logits.max())
    return odds / odds.sum()
