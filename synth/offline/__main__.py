"""`python -m synth.offline`: see synth/offline/server.py."""

from common.cli import run
from synth.offline.server import main

if __name__ == "__main__":
    run(main)
