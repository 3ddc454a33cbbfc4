"""What --plan says of a run's memory against what mlx measures, phase by phase, on narrow models with random weights.

    python benchmarks/plan.py
    python benchmarks/plan.py --cells full pairs --devices cpu

Each cell is a process of its own: SFT, reward model, DPO or PPO by the scripts' own flags, on texts as long as is
planned; the second step is measured. "cpu" is this machine with its replacements (models/cpu); "gpu" is mlx's own
operations in a compiled loss (TUNER_SIMULATE_GPU=1), which is what a Mac would run, computed on this CPU. Arrays of
NumPy (Adam's moments on CPU) are added to mlx's.
"""

import argparse
import json
import os
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
import mlx.nn as nn
import mlx_lm.utils
import numpy as np

from common.cli import run
from common.errors import UserError
from common.files import atomic_file
from common.parser import Parser
from data.batching import BatchPlan, Example
from models import token_stats
from models.adapters import AdapterConfig
from models.loading import LoadedModel
from models.memory_plan import MemoryPlan
from training import ppo_flags, ppo_learner, sft_flags, sft_loop
from training.advantages import advantages_and_returns
from training.flags import adapter_settings
from training.optimizer import bytes_of_numpy
from training.planning import PLANNERS, add_plan_flags
from training.settings import PPOSettings, SFTSettings

DEVICES = ("cpu", "gpu")
HELD_TO = 0.15  # the share by which the peak of a run may differ from its plan
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32_000,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
QWEN = {**LLAMA, "model_type": "qwen3", "vocab_size": 151_936, "rope_theta": 1e6, "max_position_embeddings": 4096}
SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 192, "head_dim": 16}
BF16, FOUR_BITS = {"dtype": "bfloat16"}, {"quantization": {"bits": 4, "group_size": 64}}
QUERIES_AND_VALUES = "--lora-layers -1 --lora-keys self_attn.q_proj self_attn.v_proj"
PPO = "--mini-batch-size 8 --ppo-epochs 1"


class Cell(NamedTuple):
    """A run: flags of a script, the model's config.json, and tokens of a text (of PPO: a prompt)."""

    script: str
    flags: str
    length: int
    config: dict[str, Any]


CELLS = {
    "lora": Cell("sft.py", "--lora-layers -1", 512, LLAMA),
    "queries and values": Cell("sft.py", QUERIES_AND_VALUES, 512, LLAMA),
    "dora": Cell("sft.py", "--lora-layers -1 --fine-tune-type dora", 256, LLAMA),
    "soft prompt": Cell("sft.py", "--prompt-tuning", 256, LLAMA),
    "full": Cell("sft.py", "--fine-tune-type full", 256, LLAMA),
    "checkpoint": Cell("sft.py", "--lora-layers -1 --grad-checkpoint", 1024, LLAMA),
    "last layers, long": Cell("sft.py", "--lora-layers 3 --batch-size 2", 2048, LLAMA),
    "short, large vocabulary": Cell("sft.py", "--lora-layers -1 --batch-size 16", 64, QWEN),
    "bf16": Cell("sft.py", "--lora-layers -1", 128, {**LLAMA, **SMALL, **BF16}),
    "4-bit": Cell("sft.py", "--lora-layers -1", 128, {**LLAMA, **SMALL, **BF16, **FOUR_BITS}),
    "4-bit dora": Cell("sft.py", "--lora-layers -1 --fine-tune-type dora", 128, {**LLAMA, **BF16, **FOUR_BITS}),
    "pieces": Cell("sft.py", "--lora-layers -1 --batch-size 16 --gradient-accumulation-steps 4", 256, LLAMA),
    "packed": Cell("sft.py", "--lora-layers -1 --pack --batch-size 8", 256, LLAMA),
    "small logits": Cell("sft.py", "--lora-layers 2 --logits-memory 64", 512, QWEN),
    "reward model": Cell("sft.py", "--reward-model --lora-layers -1", 256, LLAMA),
    "dpo": Cell("sft.py", "--dpo --lora-layers -1", 256, LLAMA),
    "ppo": Cell("ppo_training.py", f"--lora-layers -1 --batch-size 16 --max-completion-length 192 {PPO}", 64, LLAMA),
    "ppo, frozen layers": Cell(
        "ppo_training.py", f"--lora-layers 3 --batch-size 32 --max-completion-length 128 {PPO}", 384, LLAMA
    ),
    "ppo, full": Cell(
        "ppo_training.py", f"--fine-tune-type full --batch-size 8 --max-completion-length 64 {PPO}", 64, LLAMA
    ),
    "ppo, exact KL": Cell(
        "ppo_training.py",
        f"--lora-layers -1 --kl-penalty full --entropy-coef 0.01 --batch-size 8 --max-completion-length 64 {PPO}",
        64,
        QWEN,
    ),
    "ppo, bf16": Cell(
        "ppo_training.py",
        f"{QUERIES_AND_VALUES} --batch-size 8 --max-completion-length 64 {PPO}",
        64,
        {**LLAMA, **SMALL, **BF16},
    ),
    "ppo, groups": Cell(
        "ppo_training.py",
        f"--advantage group --lora-layers -1 --grad-checkpoint --batch-size 16 --max-completion-length 64 {PPO}",
        256,
        LLAMA,
    ),
}


class Tokenizer:
    """What training asks of one. No token ends a completion, so all are as long as they may be."""

    eos_token_ids: tuple[int, ...] = ()
    eos_token_id = pad_token_id = 0


def flags_of(cell: Cell) -> argparse.Namespace:
    """The flags of a cell, as its script reads them."""
    parser = sft_flags.sft_parser("") if cell.script == "sft.py" else ppo_flags.ppo_parser("")
    add_plan_flags(parser)
    words = ["--model", "none", *cell.flags.split()]
    if cell.script == "sft.py":
        return parser.parse_args([*words, "--train", "--max-length", str(cell.length)])
    return parser.parse_args([*words, "--num-steps", "2"])


def plan(cell: Cell, on_gpu: bool) -> MemoryPlan:
    """What --plan says of a cell."""
    return PLANNERS[cell.script].plan(flags_of(cell), cell.config, cell.length, on_gpu)


def build(config: dict[str, Any]) -> LoadedModel:
    """A model of random weights."""
    model_class, arguments = mlx_lm.utils._get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.set_dtype(getattr(mx, config["dtype"]))
    if "quantization" in config:
        nn.quantize(model, **config["quantization"])
    mx.eval(model.parameters())
    model.eval()
    return LoadedModel(model, Tokenizer(), config, ROOT, "random")


def peak_of(phase: Callable[[], Any]) -> int:
    """Bytes of mlx's arrays at most while `phase` runs."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    phase()
    mx.synchronize()
    return mx.get_peak_memory()


def measure(cell: Cell) -> dict[str, int]:
    """Phase → bytes at most, in the second step."""
    mx.random.seed(0)
    args, loaded, rng = flags_of(cell), build(cell.config), np.random.default_rng(0)
    adapter = AdapterConfig(**adapter_settings(args))

    def text(length: int) -> list[int]:
        return rng.integers(1, cell.config["vocab_size"], length).tolist()

    return (_measure_sft if cell.script == "sft.py" else _measure_ppo)(args, cell, loaded, adapter, text)


def _measure_sft(args, cell: Cell, loaded: LoadedModel, adapter: AdapterConfig, text) -> dict[str, int]:
    settings = SFTSettings.from_flags(args)
    trainee = sft_loop.build_trainee(loaded, settings, adapter, args.reward_model, args.grad_checkpoint)
    objective: Any = sft_loop.make_objective(trainee, loaded.tokenizer, settings)
    pairs = args.reward_model or settings.dpo
    first = len(objective.prefix) + 1
    count = settings.batch_size * (2 if pairs else 1)
    # Of pairs, rows without a prompt; of the soft prompt, planned beside the text.
    objective.examples = [Example([*objective.prefix, *text(cell.length + 1)], first) for _ in range(count)]
    if pairs:
        objective.rewards, objective.reference, objective._epoch = None, np.zeros(count, dtype=np.float32), -1
        objective._draw(0)
    else:
        objective.plan = BatchPlan([len(example.tokens) for example in objective.examples], settings.batch_size, 0)
    optimizer = sft_loop.make_sft_optimizer(trainee, settings)
    mx.eval(trainee.module.parameters(), optimizer.state)
    validation = peak_of(lambda: sft_loop.evaluate(trainee.module, objective, 1))
    steps = sft_loop.sft_steps(trainee.module, optimizer, objective, objective, settings, sft_loop.SFTProgress())
    next(steps)
    peak, outside = peak_of(lambda: next(steps)), bytes_of_numpy(optimizer)
    return {"training": peak + outside, "validation": validation + outside}


def _measure_ppo(args, cell: Cell, loaded: LoadedModel, adapter: AdapterConfig, text) -> dict[str, int]:
    settings = PPOSettings.from_flags(args)
    policy, reference = ppo_learner.build_policies(loaded, settings, adapter, args.grad_checkpoint)
    optimizer = ppo_learner.make_ppo_optimizer(policy, settings)
    mx.eval(policy.module.parameters(), reference.parameters(), optimizer.state)
    learner = ppo_learner.PPOLearner(policy.module, reference, loaded.tokenizer, optimizer, settings)
    repeats = settings.num_generations if settings.advantage == "group" else 1
    prompts = [each for _ in range(settings.batch_size // repeats) for each in [text(cell.length)] * repeats]
    scores = np.random.default_rng(0).normal(size=settings.batch_size).astype(np.float32)
    found: dict[str, Any] = {}

    def score() -> None:
        found["rollout"], entropy = learner.experience(prompts, found["completions"], scores)
        mx.eval(entropy)

    for step in range(2):
        found.clear()
        sampling = peak_of(lambda: found.update(completions=learner.sample(prompts)))
        scoring = peak_of(score)
        estimates = advantages_and_returns(found["rollout"], settings, 0.01)
        update = peak_of(lambda: learner.update(step, found["rollout"], *estimates, 0.01))  # noqa: B023
    outside = bytes_of_numpy(optimizer)
    return {"sampling": sampling + outside, "scoring": scoring + outside, "update": update + outside}


def in_process(name: str, device: str) -> dict[str, int]:
    """`measure` in a process of its own. Raises UserError where that dies."""
    environment = {**os.environ, "TUNER_SIMULATE_GPU": str(int(device == "gpu"))}
    process = subprocess.run(
        [sys.executable, __file__, "--measure", name], capture_output=True, text=True, env=environment
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{name} on {device} ended with code {process.returncode} ({last})")
    return json.loads(process.stdout.splitlines()[-1])


def line(name: str, device: str, planned: MemoryPlan, measured: dict[str, int]) -> str:
    """One row of the table: MB planned and measured of the widest phase, their ratio, and that of every phase."""
    widest = max(measured, key=lambda phase: measured[phase])
    ratio = planned.peak / measured[widest]
    others = ", ".join(f"{phase} {planned.peak_of(phase) / size:.2f}" for phase, size in measured.items())
    figures = [f"{planned.peak / 1e6:.0f}", f"{measured[widest] / 1e6:.0f}", f"{ratio:.2f}", others]
    return f"| {' | '.join([name, device, *figures])} |"


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--cells", nargs="+", choices=tuple(CELLS), default=list(CELLS), help="what to run")
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=list(DEVICES), help="where, or as if there")
    parser.add_argument("--output", default="runs/plan.md", help="file of the table")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.measure:
        if cpu.simulating_gpu():
            for module in ("training.optimizer", "training.ppo_learner"):
                sys.modules[module].compiling_pays = lambda: True  # type: ignore[attr-defined]
            token_stats.ALIVE_ON_CPU = token_stats.ALIVE_ON_GPU
        print(json.dumps(measure(CELLS[args.measure])))
        return
    lines = ["| run | device | planned, MB | measured, MB | planned / measured | each phase |", "|---" * 6 + "|"]
    print("\n".join(lines), flush=True)
    started = time.perf_counter()
    for name in args.cells:
        for device in args.devices:
            lines.append(line(name, device, plan(CELLS[name], device == "gpu"), in_process(name, device)))
            print(lines[-1], flush=True)
    print(f"{time.perf_counter() - started:.0f} s")
    with atomic_file(Path(args.output)) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
