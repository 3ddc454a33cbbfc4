"""What the training scripts share: flags, PPO maths, losses, checkpoints, metrics and plots.

    from training import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer    TRL 0.11's, on MLX

These are imported when they are asked for; docs/from_trl.md is about them.
"""

from importlib import import_module
from typing import Any

import common  # noqa: F401  so that Ctrl-C among the imports of a command is one line

TRL_NAMES = {
    "PPOConfig": "training.trl_config",
    "LengthSampler": "training.trl_config",
    "PPOTrainer": "training.trainer",
    "AutoModelForCausalLMWithValueHead": "training.trainer",
    "create_reference_model": "training.trainer",
    "set_seed": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in TRL_NAMES:
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    if TRL_NAMES[name] == "training.trainer":
        from models import cpu

        cpu.enable()  # before mlx is imported: code that comes from TRL is an entry point
    return getattr(import_module(TRL_NAMES[name]), name)
