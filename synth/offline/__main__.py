"""`python -m synth.offline`: see synth/offline/server.py."""

import sys
from pathlib import Path

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import run
from synth.offline.server import main

if __name__ == "__main__":
    run(main)
