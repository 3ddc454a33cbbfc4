"""Gradient checkpointing: recompute activations in the backward pass to save memory.

Only each layer's input is kept. A step takes about one more forward pass; loss and gradients do not change. mlx-lm's
own `grad_checkpoint` patches the layers' class, and with it every model of the process; this changes the layers of one
model only. Calls with a cache, as in sampling, are not affected.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.errors import UserError


def checkpoint_layers(model: nn.Module, dropout: float = 0.0) -> None:
    """Recompute every layer of `model` in the backward pass; its `twin`s are not affected.

    dropout: of the layers. Raises UserError if it is not 0, because recomputation would draw other masks and the
    gradient would not be that of the loss; and if the model has no list of layers.
    """
    if dropout:
        raise UserError(
            f"--grad-checkpoint cannot repeat what the LoRA dropout of {dropout} draws; give --lora-dropout 0, "
            "or omit --grad-checkpoint"
        )
    layers = getattr(model, "layers", None)
    if not layers or not all(isinstance(layer, nn.Module) for layer in layers):
        raise UserError(f"{type(model).__module__} has no list of layers to checkpoint; omit --grad-checkpoint")
    classes = {kind: _checkpointed(kind) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = classes[type(layer)]


def is_checkpointed(model: nn.Module) -> bool:
    """Whether layers are recomputed in the backward pass, when nothing stands in for their parts any more."""
    return any(getattr(layer, "recomputed", False) for layer in getattr(model, "layers", None) or ())


def _checkpointed(layer_class: type) -> type:
    """A subclass whose calls are recomputed in the backward pass."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(hasattr(argument, "make_mask") for argument in (*args, *kwargs.values())):  # a cache
            return layer_class.__call__(self, *args, **kwargs)

        def with_weights(weights: dict, args: tuple, kwargs: dict) -> Any:
            held = self.trainable_parameters()
            self.update(weights)
            try:
                return layer_class.__call__(self, *args, **kwargs)
            finally:
                self.update(held)  # in the second call, `weights` are placeholders that keep the whole graph alive

        return mx.checkpoint(with_weights)(self.trainable_parameters(), args, kwargs)

    return type(
        layer_class.__name__,
        (layer_class,),
        {"__call__": call, "__module__": layer_class.__module__, "recomputed": True},
    )
