"""The update that SFT, reward modelling and PPO share: Adam or Muon, a schedule, clipping, and no update on NaN."""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.utils import build_schedule

from common.errors import UserError
from models.cpu import adam
from training.muon import muon_step
from training.optimizer_groups import belongs_to_first, groups
from training.schedules import DECAY_SHARE, SCHEDULES


class Schedule:
    """The learning rate of an update: that of its number in the plan, where it is given, else of those made so far.

    The rates are those of training.schedules, times `factor`.
    """

    def __init__(self, rate: float, total_updates: int, kind: str = "constant", warmup_updates: int = 0):
        """The rate rises from 0 over the warm-up, then stays, or decays to 0 at `total_updates`."""
        if kind not in SCHEDULES:
            raise UserError(f"--lr-schedule is {kind!r}; use one of {', '.join(SCHEDULES)}")
        decay_updates = max(total_updates - warmup_updates, 1)
        arguments = {
            # mlx has no constant schedule; a linear one from a rate to itself is one.
            "constant": ("linear_schedule", [rate, rate, decay_updates]),
            "linear": ("linear_schedule", [rate, 0.0, decay_updates]),
            "cosine": ("cosine_decay", [rate, decay_updates]),
            "wsd": ("linear_schedule", [rate, rate, decay_updates]),
        }
        name, values = arguments[kind]
        self.rate_at = build_schedule({"name": name, "arguments": values, "warmup": warmup_updates})
        self.last = None if kind != "wsd" else (total_updates, DECAY_SHARE * total_updates)
        self.planned: int | None = None
        self.factor = 1.0

    def __call__(self, step: mx.array) -> mx.array:
        """The rate, for an mlx optimizer that has taken `step` steps."""
        update = step if self.planned is None else mx.array(self.planned, mx.uint64)
        rate = self.factor * self.rate_at(update)
        if self.last is None:
            return rate
        end, decay = self.last
        return rate * mx.clip((end - update.astype(mx.float32)) / decay, 0, 1)


class Adam(optim.Adam):
    """mlx's Adam, or AdamW, with bias correction, equal to it but for rounding; faster on CPU (models.cpu.adam).

    What is the same for every weight is computed once.
    """

    def __init__(self, learning_rate: float | Callable, weight_decay: float = 0.0):
        super().__init__(learning_rate, bias_correction=True)
        self.weight_decay, self.schedule = weight_decay, learning_rate

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """The parameters after one step; called by `Optimizer.update`."""
        step, (b1, b2) = self.step + 1, self.betas
        correction = mx.sqrt(1 - b2**step)
        self._eps, self._per_rate = correction * self.eps, correction / (1 - b1**step)
        self._rate: mx.array | None = None
        return super().apply_gradients(gradients, parameters)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """One array's step. √v + ε·c, with √v's correction c in the rate, saves a pass over √v · 1/c + ε."""
        if self._rate is None:
            self._rate = self.learning_rate * self._per_rate  # only now has the schedule been asked
        if self.weight_decay:
            parameter = parameter * (1 - self.learning_rate * self.weight_decay).astype(parameter.dtype)
        if adam.serves(gradient, parameter):
            return adam.step(gradient, parameter, state, self.betas, self._rate.item(), self._eps.item())
        arrays = (gradient, parameter, state["m"], state["v"], self._rate, self._eps)
        moved, state["m"], state["v"] = _adam_step(*arrays, *self.betas)
        return moved


@partial(mx.compile, shapeless=True)
def _adam_step(
    gradient: mx.array, parameter: mx.array, m: mx.array, v: mx.array, rate: mx.array, eps: mx.array, b1: float,
    b2: float,
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    """The parameter after one step, and the new moments m and v: on a GPU one kernel for each array."""
    m = b1 * m + (1 - b1) * gradient
    v = b2 * v + (1 - b2) * mx.square(gradient)
    return parameter - rate.astype(gradient.dtype) * m / (mx.sqrt(v) + eps.astype(gradient.dtype)), m, v


class Muon(optim.Muon):
    """Muon by `muon_step`, with decoupled weight decay.

    Each matrix moves along its momentum with all singular values set to about 1, so that the rate is the step's
    spectral norm: no direction is left behind because others have larger gradients.
    """

    def __init__(self, learning_rate: float | Callable, weight_decay: float = 0.0):
        super().__init__(learning_rate, weight_decay=weight_decay)
        self.schedule = learning_rate

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """One matrix's step."""
        rate = self.learning_rate.astype(parameter.dtype)
        moved, state["v"] = _muon_step(gradient, parameter, state["v"], rate, self.weight_decay)
        return moved


@mx.compile  # a trace for every shape: `muon_step` turns a matrix that is taller than wide
def _muon_step(
    gradient: mx.array, parameter: mx.array, average: mx.array, rate: mx.array, weight_decay: float
) -> tuple[mx.array, mx.array]:
    """The parameter after one step, and the new moving average: on a GPU, what lies between products is one kernel."""
    step, average = muon_step(gradient, average)
    return parameter * (1 - rate * weight_decay) - rate * step, average


Optimizer: TypeAlias = Adam | Muon | optim.MultiOptimizer


def make_optimizer(
    learning_rate: float,
    total_updates: int,
    schedule: str = "constant",
    warmup_updates: int = 0,
    weight_decay: float = 0.0,
    kind: str = "adam",
    head_rate: float | None = None,
) -> Optimizer:
    """Adam with PyTorch's bias correction, or Muon, with a `Schedule`.

    total_updates: optimizer steps planned for the whole run, after which the rate of a linear or cosine schedule is 0.
    head_rate: that of a value head, where it has its own; see training.optimizer_groups.
    """
    classes: dict[str, type[Adam] | type[Muon]] = {"adam": Adam, "muon": Muon}
    optimizers = [
        classes[name](Schedule(rate, total_updates, schedule, warmup_updates), weight_decay)
        for name, rate in groups(kind, learning_rate, head_rate)
    ]
    if len(optimizers) == 1:
        return optimizers[0]
    return optim.MultiOptimizer(optimizers, [lambda name, array: belongs_to_first(name, array.ndim, kind)])


def update(
    module: nn.Module,
    optimizer: Optimizer,
    loss: mx.array,
    gradients: dict,
    max_grad_norm: float | None,
    planned: int | None = None,
    factor: float = 1.0,
) -> float:
    """Clip the gradients to `max_grad_norm` (None or 0: no limit) and take one optimizer step on `module`.

    planned: the number (from 0) of this update in the run's plan, which the schedule follows; None: all updates were
    made. factor: of the schedule's rate. Returns the gradients' norm before clipping. If the loss or the norm is not
    finite, nothing is touched, and the norm returned is NaN: the caller counts and reports it.
    """
    norm = read(loss, gradients)["grad_norm"]
    if not math.isnan(norm):
        take_step(module, optimizer, gradients, norm, max_grad_norm, planned, factor)
    return norm


def take_step(
    module: nn.Module,
    optimizer: Optimizer,
    gradients: dict,
    norm: float,
    max_grad_norm: float | None,
    planned: int | None = None,
    factor: float = 1.0,
) -> None:
    """`update` where the gradients' norm is known and finite."""
    if max_grad_norm and norm > max_grad_norm:
        gradients = scaled(gradients, max_grad_norm / (norm + 1e-6))
        mx.async_eval(gradients)  # while the optimizer takes its first arrays
    for part in optimizer.optimizers if isinstance(optimizer, optim.MultiOptimizer) else [optimizer]:
        if isinstance(part.schedule, Schedule):
            part.schedule.planned, part.schedule.factor = planned, factor
    optimizer.update(module, gradients)
    mx.async_eval(module.trainable_parameters(), optimizer.state)  # runs while the caller prepares its next pass


def scaled(gradients: dict, factor: float) -> dict:
    """All gradients times `factor`."""
    return tree_map(lambda gradient: factor * gradient, gradients)


def read(loss: mx.array, gradients: dict, stats: dict[str, mx.array] | None = None) -> dict[str, float]:
    """A mini batch's stats, scalars, as numbers, and "grad_norm": NaN if it or the loss is not finite.

    Everything is read at once, since each wait leaves a GPU without work.
    """
    stats = stats or {}
    mx.async_eval(loss, gradients, stats)
    norm = gradient_norm(gradients)
    by_numpy = isinstance(norm, float)
    checked = loss if by_numpy else mx.where(mx.isfinite(loss) & mx.isfinite(norm), norm, math.nan)
    *numbers, last = mx.stack([value.astype(mx.float32) for value in (*stats.values(), checked)]).tolist()
    if by_numpy:
        last = norm if math.isfinite(last) and math.isfinite(norm) else math.nan
    return {**dict(zip(stats, numbers, strict=True)), "grad_norm": last}


def gradient_norm(gradients: dict) -> float | mx.array:
    """The Euclidean norm of all gradients together: a number where NumPy computes it, else an array to be evaluated."""
    arrays = [gradient for _, gradient in tree_flatten(gradients)]
    if adam.serves(*arrays):
        return adam.norm(arrays)
    # Rows first: however a gradient lies in memory, the sum is the same.
    rows = [mx.square(mx.atleast_1d(array).astype(mx.float32)).sum(axis=-1) for array in arrays]
    return mx.sqrt(mx.sum(mx.stack([row.sum() for row in rows])))


def bytes_of_numpy(optimizer: optim.Optimizer) -> int:
    """What of the optimizer's state NumPy holds (models.cpu.adam), which mlx's counters of memory do not see."""
    return sum(array.nbytes for _, array in tree_flatten(optimizer.state) if not isinstance(array, mx.array))


def optimizer_arrays(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's state by name, to be saved as safetensors."""
    return {name: mx.array(array) for name, array in tree_flatten(optimizer.state)}


def restore_optimizer(optimizer: optim.Optimizer, module: nn.Module, arrays: dict[str, mx.array]) -> None:
    """Restore a state from `optimizer_arrays`; the steps that follow are bit for bit those that would have followed."""
    optimizer.init(module.trainable_parameters())
    expected = {name: array.shape for name, array in optimizer_arrays(optimizer).items()}
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise UserError("the checkpoint's optimizer state does not fit this model; resume with the run's own flags")
    optimizer.state = tree_unflatten(list(arrays.items()))


def compiling_pays() -> bool:
    """Whether mx.compile is worth its first call: on a GPU, and not a simulated one. On CPU it runs a C++ compiler, for
    little gain."""
    return mx.default_device() == mx.Device(mx.gpu)


def loss_and_gradients(module: nn.Module, loss_function: Callable) -> Callable:
    """`nn.value_and_grad`, compiled where that pays.

    loss_function takes the module and arrays; what it closes over becomes a constant, so whatever varies has to be an
    array.
    """

    def with_module(*arrays):
        return nn.value_and_grad(module, loss_function)(module, *arrays)

    if not compiling_pays():
        return with_module

    def without_traces(*arrays):
        weights = module.trainable_parameters()
        result = with_module(*arrays)
        module.update(weights)  # differentiating leaves its placeholders in the module while it is traced
        return result

    return mx.compile(without_traces, inputs=[module.state, mx.random.state], outputs=[mx.random.state])
