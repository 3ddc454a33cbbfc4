"""Running a training script as a process of its own: its memory is given back, and its run folder is the interface."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common.cli import LAST_WORDS, Stopped, StopSignal
from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


def run_script(words: Sequence[str], go_on: str, files: Sequence[int] = ()) -> None:
    """Run one of the scripts, words[0], with its flags. A first Ctrl-C or SIGTERM makes it end its step and save.

    go_on: the command that resumes; files: open files that the script inherits. Raises UserError if the script fails,
    Stopped if it was stopped.
    """
    print(f"$ python {shlex.join(words)}", flush=True)
    with StopSignal() as stop:
        # In its own session, so that a Ctrl-C reaches it once, from here.
        reader, writer = os.pipe()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / words[0]), *words[1:]],
            start_new_session=True,
            pass_fds=(*files, writer),
            env={**os.environ, LAST_WORDS: str(writer)},
        )
        os.close(writer)
        asked = False
        while process.poll() is None:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                if stop.requested and not asked:
                    process.terminate()
                    asked = True
    with os.fdopen(reader, encoding="utf-8") as pipe:
        said = pipe.read()
    if stop.requested or process.returncode == 130:
        raise Stopped(f"go on with: {go_on}")
    if process.returncode:
        why = f": {said}" if said else f" with exit code {process.returncode}; its message stands above"
        raise UserError(f"{words[0]} failed{why}; then go on with: {go_on}")
