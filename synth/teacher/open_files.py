"""As many open files as a teacher's connections need: macOS allows a process 256 until it asks for more."""

import resource

from common.errors import UserError

OTHERS = 128  # files of the process besides its connections


def allow_connections(count: int) -> None:
    """Raise the soft limit of open files, if that many connections would reach it. Raises UserError if it can't be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + OTHERS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError):
        raise UserError(
            f"--concurrency {count} needs {needed} open files, and the system allows this process {soft}; "
            f"try --concurrency {max(soft - OTHERS, 1)}, or raise the limit (ulimit -n)"
        ) from None
