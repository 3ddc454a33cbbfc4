"""Checkpoints from which a run continues as if it had never stopped.

    RUN/checkpoints/000200/adapter/     an adapter, complete in itself
                           value_head.safetensors, optimizer.safetensors, state.json

Each is written under a temporary name and renamed, so a folder with a number is complete. Randomness and data order
are functions of (seed, step), so saving the step saves both; the loops reseed at every step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from common.errors import UserError
from models.adapters import AdapterConfig, read_adapter, save_adapter, set_adapter_weights
from models.arrays import read_arrays
from models.value_head import ScoringModel, ValueHead, load_value_head, save_value_head
from training.checkpoint_folders import (
    DAMAGED,
    KEPT,
    OPTIMIZER_FILE,
    best_folder,
    last_checkpoint,
    new_checkpoint,
    read_state,
)
from training.mlx_ranks import from_first
from training.optimizer import optimizer_arrays, restore_optimizer
from training.ranks import Ranks


@dataclass
class Trainee:
    """What a run trains: the model with its adapter, perhaps a value head, and the module that holds both."""

    model: nn.Module
    adapter: AdapterConfig
    module: nn.Module
    value_head: ValueHead | None = None
    new: bool = True  # whether the adapter was made for this run, not loaded

    @property
    def reward_head(self) -> ValueHead | None:
        """The head that is part of the result: a reward model's. PPO's critic is used within its own run only."""
        return self.value_head if isinstance(self.module, ScoringModel) else None

    def sizes(self) -> tuple[int, int]:
        """Number of trainable weights, and of all weights."""
        trainable, everything = self.module.trainable_parameters(), self.module.parameters()
        return tuple(sum(array.size for _, array in tree_flatten(tree)) for tree in (trainable, everything))


def save_checkpoint(
    run_folder: str | Path,
    step: int,
    trainee: Trainee,
    optimizer: optim.Optimizer,
    state: dict[str, Any],
    keep: int = KEPT,
) -> Path:
    """Write a checkpoint after `step` steps, delete all but the last `keep` (0: none), and return its folder."""
    with new_checkpoint(run_folder, step, state, keep) as temporary:
        save_adapter(temporary / "adapter", trainee.model, trainee.adapter, trainee.reward_head)
        if trainee.value_head is not None:
            save_value_head(temporary, trainee.value_head)
        mx.save_safetensors(str(temporary / OPTIMIZER_FILE), optimizer_arrays(optimizer))
    return last_checkpoint(run_folder)


def restore_checkpoint(folder: Path, trainee: Trainee, optimizer: optim.Optimizer) -> dict[str, Any]:
    """Restore weights and optimizer; returns the state that was saved with them."""
    saved = read_adapter(folder / "adapter")
    set_adapter_weights(trainee.model, saved.weights, folder)
    if trainee.value_head is not None:
        head = load_value_head(folder, trainee.value_head.weight.shape[1])
        if head is None:
            raise UserError(f"{folder} holds no value head; resume with the run's own flags")
        trainee.value_head.update(head.parameters())
    restore_optimizer(optimizer, trainee.module, read_arrays(folder / OPTIMIZER_FILE, DAMAGED, weights=False))
    return read_state(folder)


def share_checkpoint(ranks: Ranks, trainee: Trainee, optimizer: optim.Optimizer) -> None:
    """Give all ranks the trained weights and the optimizer state that rank 0 has."""
    if ranks.size > 1:
        trainee.module.update(from_first(ranks, trainee.module.trainable_parameters()))
        optimizer.state = from_first(ranks, optimizer_arrays(optimizer))


def save_best(run_folder: str | Path, step: int, trainee: Trainee) -> None:
    """Keep the adapter as it is after `step` steps, whose evaluation is the best so far."""
    save_adapter(best_folder(run_folder, step), trainee.model, trainee.adapter, trainee.reward_head)


def restore_best(run_folder: str | Path, step: int, trainee: Trainee) -> None:
    """Restore the adapter that `save_best` kept after `step` steps."""
    folder = best_folder(run_folder, step)
    saved = read_adapter(folder)
    set_adapter_weights(trainee.model, saved.weights, folder)
    if trainee.reward_head is not None and saved.value_head is not None:
        trainee.reward_head.update(saved.value_head.parameters())
