"""Runs killed by SIGKILL at random moments and resumed: do they end as if they had never been disturbed?

    python -m benchmarks.crash --kills 25 --output crash.json
    python -m benchmarks.crash --only sft ppo --kills 5 --seconds 400 --output crash.json

What the file of results holds is not done again: a second call goes on with the kinds that have too few kills.

Of each kind, one run is left alone. Others are killed after a random share of the time that it took from the first
file that it touched (before, it only imports) to its end, each time resumed (fuse.py: started again), and after a few
kills go on to their end. Then every file is compared, byte for byte but for times; and no temporary file may be left.
Where a run starts a process, half the kills hit that, too.

The teacher of synth.run, synth.evolve and synth.tune is the offline one, over HTTP in this process, which counts what
is asked again. Models are untrained and small, and packages that a run does not need are hidden from it, so that what
can go wrong takes most of its time, not arithmetic and imports.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from models import cpu

cpu.enable()  # before mlx is imported

from safetensors.numpy import load_file

from common.cli import run
from common.errors import UserError
from common.files import read_json, write_json
from common.parser import Parser
from models.adapters import AdapterConfig, attach_adapter, save_adapter
from models.loading import load
from models.tiny import RECIPES, build
from synth.offline.instructions import starting
from synth.offline.server import OfflineTeacher

ROOT = Path(__file__).resolve().parent.parent
KILLS_OF_A_RUN = 5  # at most; each resume may go wrong in another way
CONCURRENCY = 4  # of the teacher: as many questions can be lost by a kill
STAGES = ("generate", "verify", "pass_rates", "difficulty")
# Not compared: what is no result, pictures, and what counts or keeps calls, of which a killed run has more.
PASSED_OVER = re.compile(r"lock|ledger\.json|.*\.sqlite.*|.*\.png|report\.html")
# Imported where they are installed, and half of a start's time: to these runs they are not installed.
HIDDEN = ("torch", "wandb", "tensorboardX", "datasets")
TIMES = re.compile(r".*seconds.*|.*_per_second|time|peak_memory.*")
RL = ["--ground-truth-reward", "--num-steps", 12, "--save-every", 2, "--batch-size", 8, "--mini-batch-size", 4,
      "--max-completion-length", 6, "--horizon", 50, "--normalize-scores"]  # fmt: skip
SFT = ["--train", "--iters", 40, "--save-every", 4, "--steps-per-report", 3, "--steps-per-eval", 10,
       "--val-batches", 2, "--batch-size", 4, "--lora-dropout", 0.1]  # fmt: skip
PLACES = ["--model", "../../model", "--output-dir", "run", "--save-file", "adapter.safetensors"]
DATA = ["--data", ROOT / "data"]


class Kind(NamedTuple):
    """A kind of run. words: its first command line, in a folder of its own. again: words that resume, if it can be."""

    words: Sequence[object]
    again: Sequence[object] | None = None
    asks: bool = False  # a teacher
    torch: bool = False


KINDS = {
    "sft": Kind([ROOT / "sft.py", *SFT, *PLACES, *DATA], [ROOT / "sft.py", "--resume", "run"]),
    "reward model": Kind(
        [ROOT / "sft.py", "--reward-model", *SFT, *PLACES, *DATA, "--data-base", "reward_function_increasing_mult_2_"],
        [ROOT / "sft.py", "--resume", "run"],
    ),
    "ppo": Kind([ROOT / "ppo_training.py", *RL, *PLACES], [ROOT / "ppo_training.py", "--resume", "run"]),
    "pytorch ppo": Kind(
        [ROOT / "pytorch_ppo_training.py", *RL, *PLACES, "--device", "cpu"],
        [ROOT / "pytorch_ppo_training.py", "--resume", "run"],
        torch=True,
    ),
    "fuse": Kind([ROOT / "fuse.py", "--model", "../../model", "--adapter-file", "../../adapter", "--save-path", "run"]),
    "synth.run": Kind(
        ["-m", "synth.run", "--task", ROOT / "synth/tasks/arithmetic.yaml", "--base-model", "../../model", "--seed", 3,
         "--count", 12, "--votes", 2, "--rounds", 1, "--wanted", 6, "--rollouts", 2, "--max-rollouts", 2,
         "--concurrency", CONCURRENCY, "--teacher-model", "m", "--max-completion-length", 3, "--rule", "random",
         "--num-steps", 8, "--batch-size", 4, "--training-flags=--num-generations 2", "--dataset-path",
         "../../evaluation.jsonl", "--output-dir", "run"],
        ["-m", "synth.run", "--resume", "run"],
        asks=True,
    ),
    "evolve": Kind(
        ["-m", "synth.evolve", "--rounds", 2, "--iterations", 3, "--starts", 2, "--group", 2, "--answers", 2,
         "--answer", "number", "--instructions", "../../instructions.txt", "--teacher-model", "m",
         "--concurrency", CONCURRENCY, "--sft", "--base-model", "../../model",
         "--sft-flags=--iters 12 --save-every 3 --steps-per-report 2 --batch-size 2 --val-batches 1",
         "--output-dir", "run"],
        ["-m", "synth.evolve", "--resume", "run"],
        asks=True,
    ),
    "tune": Kind(
        ["-m", "synth.tune", "--config", "tuner.yaml", "--output-dir", "run"],
        ["-m", "synth.tune", "--resume", "run"],
        asks=True,
    ),
}  # fmt: skip
TUNER = """
task: {root}/synth/tasks/digits.yaml
teacher: {{teacher_url: {url}, teacher_model: m, concurrency: 4}}
sft_model: ../../model
sft_iters: 4
sft_flags: --save-every 2 --batch-size 2 --val-batches 1
rl_tuning:
  {{enable_rl_tuning: true, num_iterations: 2, batch_size: 4, rl_algorithm: ppo, update_every: 2,
    validation_data_path: {root}/synth/tuning/examples/digits_valid.jsonl}}
"""


@dataclass
class Result:
    """What a kind went through. different, left_over: files, which have to be none; asked_again: calls of a killed run
    that repeat one, at most `lost` of them were in flight."""

    seconds: float  # of the undisturbed run, after its imports
    kills: int = 0
    runs: int = 0
    of_children: int = 0  # kills that hit a training, too
    left_by_kills: int = 0  # temporary folders found after a kill
    compared: int = 0  # files
    different: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    asked_again: int = 0
    lost: int = 0

    @property
    def whole(self) -> bool:
        """Whether every end was that of the undisturbed run."""
        return self.compared > 0 and not self.different and not self.left_over and self.asked_again <= self.lost


def start(kind: Kind, folder: Path, url: str = "") -> subprocess.Popen:
    """The next process of a run in `folder`: its first one, or one that resumes."""
    folder.mkdir(parents=True, exist_ok=True)
    words = list(kind.again if kind.again and (folder / "run" / "config.json").is_file() else kind.words)
    if "tuner.yaml" in words:
        (folder / "tuner.yaml").write_text(TUNER.format(root=ROOT, url=url), encoding="utf-8")
    elif url and words == list(kind.words):
        words += ["--teacher-url", url]
    path = [str(ROOT)] if kind.torch else [str(_without(folder.parent / "hidden")), str(ROOT)]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=folder, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip


def _without(folder: Path) -> Path:
    """A folder for PYTHONPATH that hides the packages HIDDEN, as if they were not installed."""
    folder.mkdir(exist_ok=True)
    code = f"import sys\nsys.modules.update(dict.fromkeys({HIDDEN}))\n"
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    return folder


def touched(process: subprocess.Popen, folder: Path) -> None:
    """Wait until a process that was just started has printed or written something, or has ended."""

    def seen() -> list[int]:
        places = (folder, folder / "run", folder / "output.txt")
        return [os.stat(place).st_mtime_ns if place.exists() else 0 for place in places]

    before = seen()
    while process.poll() is None and seen() == before:
        time.sleep(0.005)


def kill_after(process: subprocess.Popen, seconds: float, children: bool) -> bool:
    """Kill the process after so many seconds, perhaps with those that it started; whether it was still running."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
        process.kill()
        for child in found.split() if children else []:
            os.kill(int(child), signal.SIGKILL)
        return process.wait() != 0


def end(kind: Kind, folder: Path, url: str = "") -> float:
    """Let a run come to its end; returns the seconds after its imports. Raises UserError if it fails."""
    process = start(kind, folder, url)
    touched(process, folder)
    started = time.perf_counter()
    if process.wait():
        last = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
        raise UserError(f"a run failed ({' '.join(last)}); see {folder / 'output.txt'}")
    return time.perf_counter() - started


def repeated(server: OfflineTeacher) -> int:
    """How many calls repeated an earlier one."""
    return sum(server.asked.values()) - len(server.asked)


def tables(folder: Path) -> dict[str, bytes]:
    """The files of synth.run's stages that ask."""
    paths = {name: folder / f"{name}.jsonl" for name in STAGES}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def left_by(folder: Path, url: str = "") -> dict[str, Any]:
    """Every file that a run leaves, but for times, the address of its teacher, and PASSED_OVER."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or PASSED_OVER.fullmatch(path.name) or name in ("output.txt", "tuner.yaml"):
            continue
        if path.suffix in (".json", ".jsonl", ".md"):
            text = path.read_text(encoding="utf-8").replace(url or "\0", "URL")
            found[name] = [_without_times(line) for line in (text.split("\n") if path.suffix == ".jsonl" else [text])]
        elif path.name in ("optimizer.safetensors", "agent.safetensors"):  # whose arrays may come in another order
            found[name] = {key: array.tobytes() for key, array in load_file(path).items()}
        else:
            found[name] = path.read_bytes()
    return found


def _without_times(text: str) -> Any:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(one) for key, one in value.items() if not TIMES.fullmatch(key)}
        return [strip(one) for one in value] if isinstance(value, list) else value

    try:
        return strip(json.loads(text))
    except ValueError:
        return text


def temporary_files(folder: Path) -> list[str]:
    """Temporary folders of ours below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*.tmp"))


def measure(kind: Kind, kills: int, seed: str, folder: Path, results: Result | None = None) -> Iterator[Result]:
    """Kill runs of a kind, `kills` times in all, and compare each at its end with one never disturbed.

    results: those so far, with which it goes on. Yields them after every run.
    """
    with OfflineTeacher() if kind.asks else nullcontext() as server:
        url = server.url if server else ""
        seconds = end(kind, folder / "whole", url)
        expected = left_by(folder / "whole", url)
    result = results or Result(round(seconds, 1))
    while result.kills < kills:
        result.runs += 1
        cut, before, rng = folder / f"cut{result.runs}", result.kills, random.Random(f"{seed} {result.runs}")
        most = min(kills, before + KILLS_OF_A_RUN)
        with OfflineTeacher() if kind.asks else nullcontext() as server:
            url = server.url if server else ""
            alive = True
            while alive and result.kills < most:
                children = rng.random() < 0.5
                process = start(kind, cut, url)
                touched(process, cut)
                alive = kill_after(process, rng.random() * seconds, children)
                result.kills += alive
                result.of_children += alive and children and kind.asks
                result.left_by_kills += len(temporary_files(cut)) if alive else 0
            end(kind, cut, url) if alive else None
            got = left_by(cut, url)
            result.asked_again += repeated(server) if server else 0
            result.lost += (result.kills - before) * CONCURRENCY if server else 0
        result.compared += len(expected)
        names = got.keys() | expected.keys()
        result.different += [f"{cut.name}/{name}" for name in sorted(names) if got.get(name) != expected.get(name)]
        result.left_over += [f"{cut.name}/{name}" for name in temporary_files(cut)]
        yield result


def prepare(folder: Path) -> None:
    """The model, the adapter and the rows that the runs take."""
    build(replace(RECIPES["tiny-digits"], steps=0), folder / "model")
    loaded = load(str(folder / "model"))
    config = AdapterConfig(num_layers=-1, model=str(folder / "model"))
    attach_adapter(loaded.model, config)
    save_adapter(folder / "adapter", loaded.model, config)
    (folder / "instructions.txt").write_text("\n".join(starting(6, 0)) + "\n", encoding="utf-8")
    rows = ({"input": f"{n} + {n} =", "output": str(2 * n)} for n in range(6))
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(results: dict[str, dict[str, Any]]) -> str:
    """Results by kind, as markdown."""
    heads = ("run", "kills", "of which its training, too", "runs", "files compared", "different", "temporary left",
             "asked again (at most)")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, found in results.items():
        asks = KINDS[name].asks
        again = f"{found['asked_again']} ({found['lost']})" if asks else ""
        cells = [name, found["kills"], found["of_children"] if asks else "", found["runs"], found["compared"]]
        lines.append(f"| {' | '.join(map(str, [*cells, len(found['different']), len(found['left_over']), again]))} |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--kills", type=int, default=25, help="of each kind of run")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS), help="kinds of runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no run is begun")
    parser.add_argument("--output", metavar="FILE", help="JSON of the results, which a later call goes on with")
    parser.add_argument("--keep", metavar="FOLDER", help="where runs stay whose end differs")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    path, until = Path(args.output) if args.output else None, time.monotonic() + args.seconds
    results: dict[str, dict[str, Any]] = read_json(path) if path and path.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for name in args.only:
            place, so_far = folder / name.replace(" ", "_"), Result(**results[name]) if name in results else None
            if time.monotonic() > until or (so_far and so_far.kills >= args.kills):
                continue
            for found in measure(KINDS[name], args.kills, f"{args.seed} {name}", place, so_far):
                print(f"{name}: {found.kills} of {args.kills} kills, in {found.runs} runs", flush=True)
                results[name] = asdict(found)
                if path:
                    write_json(path, results)
                if not found.whole:
                    print(f"  NOT THE SAME: {found}", flush=True)
                if args.keep and not found.whole:
                    shutil.copytree(place, Path(args.keep) / place.name, dirs_exist_ok=True)
                if time.monotonic() > until:
                    break
            shutil.rmtree(place, ignore_errors=True)
    print(table({name: results[name] for name in KINDS if name in results}))


if __name__ == "__main__":
    run(main)
