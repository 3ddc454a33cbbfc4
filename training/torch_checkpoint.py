"""Checkpoints in PyTorch, from which a run continues as if it had never stopped.

The twin of training.checkpoint, with the same files: safetensors and JSON, never a pickle.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from common.errors import UserError
from models.adapter_config import AdapterConfig
from models.torch_adapters import read_adapter, save_adapter, set_adapter_weights
from models.torch_arrays import read_arrays
from models.torch_value_head import Policy, ValueHead, load_value_head, save_value_head
from training.checkpoint_folders import (
    DAMAGED,
    KEPT,
    OPTIMIZER_FILE,
    best_folder,
    last_checkpoint,
    new_checkpoint,
    read_state,
)
from training.ranks import Ranks
from training.torch_optimizer import ScheduledOptimizer


@dataclass
class Trainee:
    """What a run trains: the model with its adapter, perhaps a value head, and the module that holds both."""

    model: nn.Module
    adapter: AdapterConfig
    module: Policy
    value_head: ValueHead | None = None

    def sizes(self) -> tuple[int, int]:
        """Number of trainable weights, and of all weights."""
        weights = list(self.module.parameters())
        return sum(w.numel() for w in weights if w.requires_grad), sum(w.numel() for w in weights)


def save_checkpoint(
    run_folder: str | Path,
    step: int,
    trainee: Trainee,
    optimizer: ScheduledOptimizer,
    state: dict[str, Any],
    keep: int = KEPT,
) -> Path:
    """Write a checkpoint after `step` steps, delete all but the last `keep` (0: none), and return its folder."""
    with new_checkpoint(run_folder, step, state, keep) as temporary:
        save_adapter(temporary / "adapter", trainee.model, trainee.adapter)
        if trainee.value_head is not None:
            save_value_head(temporary, trainee.value_head)
        save_file(optimizer.arrays(), temporary / OPTIMIZER_FILE)
    return last_checkpoint(run_folder)


def restore_checkpoint(folder: Path, trainee: Trainee, optimizer: ScheduledOptimizer) -> dict[str, Any]:
    """Restore weights and optimizer; returns the state that was saved with them."""
    saved = read_adapter(folder / "adapter")
    set_adapter_weights(trainee.model, saved.weights, folder)
    if trainee.value_head is not None:
        head = load_value_head(folder, trainee.value_head.weight.shape[1])
        if head is None:
            raise UserError(f"{folder} holds no value head; resume with the run's own flags")
        trainee.value_head.load_state_dict(head.state_dict())
    optimizer.restore(read_arrays(folder / OPTIMIZER_FILE, DAMAGED, weights=False))
    return read_state(folder)


def share_checkpoint(ranks: Ranks, trainee: Trainee, optimizer: ScheduledOptimizer) -> None:
    """Give all ranks the trained weights and the optimizer state that rank 0 has."""
    if ranks.size == 1:
        return
    state = optimizer.arrays()
    kinds = ranks.from_writer(lambda: {name: (str(a.dtype)[6:], *a.shape) for name, a in state.items()})
    if not ranks.writes:
        device = trainee.model.device
        state = {
            name: torch.zeros(shape, dtype=getattr(torch, dtype), device=device if shape else "cpu")
            for name, (dtype, *shape) in kinds.items()
        }
    own = [*optimizer.weights, *state.values()]
    shared = ranks.sum([array.detach() if ranks.writes else torch.zeros_like(array) for array in own])
    weights, arrays = shared[: len(optimizer.weights)], shared[len(optimizer.weights) :]
    if not ranks.writes:
        for weight, value in zip(optimizer.weights, weights, strict=True):
            weight.data.copy_(value)
        optimizer.restore(dict(zip(state, arrays, strict=True)))


def save_best(run_folder: str | Path, step: int, trainee: Trainee) -> None:
    """Keep the adapter as it is after `step` steps, whose evaluation is the best so far."""
    save_adapter(best_folder(run_folder, step), trainee.model, trainee.adapter)


def restore_best(run_folder: str | Path, step: int, trainee: Trainee) -> None:
    """Restore the adapter that `save_best` kept after `step` steps."""
    folder = best_folder(run_folder, step)
    saved = read_adapter(folder)
    set_adapter_weights(trainee.model, saved.weights, folder)
