"""The update that SFT, reward modelling and PPO share: Adam or Muon, a schedule, clipping, and a guard against NaN."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import build_schedule

from common.errors import UserError
from training.muon import muon_step
from training.optimizer_groups import belongs_to_first, groups

SCHEDULES = ("constant", "linear", "cosine")
BLOCK = 2**15  # weights: five arrays of them fit a core's cache


class Adam(optim.Adam):
    """mlx's Adam, or AdamW, with bias correction, in half of its time on CPU; equal to it but for rounding.

    All that is equal for every weight is worked out once. In float32 on CPU the moments are NumPy's, and a step takes
    the weights in blocks that stay in the cache, not the whole of them operation by operation.
    """

    def __init__(self, learning_rate: float | Callable, weight_decay: float = 0.0):
        super().__init__(learning_rate, bias_correction=True)
        self.weight_decay = weight_decay
        self.shrink = 1.0  # of the next step's gradients

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
        if _for_numpy(gradient, parameter):
            return self._apply_by_blocks(gradient, parameter, state)
        b1, b2 = self.betas
        m = state["m"] = b1 * state["m"] + (1 - b1) * self.shrink * gradient
        v = state["v"] = b2 * state["v"] + (1 - b2) * self.shrink**2 * mx.square(gradient)
        rate, eps = self._rate.astype(gradient.dtype), self._eps.astype(gradient.dtype)
        return parameter - rate * m / (mx.sqrt(v) + eps)

    def _apply_by_blocks(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """What `apply_single` does, bit for bit; the moments in `state` become NumPy's and change in place."""
        for name in ("m", "v"):
            if isinstance(state[name], mx.array):
                state[name] = np.array(state[name])
        new = np.empty(parameter.shape, np.float32)
        flat = [_flat(array) for array in (gradient, parameter, state["m"], state["v"], new)]
        assert self._rate is not None
        (b1, b2), rate, eps = self.betas, self._rate.item(), self._eps.item()
        for start in range(0, new.size, BLOCK):
            gradient, parameter, m, v, moved = (array[start : start + BLOCK] for array in flat)
            m *= b1
            m += (1 - b1) * self.shrink * gradient
            v *= b2
            v += (1 - b2) * self.shrink**2 * np.square(gradient)
            np.sqrt(v, out=moved)
            moved += eps
            np.divide(rate * m, moved, out=moved)
            np.subtract(parameter, moved, out=moved)
        return mx.array(new)


def _for_numpy(*arrays: mx.array) -> bool:
    """Whether NumPy can take arrays where they lie, and they are not on a GPU."""
    return mx.default_device() == mx.Device(mx.cpu) and all(array.dtype == mx.float32 for array in arrays)


def _flat(array: mx.array | np.ndarray) -> np.ndarray:
    """All elements in order of the last axis, without a copy where they lie so."""
    return np.asarray(array).reshape(-1)


class Muon(optim.Muon):
    """Muon by `muon_step`, with a decoupled decay of the weights.

    Each matrix moves along its momentum with all singular values made about 1, so a rate is a spectral norm: no
    direction is left behind because others have the larger gradients.
    """

    def __init__(self, learning_rate: float | Callable, weight_decay: float = 0.0):
        super().__init__(learning_rate, weight_decay=weight_decay)
        self.shrink = 1.0  # of the next step's gradients

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """One matrix's step."""
        step, state["v"] = muon_step(self.shrink * gradient, state["v"])
        rate = self.learning_rate.astype(parameter.dtype)
        return parameter * (1 - rate * self.weight_decay) - rate * step


class Groups(optim.MultiOptimizer):
    """Several optimizers of one model, each for its own weights; the last for what no other takes."""

    @property
    def shrink(self) -> float:
        """Of the next step's gradients."""
        return self.optimizers[0].shrink

    @shrink.setter
    def shrink(self, shrink: float) -> None:
        for optimizer in self.optimizers:
            optimizer.shrink = shrink


def make_optimizer(
    learning_rate: float,
    total_updates: int,
    schedule: str = "constant",
    warmup_updates: int = 0,
    weight_decay: float = 0.0,
    kind: str = "adam",
    head_rate: float | None = None,
) -> Adam | Muon | Groups:
    """Adam with PyTorch's bias correction, or Muon, whose rate rises over the warm-up and then keeps, or falls to 0.

    total_updates: optimizer steps of the whole run, at which linear and cosine schedules end. head_rate: that of a
    value head, where it has its own; see training.optimizer_groups.
    """
    classes: dict[str, type[Adam] | type[Muon]] = {"adam": Adam, "muon": Muon}
    optimizers = [
        classes[name](scheduled(rate, total_updates, schedule, warmup_updates), weight_decay)
        for name, rate in groups(kind, learning_rate, head_rate)
    ]
    if len(optimizers) == 1:
        return optimizers[0]
    return Groups(optimizers, [lambda name, array: belongs_to_first(name, array.ndim, kind)])


def scheduled(learning_rate: float, total_updates: int, schedule: str, warmup_updates: int) -> Callable:
    """The rate of each update, as `make_optimizer` has it."""
    if schedule not in SCHEDULES:
        raise UserError(f"--lr-schedule is {schedule!r}; use one of {', '.join(SCHEDULES)}")
    decay_updates = max(total_updates - warmup_updates, 1)
    arguments = {
        # mlx has no constant schedule; a linear one from a rate to itself is one.
        "constant": ("linear_schedule", [learning_rate, learning_rate, decay_updates]),
        "linear": ("linear_schedule", [learning_rate, 0.0, decay_updates]),
        "cosine": ("cosine_decay", [learning_rate, decay_updates]),
    }
    name, values = arguments[schedule]
    return build_schedule({"name": name, "arguments": values, "warmup": warmup_updates})


def update(
    module: nn.Module, optimizer: Adam | Muon | Groups, loss: mx.array, gradients: dict, max_grad_norm: float | None
) -> float:
    """Clip the gradients to `max_grad_norm` (None or 0: no limit) and take one optimizer step on `module`.

    Returns the gradients' norm before clipping. If the loss or the norm is not finite, nothing is touched, and the
    norm returned is NaN: the caller counts and reports it.
    """
    mx.async_eval(loss, gradients)
    norm = gradient_norm(gradients)
    if not (math.isfinite(loss.item()) and math.isfinite(norm)):
        return math.nan
    optimizer.shrink = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm else 1.0
    optimizer.update(module, gradients)
    mx.async_eval(module.trainable_parameters(), optimizer.state)  # the caller goes on to its next pass meanwhile
    return norm


def gradient_norm(gradients: dict) -> float:
    """The Euclidean norm of all gradients together."""
    arrays = [gradient for _, gradient in tree_flatten(gradients)]
    if _for_numpy(*arrays):
        with np.errstate(over="ignore", invalid="ignore"):
            return math.sqrt(sum(float(np.dot(flat, flat)) for flat in map(_flat, arrays)))
    # Rows first: however a gradient lies in memory, the sum is the same.
    rows = [mx.square(mx.atleast_1d(array).astype(mx.float32)).sum(axis=-1) for array in arrays]
    return mx.sqrt(mx.sum(mx.stack([row.sum() for row in rows]))).item()


def optimizer_arrays(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's whole state by name, to be saved as safetensors."""
    return {name: mx.array(array) for name, array in tree_flatten(optimizer.state)}


def restore_optimizer(optimizer: optim.Optimizer, module: nn.Module, arrays: dict[str, mx.array]) -> None:
    """Put back a state from `optimizer_arrays`; what follows is then bit for bit what would have followed."""
    optimizer.init(module.trainable_parameters())
    expected = {name: array.shape for name, array in optimizer_arrays(optimizer).items()}
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise UserError("the checkpoint's optimizer state does not fit this model; resume with the run's own flags")
    optimizer.state = tree_unflatten(list(arrays.items()))


def compiling_pays() -> bool:
    """Whether mx.compile is worth its first call: on a GPU. On CPU it runs a C++ compiler for little gain."""
    return mx.default_device() == mx.Device(mx.gpu)


def loss_and_gradients(module: nn.Module, loss_function: Callable) -> Callable:
    """`nn.value_and_grad`, compiled where it pays.

    loss_function takes the module and arrays; what it closes over is baked in, so what varies has to be an array.
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
