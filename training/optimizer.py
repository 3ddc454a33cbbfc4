"""The update that SFT, reward modelling and PPO share: Adam, a schedule, clipping, and a guard against NaN."""

import math
from collections.abc import Callable

import models.fast_blas  # noqa: F401  (before mlx)
from data.errors import UserError

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.utils import build_schedule

SCHEDULES = ("constant", "linear", "cosine")


def make_optimizer(
    learning_rate: float,
    total_updates: int,
    schedule: str = "constant",
    warmup_updates: int = 0,
    weight_decay: float = 0.0,
) -> optim.Optimizer:
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
    if weight_decay:
        return optim.AdamW(rate, weight_decay=weight_decay, bias_correction=True)
    return optim.Adam(rate, bias_correction=True)


def update(
    module: nn.Module, optimizer: optim.Optimizer, loss: mx.array, gradients: dict, max_grad_norm: float | None
) -> float:
    """Clip the gradients to `max_grad_norm` (None or 0: no limit) and take one optimizer step on `module`.

    Returns the gradients' norm before clipping. If the loss or the norm is not finite, nothing is touched, and the
    norm returned is NaN: the caller counts and reports it.
    """
    norm = gradient_norm(gradients)
    mx.eval(loss, norm, gradients)
    norm_value = norm.item()
    if not (math.isfinite(loss.item()) and math.isfinite(norm_value)):
        return math.nan
    if max_grad_norm and norm_value > max_grad_norm:
        shrink = mx.array(max_grad_norm / (norm_value + 1e-6))
        gradients = tree_map(lambda gradient: gradient * shrink, gradients)
    optimizer.update(module, gradients)
    mx.eval(module.trainable_parameters(), optimizer.state)
    return norm_value


def gradient_norm(gradients: dict) -> mx.array:
    """The Euclidean norm of all gradients together, in float32."""
    squares = [mx.sum(mx.square(g.astype(mx.float32))) for _, g in tree_flatten(gradients)]
    return mx.sqrt(mx.sum(mx.stack(squares)))


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
    """`nn.value_and_grad`, compiled where it pays: on a GPU. On CPU compiling calls a C++ compiler for seconds.

    loss_function takes the module and arrays; what it closes over is baked in, so what varies has to be an array.
    """

    def with_module(*arrays):
        return nn.value_and_grad(module, loss_function)(module, *arrays)

    if mx.default_device() != mx.Device(mx.gpu):
        return with_module

    def without_traces(*arrays):
        weights = module.trainable_parameters()
        result = with_module(*arrays)
        module.update(weights)  # differentiating leaves its placeholders in the module while it is traced
        return result

    return mx.compile(without_traces, inputs=[module.state, mx.random.state], outputs=[mx.random.state])
