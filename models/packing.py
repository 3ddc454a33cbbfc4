"""Rows of a batch end to end, as one long row without pads, through the forward pass of mlx-lm's models.

    layout = Layout.of([5, 3, 9], width=24)
    with packed(model, layout):
        _, hidden = forward(model, tokens)  # tokens: (1, 24)

All that works on single tokens sees no pads. Attention gets every row by itself, padded: no row sees another. Rotary
embeddings are told each token's position in its row. That needs a family that calls mlx-lm's attention and a rotary
embedding, which is tried out on a few tokens (`packs`). Rows that begin alike can share their beginning (`Sharing`).
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


class Sharing(NamedTuple):
    """Tokens that several rows begin with: the first S of T. Each belongs to one of G beginnings."""

    rows: mx.array  # (G, B) 1 where a row has the beginning, else 0
    slots: mx.array  # (S,) index into G · L
    is_own: mx.array  # (B, L) whether there is a token that no row before has


class Layout(NamedTuple):
    """Where the tokens of B rows lie: end to end in T places, and side by side in (B, L)."""

    places: mx.array  # (B, L) index into T; 0 at pads
    is_row: mx.array  # (B, L) whether there is a token
    slots: mx.array  # (T,) index into B · L, of the first row that has the token; 0 past the last row
    is_token: mx.array  # (T,) whether there is a token
    sharing: Sharing | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, multiple: int = 8) -> "Layout":
        """The layout of rows of these lengths in `width` places. L is rounded up, so that few shapes occur."""
        counts = np.asarray(lengths)
        longest = -(-int(counts.max()) // multiple) * multiple
        within = np.arange(longest)
        is_row = within < counts[:, None]
        starts = np.cumsum(counts) - counts
        places = np.where(is_row, starts[:, None] + within, 0)
        slots = np.zeros(width, dtype=np.int32)
        slots[: counts.sum()] = np.flatnonzero(is_row)
        return cls(*map(mx.array, (places.astype(np.int32), is_row, slots, np.arange(width) < counts.sum())))

    def side_by_side(self, packed: mx.array) -> mx.array:
        """(1, heads, T, D) → (B, heads, L, D); at pads stands anything finite."""
        rows, length = self.places.shape

        @mx.custom_function
        def spread(x: mx.array) -> mx.array:
            return x[0][:, self.places.reshape(-1)].reshape(-1, rows, length, x.shape[-1]).swapaxes(0, 1)

        @spread.vjp
        def backward(primals, cotangent, output):
            return mx.where(self.is_token[:, None], self._summed(cotangent), 0)[None]

        return spread(packed)

    def _summed(self, rows: mx.array) -> mx.array:
        """(B, heads, L, D) → (heads, T, D), the sum over all rows that have a token."""
        heads, length = rows.shape[1:3]

        def at(arrays: mx.array, slots: mx.array) -> mx.array:
            return arrays.swapaxes(0, 1).reshape(heads, len(arrays) * length, -1)[:, slots]

        if self.sharing is None:
            return at(rows, self.slots)
        # A product with the one-hot rows: mlx's own gradient adds up the rows in varying order on a GPU.
        sums = self.sharing.rows.astype(rows.dtype) @ rows.reshape(len(rows), -1)
        shared = at(sums.reshape(-1, *rows.shape[1:]), self.sharing.slots)
        return mx.concatenate([shared, at(rows, self.slots[shared.shape[1] :])], axis=1)

    def end_to_end(self, rows: mx.array) -> mx.array:
        """(B, heads, L, D) → (1, heads, T, D), the opposite."""
        count, length = self.places.shape
        is_own = self.is_row if self.sharing is None else self.sharing.is_own

        @mx.custom_function
        def join(x: mx.array) -> mx.array:
            return x.swapaxes(0, 1).reshape(x.shape[1], count * length, -1)[:, self.slots][None]

        @join.vjp
        def backward(primals, cotangent, output):
            found = cotangent[0][:, self.places.reshape(-1)].reshape(-1, count, length, cotangent.shape[-1])
            return mx.where(is_own[:, None, :, None], found.swapaxes(0, 1), 0)

        return join(rows)


class _PackedRope:
    """Stands in for a rotary embedding: every token is turned as a text of its own, from its position in its row on."""

    def __init__(self, rope: nn.Module, layout: Layout):
        self.rope, self.layout = rope, layout

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rope, name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        positions = self.layout.slots % self.layout.places.shape[1]
        tokens = x[0].swapaxes(0, 1)[:, :, None]  # (T, heads, 1, D)
        return self.rope(tokens, *args, **{**kwargs, "offset": positions})[:, :, 0].swapaxes(0, 1)[None]


def _packed_attention(attention: Callable, layout: Layout) -> Callable:
    """mlx-lm's attention, row by row."""
    length = layout.places.shape[1]

    def by_row(queries: mx.array, keys: mx.array, values: mx.array, *args: Any, mask: Any = None, **kwargs: Any):
        if isinstance(mask, mx.array):
            mask = mask[..., :length, :length]  # causal, perhaps with a window: the same wherever a row begins
        rows = map(layout.side_by_side, (queries, keys, values))
        return layout.end_to_end(attention(*rows, *args, mask=mask, **kwargs))

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
    """mlx-lm's mask, made for L tokens: with a window, one for all T would have T² elements."""
    row = mx.zeros((1, layout.places.shape[1], 1))

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
