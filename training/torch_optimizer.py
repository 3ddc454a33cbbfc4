"""The update of PPO in PyTorch: Adam or Muon, a schedule, clipping, and no update on NaN.

The twin of training.optimizer, with the same numbers: the same rate at every update, the same clipping.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from training.muon import muon_step
from training.optimizer_groups import belongs_to_first, groups
from training.schedules import schedule_share

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


class Muon(torch.optim.Optimizer):
    """Muon by `muon_step`, with decoupled weight decay. (torch.optim.Muon works in bfloat16.)"""

    def __init__(self, weights: Iterable[Tensor], lr: float, weight_decay: float = 0.0):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of every matrix; `closure` is not called."""
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].get("momentum_buffer", torch.zeros_like(weight))
                step, self.state[weight]["momentum_buffer"] = muon_step(weight.grad, average)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])


class Part(NamedTuple):
    """Some of a module's weights, by name, and their optimizer."""

    optimizer: torch.optim.Optimizer
    rate: float  # the highest
    names: list[str]


STATE = {Muon: ("momentum_buffer",), torch.optim.Adam: ADAM_STATE, torch.optim.AdamW: ADAM_STATE}


class ScheduledOptimizer:
    """Adam, AdamW where weights decay, or Muon, over the trainable weights of a module, with its schedule.

    Its state is saved by the names of the weights.
    """

    def __init__(
        self,
        module: nn.Module,
        rate: float,
        share_at: Callable[[int], float],
        weight_decay: float = 0.0,
        kind: str = "adam",
        head_rate: float | None = None,
    ):
        """share_at: from an update (from 0) to its share of the highest rate."""
        self.named = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.weights = list(self.named.values())
        self.share_at = share_at
        self.updates = 0
        classes = {"adam": torch.optim.AdamW if weight_decay else torch.optim.Adam, "muon": Muon}
        self.parts: list[Part] = []
        wanted = groups(kind, rate, head_rate)
        for index, (name, part_rate) in enumerate(wanted):
            mine = {
                path: weight
                for path, weight in self.named.items()
                if len(wanted) == 1 or belongs_to_first(path, weight.ndim, kind) == (index == 0)
            }
            if mine:  # there may be no value head
                optimizer = classes[name](mine.values(), lr=part_rate, weight_decay=weight_decay)
                self.parts.append(Part(optimizer, part_rate, list(mine)))

    def step(self, gradients: Sequence[Tensor], planned: int | None = None, factor: float = 1.0) -> None:
        """One update of the weights by their gradients, in the order of `weights`; planned, factor: see `update`."""
        at = self.updates if planned is None else planned
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        for optimizer, rate, _ in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = factor * rate * self.share_at(at)
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1

    def arrays(self) -> dict[str, Tensor]:
        """The state by name, to be saved as safetensors."""
        moments = {
            f"{name}.{key}": value
            for optimizer, _, names in self.parts
            for name in names
            for key, value in optimizer.state[self.named[name]].items()
        }
        return {"updates": torch.tensor(self.updates), **moments}

    def restore(self, arrays: dict[str, Tensor]) -> None:
        """Restore a state from `arrays`; the steps that follow are bit for bit those that would have followed."""
        self.updates = int(arrays["updates"]) if "updates" in arrays else 0
        expected: dict[str, Any] = {"updates": ()}
        states = []
        for optimizer, _, names in self.parts:
            keys = STATE[type(optimizer)] if self.updates else ()
            expected |= {f"{n}.{key}": () if key == "step" else self.named[n].shape for n in names for key in keys}
            states.append({i: {key: arrays.get(f"{name}.{key}") for key in keys} for i, name in enumerate(names)})
        if {name: array.shape for name, array in arrays.items()} != expected:
            raise UserError("the checkpoint's optimizer state does not fit this model; resume with the run's own flags")
        if self.updates:
            for (optimizer, _, _), state in zip(self.parts, states, strict=True):
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def make_optimizer(
    module: nn.Module,
    rate: float,
    total_updates: int,
    schedule: str = "constant",
    warmup_updates: int = 0,
    weight_decay: float = 0.0,
    kind: str = "adam",
    head_rate: float | None = None,
) -> ScheduledOptimizer:
    """The optimizer of `module`; its arguments are those of training.optimizer.make_optimizer."""

    def share_at(update: int) -> float:
        return schedule_share(update, total_updates, schedule, warmup_updates)

    return ScheduledOptimizer(module, rate, share_at, weight_decay, kind, head_rate)


def update(
    optimizer: ScheduledOptimizer,
    loss: Tensor,
    gradients: Sequence[Tensor],
    max_grad_norm: float | None,
    planned: int | None = None,
    factor: float = 1.0,
) -> float:
    """Clip the gradients to `max_grad_norm` (None or 0: no limit) and take one optimizer step.

    planned: the number (from 0) of this update in the run's plan, which the schedule follows; None: all updates were
    made. factor: of the schedule's rate. Returns the gradients' norm before clipping. If the loss or the norm is not
    finite, nothing is touched, and the norm returned is NaN: the caller counts and reports it.
    """
    norm = read(loss, gradients)["grad_norm"]
    if not math.isnan(norm):
        take_step(optimizer, gradients, norm, max_grad_norm, planned, factor)
    return norm


def take_step(
    optimizer: ScheduledOptimizer,
    gradients: Sequence[Tensor],
    norm: float,
    max_grad_norm: float | None,
    planned: int | None = None,
    factor: float = 1.0,
) -> None:
    """`update` where the gradients' norm is known and finite."""
    if max_grad_norm and norm > max_grad_norm:
        gradients = [gradient * (max_grad_norm / (norm + 1e-6)) for gradient in gradients]
    optimizer.step(gradients, planned, factor)


def read(loss: Tensor, gradients: Sequence[Tensor], stats: dict[str, Tensor] | None = None) -> dict[str, float]:
    """A mini batch's stats, scalars, as numbers, and "grad_norm": NaN if it or the loss is not finite.

    Everything is read at once, since each wait leaves a GPU without work.
    """
    stats, norm = stats or {}, gradient_norm(gradients)
    checked = torch.where(loss.isfinite() & norm.isfinite(), norm, math.nan)
    numbers = torch.stack([value.float() for value in (*stats.values(), checked)]).tolist()
    return dict(zip([*stats, "grad_norm"], numbers, strict=True))


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
