"""Seconds of one PPO step against TRL 0.11.4, whose PPOTrainer was the last in TRL to be token-level with a value head.

    python benchmarks/ppo_step.py                                 ours alone
    python benchmarks/ppo_step.py --make-trl-env ~/trl_env        makes TRL's environment (1.4 GB) and measures both
    python benchmarks/ppo_step.py --trl-python ~/trl_env/bin/python --rounds 20

A step is: prompts, new tokens, a reward, logprobs of policy and reference, GAE, and epochs of mini batches of 8 by
Adam, on a random Llama. With the small models, 32 prompts of 3 tokens, 24 new tokens, 4 epochs; LoRA of rank 16 on q
and v, or all weights. At the real shape (SmolLM2-135M's), 16 prompts of 32 tokens, 48 new tokens, 2 epochs; LoRA of
rank 8 on q and v of the last 8 of 30 layers. Both sides do it in processes of their own, taking turns step by step, so
that a busy machine slows both; what counts is the ratio within a round. Memory is the highest resident size of a
side's processes together.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from tqdm import tqdm

from common.cli import run
from common.errors import UserError
from common.files import atomic_file, write_json
from common.parser import Parser, positive


def make_task(prompts: int, prompt_length: int, new_tokens: int, ppo_epochs: int, rank: int, layers: int) -> dict:
    """What a step does. layers: those at the end that get a LoRA; -1: all."""
    return {
        "prompts": [" ".join(f"w{1 + i + j}" for j in range(prompt_length)) for i in range(prompts)],
        "new_tokens": new_tokens,
        "ppo_epochs": ppo_epochs,
        "mini_batch_size": 8,
        "learning_rate": 1.41e-5,
        "lora_rank": rank,
        "lora_layers": layers,
    }


SMALL_TASK = make_task(32, prompt_length=3, new_tokens=24, ppo_epochs=4, rank=16, layers=-1)
REAL_TASK = make_task(16, prompt_length=32, new_tokens=48, ppo_epochs=2, rank=8, layers=8)
SMALL = {"vocab_size": 64, "tie_word_embeddings": False, "max_position_embeddings": 128}
MODELS: dict[str, dict[str, Any]] = {
    "hidden 256": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        **SMALL,
    },
    "hidden 64": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **SMALL,
    },
    "real shape": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
    },
}
SETTINGS = {
    "hidden 256, lora": ("hidden 256", "lora", SMALL_TASK),
    "hidden 256, full": ("hidden 256", "full", SMALL_TASK),
    "hidden 64, lora": ("hidden 64", "lora", SMALL_TASK),
    "hidden 64, full": ("hidden 64", "full", SMALL_TASK),
    "real shape, lora": ("real shape", "lora", REAL_TASK),
}
TRL_PACKAGES = ("trl==0.11.4", "transformers==4.46.3", "peft==0.13.2", "accelerate==1.0.1", "numpy<2.3", "rich")
TORCH = "torch==2.13.0"


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each side, after the warm-up")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each side that are not counted")
    parser.add_argument("--trl-python", metavar="PATH", help="Python of an environment that has TRL")
    parser.add_argument("--make-trl-env", metavar="FOLDER", help="make such an environment there first, with pip")
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS), help="which")
    parser.add_argument("--threads", type=int, default=1, help="of our BLAS, in each process")
    parser.add_argument("--processes", type=int, default=1, help="of ours, which share the rows of a step")
    parser.add_argument("--trl-threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", default="runs/ppo_step.json", help="file of all figures; the table lies beside it")
    return parser.parse_args()


def make_trl_environment(folder: Path) -> Path:
    """A virtual environment with TRL 0.11.4 and the packages of its time. Returns its Python."""
    if folder.exists():
        raise UserError(f"--make-trl-env {folder} exists already; name another folder, or use --trl-python")
    print(f"installing TRL into {folder}", flush=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # Torch first, by itself: left to choose, the resolver would weigh every torch against TRL's old requirements.
    for packages in ((TORCH,), (TORCH, *TRL_PACKAGES)):
        if subprocess.run([python, "-m", "pip", "install", "-q", *packages]).returncode:
            raise UserError(f"pip could not install {' '.join(packages)}; remove {folder} and try again")
    return python


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """A tokenizer of so many words, w1 w2 ..., and an EOS behind them that no model here can sample."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", *(f"w{i}" for i in range(1, vocabulary)), "<eos>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))


class Worker:
    """A process, or several that take each step together, which answers every line with one line of JSON."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: dict[str, str], processes: int = 1):
        """processes: so many, joined by mlx's ring, of which the first answers and ends if another is lost."""
        self.name = name
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (closed by `close`)
        self.hosts = tempfile.NamedTemporaryFile("w", suffix=".json")  # noqa: SIM115  (likewise)
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(processes)], self.hosts)
        self.hosts.flush()
        self.processes = []
        for rank in range(processes):
            joined = {"MLX_RANK": str(rank), "MLX_HOSTFILE": self.hosts.name} if processes > 1 else {}
            process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                text=True, env={**os.environ, **environment, **joined},
            )  # fmt: skip
            self.processes.append(process)
        self.ready = self._answer()

    def step(self) -> dict[str, float]:
        """One step's figures."""
        return self.ask("step")

    def ask(self, line: str) -> Any:
        """The answer to a line. Raises UserError with the end of the worker's log if it has died."""
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has died, so its answer is missing too
                print(line, file=process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        first = self.processes[0]
        assert first.stdout is not None
        line = first.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["no message"])[-1]
        code = first.wait()
        self.close()
        raise UserError(f"the {self.name} process ended with code {code} ({last}); run it by itself")

    def close(self) -> None:
        """End the processes, and drop their log and hosts file."""
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with suppress(BrokenPipeError):
                    stream.close()
        self.log.close()
        self.hosts.close()


def free_ports(count: int) -> list[int]:
    """So many TCP ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def workers(args: argparse.Namespace, name: str, tokenizer: Path) -> Iterator[dict[str, Worker]]:
    """The processes of a setting by name: "ours" and, where its Python is known, "TRL"."""
    model, kind, task = SETTINGS[name]
    write_tokenizer(tokenizer, MODELS[model]["vocab_size"])
    work = json.dumps({"task": task, "model": MODELS[model], "kind": kind, "tokenizer": str(tokenizer)})
    here = ROOT / "benchmarks"
    threads = {"OPENBLAS_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    started: dict[str, Worker] = {}
    try:
        started["ours"] = Worker("ours", [sys.executable, here / "mlx_step.py", work], threads, args.processes)
        if args.trl_python:
            threads = {"OMP_NUM_THREADS": str(args.trl_threads), "MKL_NUM_THREADS": str(args.trl_threads)}
            started["TRL"] = Worker("TRL", [args.trl_python, here / "trl_step.py", work], threads)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def check_whole(name: str, answer: dict[str, float], task: dict[str, Any]) -> None:
    """Raise UserError unless a step sampled every token and made every update: else the sides did unequal work."""
    completions = len(task["prompts"])
    wanted = {
        "tokens": completions * task["new_tokens"],
        "updates": task["ppo_epochs"] * completions // task["mini_batch_size"],
    }
    for what, number in wanted.items():
        if answer[what] != number:
            raise UserError(f"a step of {name} had {answer[what]:g} {what}, not {number}; the figures do not compare")


def measure(
    sides: dict[str, Worker], task: dict[str, Any], rounds: int, warm_up: int, title: str
) -> dict[str, list[dict[str, float]]]:
    """The answers of each side: one step of each in turn, `rounds` times, after `warm_up` rounds that are dropped."""
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for index in tqdm(range(warm_up + rounds), desc=title, unit="round"):
        for name, worker in sides.items():
            answer = worker.step()
            check_whole(name, answer, task)
            if index >= warm_up:
                answers[name].append(answer)
    return answers


class Comparison(NamedTuple):
    """Medians over the rounds, in seconds, and how many times as long TRL takes within a round. Memory in GB."""

    ours: float
    ours_memory: float
    trl: float | None = None
    trl_memory: float | None = None
    ratio: float | None = None
    lowest: float | None = None
    highest: float | None = None


def compare(ours: Sequence[dict[str, float]], trl: Sequence[dict[str, float]] | None = None) -> Comparison:
    """ours, trl: answers of the same rounds."""
    sides = [
        np.array([(answer["seconds"], answer["peak_memory"] / 1e9) for answer in side]) for side in (ours, trl or ())
    ]
    found = [float(value) for side in sides if len(side) for value in (np.median(side[:, 0]), side[:, 1].max())]
    if not trl:
        return Comparison(*found)
    ratios = sides[1][:, 0] / sides[0][:, 0]
    return Comparison(*found, *(float(x) for x in (np.median(ratios), ratios.min(), ratios.max())))


def table(comparisons: dict[str, Comparison]) -> str:
    """One line per setting, as Markdown."""
    heads = ["setting", "ours, s", "TRL 0.11.4, s", "TRL / ours (lowest to highest)", "ours, GB", "TRL, GB"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in comparisons.items():
        cells = [f"{row.ours:.3f}", "", "", f"{row.ours_memory:.2f}", ""]
        if row.trl is not None:
            ratio = f"{row.ratio:.2f} ({row.lowest:.2f} to {row.highest:.2f})"
            cells = [cells[0], f"{row.trl:.3f}", ratio, cells[3], f"{row.trl_memory:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    positive("rounds", args.rounds)
    positive("processes", args.processes)
    positive("warm-up", args.warm_up, zero=True)
    if args.make_trl_env:
        args.trl_python = make_trl_environment(Path(args.make_trl_env).expanduser())
    elif args.trl_python and not Path(args.trl_python).is_file():
        raise UserError(f"--trl-python {args.trl_python} does not exist; make one with --make-trl-env FOLDER")
    figures, comparisons = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.settings:
            with workers(args, name, Path(folder) / "tokenizer.json") as sides:
                answers = measure(sides, SETTINGS[name][2], args.rounds, args.warm_up, name)
                ready = {side: worker.ready for side, worker in sides.items()}
            comparisons[name] = compare(answers["ours"], answers.get("TRL"))
            figures.append({"setting": name, **comparisons[name]._asdict(), "sides": ready, "steps": answers})
    text = table(comparisons)
    print(text)
    output = Path(args.output)
    ours = {"threads": args.threads, "processes": args.processes}
    write_json(output, {"cores": os.cpu_count(), **ours, "settings": figures})
    with atomic_file(output.with_suffix(".md")) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
