"""The update of PPO in PyTorch: Adam, a schedule, clipping, and a guard against NaN.

The twin of training.optimizer, with the same numbers: the same rate at every update, the same clipping.
"""

import math
from collections.abc import Callable, Sequence

from data.errors import UserError

import torch
from torch import Tensor, nn


def learning_rate(update: int, rate: float, total_updates: int, schedule: str = "constant", warmup: int = 0) -> float:
    """The rate of an update (from 0): it rises from 0 over the warm-up, then keeps, or falls to 0 at `total_updates`.

    schedule: constant, linear or cosine. Source: mlx-lm, `tuner.utils.build_schedule`, which holds the full rate for
    the two updates after the warm-up.
    """
    if warmup and update <= warmup:
        return rate * update / warmup
    decay_updates = max(total_updates - warmup, 1)
    past = min(update - (warmup + 1 if warmup else 0), decay_updates) / decay_updates
    return rate * {"constant": 1.0, "linear": 1 - past, "cosine": 0.5 * (1 + math.cos(math.pi * past))}[schedule]


class ScheduledAdam:
    """Adam, or AdamW where weights decay, over the trainable weights of a module, with its schedule.

    Its state is saved by the names of the weights.
    """

    def __init__(self, module: nn.Module, rate_at: Callable[[int], float], weight_decay: float = 0.0):
        self.named = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.weights = list(self.named.values())
        self.rate_at = rate_at
        self.updates = 0
        kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
        self.adam = kind(self.weights, lr=rate_at(0), weight_decay=weight_decay)

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One update of the weights by their gradients, in the order of `weights`."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        for group in self.adam.param_groups:
            group["lr"] = self.rate_at(self.updates)
        self.adam.step()
        self.adam.zero_grad()
        self.updates += 1

    def arrays(self) -> dict[str, Tensor]:
        """The whole state by name, to be saved as safetensors."""
        states = zip(self.named, (self.adam.state[weight] for weight in self.weights), strict=True)
        moments = {f"{name}.{key}": value for name, state in states for key, value in state.items()}
        return {"updates": torch.tensor(self.updates), **moments}

    def restore(self, arrays: dict[str, Tensor]) -> None:
        """Put back a state from `arrays`; what follows is then bit for bit what would have followed."""
        self.updates = int(arrays["updates"]) if "updates" in arrays else 0
        shapes = {"step": (), "exp_avg": None, "exp_avg_sq": None} if self.updates else {}
        expected = {
            f"{n}.{key}": w.shape if s is None else s for n, w in self.named.items() for key, s in shapes.items()
        }
        if {name: array.shape for name, array in arrays.items()} != {"updates": (), **expected}:
            raise UserError("the checkpoint's optimizer state does not fit this model; resume with the run's own flags")
        if self.updates:
            states = {i: {key: arrays[f"{name}.{key}"] for key in shapes} for i, name in enumerate(self.named)}
            self.adam.load_state_dict({**self.adam.state_dict(), "state": states})


def make_optimizer(
    module: nn.Module,
    rate: float,
    total_updates: int,
    schedule: str = "constant",
    warmup_updates: int = 0,
    weight_decay: float = 0.0,
) -> ScheduledAdam:
    """The optimizer of `module`; its arguments are those of training.optimizer.make_optimizer."""

    def rate_at(update: int) -> float:
        return learning_rate(update, rate, total_updates, schedule, warmup_updates)

    return ScheduledAdam(module, rate_at, weight_decay)


def update(optimizer: ScheduledAdam, loss: Tensor, gradients: Sequence[Tensor], max_grad_norm: float | None) -> float:
    """Clip the gradients to `max_grad_norm` (None or 0: no limit) and take one optimizer step.

    Returns the gradients' norm before clipping. If the loss or the norm is not finite, nothing is touched, and the
    norm returned is NaN: the caller counts and reports it.
    """
    norm = gradient_norm(gradients).item()
    if not (math.isfinite(loss.item()) and math.isfinite(norm)):
        return math.nan
    if max_grad_norm and norm > max_grad_norm:
        gradients = [gradient * (max_grad_norm / (norm + 1e-6)) for gradient in gradients]
    optimizer.step(gradients)
    return norm


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, in float32."""
    return torch.stack([gradient.float().square().sum() for gradient in gradients]).sum().sqrt()


def loss_and_gradients(module: nn.Module, loss_function: Callable) -> Callable:
    """The function of arrays that gives ((loss, stats), gradients): `nn.value_and_grad` of MLX, for torch.

    loss_function takes the module and arrays. Gradients come in the order of the module's trainable weights; nothing
    returned is still on the graph.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]

    def gradients_of(*arrays):
        loss, stats = loss_function(module, *arrays)
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        return (loss.detach(), {name: value.detach() for name, value in stats.items()}), gradients

    return gradients_of
