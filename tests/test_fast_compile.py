"""mx.compile on Linux CPU: it keeps traces, and asks for no compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import models.fast_blas
from models import fast_compile

import mlx.core as mx
import pytest

ROOT = Path(__file__).resolve().parent.parent
only_where_wanted = pytest.mark.skipif(not models.fast_blas.wanted(), reason="on a GPU mx.compile is as it was")


@only_where_wanted
def test_this_mlx_has_the_mode():
    assert fast_compile.KEEPS_TRACES and fast_compile.pays()


@only_where_wanted
@pytest.mark.skipif(not shutil.which("g++"), reason="nothing could be compiled")
@pytest.mark.parametrize(("module", "writes"), [("models.fast_blas", True), ("models.fast_compile", False)])
def test_it_writes_no_c_plus_plus(module, writes, tmp_path):
    """Without the mode mlx 0.32 keeps the source and the library of every function it has fused in a folder there."""
    code = (
        f"import {module}\n"
        "import mlx.core as mx\n"
        "compiled = mx.compile(lambda x, y: mx.exp(x) * 0.25 + mx.sin(x * y))\n"
        "print(compiled(mx.zeros(2), mx.zeros(2)).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "[0.25, 0.25]\n", done.stderr
    assert any(path.is_file() for path in tmp_path.rglob("*")) is writes


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
