"""A process that may open few files: mlx-lm asks for more as it is imported, and cannot go on without.

Called before mlx_lm is imported, wherever that is.
"""

import resource
import sys

WANTED = 4096  # the hard limit that mlx-lm sets (mlx_lm/utils.py)


def accept_few_files() -> None:
    """Let mlx-lm be imported where the hard limit on open files is below what it asks for, with a line on stderr."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= WANTED:
        return
    ask = resource.setrlimit

    def accepting(kind: int, limits: tuple[int, int]) -> None:
        try:
            ask(kind, limits)
        except ValueError:
            if kind != resource.RLIMIT_NOFILE:
                raise
            print(
                f"this process may open {hard} files at most, and mlx-lm asks for {limits[1]}; where they run out, "
                "raise the hard limit (ulimit -Hn)",
                file=sys.stderr,
            )

    resource.setrlimit = accepting
