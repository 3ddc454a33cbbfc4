"""The update that SFT, reward modelling and PPO share: Adam, a schedule, clipping, and a guard against NaN."""

import itertools
import math
from collections.abc import Callable

import models.fast_blas  # noqa: F401  (before mlx)
from data.errors import UserError
from models import fast_compile

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.utils import build_schedule

SCHEDULES = ("constant", "linear", "cosine")
SMALL = 2**17  # weights


class Adam(optim.Adam):
    """mlx's Adam, or AdamW, with bias correction, in two thirds of its time on CPU; equal to it but for rounding.

    All that is equal for every weight is worked out once, and the moments lie in memory as the gradient does.
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
        if not _small(gradients):
            return super().apply_gradients(gradients, parameters)
        if not self._initialized:
            self.init(gradients)
        for name, scheduler in self._schedulers.items():
            self.state[name] = scheduler(self.step)
        self.state["step"] = step
        return self._apply_together(gradients, parameters)

    def _apply_together(self, gradients: dict, parameters: dict) -> dict:
        """One step on all arrays end to end: where they are small, the number of operations is what takes the time."""
        leaves: list[tuple[mx.array, mx.array, dict]] = []
        tree_map(lambda *leaf: leaves.append(leaf), gradients, parameters, self.state)
        whole, held, m, v = (
            mx.concatenate([array.reshape(-1) for array in arrays])
            for arrays in zip(*((g, p, state["m"], state["v"]) for g, p, state in leaves), strict=True)
        )
        state = {"m": m, "v": v}
        held = self.apply_single(whole, held, state)
        ends = list(itertools.accumulate(gradient.size for gradient, _, _ in leaves))[:-1]
        pieces = zip(leaves, *(mx.split(array, ends) for array in (held, state["m"], state["v"])), strict=True)
        new = []
        for (gradient, _, own), held, own_m, own_v in pieces:
            own["m"], own["v"] = own_m.reshape(gradient.shape), own_v.reshape(gradient.shape)
            new.append(held.reshape(gradient.shape))
        following = iter(new)
        return tree_map(lambda _: next(following), gradients)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """One array's step. √v + ε·c, with √v's correction c in the rate, saves a pass over √v · 1/c + ε."""
        if self._rate is None:
            self._rate = self.learning_rate * self._per_rate  # only now has the schedule been asked
        b1, b2 = self.betas
        m, v = (_laid_as(gradient, state[name]) for name in ("m", "v"))
        m = state["m"] = b1 * m + (1 - b1) * self.shrink * gradient
        v = state["v"] = b2 * v + (1 - b2) * self.shrink**2 * mx.square(gradient)
        if self.weight_decay:
            parameter = parameter * (1 - self.learning_rate * self.weight_decay).astype(parameter.dtype)
        rate, eps = self._rate.astype(gradient.dtype), self._eps.astype(gradient.dtype)
        return parameter - rate * m / (mx.sqrt(v) + eps)


def _small(gradients: dict) -> bool:
    """Whether the arrays are better taken together: on CPU, where all of them fit the cache."""
    arrays = [array for _, array in tree_flatten(gradients)]
    alike = all(array.dtype == mx.float32 for array in arrays)
    return alike and sum(array.size for array in arrays) <= SMALL and mx.default_device() != mx.Device(mx.gpu)


def _laid_as(gradient: mx.array, moment: mx.array) -> mx.array:
    """`moment`, by columns if the gradient is: on CPU mlx takes three times as long where the two differ.

    The gradient of a linear layer's weight is, as mlx makes it transposed. The weights stay as they are, so that a
    forward pass after a resume multiplies what it would have multiplied, bit for bit.
    """
    if moment.ndim != 2 or moment.dtype != mx.float32 or mx.default_device() == mx.Device(mx.gpu):
        return moment
    by_columns = memoryview(gradient).f_contiguous and not memoryview(moment).f_contiguous
    return mx.contiguous(moment.T).T if by_columns else moment


def make_optimizer(
    learning_rate: float,
    total_updates: int,
    schedule: str = "constant",
    warmup_updates: int = 0,
    weight_decay: float = 0.0,
) -> Adam:
    """Adam with PyTorch's bias correction, whose rate rises over the warm-up and then keeps, or falls to 0.

    total_updates: optimizer steps of the whole run, at which linear and cosine schedules end.
    """
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
    rate = build_schedule({"name": name, "arguments": values, "warmup": warmup_updates})
    return Adam(rate, weight_decay)


def update(module: nn.Module, optimizer: Adam, loss: mx.array, gradients: dict, max_grad_norm: float | None) -> float:
    """Clip the gradients to `max_grad_norm` (None or 0: no limit) and take one optimizer step on `module`.

    Returns the gradients' norm before clipping. If the loss or the norm is not finite, nothing is touched, and the
    norm returned is NaN: the caller counts and reports it.
    """
    norm = gradient_norm(gradients)
    mx.eval(loss, norm, gradients)
    norm_value = norm.item()
    if not (math.isfinite(loss.item()) and math.isfinite(norm_value)):
        return math.nan
    optimizer.shrink = min(1.0, max_grad_norm / (norm_value + 1e-6)) if max_grad_norm else 1.0
    optimizer.update(module, gradients)
    mx.async_eval(module.trainable_parameters(), optimizer.state)  # the caller goes on to its next pass meanwhile
    return norm_value


def gradient_norm(gradients: dict) -> mx.array:
    """The Euclidean norm of all gradients together, in float32."""
    squares = [mx.square(g.astype(mx.float32)) for _, g in tree_flatten(gradients)]
    # Rows first: by columns, as most gradients lie, that is twice as fast as all at once.
    return mx.sqrt(mx.sum(mx.stack([mx.sum(square.sum(axis=-1) if square.ndim > 1 else square) for square in squares])))


def optimizer_arrays(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's whole state by name, to be saved as safetensors."""
    return dict(tree_flatten(optimizer.state))


def restore_optimizer(optimizer: optim.Optimizer, module: nn.Module, arrays: dict[str, mx.array]) -> None:
    """Put back a state from `optimizer_arrays`; what follows is then bit for bit what would have followed."""
    optimizer.init(module.trainable_parameters())
    expected = {name: array.shape for name, array in optimizer_arrays(optimizer).items()}
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise UserError("the checkpoint's optimizer state does not fit this model; resume with the run's own flags")
    optimizer.state = tree_unflatten(list(arrays.items()))


def loss_and_gradients(module: nn.Module, loss_function: Callable) -> Callable:
    """`nn.value_and_grad`, compiled where it pays.

    loss_function takes the module and arrays; what it closes over is baked in, so what varies has to be an array.
    """

    def with_module(*arrays):
        return nn.value_and_grad(module, loss_function)(module, *arrays)

    if not fast_compile.pays():
        return with_module

    def without_traces(*arrays):
        weights = module.trainable_parameters()
        result = with_module(*arrays)
        module.update(weights)  # differentiating leaves its placeholders in the module while it is traced
        return result

    return mx.compile(without_traces, inputs=[module.state, mx.random.state], outputs=[mx.random.state])
