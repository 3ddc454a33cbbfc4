"""Settings of this process for mlx on Linux CPU: the scheduling policy, the core it computes on, and glibc's handling
of freed memory."""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP_THRESHOLD, KEPT_BYTES = 2**25, 2**30


NAP = 1e-4  # seconds
_rank = os.environ.get("MLX_RANK")  # which training.mlx_ranks takes out, as it is no matter of scripts started here
_start: Callable[[], None] | None = None  # what makes mlx start its threads, where `on_one_core` shall have an effect
_mlx_threads: set[int] = set()  # those threads, once started


def threads() -> set[int]:
    """The ids of this process's threads."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def compute_after(start: Callable[[], None]) -> None:
    """Let `on_one_core` hold the threads that `start` starts, by which mlx computes, together with its caller."""
    global _start
    _start = start


def start_computing() -> None:
    """Start mlx's threads and note them, once. Before anything is computed, or they are not told from others.

    Not as soon as mlx is imported: a process that is forked off later has none of these threads, and its mlx would wait
    for them without an end.
    """
    global _start
    if _start:
        start, _start, others = _start, None, threads()
        start()
        _mlx_threads.update(threads() - others)


def compute_on_all_cores() -> None:
    """Let `on_one_core` do nothing from here on."""
    global _start
    _start = None
    _mlx_threads.clear()


def is_rank() -> bool:
    """Whether this process is one of a launch by mlx.launch."""
    return _rank is not None


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Within it, the thread that builds the graph and the one that computes share a core, where mlx's BLAS has one
    thread (`compute_after`, `start_computing`); elsewhere nothing is done.

    mlx hands each operation to the other thread, and on two cores most are done before the next is there: each side
    waits for the other and is woken, for longer than a small model's operation takes. A PPO step of a model of hidden
    size 64 took 239 to 268 ms on two cores and 140 to 150 on one.

    The core is the one on which the kernel wakes the caller from a nap, so that processes spread over the cores, and of
    a launch by mlx.launch the rank's. After it the caller may run anywhere again, so processes that it starts may, too.
    """
    if not _mlx_threads:
        yield
        return
    allowed = os.sched_getaffinity(0)
    if len(allowed) > 1:
        time.sleep(NAP)
    both = (0, *_mlx_threads)
    _hold(both, {_core(sorted(allowed))})
    try:
        yield
    finally:
        _hold(both, allowed)


def _core(allowed: list[int]) -> int:
    """The core to compute on, of those allowed."""
    if _rank:
        return allowed[int(_rank) % len(allowed)]
    return ctypes.CDLL(None).sched_getcpu()


def _hold(thread_ids: tuple[int, ...], cores: set[int]) -> None:
    for thread in thread_ids:
        with contextlib.suppress(OSError):  # the thread has ended, or a sandbox forbids it
            os.sched_setaffinity(thread, cores)


def use_batch_scheduling() -> None:
    """Run this process's threads, and those that it starts later, under the kernel's batch policy.

    mlx hands each operation to another thread. By default the kernel preempts the thread that hands over to run the one
    that receives, which takes a quarter of the time of a small model.
    """
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next array, as mlx's own allocator does on a GPU.

    By default it returns arrays above about 100 kB to the kernel, which then has to clear every page of the next one:
    a sixth of a PPO step of 128 completions of 80 tokens.
    """
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
