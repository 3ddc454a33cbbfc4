"""The tables of docs/which_mac.md and docs/recipes.md: plans by the scripts' own flags, of models whose config.json is
written down here.

tests/test_plan_tables.py holds the sizes to the published ones, tests/flag_tables.py writes the tables.

python -m tests.plan_tables        prints them
"""

import argparse
import shlex
from typing import Any

import ppo_training
import sft
from models.adapter_config import AdapterConfig
from models.gpu import a_mac
from models.memory_plan import MemoryPlan
from models.outline import outline_of
from tests.scripts import ROOT, parser_of
from training.planning import Planned, gigabytes, planned_with

MACS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)  # GB
FOUR_BITS, EIGHT_BITS = ({"quantization": {"bits": bits, "group_size": 64}} for bits in (4, 8))
PARSERS = {"sft.py": sft.parse_args, "ppo_training.py": ppo_training.parse_args}


def _config(family: str, hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, width: int,
            vocabulary: int, tied: bool) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32_768,
        "dtype": "bfloat16",
    }


# What their config.json say of sizes.
CONFIGS = {
    "Qwen/Qwen3-0.6B": _config("qwen3", 1024, 28, 3072, 16, 8, 128, 151_936, True),
    "meta-llama/Llama-3.2-1B-Instruct": _config("llama", 2048, 16, 8192, 32, 8, 64, 128_256, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _config("llama", 2048, 24, 8192, 32, 32, 64, 49_152, True),
    "meta-llama/Llama-3.2-3B-Instruct": _config("llama", 3072, 28, 8192, 24, 8, 128, 128_256, True),
    "mistralai/Mistral-7B-Instruct-v0.3": _config("mistral", 4096, 32, 14_336, 32, 8, 128, 32_768, False),
    "Qwen/Qwen2.5-7B-Instruct": _config("qwen2", 3584, 28, 18_944, 28, 4, 128, 152_064, False),
    "meta-llama/Llama-3.1-8B-Instruct": _config("llama", 4096, 32, 14_336, 32, 8, 128, 128_256, False),
    "Qwen/Qwen2.5-14B-Instruct": _config("qwen2", 5120, 48, 13_824, 40, 8, 128, 152_064, False),
}
CONFIGS["mlx-community/Qwen2.5-7B-Instruct-4bit"] = CONFIGS["Qwen/Qwen2.5-7B-Instruct"] | FOUR_BITS
CONFIGS["mlx-community/Mistral-7B-Instruct-v0.3-4bit"] = CONFIGS["mistralai/Mistral-7B-Instruct-v0.3"] | FOUR_BITS


def planned(command: str, length: int, memory: float, config: dict[str, Any] | None = None) -> Planned:
    """What --plan says of a command, `python SCRIPT FLAGS`, on a Mac with `memory` GB.

    config: of the model; by default that of the one that the command names. length: tokens of the longest text.
    """
    _, script, *words = shlex.split(command)
    args: argparse.Namespace = parser_of(PARSERS[script]).parse_args(words)
    args.resume_file = None  # the adapter that SFT leaves is as large as a new one
    return planned_with(script, args, config or CONFIGS[args.model], length, "here", a_mac(memory))


# docs/which_mac.md

LORA = AdapterConfig(model=None)  # type: ignore[arg-type]  # the flags' default, of which the plans have the outlines
SFT = "python sft.py --train --batch-size 4"
PPO = "python ppo_training.py --batch-size 32 --mini-batch-size 8 --max-completion-length 256 --grad-checkpoint"
RUNS = {  # column → command, length, what the base is stored in
    "SFT on 4-bit, `--grad-checkpoint`": (f"{SFT} --grad-checkpoint", 512, FOUR_BITS),
    "SFT on 4-bit": (SFT, 512, FOUR_BITS),
    "SFT on bfloat16": (SFT, 512, {}),
    "SFT, full": (f"{SFT} --fine-tune-type full", 512, {}),
    "PPO on 4-bit": (PPO, 256, FOUR_BITS),
    "PPO on bfloat16": (PPO, 256, {}),
}


def which_mac() -> str:
    """The table of docs/which_mac.md."""
    columns = ["model", "parameters", *(f"weights, {name}" for name in ("bfloat16", "8-bit", "4-bit")), *RUNS]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, config in CONFIGS.items():
        if "quantization" in config:
            continue
        weights = [outline_of(config | kind, LORA).weights for kind in ({}, EIGHT_BITS, FOUR_BITS)]
        plans = [planned(command, length, MACS[-1], config | kind).plan for command, length, kind in RUNS.values()]
        row = [name.split("/")[1], f"{weights[0] / 2e9:.2f} billion", *(f"{size / 1e9:.1f}" for size in weights)]
        lines.append(f"| {' | '.join([*row, *map(_with_mac, plans)])} |")
    return "\n".join(lines)


def _with_mac(plan: MemoryPlan) -> str:
    """Gigabytes, and the smallest Mac that has them to spare."""
    mac = next((memory for memory in MACS if plan.peak <= a_mac(memory).memory), None)
    return f"{plan.peak / 1e9:.1f} → {f'{mac} GB' if mac else 'none'}"


# docs/recipes.md

RECIPES = ("Qwen3-0.6B", "Llama-3.2-1B", "SmolLM2-1.7B", "Qwen2.5-7B, 4-bit", "Mistral-7B, 4-bit")  # sections
RECIPE_MACS = (8, 16, 32)
RECIPE_LENGTHS = {"sft.py": 512, "ppo_training.py": 256}  # tokens of a row, of a prompt


def recipe_commands(model: str) -> list[str]:
    """The commands that docs/recipes.md has for a model."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = page.split(f"## {model}\n", 1)[1].split("\n## ", 1)[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    python ")]


def recipe(model: str) -> str:
    """What --plan says of a recipe's commands on each Mac."""
    commands = recipe_commands(model)
    columns = ["", "peak, GB", "at", *(f"{memory} GB" for memory in RECIPE_MACS)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for command in commands:
        script = command.split()[1]
        on_each = [planned(command, RECIPE_LENGTHS[script], memory) for memory in RECIPE_MACS]
        plan = on_each[0].plan
        cells = [_stage(command), gigabytes(plan.peak), plan.widest, *map(_answer, on_each)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _stage(command: str) -> str:
    if "ppo_training.py" in command:
        return "PPO"
    return "reward model" if "--reward-model" in command else "SFT"


def _answer(found: Planned) -> str:
    return "fits" if found.fits else f"no: {found.remedy}"


if __name__ == "__main__":
    print(which_mac())
