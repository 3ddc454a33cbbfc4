"""What every other folder uses: errors, atomic files, the flag parser, running a script. Imports nothing of ours."""

import sys
from types import TracebackType


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C before `common.cli.run` has begun, while a script still imports: one line, no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:  # a notebook has its own
    sys.excepthook = _quiet
