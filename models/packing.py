"""Rows of a batch end to end, as one long row without pads, through the forward pass of mlx-lm's models.

    layout = Layout.of([5, 3, 9], width=24)
    with packed(model, layout):
        _, hidden = forward(model, tokens)  # tokens: (1, 24)

All that works on single tokens sees no pads. Attention gets every row by itself, padded: no row sees another. Rotary
embeddings are told each token's position in its row. That needs a family that calls mlx-lm's attention and a rotary
embedding, which is tried out on a few tokens (`packs`). Rows can go on from others, which are computed once: replies
from their prompt, prompts from what all of them begin with (`Level`).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from common.errors import UserError
from models.value_head import forward, standing_in

TOLERANCE = 1e-4  # of the largest hidden state, between rows packed and padded


class Beginning(NamedTuple):
    """What the rows of a level go on from: the S tokens of the levels before it, which make up G beginnings."""

    seen: mx.array  # (R, K) index into the S + N tokens so far of all that a row has; 0 at pads
    places: mx.array  # (R, Q) place in its row of each token of the level
    slots: mx.array  # (N,) index into R · K of the level's tokens
    rows: mx.array  # (G, R) 1 where a row goes on from a beginning, else 0
    shared: mx.array  # (S,) index into G · K of the tokens before
    is_token: mx.array  # (S,) whether there is one


class Level(NamedTuple):
    """N tokens, each of one of R rows: end to end, and beside each other in (R, Q)."""

    own: mx.array  # (R, Q) index into N; 0 at pads
    is_own: mx.array  # (R, Q) whether there is a token
    slots: mx.array  # (N,) index into R · Q; 0 at pads
    is_token: mx.array  # (N,) whether there is a token
    before: Beginning | None = None

    @classmethod
    def of(cls, lengths: np.ndarray, width: int, count: int, before: Beginning | None = None) -> "Level":
        """Rows of these lengths, in (R, `width`) places and in `count`."""
        within, starts = np.arange(width), np.cumsum(lengths) - lengths
        is_own = within < lengths[:, None]
        slots = np.zeros(count, dtype=np.int32)
        slots[: lengths.sum()] = np.flatnonzero(is_own)
        own = np.where(is_own, starts[:, None] + within, 0).astype(np.int32)
        is_token = np.arange(count) < lengths.sum()
        return cls(mx.array(own), mx.array(is_own), mx.array(slots), mx.array(is_token), before)

    @property
    def length(self) -> int:
        """Places of a whole row."""
        return self.own.shape[1] if self.before is None else self.before.seen.shape[1]

    @property
    def positions(self) -> mx.array:
        """(N,) place in its row of each token."""
        return (self.slots if self.before is None else self.before.slots) % self.length

    def side_by_side(self, packed: mx.array) -> mx.array:
        """(1, heads, N, D) → (R, heads, Q, D); at pads stands anything finite."""

        @mx.custom_function
        def spread(x: mx.array) -> mx.array:
            return _spread(x, self.own)

        @spread.vjp
        def backward(primals, cotangent, output):
            return mx.where(self.is_token[:, None], _at(cotangent, self.slots), 0)[None]

        return spread(packed)

    def end_to_end(self, rows: mx.array) -> mx.array:
        """(R, heads, Q, D) → (1, heads, N, D), the opposite."""

        @mx.custom_function
        def join(x: mx.array) -> mx.array:
            return _at(x, self.slots)[None]

        @join.vjp
        def backward(primals, cotangent, output):
            return mx.where(self.is_own[:, None, :, None], _spread(cotangent, self.own), 0)

        return join(rows)

    def whole(self, packed: mx.array) -> mx.array:
        """(1, heads, S + N, D) → (R, heads, K, D), the rows with what they go on from."""
        before = self.before
        if before is None:
            return self.side_by_side(packed)

        @mx.custom_function
        def spread(x: mx.array) -> mx.array:
            return _spread(x, before.seen)

        @spread.vjp
        def backward(primals, cotangent, output):
            # A product with the one-hot rows: mlx's own gradient adds up the rows in varying order on a GPU.
            sums = before.rows.astype(cotangent.dtype) @ cotangent.reshape(len(cotangent), -1)
            shared = _at(sums.reshape(-1, *cotangent.shape[1:]), before.shared)
            found = mx.concatenate([shared, _at(cotangent, before.slots)], axis=1)
            return mx.where(mx.concatenate([before.is_token, self.is_token])[:, None], found, 0)[None]

        return spread(packed)

    def mask(self, given: Any) -> Any:
        """The mask of the level's tokens, of the one that the model made for a row: causal, perhaps with a window."""
        length, before = self.length, self.before
        if before is None:
            return given[..., :length, :length] if isinstance(given, mx.array) else given
        if isinstance(given, mx.array):
            return given.reshape(given.shape[-2:])[before.places][:, None, :, :length]
        return (mx.arange(length) <= before.places[..., None])[:, None]


class Layout(NamedTuple):
    """Where the T tokens of a pass lie: the levels' end to end, one level after the other.

    Every token asks once, in a row of its level; it sees that row, and what the row goes on from.
    """

    levels: tuple[Level, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, multiple: int = 8) -> "Layout":
        """The layout of rows of these lengths in `width` places. Their own are rounded up, so that few shapes occur."""
        counts = np.asarray(lengths)
        return cls((Level.of(counts, -(-int(counts.max()) // multiple) * multiple, width),))

    @property
    def length(self) -> int:
        """Places of the longest row."""
        return max(level.length for level in self.levels)


def _spread(packed: mx.array, index: mx.array) -> mx.array:
    """(1, heads, T, D) at index (R, L) → (R, heads, L, D)."""
    return packed[0][:, index.reshape(-1)].reshape(-1, *index.shape, packed.shape[-1]).swapaxes(0, 1)


def _at(rows: mx.array, slots: mx.array) -> mx.array:
    """(R, heads, L, D) at slots (T,) of R · L → (heads, T, D)."""
    heads, width = rows.shape[1], rows.shape[-1]
    return rows.swapaxes(0, 1).reshape(heads, -1, width)[:, slots]


class _PackedRope:
    """Stands in for a rotary embedding: every token is turned as a text of its own, from its position in its row on."""

    def __init__(self, rope: nn.Module, layout: Layout):
        self.rope, self.layout = rope, layout

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rope, name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        positions = mx.concatenate([level.positions for level in self.layout.levels])
        tokens = x[0].swapaxes(0, 1)[:, :, None]  # (T, heads, 1, D)
        return self.rope(tokens, *args, **{**kwargs, "offset": positions})[:, :, 0].swapaxes(0, 1)[None]


def _packed_attention(attention: Callable, layout: Layout) -> Callable:
    """mlx-lm's attention, row by row."""

    def by_row(queries: mx.array, keys: mx.array, values: mx.array, *args: Any, mask: Any = None, **kwargs: Any):
        found, start = [], 0
        for level in layout.levels:
            end = start + len(level.slots)
            first = 0 if level.before else start
            asked = level.side_by_side(queries[:, :, start:end])
            known, given = level.whole(keys[:, :, first:end]), level.whole(values[:, :, first:end])
            found.append(level.end_to_end(attention(asked, known, given, *args, mask=level.mask(mask), **kwargs)))
            start = end
        return mx.concatenate(found, axis=2)

    return by_row


@contextmanager
def packed(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Within it, calls of `model` take (1, T) tokens that lie as `layout` says."""
    with ExitStack() as stack:
        for parent, key, rope in _ropes(model):
            stack.enter_context(standing_in(parent, key, _PackedRope(rope, layout)))
        for module in _families(model):
            stack.enter_context(_attention_of(module, layout))
        yield


@contextmanager
def _attention_of(module: ModuleType, layout: Layout) -> Iterator[None]:
    stand_ins = {"scaled_dot_product_attention": _packed_attention, "create_attention_mask": _mask_of_a_row}
    plain = {name: getattr(module, name) for name in stand_ins if hasattr(module, name)}
    for name, function in plain.items():
        setattr(module, name, stand_ins[name](function, layout))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(module, name, function)


def _mask_of_a_row(create_mask: Callable, layout: Layout) -> Callable:
    """mlx-lm's mask, made for a row: with a window, one for all T tokens would have T² elements."""
    row = mx.zeros((1, layout.length, 1))

    def create(hidden: mx.array, *args: Any, **kwargs: Any) -> Any:
        return create_mask(row, *args, **kwargs)

    return create


def _ropes(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [
        (module, key, child)
        for module in model.modules()
        for key, child in module.items()
        if isinstance(child, nn.Module) and "rope" in type(child).__name__.lower()
    ]


def _families(model: nn.Module) -> list[ModuleType]:
    """The modules of mlx-lm that the model's classes are from and that call its attention."""
    names = {type(module).__module__ for module in model.modules()}
    return [sys.modules[name] for name in names if hasattr(sys.modules[name], "scaled_dot_product_attention")]


def packs(model: nn.Module) -> bool:
    """Whether a model's rows can be packed, by three rows both ways."""
    lengths, width = [5, 2, 7], 16
    tokens = np.arange(1, width + 1, dtype=np.int32)[None] % 7
    was_training = model.training
    model.eval()
    starts = (np.cumsum(lengths) - lengths).tolist()
    alone = [
        forward(model, mx.array(tokens[:, start : start + length]))[1][0]
        for start, length in zip(starts, lengths, strict=True)
    ]
    try:
        with packed(model, Layout.of(lengths, width)):
            _, found = forward(model, mx.array(tokens))
        apart = mx.abs(found[0, : sum(lengths)] - mx.concatenate(alone)).max()
        same = bool((apart <= TOLERANCE * mx.abs(mx.concatenate(alone)).max()).item())
    except (AttributeError, IndexError, TypeError, ValueError):  # attention that is called in another way
        same = False
    model.train(was_training)
    return same


def check_packing(model: nn.Module) -> None:
    """Raise UserError for a model whose rows cannot be packed."""
    if not packs(model):
        raise UserError(
            f"--pack does not serve {type(model).__module__}: a row would see its neighbours (layers that are not "
            "mlx-lm's attention), or positions would not begin anew in each; leave it out"
        )
