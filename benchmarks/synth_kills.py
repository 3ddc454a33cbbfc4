"""synth.run, killed at random moments and resumed: what is asked again, and whether the result is the same.

The offline teacher runs over HTTP in this process, so it sees what all processes of the run ask. First the stages that
ask, killed between calls; then whole runs, killed at any time: half the kills hit only synth.run, whose training goes
on without it, and half the training as well.

    python -m benchmarks.synth_kills --kills 20
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common.cli import run
from common.errors import UserError
from common.parser import Parser
from synth.offline.server import OfflineTeacher

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("generate", "verify", "pass_rates", "difficulty")
# synth.run up to its training, with a base model that is quick: right on small sums.
PROGRAM = """
import sys
from synth import run
from synth.pipeline.pass_rates import BaseModelSettings
from tests.test_difficulty import Adder
from common.cli import run as run_main
BaseModelSettings.open = lambda self: Adder()
run.split = lambda *_: sys.exit(0)
run_main(run.main)
"""
CONCURRENCY = 8
WORDS = ["--task", "synth/tasks/arithmetic.yaml", "--count", "60", "--votes", "8", "--rounds", "2", "--wanted", "40"]
WORDS += ["--concurrency", str(CONCURRENCY), "--teacher-model", "m"]


WHOLE = [*WORDS, "--count", "30", "--rule", "random", "--max-completion-length", "4", "--num-steps", "60"]
WHOLE += ["--batch-size", "16", "--training-flags=--num-generations 4", "--dataset-path", "evaluation.jsonl"]
WHOLE[1] = str(ROOT / WHOLE[1])


def start(*words: object, program: Sequence[str] = ("-c", PROGRAM), cwd: Path = ROOT) -> subprocess.Popen:
    """A process of PROGRAM, or of another one."""
    command = [sys.executable, *program, *map(str, words)]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=cwd, env=paths, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def send_kill(process: subprocess.Popen, server: OfflineTeacher, calls: int) -> int:
    """Kill the process once it has made `calls` calls; returns its exit status, 0 if it ended before."""
    before = server.calls
    while process.poll() is None and server.calls < before + calls:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def repeated(server: OfflineTeacher) -> int:
    """How many calls repeated an earlier one."""
    return sum(server.asked.values()) - len(server.asked)


def tables(folder: Path) -> dict[str, bytes]:
    """The stages' files."""
    paths = {name: folder / f"{name}.jsonl" for name in STAGES}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def left_by(folder: Path) -> dict[str, bytes]:
    """Every file of a whole run that contains no times."""
    names = ("held_out.jsonl", "selection.jsonl", "prompts.jsonl", "checkpoints.json", "evaluation.json")
    weights = (f"{name}/adapters.safetensors" for name in ("adapter", "last_adapter"))
    return {**tables(folder), **{name: (folder / name).read_bytes() for name in (*names, *weights)}}


def kill_whole(process: subprocess.Popen, seconds: float, training_too: bool) -> bool:
    """Kill the process after so many seconds, optionally with its children; whether it was still running."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
        process.kill()
        for child in found.split() if training_too else []:
            os.kill(int(child), signal.SIGKILL)
        return process.wait() != 0


def between_calls(rng: random.Random, most: int, temporary: Path) -> None:
    """Kills in the stages that ask."""
    cut, whole = temporary / "cut", temporary / "whole"
    with OfflineTeacher(latency_ms=20) as server:
        start(*WORDS, "--teacher-url", server.url, "--output-dir", whole).wait()
        undisturbed = server.calls
    kills = 0
    with OfflineTeacher(latency_ms=20) as server:
        while True:
            begun = (cut / "config.json").is_file()
            words = ["--resume", cut] if begun else [*WORDS, "--teacher-url", server.url, "--output-dir", cut]
            process = start(*words)
            if kills == most:
                process.wait()
                break
            kills += send_kill(process, server, rng.randrange(undisturbed // most)) != 0
        print(f"stages 1 to 5: calls: {undisturbed} undisturbed, {server.calls} with {kills} kills")
        print(f"asked again: {repeated(server)}, at most in flight: {kills * CONCURRENCY}")
    print(f"the same result: {tables(cut) == tables(whole) and len(tables(cut)) == len(STAGES)}", flush=True)


def at_any_time(rng: random.Random, most: int, temporary: Path) -> None:
    """Kills in whole runs, training, choice of the checkpoint and evaluation included."""
    cut, whole = temporary / "whole_cut", temporary / "whole_whole"
    rows = ({"input": f"{n} + {n} =", "output": str(2 * n)} for n in range(100))
    (temporary / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def begin(folder: Path, server: OfflineTeacher) -> subprocess.Popen:
        begun = (folder / "config.json").is_file()
        words = ["--resume", folder] if begun else [*WHOLE, "--teacher-url", server.url, "--output-dir", folder]
        return start(*words, program=("-m", "synth.run"), cwd=temporary)

    with OfflineTeacher(latency_ms=20) as server:
        started = time.perf_counter()
        if begin(whole, server).wait():
            raise UserError("the undisturbed run failed; run it by hand to see why: synth.run with the words of WHOLE")
        seconds, undisturbed = time.perf_counter() - started, server.calls
    kills, reached = 0, []
    with OfflineTeacher(latency_ms=20) as server:
        while kills < most and kill_whole(begin(cut, server), rng.uniform(0.3, 0.8) * seconds, rng.random() < 0.5):
            kills += 1
            reached.append(sum(1 for _ in cut.rglob("*")))
        begin(cut, server).wait()
        print(
            f"whole run: {seconds:.0f} s and {undisturbed} calls undisturbed, {server.calls} calls with {kills} kills"
        )
        print(f"asked again: {repeated(server)}; files there at each kill: {reached}")
    print(f"the same result: {left_by(cut) == left_by(whole)}")


def main() -> None:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--kills", type=int, default=20, help="at random moments, of each of the two")
    parser.add_argument("--seed", type=int, default=0, help="of those moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        between_calls(rng, args.kills, Path(temporary))
        at_any_time(rng, args.kills, Path(temporary))


if __name__ == "__main__":
    run(main)
