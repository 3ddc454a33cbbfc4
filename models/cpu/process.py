"""How the kernel schedules this process, and what glibc does with freed memory: settings that suit mlx on Linux CPU."""

import contextlib
import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP_THRESHOLD, KEPT_BYTES = 2**25, 2**30


def use_batch_scheduling() -> None:
    """Run this process's threads, and those it starts from now on, under the kernel's batch policy.

    mlx hands each operation to a thread of its own. By default the kernel stops the one that hands over to run the
    one that takes, and back, which for a small model is a quarter of all the time.
    """
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next array, as mlx does itself on a GPU.

    By default it gives arrays of some 100 kB and more back to the kernel, which then clears every page of the next
    one: a sixth of a PPO step of 128 completions of 80 tokens.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
