"""Real tokens a second of SFT, packed and not, against `mlx_lm.lora` and mlx-lm-lora on the same rows.

    python benchmarks/sft_step.py                     texts of 16 to 256 tokens, all trained
    python benchmarks/sft_step.py --masked            prompts three times as long as the replies, which alone count

    pip install --no-deps --target FOLDER mlx-lm-lora==5.10.2; PYTHONPATH=FOLDER python benchmarks/sft_step.py

A random Llama (hidden 192, 6 layers, vocabulary 16 000) with a LoRA of rank 8 on all layers is trained by Adam. A pass
takes every row once, in batches by each side's own plan: mlx-lm's `train`, mlx-lm-lora's `train_sft`, if it is there,
and our step with and without --pack. Passes take turns in one process, with the same BLAS, so that a busy machine slows
all alike; what counts is the ratio within a round. A real token is one of a row, prompts included, pads not. The loss
is that of all rows after the last pass, as our evaluation has it.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import cpu

cpu.enable()  # before mlx is imported

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models import llama
from mlx_lm.tuner import trainer

from common.cli import run
from common.parser import Parser, positive
from data.batching import BatchPlan, Example
from models.adapters import AdapterConfig, attach_adapter
from training.objectives import LanguageModelling, PackedLanguageModelling
from training.optimizer import loss_and_gradients, make_optimizer, update
from training.sft_loop import evaluate

try:
    from mlx_lm_lora.trainer import sft_trainer
except ImportError:
    sft_trainer = None

VOCABULARY = 16_000
MODEL = {
    "model_type": "llama", "hidden_size": 192, "num_hidden_layers": 6, "intermediate_size": 512,
    "num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}  # fmt: skip
SHORTEST, LONGEST = 16, 256
RATE = 5e-4
TRAINING = {"max_seq_length": LONGEST + 32, "steps_per_report": 10**6, "steps_per_save": 10**6}  # of either trainer
THEIRS, OTHERS, OURS, PACKED = "mlx_lm.lora", "mlx-lm-lora", "sft.py", "sft.py --pack"


class NoTokenizer:
    """All that a batch asks of a tokenizer."""

    pad_token_id = 0


class Rows:
    """What mlx-lm's trainer takes for a data set: (tokens, tokens of the prompt) by index."""

    def __init__(self, examples: list[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]

    def process(self, example: Example) -> tuple[list[int], int]:
        """As mlx-lm's data sets do, when a row is first asked for."""
        return example.tokens, example.first_target - 1


def make_rows(count: int, masked: bool, seed: int = 0) -> list[Example]:
    """Rows of log-normal lengths: most are short, a few long."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(64), 0.7, count), SHORTEST, LONGEST).astype(int)
    tokens = [rng.integers(1, VOCABULARY, length).tolist() for length in lengths]
    return [Example(each, max(len(each) * 3 // 4, 1) if masked else 1) for each in tokens]


def make_model() -> nn.Module:
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(MODEL))
    attach_adapter(model, AdapterConfig(num_layers=-1))
    model.train()
    mx.eval(model.parameters())
    return model


def make_adam() -> optim.Adam:
    """Theirs, with the bias correction that ours has, so that losses compare."""
    return optim.Adam(learning_rate=RATE, bias_correction=True)


def make_objective(kind: type[LanguageModelling], examples: list[Example], batch_size: int) -> LanguageModelling:
    objective = kind(NoTokenizer(), [], batch_size, LONGEST, 0)
    objective.examples = examples
    objective.plan = BatchPlan([len(example.tokens) for example in examples], batch_size, 0)
    return objective


class Ours:
    """Passes by our own step."""

    def __init__(self, kind: type[LanguageModelling], examples: list[Example], batch_size: int):
        self.model = make_model()
        self.objective = make_objective(kind, examples, batch_size)
        self.optimizer = make_optimizer(RATE, 10**6)
        self.optimizer.init(self.model.trainable_parameters())
        self.gradients_of = loss_and_gradients(self.model, self.objective.loss)
        self.steps = 0

    def one_pass(self) -> float:
        """Take every row once; returns the seconds."""
        started = time.perf_counter()
        for _ in range(self.objective.steps_per_epoch):
            (loss, _), gradients = self.gradients_of(*self.objective.batch(self.steps))
            update(self.model, self.optimizer, loss, gradients, 1.0, self.steps)
            self.steps += 1
        mx.synchronize()
        return time.perf_counter() - started


class Others:
    """Passes by mlx-lm-lora's trainer, which is called for each of them."""

    def __init__(self, examples: list[Example], batch_size: int):
        self.model, self.adam = make_model(), make_adam()
        self.dataset = sft_trainer.CacheDataset(Rows(examples))
        self.batches = sft_trainer.iterate_batches(self.dataset, batch_size, LONGEST + 32, train=True)
        self.settings = {"batch_size": batch_size, "iters": len(examples) // batch_size, **TRAINING}

    def one_pass(self) -> float:
        """Take every row once; returns the seconds."""
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # its progress bar
            if "max_recommended_working_set_size" not in mx.device_info():  # which it asks for, and only Metal has
                limit = {"max_recommended_working_set_size": 0}
                stack.enter_context(mock.patch.object(mx, "device_info", return_value=limit))
                stack.enter_context(mock.patch.object(mx, "set_wired_limit"))
            path = str(Path(folder) / "adapters.safetensors")
            arguments = sft_trainer.SFTTrainingArgs(adapter_file=path, **self.settings)
            started = time.perf_counter()
            sft_trainer.train_sft(
                self.model, self.adam, self.dataset, args=arguments, iterate_batches=lambda **_: self.batches
            )
            return time.perf_counter() - started


def measure(examples: list[Example], batch_size: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every pass and the loss at the end, by side. In each round all take a pass; the first is dropped."""
    sides: dict[str, Ours | Others] = {
        OURS: Ours(LanguageModelling, examples, batch_size),
        PACKED: Ours(PackedLanguageModelling, examples, batch_size),
    }
    if sft_trainer is not None:
        sides[OTHERS] = Others(examples, batch_size)
    seconds: dict[str, list[float]] = {THEIRS: [], **{name: [] for name in sides}}
    per_pass = len(examples) // batch_size

    def in_turns(dataset: Any, batch_size: int, max_seq_length: int, **arguments: Any) -> Iterator[Any]:
        """mlx-lm's batches; between its passes come ours, and what passes until the next is asked for is its step."""
        batches = trainer.iterate_batches(dataset, batch_size, max_seq_length, **arguments)
        for _ in range(rounds + 1):
            for name, side in sides.items():
                seconds[name].append(side.one_pass())
            spent = 0.0
            for _ in range(per_pass):
                batch = next(batches)
                started = time.perf_counter()
                yield batch
                spent += time.perf_counter() - started
            seconds[THEIRS].append(spent)
            print(f"round {len(seconds[THEIRS]) - 1}", file=sys.stderr, flush=True)
        models = {THEIRS: model, **{name: side.model for name, side in sides.items()}}
        losses.update({name: evaluate(trained, whole)["valid_loss"] for name, trained in models.items()})
        yield next(batches)  # asking for it ends the last round; it belongs to none

    model, losses = make_model(), {}  # type: tuple[nn.Module, dict[str, float]]
    whole = make_objective(LanguageModelling, examples, batch_size)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = trainer.TrainingArgs(
            batch_size=batch_size, iters=(rounds + 1) * per_pass + 1,
            adapter_file=str(Path(folder) / "adapters.safetensors"), **TRAINING,
        )  # fmt: skip
        dataset = trainer.CacheDataset(Rows(examples))
        trainer.train(model, make_adam(), dataset, args=settings, iterate_batches=in_turns)
    return {name: values[1:] for name, values in seconds.items()}, losses


def table(seconds: dict[str, list[float]], losses: dict[str, float], tokens: int) -> str:
    """Tokens a second, by rounds how many times mlx-lm's, and the loss in nats."""
    lines = ["| | real tokens a second | times mlx_lm.lora's (lowest to highest round) | loss |", "|---|---|---|---|"]
    for name, values in seconds.items():
        ratios = np.array(seconds[THEIRS]) / np.array(values)
        ratio = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        lines.append(f"| {name} | {tokens / np.median(values):.0f} | {ratio} | {losses[name]:.3f} |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--rows", type=int, default=64, help="a multiple of --batch-size")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--masked", action="store_true", help="train the last quarter of each row alone")
    args = parser.parse_args()
    for name in ("rows", "batch_size", "rounds"):
        positive(name.replace("_", "-"), getattr(args, name))
    return args


def main() -> None:
    args = parse_args()
    examples = make_rows(args.rows - args.rows % args.batch_size, args.masked)
    lengths = [len(example.tokens) for example in examples]
    print(f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens, mean {np.mean(lengths):.0f}; {cpu.BLAS}")
    print(table(*measure(examples, args.batch_size, args.rounds), sum(lengths)))


if __name__ == "__main__":
    run(main)
