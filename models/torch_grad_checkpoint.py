"""Gradient checkpointing in PyTorch: keep each layer's input, and work out again what lies within.

The twin of models.grad_checkpoint. transformers' own switch acts in training mode only, in which PPO never is.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from common.errors import UserError


def checkpoint_layers(model: nn.Module) -> None:
    """Let every layer of `model` be worked out again for its gradient. Raises UserError where it has no such layers."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no layers to checkpoint; leave --grad-checkpoint out")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
