"""mx.compile on Linux CPU: it keeps traces, and asks for no compiler."""

import random
from pathlib import Path

import models.fast_blas
from models import fast_compile

import mlx.core as mx
import pytest

only_where_wanted = pytest.mark.skipif(not models.fast_blas.wanted(), reason="on a GPU mx.compile is as it was")


@only_where_wanted
def test_this_mlx_has_the_mode():
    assert fast_compile.KEEPS_TRACES and fast_compile.pays()


@only_where_wanted
def test_it_writes_no_c_plus_plus():
    """Without the mode mlx 0.32 keeps the source and the library of every function it has fused in a folder there."""
    kept = Path("/tmp/mlx")
    before = {path.name for path in kept.rglob("*")}
    new = random.random()  # a constant is part of the source, so this function was never compiled
    compiled = mx.compile(lambda x, y: mx.exp(x) * new + mx.sin(x * y))
    assert compiled(mx.zeros((2, 3)), mx.zeros((2, 3))).tolist() == [[pytest.approx(new)] * 3] * 2
    assert {path.name for path in kept.rglob("*")} == before


@only_where_wanted
def test_a_compiled_function_is_traced_once_for_each_shape():
    traced = []

    def double(x):
        traced.append(x.shape)
        return 2 * x

    compiled = mx.compile(double)
    for size in (2, 3, 2, 3):
        assert compiled(mx.ones(size)).tolist() == [2.0] * size
    assert traced == [(2,), (3,)]
