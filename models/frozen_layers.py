"""The layers below the first trained one, computed once: their output does not change while the others learn.

With a LoRA on the last n layers, the states that enter layer L − n depend on the tokens alone. `lower_states` computes
them, `from_states` runs the rest of the model's own forward pass on them. So one pass through the lower layers serves
the policy, its reference and every epoch of an update.

As in models.value_head, no family's body is called by hand: layers stand in for themselves during the model's call.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from models.modules import outer_modules

TOLERANCE = 1e-4  # of the largest logit, between the plain pass and the one on kept states


class _StandIn:
    """Takes a layer's place in the list of layers; what a model asks of the layer itself is still answered by it."""

    def __init__(self, layer: nn.Module, call: Callable[[mx.array], mx.array]):
        self.layer, self.call = layer, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return self.call(hidden)


class _Listener(_StandIn):
    """Hands what a layer is given to `call` as well, and is that layer."""

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self.call(hidden)
        return self.layer(hidden, *args, **kwargs)


class _Reached(Exception):
    """Carries the states that enter a layer out of the model's call."""

    def __init__(self, states: mx.array):
        self.states = states


def _layer_list(model: nn.Module) -> list | None:
    """The list that holds the model's layers, by the object itself: to change it is to change the model."""
    layers = getattr(model, "layers", None)
    if not layers:
        return None
    for _, module in outer_modules(model):
        for value in module.values():
            if isinstance(value, list) and len(value) == len(layers) and value[0] is layers[0]:
                return value
    return None


@contextmanager
def _standing_in(
    layers: list, stand_ins: dict[int, Callable[[mx.array], Any]], kind: type[_StandIn] = _StandIn
) -> Iterator[None]:
    kept = list(layers)
    layers[:] = [kind(layer, stand_ins[i]) if i in stand_ins else layer for i, layer in enumerate(kept)]
    try:
        yield
    finally:
        layers[:] = kept


def num_frozen_layers(model: nn.Module) -> int:
    """How many layers, from the first on, no trained weight comes before or within. 0 where the trick is not possible.

    It is not for a model whose layers are no list, with a trained weight outside the layers (a soft prompt, a table),
    or of a family whose layers are handed more than the states, which one forward pass both ways shows.
    """
    layers = _layer_list(model)
    if layers is None:
        return 0
    inside = [{id(array) for _, array in tree_flatten(layer.trainable_parameters())} for layer in layers]
    trained = {id(array) for _, array in tree_flatten(model.trainable_parameters())}
    count = next((i for i, arrays in enumerate(inside) if arrays), 0)
    if count == 0 or trained - set().union(*inside):
        return 0
    return count if _same_logits(model, count) else 0


def _same_logits(model: nn.Module, count: int) -> bool:
    tokens = mx.array([[0, 1, 2], [2, 1, 0]])
    try:
        plain = model(tokens)
        kept = lower_states(model, tokens, count)
        with from_states(model, kept, count):
            ours = model(tokens)
        difference = mx.abs(ours - plain).max() <= TOLERANCE * mx.abs(plain).max()
        return bool(difference.item())
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # a layer that is called in another way
        return False


def shares_lower_layers(model: nn.Module, other: nn.Module, count: int) -> bool:
    """Whether all that comes before layer `count` is the same arrays in both, as in a model and its twin."""
    return _arrays_below(model, count) == _arrays_below(other, count)


def _arrays_below(model: nn.Module, count: int) -> set[int]:
    upper = {id(array) for layer in (_layer_list(model) or [])[count:] for _, array in tree_flatten(layer.parameters())}
    return {id(array) for _, array in tree_flatten(model.parameters())} - upper


def num_shared_layers(models: Sequence[nn.Module]) -> int:
    """How many layers, from the first on, are the same arrays in all models, as is all outside the layers.

    At least one layer is left to be run. 0 for one model, for models of other families or sizes, and where
    `num_frozen_layers` would have it so.
    """
    layers = [_layer_list(model) or [] for model in models]
    if len(models) < 2 or len({len(each) for each in layers}) > 1:
        return 0
    arrays = [[{id(array) for _, array in tree_flatten(layer.parameters())} for layer in each] for each in layers]
    same = [all(one == of_layer[0] for one in of_layer) for of_layer in zip(*arrays, strict=True)]
    count = min([*same, False].index(False), len(same) - 1)
    if count <= 0 or not all(shares_lower_layers(models[0], model, count) for model in models):
        return 0
    return count if all(_same_logits(model, count) for model in models) else 0


def lower_states(model: nn.Module, tokens: mx.array, count: int) -> mx.array:
    """The states (B, L, H) that enter layer `count`, of tokens (B, L). The layers from there on are not run."""
    layers = _layer_list(model)
    if layers is None or not 0 < count < len(layers):
        raise ValueError(f"the model has no layer {count} that states could enter")

    def reached(states: mx.array) -> mx.array:
        raise _Reached(states)

    with _standing_in(layers, {count: reached}):
        try:
            model(tokens)
        except _Reached as end:
            return mx.stop_gradient(end.states)
    raise ValueError(f"{type(model).__module__} did not call its layer {count}")


@contextmanager
def from_states(model: nn.Module, states: mx.array | None, count: int) -> Iterator[None]:
    """Within it, a call of `model` takes `states` (B, L, H) from `lower_states` for what its first `count` layers give.

    Without states the model is as it is.

    The tokens of the call give shapes only: what they are looked up for is not used, so mlx does not evaluate it.
    """
    if states is None:
        yield
        return
    layers = _layer_list(model)
    assert layers is not None, "lower_states has found them"
    through: dict[int, Callable[[mx.array], mx.array]] = dict.fromkeys(range(count - 1), lambda hidden: hidden)
    with _standing_in(layers, {**through, count - 1: lambda hidden: states}):
        yield


class SampledStates:
    """The states that entered a layer while completions were sampled, of every token that was read.

    They are `lower_states` of the same rows but for rounding, without another pass. models.generation.sample fills them
    in: `listening` while it samples, `prompts_read` and `tokens_read` after each pass.
    """

    def __init__(self, count: int):
        """count: the layer, by its number."""
        self.count = count
        self._passes: list[mx.array] = []  # states (rows of the pass, its tokens, H)
        self._size = 0  # states in all passes
        self._index = np.zeros((0, 0), dtype=np.int64)  # (B, L) of each token's state among them, -1: none

    @contextmanager
    def listening(self, model: nn.Module, rows: int, longest: int) -> Iterator[None]:
        """Within it, calls of the model leave their states here. rows: of the batch; longest: tokens of one."""
        self._passes, self._size, self._index = [], 0, np.full((rows, longest), -1)
        layers = _layer_list(model)
        assert layers is not None, "num_frozen_layers has found them"
        with _standing_in(layers, {self.count: self._passes.append}, _Listener):
            yield

    def prompts_read(self, numbers: np.ndarray, lengths: np.ndarray, start: int) -> None:
        """The last pass read tokens from `start` on. numbers, lengths (B,): of each row its place in the pass, and the
        tokens that it has."""
        count, tokens, _ = self._passes[-1].shape
        places = np.arange(start, start + tokens)
        found = self._size + numbers[:, None] * tokens + np.arange(tokens)
        known = self._index[:, start : start + tokens]
        self._index[:, start : start + tokens] = np.where(places < lengths[:, None], found, known)
        self._size += count * tokens

    def tokens_read(self, rows: np.ndarray, places: np.ndarray) -> None:
        """The last pass read one token of each of these rows, at these places."""
        self._index[rows, places] = self._size + np.arange(len(rows))
        self._size += len(rows)

    def of(self, lengths: Sequence[int], width: int) -> mx.array | None:
        """States (B, width, H) of rows of these lengths, 0 at pads; None where a token was not read."""
        places = np.arange(width)
        return self.at(np.arange(len(lengths))[:, None], places, places < np.array(lengths)[:, None])

    def at(self, rows: np.ndarray, places: np.ndarray, real: np.ndarray | bool = True) -> mx.array | None:
        """The states (..., H) of tokens by row and place, 0 where not `real`; None where a token was not read."""
        if not self._passes:
            return None
        within = places < self._index.shape[1]
        found = np.where(within, self._index[rows, np.where(within, places, 0)], -1)
        index = np.where(real, found, self._size)
        if (index < 0).any():
            return None
        size = self._passes[0].shape[-1]
        flat = [states.reshape(-1, size) for states in self._passes]
        return mx.concatenate([*flat, mx.zeros((1, size), flat[0].dtype)])[mx.array(index)]
