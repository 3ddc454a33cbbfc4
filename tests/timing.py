"""How long a piece of work takes on a machine that is busy with other tests, too."""

import time
from collections.abc import Callable


def takes_under(seconds: float, work: Callable[..., object], *arguments, tries: int = 3) -> bool:
    """Whether `work(*arguments)` takes less than `seconds` of this thread's own time in the best of `tries`.

    One try may hold a pause that is none of its own (a collection of all a test session's garbage); what hangs is
    slow in each.
    """
    for _ in range(tries):
        started = time.thread_time()
        work(*arguments)
        if time.thread_time() - started < seconds:
            return True
    return False
