"""Sampling by a random key for each row, so that a completion depends on its own key alone.

Neither the rows beside it, nor the size of the batch, nor the process that draws it changes it.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from models.cpu.exponential import exp


def row_keys(count: int) -> np.ndarray:
    """The keys (count, 2) uint32 of so many rows, drawn from mlx's global stream, as mx.random.seed has set it."""
    (high, low), *keys = mx.random.split(mx.random.state[0], count + 1).tolist()
    mx.random.seed((high << 32) | low)
    return np.array(keys, dtype=np.uint32).reshape(count, 2)


def next_keys(keys: np.ndarray, tokens: int | np.ndarray = 1) -> np.ndarray:
    """The keys (B, 2) of the token that is so many, of each row if (B,), after those of `keys`: the second half is
    counted up, and wraps."""
    following = keys.copy()
    following[:, 1] += np.asarray(tokens, dtype=np.uint32)
    return following


def draw(logits: mx.array, keys: np.ndarray, temperature: float) -> mx.array:
    """One token a row from softmax(logits / temperature), by the inverse of its cumulative probabilities.

    At temperature 0 the most likely one. logits: (B, V), or logprobs; keys: (B, 2). These are the tokens that
    mx.random.categorical (mlx 0.32) draws for each row alone by the row's own key.
    """
    if temperature == 0:
        return mx.argmax(logits, axis=-1)
    logits = logits if temperature == 1 else logits / temperature
    logits = logits.astype(mx.float32)
    sums = mx.cumsum(exp(logits - logits.max(axis=-1, keepdims=True)), axis=-1)
    shares = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(mx.array(keys))
    return mx.minimum((sums <= shares * sums[:, -1:]).sum(axis=-1), sums.shape[-1] - 1)


class Keys:
    """The random keys of a batch's rows. mlx-lm takes it for a cache, and so moves and drops keys as it does rows."""

    state = ()
    nbytes = 0

    def __init__(self, keys: np.ndarray):
        """keys: (B, 2) uint32."""
        self.keys = keys

    def merge(self, caches: Sequence["Keys"]) -> "Keys":
        """One for the rows of all `caches`."""
        return Keys(np.concatenate([cache.keys for cache in caches]))

    def extend(self, other: "Keys") -> None:
        """Append the rows of another."""
        self.keys = np.concatenate([self.keys, other.keys])

    def filter(self, rows: Sequence[int]) -> None:
        """Keep these rows alone."""
        self.keys = self.keys[list(rows)]

    def extract(self, row: int) -> "Keys":
        """One row."""
        return Keys(self.keys[row : row + 1])

    def prepare(self, **lengths: Any) -> None:
        """Prompts of these lengths are to be read, which takes no key."""

    def finalize(self) -> None:
        """They have been read."""

    def next(self) -> np.ndarray:
        """The keys (B, 2) of the rows' next tokens."""
        self.keys = next_keys(self.keys)
        return self.keys


class KeyedModel:
    """A model as BatchGenerator calls it, whose last cache is `Keys`; `draw` is the sampler of the logits it gave last.

    All rows are drawn together: a sampler for each, which BatchGenerator allows as well, takes some ten operations a
    row.
    """

    def __init__(self, model: nn.Module, temperature: float):
        self.model, self.temperature = model, temperature
        self.rows = Keys(np.empty((0, 2), dtype=np.uint32))

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits (B, L, V) of tokens (B, L)."""
        self.rows = cache[-1]
        return self.model(tokens, cache=cache[:-1])

    def draw(self, logprobs: mx.array) -> mx.array:
        """One token a row of logprobs (B, V)."""
        return draw(logprobs, self.rows.next(), self.temperature)
