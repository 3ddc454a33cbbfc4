"""The core that mlx computes on, on Linux CPU."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from models.cpu import process

ROOT = Path(__file__).resolve().parent.parent
CORES = os.sched_getaffinity(0)


@pytest.fixture
def another(monkeypatch):
    """The id of a thread that waits, in the place of mlx's."""
    end, thread = threading.Event(), None
    thread = threading.Thread(target=end.wait)
    thread.start()
    monkeypatch.setattr(process, "_mlx_threads", {thread.native_id})
    yield thread.native_id
    end.set()
    thread.join()


def test_both_threads_share_a_core_within_and_may_run_anywhere_after(another):
    with process.on_one_core():
        assert len(os.sched_getaffinity(0)) == 1
        assert os.sched_getaffinity(another) == os.sched_getaffinity(0)
        with process.on_one_core():
            assert len(os.sched_getaffinity(0)) == 1
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == os.sched_getaffinity(another) == CORES


def test_after_an_error_they_may_run_anywhere(another):
    with pytest.raises(ZeroDivisionError), process.on_one_core():
        _ = 1 / 0
    assert os.sched_getaffinity(0) == os.sched_getaffinity(another) == CORES


def test_the_ranks_of_a_launch_have_cores_of_their_own(another, monkeypatch):
    cores: list[int] = []
    for rank in range(2 * len(CORES)):
        monkeypatch.setattr(process, "_rank", str(rank))
        with process.on_one_core():
            cores += os.sched_getaffinity(0)
    assert cores == 2 * sorted(CORES)


def test_a_thread_that_has_ended_is_no_error(monkeypatch):
    monkeypatch.setattr(process, "_mlx_threads", {2**22 + 1})  # beyond the largest id
    with process.on_one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == CORES


@pytest.mark.parametrize(("threads", "held"), [("1", 1), ("2", 0)])
def test_mlx_has_its_thread_held_where_the_blas_has_one(threads, held):
    """In a process of its own, as this one has its BLAS. Imports start no thread, so that forks can compute."""
    code = (
        "from models import cpu; cpu.enable()\n"
        "import mlx.core, ppo_training, synth.run\n"
        "from models.cpu import blas, process\n"
        "before = process.threads()\n"
        "process.start_computing(); process.start_computing()\n"
        "print(int(blas.has_one_thread()), len(before), len(process._mlx_threads))"
    )
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, "TUNER_SIMULATE_GPU": "0", **dict.fromkeys(names, threads)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    one_thread, threads_before, threads_held = map(int, done.stdout.split())
    if one_thread:
        assert (threads_before, threads_held, held) == (1, 1, 1)
    else:
        assert threads_held == 0
