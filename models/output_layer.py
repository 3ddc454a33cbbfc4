"""The last step of a language model, from hidden states to logits, as a function of its own.

Families differ in what they do to their logits (a soft cap, a scale), so the model itself is called, with the states
put in where its output layer takes them. What lies below is left out or, as mlx is lazy, never evaluated.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from common.errors import UserError
from models.modules import outer_modules
from models.value_head import Tap, module_at, standing_in, tap_places


class _Body:
    """Stands in for the module that has the layers: hands on a state, and is that module in all else."""

    def __init__(self, body: nn.Module, state: mx.array):
        self.body, self.state = body, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.body, name)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self.state


class _Way(NamedTuple):
    """Where to put the states in, and which module to leave out meanwhile."""

    parent: nn.Module
    key: str
    tap_type: type[Tap]
    body: tuple[nn.Module, str] | None


class OutputLayer:
    """From hidden states to logits, as `model` does it, post-processing included.

    weights: by name, what is trainable in the output layer or, where that is tied, in the token embedding.
    draws: whether it gives other logits each time, by dropout.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._ways = _ways(model)
        first = self._ways[0]
        self._layer = first.parent[first.key]
        trained = tree_flatten(self._layer.trainable_parameters())
        # A soft prompt has no logits, though it lies in the table that a tied output layer multiplies by.
        self.weights: dict[str, mx.array] = {name: weight for name, weight in trained if name != "soft_prompt"}
        self.draws = any(isinstance(part, nn.Dropout) and _is_on(part) for part in self._layer.modules())

    def __call__(self, hidden: mx.array, weights: dict[str, mx.array] | None = None) -> mx.array:
        """hidden: (n, H), of `forward`; weights: to take the place of `self.weights`. Returns logits (n, V).

        Raises UserError where the model hides its output layer.
        """
        self._layer.update(tree_unflatten(list((weights or {}).items())))
        try:
            while self._ways:
                logits = self._logits(hidden[None], self._ways[0])
                if logits is not None:
                    return logits.squeeze(0)
                del self._ways[0]
        finally:
            self._layer.update(tree_unflatten(list(self.weights.items())))
        raise UserError(f"{type(self.model).__module__} hides its output layer; use another model")

    def _logits(self, states: mx.array, way: _Way) -> mx.array | None:
        """Logits (1, n, V), or None where this way does not reach the output layer."""
        tap = way.tap_type(way.parent[way.key], given=states)
        with ExitStack() as stack:
            stack.enter_context(standing_in(way.parent, way.key, tap))
            if way.body is not None:
                parent, key = way.body
                stack.enter_context(standing_in(parent, key, _Body(parent[key], states)))
            try:
                logits = self.model(mx.array([[0]]))
            except (AttributeError, TypeError, ValueError):
                if way.body is None:
                    raise
                return None  # this model wants more of its body than one array
        return None if tap.hidden is None else logits


def _is_on(dropout: nn.Dropout) -> bool:
    x = mx.zeros(1)
    return dropout(x) is not x


def _ways(model: nn.Module) -> list[_Way]:
    """The quick ones first."""
    places = list(tap_places(model))
    bodies = [*_bodies(model), None]
    return [_Way(*place, body) for body in bodies for place in places]


def _bodies(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The module that has the list of layers, as the module it lies in and its key there, unless it is the model."""
    found = [name for name, module in outer_modules(model) if any(map(_is_layers, module.values()))]
    parent, _, key = min(found, key=lambda name: name.count("."), default="").rpartition(".")
    if key:
        yield module_at(model, parent), key


def _is_layers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], nn.Module)
