"""Logprobs, entropy and exact KL of tokens, with their gradients, where the logits (B, C, V) would not fit in memory.

    _, hidden = forward(model, tokens, positions)  # (B, C, H)
    stats = token_stats(model, hidden, completions, temperature, entropy=True)

The output layer is applied to a few rows of the hidden states at a time, so that only the logits of one piece exist at
once. All of it equals training.ppo's `logprobs_from_logits`, `entropy_from_logits` and `full_kl` on the whole logits.
models.torch_token_stats is the twin for PyTorch.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from models.cpu.exponential import exp
from models.output_layer import OutputLayer

LOGITS_BYTES = 256 * 10**6
# Arrays (n, V) in float32 that live at once. mlx makes room for results before it comes to compute them, ahead by about
# 100 operations on CPU, which are several pieces, and by 10 buffers of commands on a GPU.
ALIVE_ON_CPU, ALIVE_ON_GPU = 16, 13
FEW = 2**14  # logits so few that to make and keep them all takes less time than to make their gradients with them
LOWEST = -1e38  # for a logit of −inf, which times a probability of 0 would be NaN

Figures = dict[str, mx.array]  # by name, one for each of n positions: (n,)


class TokenStats(NamedTuple):
    """One figure for each target, in the shape of the targets; None where it was not asked for."""

    logprobs: mx.array  # nats
    correct: Any = None  # whether the target is the most likely token
    entropy: Any = None  # nats
    ref_logprobs: Any = None  # nats
    kl: Any = None  # nats, policy against reference, over the whole vocabulary


def token_stats(
    model: nn.Module,
    hidden: mx.array,
    targets: mx.array,
    temperature: float | mx.array = 1.0,
    *,
    correct: bool = False,
    entropy: bool = False,
    reference: tuple[nn.Module, mx.array] | None = None,
    training: bool = False,
    logits_bytes: int = LOGITS_BYTES,
) -> TokenStats:
    """The log probability of each target under the tempered policy, and what else is asked for, in float32.

    hidden: (..., H), as `forward` gives it; targets: (...) ids; temperature > 0. reference: a model over the same
    vocabulary and its hidden states at the same positions, for ref_logprobs and kl; no gradient flows into it.
    logits_bytes: of all arrays (n, V) together, which sets how many positions make a piece (at least one).

    Gradients reach `hidden` and whatever is trainable in the output layer, which the backward pass applies once more.
    training: the gradient will be taken, so make it along with the figures where nothing in the output layer is
    trainable: each row's is then a sum of rows, one for each figure, that the backward pass only has to scale.
    """
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    head, ref_head, ref_rows = OutputLayer(model), None, None
    if reference is not None:
        ref_model, ref_hidden = reference
        ref_head, ref_rows = OutputLayer(ref_model), mx.stop_gradient(ref_hidden.reshape(-1, ref_hidden.shape[-1]))
    vocabulary = head(rows[:1]).shape[-1]
    pieces = _pieces(len(ids), logits_bytes // _bytes_a_row(vocabulary))
    # Where the output layer draws, the backward pass would not get the same logits again, so they are all kept.
    whole = head.draws or (len(pieces) == 1 and len(ids) * vocabulary <= FEW)
    gradient_rows = training and not (head.weights or whole)
    job = _Job(head, ref_head, ref_rows, ids, 1 / temperature, correct, entropy, gradient_rows)
    figures = (_whole(job) if whole else _in_pieces(job, pieces))(rows, head.weights)
    named = dict(zip(job.names(), figures, strict=False))  # after them come the gradients
    return TokenStats(**{name: named[name].reshape(targets.shape) for name in TokenStats._fields if name in named})


def _bytes_a_row(vocabulary: int) -> int:
    """Of all arrays (n, V) that live at once, for each of the n rows."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return vocabulary * (ALIVE_ON_CPU if on_cpu else ALIVE_ON_GPU) * mx.float32.size


def _pieces(count: int, size: int) -> list[slice]:
    """Slices of about equal length, `size` at most and 1 at least, that make up `count` rows."""
    number = -(-count // max(size, 1))
    ends = [count * i // number for i in range(number + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


class _Job(NamedTuple):
    """What to compute at N positions."""

    head: OutputLayer
    ref_head: OutputLayer | None
    ref_rows: mx.array | None  # (N, H), the reference's hidden states
    ids: mx.array  # (N,)
    scale: float | mx.array  # 1 / temperature
    correct: bool
    entropy: bool
    gradient_rows: bool  # whether to make the gradients along with the figures

    def differentiable(self) -> list[str]:
        """Names of the figures that have a gradient."""
        return ["logprobs", *["entropy"] * self.entropy, *["kl"] * (self.ref_head is not None)]

    def names(self) -> list[str]:
        """Of the figures. A normalizer is the log of the sum of exp(scaled logits)."""
        ref = ["ref_logprobs", "ref_normalizer"] if self.ref_head is not None else []
        return [*self.differentiable(), "normalizer", *["correct"] * self.correct, *ref]

    def scaled(self, logits: mx.array) -> mx.array:
        """Logits in float32, over the temperature."""
        logits = logits.astype(mx.float32)
        return logits if isinstance(self.scale, float) and self.scale == 1 else logits * self.scale

    def ref_scaled(self, piece: slice, after: Sequence[mx.array]) -> mx.array | None:
        """The reference's scaled logits of a piece, to be computed after some arrays."""
        if self.ref_head is None or self.ref_rows is None:
            return None
        return self.scaled(self.ref_head(mx.depends(self.ref_rows[piece], after)))


class _Softmax:
    """The softmax of scaled logits (n, V), weights / total: what is not used of it costs nothing."""

    def __init__(self, scaled: mx.array, normalizer: mx.array | None = None, likely: mx.array | None = None):
        """normalizer: (n,), where it is known; likely: (n,) ids of the largest logits, where they are known."""
        shift = normalizer
        if shift is None:
            shift = scaled.max(axis=-1) if likely is None else _at(scaled, likely)
        self.log_weights = mx.maximum(scaled - shift[:, None], LOWEST)
        self.weights = exp(self.log_weights)
        self.total = self.weights.sum(axis=-1) if normalizer is None else mx.ones(shift.shape)
        self.log_total = mx.log(self.total)
        self.normalizer = shift + self.log_total

    def mean(self, values: mx.array) -> mx.array:
        """Of values (n, V), by these probabilities: (n,)."""
        return (self.weights * values).sum(axis=-1) / self.total


def _in_pieces(job: _Job, pieces: list[slice]) -> Callable[[mx.array, Figures], list[mx.array]]:
    """A function of hidden states (N, H) and the output layer's weights that gives the figures (N,) by `job.names()`.

    Each piece depends on the one before, or mlx would evaluate them side by side.
    """
    names, differentiable = job.names(), job.differentiable()

    @mx.custom_function
    def figures_of(rows: mx.array, weights: Figures) -> list[mx.array]:
        parts: list[list[mx.array]] = []
        for piece in pieces:
            after = parts[-1] if parts else [rows]
            parts.append(_of_piece(job, piece, mx.depends(rows[piece], after), job.ref_scaled(piece, after), weights))
        return [mx.concatenate(part) for part in zip(*parts, strict=True)]

    @figures_of.vjp
    def backward(primals, cotangents, outputs):
        rows, weights = primals
        slopes = dict(zip(differentiable, cotangents, strict=False))
        if job.gradient_rows:
            made = zip(slopes.values(), outputs[len(names) :], strict=True)
            return sum(slope[:, None] * gradient for slope, gradient in made).astype(rows.dtype), {}
        figures = dict(zip(names, outputs, strict=True))
        sums = {name: mx.zeros(weight.shape) for name, weight in weights.items()}
        parts: list[mx.array] = []
        after = list(cotangents)
        for piece in pieces:
            own = [{name: array[piece] for name, array in each.items()} for each in (figures, slopes)]
            states, ref_scaled = mx.depends(rows[piece], after), job.ref_scaled(piece, after)
            of_states, of_weights = _gradients(job, piece, states, ref_scaled, weights, *own)
            sums = {name: sums[name] + of_weights[name] for name in sums}
            parts.append(of_states)
            after = [of_states, *sums.values()]
        return mx.concatenate(parts), {name: sums[name].astype(weight.dtype) for name, weight in weights.items()}

    return figures_of


def _whole(job: _Job) -> Callable[[mx.array, Figures], list[mx.array]]:
    """`_in_pieces` of one piece, whose gradient is mlx's own."""
    every = slice(0, len(job.ids))
    return lambda rows, weights: _of_piece(job, every, rows, job.ref_scaled(every, [rows]), weights)


def _of_piece(
    job: _Job, piece: slice, states: mx.array, ref_scaled: mx.array | None, weights: Figures
) -> list[mx.array]:
    """The figures (n,) of a piece and, with `job.gradient_rows`, the gradient (n, H) of each by its states."""
    ids, logits = job.ids[piece], job.head(states, weights)
    scaled = job.scaled(logits)
    likely = mx.stop_gradient(mx.argmax(logits, axis=-1)) if job.correct else None
    softmax = _Softmax(scaled, likely=likely)
    figures = {"normalizer": softmax.normalizer}
    figures["logprobs"] = _at(scaled, ids) - figures["normalizer"]
    if likely is not None:
        figures["correct"] = likely == ids
    figures["entropy"] = softmax.log_total - softmax.mean(softmax.log_weights)
    ref_softmax = None
    if ref_scaled is not None:
        ref_softmax = _Softmax(ref_scaled)
        figures["ref_normalizer"] = ref_softmax.normalizer
        figures["ref_logprobs"] = _at(ref_scaled, ids) - ref_softmax.normalizer
        log_ratio = softmax.mean(softmax.log_weights - ref_softmax.log_weights)
        figures["kl"] = log_ratio - softmax.log_total + ref_softmax.log_total
    made = [figures[name] for name in job.names()]
    for name in job.differentiable() if job.gradient_rows else ():
        slope = _slope(job, ids, softmax, ref_softmax, figures, {name: mx.ones(ids.shape)})
        made += mx.vjp(job.head, [states], [slope.astype(logits.dtype)])[1]
    return made


def _gradients(
    job: _Job,
    piece: slice,
    states: mx.array,
    ref_scaled: mx.array | None,
    weights: Figures,
    figures: Figures,
    slopes: Figures,
) -> tuple[mx.array, Figures]:
    """Of a loss by a piece's states (n, H) and by the weights; slopes: of the loss by the figures."""
    logits = job.head(states, weights)
    softmax = _Softmax(job.scaled(logits), figures["normalizer"])
    ref_softmax = None if ref_scaled is None else _Softmax(ref_scaled, figures["ref_normalizer"])
    slope = _slope(job, job.ids[piece], softmax, ref_softmax, figures, slopes)

    def head(states: mx.array, *arrays: mx.array) -> mx.array:
        return job.head(states, dict(zip(weights, arrays, strict=True)))

    _, gradients = mx.vjp(head, [states, *weights.values()], [slope.astype(logits.dtype)])
    return gradients[0], dict(zip(weights, gradients[1:], strict=True))


def _slope(
    job: _Job, ids: mx.array, softmax: _Softmax, ref_softmax: _Softmax | None, figures: Figures, slopes: Figures
) -> mx.array:
    """The gradient of a loss by the logits (n, V), from its slopes by some of the figures.

    By scaled logits, where p are the probabilities and q those of the reference:

        logprobs · (one-hot − p) − entropy · p (log p + entropy) + kl · p (log p − log q − kl)
    """
    by = {name: (slope * job.scale)[:, None] for name, slope in slopes.items()}
    factor = -by["logprobs"] if "logprobs" in by else mx.array(0.0)
    if "entropy" in by:
        factor = factor - by["entropy"] * (softmax.log_weights + (figures["entropy"] - softmax.log_total)[:, None])
    if "kl" in by and ref_softmax is not None:
        constant = ref_softmax.log_total - softmax.log_total - figures["kl"]
        log_ratio = softmax.log_weights - ref_softmax.log_weights + constant[:, None]
        factor = factor + by["kl"] * log_ratio
    slope = softmax.weights * (factor / softmax.total[:, None])
    if "logprobs" not in by:
        return slope
    # One number a row is put in its place; a one-hot array would be another (n, V).
    chosen = ids[:, None]
    at_chosen = mx.take_along_axis(slope, chosen, axis=-1) + by["logprobs"]
    return mx.put_along_axis(slope, chosen, at_chosen, axis=-1)


def _at(scaled: mx.array, ids: mx.array) -> mx.array:
    """scaled (n, V) at one id a row: (n,)."""
    return mx.take_along_axis(scaled, ids[:, None], axis=-1)[:, 0]
