"""A run of synth.run, killed at random moments and resumed: what is asked again, and whether the end is the same.

The teacher is the offline one, over HTTP, in this process, so it sees what all the processes of the run ask. Leaves out
training, whose own kills tests/test_kill_resume.py holds.

    python -m benchmarks.synth_kills --kills 20
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synth.offline_teacher import OfflineTeacher
from training import config
from training.cli import run

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("generate", "verify", "pass_rates", "difficulty")
# synth.run up to its training, with a base model that is quick: right on small sums.
PROGRAM = """
import sys
from synth import run
from tests.test_difficulty import Adder
from training.cli import run as run_main
run.base_model_from = lambda args, task: Adder()
run.split = lambda *_: sys.exit(0)
run_main(run.main)
"""
CONCURRENCY = 8
WORDS = ["--task", "synth/tasks/arithmetic.yaml", "--count", "60", "--votes", "8", "--rounds", "2", "--wanted", "40"]
WORDS += ["--concurrency", str(CONCURRENCY), "--teacher-model", "m"]


def start(*words: object) -> subprocess.Popen:
    """A process of PROGRAM."""
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def send_kill(process: subprocess.Popen, server: OfflineTeacher, calls: int) -> int:
    """Kill the process once it has made `calls` calls; returns its exit status, 0 if it ended before."""
    before = server.calls
    while process.poll() is None and server.calls < before + calls:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def repeated(server: OfflineTeacher) -> int:
    """How many calls asked what was asked before."""
    return sum(server.asked.values()) - len(server.asked)


def tables(folder: Path) -> dict[str, bytes]:
    """The stages' files."""
    paths = {name: folder / f"{name}.jsonl" for name in STAGES}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def main() -> None:
    parser = config.Parser(__doc__, yaml_file=False)
    parser.add_argument("--kills", type=int, default=20, help="at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of those moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        cut, whole = Path(temporary, "cut"), Path(temporary, "whole")
        with OfflineTeacher(latency_ms=20) as server:
            start(*WORDS, "--teacher-url", server.url, "--output-dir", whole).wait()
            undisturbed = server.calls
        kills = 0
        with OfflineTeacher(latency_ms=20) as server:
            while True:
                begun = (cut / "config.json").is_file()
                words = ["--resume", cut] if begun else [*WORDS, "--teacher-url", server.url, "--output-dir", cut]
                process = start(*words)
                if kills == args.kills:
                    process.wait()
                    break
                kills += send_kill(process, server, rng.randrange(undisturbed // args.kills)) != 0
            print(f"calls: {undisturbed} undisturbed, {server.calls} with {kills} kills")
            print(f"asked again: {repeated(server)}, at most in flight: {kills * CONCURRENCY}")
        print(f"the same result: {tables(cut) == tables(whole) and len(tables(cut)) == len(STAGES)}")


if __name__ == "__main__":
    run(main)
