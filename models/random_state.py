"""Keeping mlx's global random stream unchanged by code that draws from it."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the state of mlx's global random stream on leaving, whatever the block draws or seeds."""
    high, low = mx.random.state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed((high << 32) | low)
