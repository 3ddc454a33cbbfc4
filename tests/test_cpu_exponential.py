"""The exponential for Linux CPU: mlx's values and gradients."""

import mlx.core as mx
import numpy as np
import pytest

from models.cpu import exponential


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(exponential, "_installed", True)


def test_values_and_gradient_are_the_exact_ones(installed):
    x = np.concatenate([np.linspace(-87, 20, 2001), [0.0, -1e4, -1e38]]).astype(np.float32)
    values, gradient = mx.vjp(exponential.exp, [mx.array(x)], [mx.ones(len(x))])
    for found in (values[0], gradient[0]):
        error = np.abs(np.array(found, dtype=np.float64) - np.exp(x.astype(np.float64)))
        assert (error <= 1e-7 * (1 + np.abs(x)) * np.exp(x.astype(np.float64)) + 1e-38).all()


def test_only_float32_is_replaced_and_only_where_it_is_installed(installed, monkeypatch):
    x = mx.random.normal((100,), key=mx.random.key(0))
    half = x.astype(mx.bfloat16)
    assert exponential.exp(half).dtype == mx.bfloat16 and mx.array_equal(exponential.exp(half), mx.exp(half))
    assert not mx.array_equal(exponential.exp(x), mx.exp(x))
    monkeypatch.setattr(exponential, "_installed", False)
    assert mx.array_equal(exponential.exp(x), mx.exp(x))
