"""Gradient checkpointing in PyTorch: recompute activations in the backward pass to save memory.

The twin of models.grad_checkpoint. transformers' own switch works in training mode only, which PPO never uses.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from common.errors import UserError


def checkpoint_layers(model: nn.Module) -> None:
    """Recompute every layer of `model` in the backward pass. Raises UserError if it has no such layers."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no layers to checkpoint; omit --grad-checkpoint")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
