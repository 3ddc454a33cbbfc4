"""Logprobs, entropy and exact KL of tokens, with their gradients, where the logits (B, C, V) would not fit in memory.

    _, hidden = forward(model, tokens, positions)  # (B, C, H)
    stats = token_stats(model, hidden, completions, temperature, entropy=True)

The output layer is applied to a few rows of the hidden states at a time, and once more in the backward pass, so that
only the logits of one piece exist at once. All of it equals training.ppo's `logprobs_from_logits`,
`entropy_from_logits` and `full_kl` on the whole logits. models.torch_token_stats is the twin for PyTorch.
"""

from collections.abc import Callable
from typing import NamedTuple

import models.fast_blas  # noqa: F401  (before mlx)
from models.output_layer import OutputLayer

import mlx.core as mx
import mlx.nn as nn

LOGITS_BYTES = 256 * 10**6
LOWEST = -1e38  # for a logit of −inf, which times a probability of 0 would be NaN


class TokenStats(NamedTuple):
    """One figure for each target, in the shape of the targets; None where it was not asked for."""

    logprobs: mx.array  # nats
    correct: mx.array | None = None  # whether the target is the most likely token
    entropy: mx.array | None = None  # nats
    ref_logprobs: mx.array | None = None  # nats
    kl: mx.array | None = None  # nats, policy against reference, over the whole vocabulary


Figures = dict[str, mx.array]  # by name, (n,): fields of TokenStats, and the normalizers that the gradient takes


class _Wanted(NamedTuple):
    correct: bool
    entropy: bool
    kl: bool

    def names(self) -> list[str]:
        """Of the figures."""
        kl = ["ref_logprobs", "ref_normalizer", "kl"] * self.kl
        return ["logprobs", "normalizer"] + ["correct"] * self.correct + ["entropy"] * self.entropy + kl


def token_stats(
    model: nn.Module,
    hidden: mx.array,
    targets: mx.array,
    temperature: float | mx.array = 1.0,
    *,
    correct: bool = False,
    entropy: bool = False,
    reference: tuple[nn.Module, mx.array] | None = None,
    logits_bytes: int = LOGITS_BYTES,
) -> TokenStats:
    """The log probability of each target under the tempered policy, and what else is asked for, in float32.

    hidden: (..., H), as `forward` gives it; targets: (...) ids; temperature > 0. reference: a model over the same
    vocabulary and its hidden states at the same positions, for ref_logprobs and kl; no gradient flows into it.
    logits_bytes: of all arrays (n, V) together, which sets how many positions make a piece (at least one).
    Gradients reach `hidden` and whatever is trainable in the output layer.
    """
    head = OutputLayer(model)
    wanted = _Wanted(correct, entropy, reference is not None)
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    ref_head, ref_rows = None, None
    if reference is not None:
        ref_head = OutputLayer(reference[0])
        ref_rows = mx.stop_gradient(reference[1].reshape(-1, reference[1].shape[-1]))
    logits = head(rows[:1])  # for its shape and type alone
    pieces = _pieces(len(ids), logits_bytes // _bytes_a_row(logits, wanted))
    function = _in_pieces(head, ref_head, ref_rows, ids, 1 / temperature, wanted, pieces)
    figures = dict(zip(wanted.names(), function(rows, head.weights), strict=True))
    return TokenStats(**{name: figures[name].reshape(targets.shape) for name in TokenStats._fields if name in figures})


def _bytes_a_row(logits: mx.array, wanted: _Wanted) -> int:
    """Bytes of all arrays (n, V) that live at once, for each of the n rows."""
    return logits.shape[-1] * (3 * 4)


def _pieces(count: int, size: int) -> list[slice]:
    """Slices of about equal length, `size` at most and 1 at least, that make up `count` rows."""
    number = -(-count // max(size, 1))
    ends = [count * i // number for i in range(number + 1)]
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def _in_pieces(
    head: OutputLayer,
    ref_head: OutputLayer | None,
    ref_rows: mx.array | None,
    ids: mx.array,
    scale: float | mx.array,
    wanted: _Wanted,
    pieces: list[slice],
) -> Callable[[mx.array, Figures], list[mx.array]]:
    """A function of the hidden states (N, H) and the output layer's weights that gives the figures (N,) in order.

    Each piece depends on the one before, or mlx would evaluate them side by side.
    """
    def ref_logits(piece: slice, after: list[mx.array]) -> mx.array | None:
        if ref_head is None:
            return None
        return ref_head(mx.depends(ref_rows[piece], after))

    @mx.custom_function
    def function(rows: mx.array, weights: Figures) -> list[mx.array]:
        parts: list[list[mx.array]] = []
        for piece in pieces:
            after = parts[-1] if parts else [rows]
            logits = head(mx.depends(rows[piece], after), weights)
            figures = _figures(logits, ref_logits(piece, after), ids[piece], scale, wanted)
            parts.append([figures[name] for name in wanted.names()])
        return [mx.concatenate(part) for part in zip(*parts, strict=True)]

    @function.vjp
    def gradients(primals, cotangents, outputs):
        rows, weights = primals
        figures, slopes = (dict(zip(wanted.names(), arrays, strict=True)) for arrays in (outputs, cotangents))
        sums = {name: mx.zeros(weight.shape) for name, weight in weights.items()}
        parts = []
        after = list(cotangents)
        for piece in pieces:
            of_piece = [{name: array[piece] for name, array in each.items()} for each in (figures, slopes)]
            backward = _backward(ref_logits(piece, after), ids[piece], scale, wanted, *of_piece)

            def states_to_logits(states, *arrays):
                return backward(head(states, dict(zip(weights, arrays, strict=True))))

            states = mx.depends(rows[piece], after)
            zeros = mx.zeros((piece.stop - piece.start, 1))
            _, (of_states, *of_weights) = mx.vjp(states_to_logits, [states, *weights.values()], [zeros])
            sums = {name: sums[name] + of_weight for name, of_weight in zip(sums, of_weights, strict=True)}
            parts.append(of_states)
            after = [of_states, *sums.values()]
        return mx.concatenate(parts), {name: sums[name].astype(weight.dtype) for name, weight in weights.items()}

    return function


def _figures(
    logits: mx.array, ref_logits: mx.array | None, ids: mx.array, scale: float | mx.array, wanted: _Wanted
) -> Figures:
    """Of one piece. logits: (n, V), of any type; ids: (n,)."""
    scaled = _scaled(logits, scale)
    figures: Figures = {}
    if wanted.correct:
        figures["correct"] = mx.argmax(logits, axis=-1) == ids
    if wanted.entropy or ref_logits is not None:
        shifted, exps, total, figures["normalizer"] = _exponentials(scaled)
        if wanted.entropy:
            figures["entropy"] = mx.log(total) - (exps * shifted).sum(axis=-1) / total
    else:
        figures["normalizer"] = mx.logsumexp(scaled, axis=-1)
    if ref_logits is not None:
        ref_scaled = _scaled(ref_logits, scale)
        ref_shifted, _, ref_total, figures["ref_normalizer"] = _exponentials(ref_scaled)
        figures["ref_logprobs"] = _chosen(ref_scaled, ids) - figures["ref_normalizer"]
        figures["kl"] = (exps * (shifted - ref_shifted)).sum(axis=-1) / total + mx.log(ref_total) - mx.log(total)
    figures["logprobs"] = _chosen(scaled, ids) - figures["normalizer"]
    return figures


def _scaled(logits: mx.array, scale: float | mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits if isinstance(scale, float) and scale == 1 else logits * scale


def _chosen(scaled: mx.array, ids: mx.array) -> mx.array:
    return mx.take_along_axis(scaled, ids[:, None], axis=-1)[:, 0]


def _exponentials(scaled: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Logits less their maximum, exp of that, its sum, and the log of the sum of exp(scaled)."""
    top = scaled.max(axis=-1, keepdims=True)
    shifted = mx.maximum(scaled - top, LOWEST)
    exps = mx.exp(shifted)
    total = exps.sum(axis=-1)
    return shifted, exps, total, top[:, 0] + mx.log(total)


def _backward(ref_logits, ids, scale, wanted, figures, slopes):
    """A function that takes the logits (n, V) of a piece through to nothing: it is there for its gradient.

    slopes: the gradient of the loss by each of the figures. With p the probabilities, that by a scaled logit is

        logprobs · (one-hot − p) − entropy · p (log p + entropy) + kl · p (log p − log p_ref − kl)
    """

    @mx.custom_function
    def function(logits):
        return logits[:, :1]

    @function.vjp
    def gradient(logits, _, __):
        log_probs = _scaled(logits, scale) - figures["normalizer"][:, None]
        weight = -slopes["logprobs"][:, None]
        if wanted.entropy or wanted.kl:
            log_probs = mx.maximum(log_probs, LOWEST)
        if wanted.entropy:
            weight = weight - slopes["entropy"][:, None] * (log_probs + figures["entropy"][:, None])
        if wanted.kl:
            ref_log_probs = mx.maximum(_scaled(ref_logits, scale) - figures["ref_normalizer"][:, None], LOWEST)
            weight = weight + slopes["kl"][:, None] * (log_probs - ref_log_probs - figures["kl"][:, None])
        slope = mx.exp(log_probs) * weight
        target = ids[:, None]
        at_target = mx.take_along_axis(slope, target, axis=-1) + slopes["logprobs"][:, None]
        return (mx.put_along_axis(slope, target, at_target, axis=-1) * scale).astype(logits.dtype)

    return function
