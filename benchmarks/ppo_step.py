"""Seconds of one PPO step against TRL 0.11.4, whose PPOTrainer was the last in TRL to be token-level with a value head.

    python benchmarks/ppo_step.py                                 ours alone
    python benchmarks/ppo_step.py --make-trl-env ~/trl_env        makes TRL's environment (1.4 GB) and measures both
    python benchmarks/ppo_step.py --trl-python ~/trl_env/bin/python --rounds 20

A step is: 32 prompts of 3 tokens, 24 new tokens each, a reward, logprobs of policy and reference, GAE, and 4 epochs in
mini batches of 8 by Adam, on a random Llama; LoRA of rank 16 on q and v, or all weights. Both sides do it in processes
of their own, taking turns step by step, so that a busy machine slows both; what counts is the ratio within a round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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

VOCABULARY = 64
NEW_TOKENS = 24
TASK: dict[str, Any] = {
    "prompts": [f"w{1 + i} w{2 + i} w{3 + i}" for i in range(32)],
    "new_tokens": NEW_TOKENS,
    "ppo_epochs": 4,
    "mini_batch_size": 8,
    "learning_rate": 1.41e-5,
}
COMMON = {"vocab_size": VOCABULARY, "tie_word_embeddings": False, "max_position_embeddings": 128}
MODELS: dict[str, dict[str, Any]] = {
    "hidden 256": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        **COMMON,
    },
    "hidden 64": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **COMMON,
    },
}
KINDS = ("lora", "full")
TRL_PACKAGES = ("trl==0.11.4", "transformers==4.46.3", "peft==0.13.2", "accelerate==1.0.1", "numpy<2.3", "rich")
TORCH = "torch==2.13.0"


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each side, after the warm-up")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each side that are not counted")
    parser.add_argument("--trl-python", metavar="PATH", help="Python of an environment that has TRL")
    parser.add_argument("--make-trl-env", metavar="FOLDER", help="make such an environment there first, with pip")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="which models")
    parser.add_argument("--threads", type=int, default=1, help="of our BLAS")
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


def write_tokenizer(path: Path) -> None:
    """A tokenizer of VOCABULARY words, w1 w2 ..., and an EOS behind them that no model here can sample."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", *(f"w{i}" for i in range(1, VOCABULARY)), "<eos>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))


class Worker:
    """A process that takes steps on request and answers with one line of JSON each."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: dict[str, str]):
        self.name = name
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (closed by `close`)
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, env={**os.environ, **environment},
        )  # fmt: skip
        self.ready = self._answer()

    def step(self) -> dict[str, float]:
        """One step's figures. Raises UserError with the end of the worker's log if it has died."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, so its answer is missing too
            print("step", file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["no message"])[-1]
        code = self.process.wait()
        self.close()
        raise UserError(f"the {self.name} process ended with code {code} ({last}); run it by itself")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


@contextmanager
def workers(args: argparse.Namespace, model: str, kind: str, tokenizer: Path) -> Iterator[dict[str, Worker]]:
    """The processes of one configuration by name: "ours" and, where its Python is known, "TRL"."""
    work = json.dumps({"task": TASK, "model": MODELS[model], "kind": kind, "tokenizer": str(tokenizer)})
    here = ROOT / "benchmarks"
    threads = {"OPENBLAS_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    started: dict[str, Worker] = {}
    try:
        started["ours"] = Worker("ours", [sys.executable, here / "mlx_step.py", work], threads)
        if args.trl_python:
            threads = {"OMP_NUM_THREADS": str(args.trl_threads), "MKL_NUM_THREADS": str(args.trl_threads)}
            started["TRL"] = Worker("TRL", [args.trl_python, here / "trl_step.py", work], threads)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def check_whole(name: str, answer: dict[str, float]) -> None:
    """Raise UserError unless a step sampled every token and made every update: else the sides did unequal work."""
    completions = len(TASK["prompts"])
    wanted = {
        "tokens": completions * TASK["new_tokens"],
        "updates": TASK["ppo_epochs"] * completions // TASK["mini_batch_size"],
    }
    for what, number in wanted.items():
        if answer[what] != number:
            raise UserError(f"a step of {name} had {answer[what]:g} {what}, not {number}; the figures do not compare")


def measure(sides: dict[str, Worker], rounds: int, warm_up: int, title: str) -> dict[str, list[dict[str, float]]]:
    """The answers of each side: one step of each in turn, `rounds` times, after `warm_up` rounds that are dropped."""
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for index in tqdm(range(warm_up + rounds), desc=title, unit="round"):
        for name, worker in sides.items():
            answer = worker.step()
            check_whole(name, answer)
            if index >= warm_up:
                answers[name].append(answer)
    return answers


class Comparison(NamedTuple):
    """Medians over the rounds, in seconds, and how many times as long TRL takes within a round."""

    ours: float
    trl: float | None = None
    ratio: float | None = None
    lowest: float | None = None
    highest: float | None = None


def compare(ours: Sequence[float], trl: Sequence[float] | None = None) -> Comparison:
    """ours, trl: seconds of the same rounds."""
    if not trl:
        return Comparison(float(np.median(ours)))
    ratios = np.array(trl) / np.array(ours)
    return Comparison(
        *(float(x) for x in (np.median(ours), np.median(trl), np.median(ratios), ratios.min(), ratios.max()))
    )


def table(comparisons: dict[str, Comparison]) -> str:
    """One line per configuration, as Markdown."""
    lines = ["| configuration | ours, s | TRL 0.11.4, s | TRL / ours (lowest to highest) |", "|---|---|---|---|"]
    for name, row in comparisons.items():
        cells = [f"{row.ours:.3f}", "", ""]
        if row.trl is not None:
            cells[1:] = [f"{row.trl:.3f}", f"{row.ratio:.2f} ({row.lowest:.2f} to {row.highest:.2f})"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    positive("rounds", args.rounds)
    positive("warm-up", args.warm_up, zero=True)
    if args.make_trl_env:
        args.trl_python = make_trl_environment(Path(args.make_trl_env).expanduser())
    elif args.trl_python and not Path(args.trl_python).is_file():
        raise UserError(f"--trl-python {args.trl_python} does not exist; make one with --make-trl-env FOLDER")
    figures, comparisons = [], {}
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(tokenizer := Path(folder) / "tokenizer.json")
        for model in args.models:
            for kind in KINDS:
                name = f"{model}, {kind}"
                with workers(args, model, kind, tokenizer) as sides:
                    answers = measure(sides, args.rounds, args.warm_up, name)
                    ready = {side: worker.ready for side, worker in sides.items()}
                seconds = {side: [answer["seconds"] for answer in rows] for side, rows in answers.items()}
                comparisons[name] = compare(seconds["ours"], seconds.get("TRL"))
                figures.append({"configuration": name, **comparisons[name]._asdict(), "sides": ready, "steps": answers})
    text = table(comparisons)
    print(text)
    output = Path(args.output)
    write_json(output, {"cores": os.cpu_count(), "threads": args.threads, "configurations": figures})
    with atomic_file(output.with_suffix(".md")) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
