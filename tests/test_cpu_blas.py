"""What mlx on Linux CPU gets: a fast BLAS, threads in turns, memory that is kept, and parts of mlx-lm replaced."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import activations, base, llama

from models import cpu
from models.cpu import attention as fast_sdpa
from models.cpu import linear as fast_linear
from models.cpu import swiglu as fast_swiglu
from models.cpu import wanted
from models.cpu.blas import ADVICE
from tests.architectures import build

ROOT = Path(__file__).resolve().parent.parent


def python(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_script_says_which_library_is_taken():
    """`make test` installs torch, whose own library serves where there is no other."""
    done = python("models/cpu/blas.py")
    assert done.returncode == 0 and done.stderr == ""
    library = done.stdout.strip()
    if wanted():
        assert any(name in library for name in ("openblas", "mkl_rt", "torch_cpu")), library
    else:
        assert library == "none found"
    assert python("models/cpu/blas.py", "--needs-mkl").returncode in (0, 1)


@pytest.mark.skipif(not wanted(), reason="only the Linux CPU build of mlx needs one")
def test_without_any_library_one_line_says_what_to_do():
    code = (
        "from models import cpu\n"
        "cpu.blas._load = lambda name: False\n"
        "cpu.enable()\n"
        "print(cpu.BLAS)\n"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", ADVICE + "\n")


@pytest.mark.skipif(not wanted(), reason="only the Linux CPU build of mlx needs one")
def test_the_library_serves_the_whole_process():
    """mlx takes the first `cblas_sgemm` that it finds, so a global one has to be there before."""
    code = (
        "import ctypes\n"
        "def found():\n"
        "    return hasattr(ctypes.CDLL(None), 'cblas_sgemm') or hasattr(ctypes.CDLL(None), 'sgemm_')\n"
        "assert not found()\n"
        "import models.cpu\n"
        "models.cpu.enable()\n"
        "assert found()\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_tests_run_on_it_too():
    """test_imports.py walks the sources: each that is run and imports mlx calls cpu.enable() first."""
    assert cpu.BLAS is not None or not wanted()


@pytest.mark.skipif(not wanted(), reason="only the Linux CPU build of mlx is served")
def test_threads_of_a_process_and_of_its_children_run_in_turns():
    code = "import models.cpu, os; models.cpu.enable(); print(os.sched_getscheduler(0) == os.SCHED_BATCH)"
    assert python("-c", code).stdout == "True\n"
    assert os.sched_getscheduler(0) == os.SCHED_BATCH


@pytest.mark.skipif(not wanted() or platform.libc_ver()[0] != "glibc", reason="only glibc on Linux CPU is told to")
def test_freed_memory_serves_the_next_array():
    """By default the kernel would clear what is freed: some 50 000 pages here, each a fault."""
    code = (
        "import resource\n"
        "import models.cpu\n"
        "models.cpu.enable()\n"
        "import mlx.core as mx\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "ones = mx.ones(2**21)\n"
        "for count in range(25):\n"
        "    if count == 5: before = faults()\n"
        "    arrays = [mx.exp(ones + (count + i)) for i in range(8)]\n"
        "    mx.eval(arrays)\n"
        "    del arrays\n"
        "print(faults() - before)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5_000


@pytest.mark.parametrize(
    ("home", "ours", "theirs"),
    [
        (base, fast_sdpa.attention, fast_sdpa._original),
        (activations, fast_swiglu.swiglu, fast_swiglu._original),
    ],
)
def test_what_is_replaced_is_replaced_where_it_is_wanted_and_logits_stay(home, ours, theirs, monkeypatch):
    name = theirs.__name__
    assert getattr(home, name) is getattr(llama, name) is (ours if wanted() else theirs)
    model, tokens = build("llama-tied"), mx.array([[1, 2, 3, 4]])
    monkeypatch.setattr(llama, name, ours)
    logits = np.array(model(tokens))
    monkeypatch.setattr(llama, name, theirs)
    np.testing.assert_allclose(logits, np.array(model(tokens)), rtol=0, atol=1e-5)


def test_linear_layers_are_replaced_where_it_is_wanted():
    assert nn.Linear.__call__ is (fast_linear.linear if wanted() else fast_linear._original)
