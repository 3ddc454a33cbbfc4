"""Peak memory and seconds of a training step's losses with a large vocabulary: in pieces, and with whole logits.

    python benchmarks/memory.py
    python benchmarks/memory.py --tasks sft --types float32 --logits-bytes 100_000_000

The model is narrow, so that what is measured is the work on the logits: SFT of 4 rows of 1024 tokens, PPO's scoring
(logprobs of policy and reference, entropy, exact KL) and PPO's update (with an entropy bonus) of 8 completions of 512
tokens. "pieces" is models/token_stats.py, "whole" are the same figures from logits (B, C, V), "mlx-lm" is the
`default_loss` of its trainer. Each cell is a process of its own. An array (B, C, V) in float32 is the unit of the
peaks. Whole logits take up to a dozen of them, so those cells have --whole-share of the positions; seconds are per
1000 positions.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import cpu

cpu.enable()  # before mlx is imported

import mlx.core as mx
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from common.cli import run
from common.errors import UserError
from common.files import atomic_file
from common.parser import Parser, positive
from models.token_stats import LOGITS_BYTES, token_stats
from models.value_head import Policy, ValueHead, forward
from training import ppo
from training.optimizer import loss_and_gradients

SHAPES = {"sft": (4, 1024), "scoring": (8, 512), "update": (8, 512)}  # rows, positions a row
WAYS = {"sft": ("pieces", "whole", "mlx-lm"), "scoring": ("pieces", "whole"), "update": ("pieces", "whole")}
TYPES = ("float32", "bfloat16")
TEMPERATURE = 0.7


class Cell(NamedTuple):
    """What one process measures."""

    task: str
    way: str
    type: str
    rows: int
    length: int
    vocabulary: int
    hidden: int
    logits_bytes: int
    repeats: int


def build_model(cell: Cell) -> Model:
    """A Llama of one layer and one head, with a LoRA on its queries and values."""
    sizes = {"hidden_size": cell.hidden, "intermediate_size": 2 * cell.hidden, "vocab_size": cell.vocabulary}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": True}
    settings = {"model_type": "llama", "num_hidden_layers": 1, "rms_norm_eps": 1e-6, **sizes, **heads}
    model = Model(ModelArgs.from_dict(settings))
    model.set_dtype(getattr(mx, cell.type))
    model.freeze()
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    linear_to_lora_layers(model, 1, {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": keys})
    model.train()
    mx.eval(model.parameters())
    return model


def sft(cell: Cell) -> Callable[[], Any]:
    """The mean cross-entropy, the number of right guesses, and the gradients."""
    model, tokens = build_model(cell), mx.random.randint(0, cell.vocabulary, (cell.rows, cell.length + 1))
    mask = mx.ones((cell.rows, cell.length))
    positions = mx.broadcast_to(mx.arange(cell.length), mask.shape)
    mx.eval(tokens, mask, positions)

    def pieces(model, tokens, mask):
        _, hidden = forward(model, tokens[:, :-1], positions)
        stats = token_stats(model, hidden, tokens[:, 1:], correct=True, training=True, logits_bytes=cell.logits_bytes)
        return -ppo.masked_mean(stats.logprobs, mask), (stats.correct * mask).sum()

    def whole(model, tokens, mask):
        logits = model(tokens[:, :-1])
        loss = -ppo.masked_mean(ppo.logprobs_from_logits(logits, tokens[:, 1:]), mask)
        return loss, ((logits.argmax(axis=-1) == tokens[:, 1:]) * mask).sum()

    if cell.way == "mlx-lm":
        lengths = mx.array([[0, cell.length + 1]] * cell.rows)
        gradients_of = loss_and_gradients(model, default_loss)
        return lambda: gradients_of(tokens, lengths)
    gradients_of = loss_and_gradients(model, pieces if cell.way == "pieces" else whole)
    return lambda: gradients_of(tokens, mask)


def completions_of(cell: Cell) -> tuple[mx.array, mx.array]:
    """Tokens (B, L) and positions (B, C), with a prompt of 8 tokens."""
    tokens = mx.random.randint(0, cell.vocabulary, (cell.rows, cell.length + 8))
    positions = mx.broadcast_to(mx.arange(7, cell.length + 7), (cell.rows, cell.length))
    return tokens, positions


def scoring(cell: Cell) -> Callable[[], Any]:
    """Logprobs of policy and reference, exact KL and entropy."""
    model, reference = build_model(cell), build_model(cell)
    tokens, positions = completions_of(cell)
    ids = tokens[:, 8:]

    def pieces():
        _, hidden = forward(model, tokens, positions)
        _, ref_hidden = forward(reference, tokens, positions)
        arguments: dict[str, Any] = {
            "entropy": True,
            "reference": (reference, ref_hidden),
            "logits_bytes": cell.logits_bytes,
        }
        stats = token_stats(model, hidden, ids, TEMPERATURE, **arguments)
        return stats.logprobs, stats.ref_logprobs, stats.kl, stats.entropy

    def whole():
        logits, ref_logits = forward(model, tokens, positions)[0], forward(reference, tokens, positions)[0]
        logprobs = [ppo.logprobs_from_logits(each, ids, TEMPERATURE) for each in (logits, ref_logits)]
        kl = ppo.full_kl(logits, ref_logits, TEMPERATURE)
        return *logprobs, kl, ppo.entropy_from_logits(logits, TEMPERATURE)

    return pieces if cell.way == "pieces" else whole


def update(cell: Cell) -> Callable[[], Any]:
    """PPO's loss with a value head and an entropy bonus, and the gradients."""
    policy = Policy(build_model(cell), ValueHead(cell.hidden))
    tokens, positions = completions_of(cell)
    ids, zeros = tokens[:, 8:], mx.zeros(positions.shape)
    advantages = mx.random.normal(positions.shape)
    mx.eval(policy.parameters(), ids, positions, zeros, advantages)

    def loss(policy, tokens, advantages):
        if cell.way == "pieces":
            _, hidden = forward(policy.model, tokens, positions)
            arguments: dict[str, Any] = {"entropy": True, "training": True, "logits_bytes": cell.logits_bytes}
            stats = token_stats(policy.model, hidden, ids, TEMPERATURE, **arguments)
            logprobs, entropy, values = stats.logprobs, stats.entropy, policy.value_head(hidden)
        else:
            logits, hidden = forward(policy.model, tokens, positions)
            values = policy.value_head(hidden)
            logprobs = ppo.logprobs_from_logits(logits, ids, TEMPERATURE)
            entropy = ppo.entropy_from_logits(logits, TEMPERATURE)
        old_logprobs = mx.stop_gradient(logprobs)
        arrays = (logprobs, values, old_logprobs, zeros, advantages, zeros, mx.ones_like(zeros))
        return ppo.ppo_loss(*arrays, 0.2, 0.2, 0.1, entropy=entropy, entropy_coef=0.01)

    gradients_of = loss_and_gradients(policy, loss)
    return lambda: gradients_of(tokens, advantages)


def measure(cell: Cell) -> dict[str, float]:
    """Peak bytes of one run after the first, and the median seconds of `repeats` runs."""
    mx.random.seed(0)
    step = {"sft": sft, "scoring": scoring, "update": update}[cell.task](cell)
    seconds = []
    for index in range(cell.repeats + 1):
        if index == 1:
            mx.reset_peak_memory()
        started = time.perf_counter()
        mx.eval(step())
        mx.synchronize()
        seconds.append(time.perf_counter() - started)
    held = mx.get_active_memory()
    return {"peak": mx.get_peak_memory(), "held": held, "seconds": statistics.median(seconds[1:])}


def in_process(cell: Cell) -> dict[str, float]:
    """`measure` in a process of its own. Raises UserError where that dies."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{cell} ended with code {process.returncode} ({last}); give a smaller --whole-share")
    return json.loads(process.stdout.splitlines()[-1])


def cells(args: argparse.Namespace) -> list[Cell]:
    """All that is to be measured."""
    made = []
    for task in args.tasks:
        rows, length = SHAPES[task]
        for kind in args.types:
            for way in WAYS[task]:
                if way in args.ways:
                    own = max(1, int(length * (args.share if way == "pieces" else args.whole_share)))
                    sizes = (rows, own, args.vocabulary, args.hidden, args.logits_bytes, args.repeats)
                    made.append(Cell(task, way, kind, *sizes))
    return made


def line(cell: Cell, figures: dict[str, float]) -> str:
    """One row of the table."""
    positions = cell.rows * cell.length
    array = positions * cell.vocabulary * 4
    peak = figures["peak"]
    columns = [cell.task, cell.type, cell.way, f"{cell.rows} × {cell.length}", f"{peak / 1e9:.3f}"]
    columns += [f"{peak / array:.3f}", f"{figures['held'] / 1e9:.3f}", f"{figures['seconds'] / positions * 1000:.2f}"]
    return f"| {' | '.join(columns)} |"


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--tasks", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="what to compute")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="of the model")
    parser.add_argument("--ways", nargs="+", choices=WAYS["sft"], default=list(WAYS["sft"]), help="how to compute it")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="size of the vocabulary")
    parser.add_argument("--hidden", type=int, default=16, help="width of the model")
    parser.add_argument("--logits-bytes", type=int, default=LOGITS_BYTES, help="of all logits at once, in pieces")
    parser.add_argument("--share", type=float, default=1.0, help="of the positions, for pieces")
    parser.add_argument("--whole-share", type=float, default=0.125, help="of the positions, for whole logits")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each cell, after one that is not")
    parser.add_argument("--output", default="runs/memory.md", help="file of the table")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.cell:
        print(json.dumps(measure(Cell(*json.loads(args.cell)))))
        return
    positive("repeats", args.repeats)
    lines = [
        "| task | type | way | positions | peak, GB | peak, arrays (B, C, V) | held, GB | s per 1000 positions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for cell in cells(args):
        lines.append(line(cell, in_process(cell)))
        print(lines[-1], flush=True)
    with atomic_file(Path(args.output)) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
