"""Gradient checkpointing: keep each layer's input instead of all that is worked out in it, and work it out again.

Memory of a training step falls, its time rises by about one forward pass; loss and gradients stay what they are. Where
mlx-lm's own `grad_checkpoint` changes the class of the layers, and so every model of the process, this changes the
layers of one model. Sampling, which passes caches, goes through the layer as it is.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.errors import UserError


def checkpoint_layers(model: nn.Module, dropout: float = 0.0) -> None:
    """Let every layer of `model` be worked out again for its gradient; its `twin`s are left as they are.

    dropout: what the layers are trained with. Raises UserError where that is not 0: the second time a layer would draw
    other masks, and the gradient would not be that of the loss; and where the model has no list of layers.
    """
    if dropout:
        raise UserError(
            f"--grad-checkpoint cannot repeat what the LoRA dropout of {dropout} draws; give --lora-dropout 0, "
            "or leave --grad-checkpoint out"
        )
    layers = getattr(model, "layers", None)
    if not layers or not all(isinstance(layer, nn.Module) for layer in layers):
        raise UserError(f"{type(model).__module__} has no list of layers to checkpoint; leave --grad-checkpoint out")
    classes = {kind: _checkpointed(kind) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = classes[type(layer)]


def _checkpointed(layer_class: type) -> type:
    """A class of layers that are worked out again where they take part in a gradient."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(hasattr(argument, "make_mask") for argument in (*args, *kwargs.values())):  # a cache
            return layer_class.__call__(self, *args, **kwargs)

        def with_weights(weights: dict, args: tuple, kwargs: dict) -> Any:
            held = self.trainable_parameters()
            self.update(weights)
            try:
                return layer_class.__call__(self, *args, **kwargs)
            finally:
                self.update(held)  # the second time, `weights` are placeholders that hold on to the whole pass

        return mx.checkpoint(with_weights)(self.trainable_parameters(), args, kwargs)

    return type(layer_class.__name__, (layer_class,), {"__call__": call, "__module__": layer_class.__module__})
