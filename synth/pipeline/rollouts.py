"""Completions of the base model, each drawn once: completions are kept in a file and never drawn again.

Not here: the model that draws them (see synth/pipeline/base_model.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from common.progress import progress
from synth.teacher.cache import Cache, Stored, cache_key


class Draw(NamedTuple):
    """One completion to draw: the `number`-th of a prompt."""

    prompt: str
    number: int


class Completer(Protocol):
    """Draws completions. identity: everything they depend on besides prompt and number."""

    identity: str

    def sample(self, wanted: Sequence[Draw], done: Callable[[int, str], None]) -> None:
        """Draw all of `wanted`; call done(index, text) as each one ends."""


def draw(wanted: Sequence[Draw], model: Completer, store: Cache) -> list[str]:
    """The completions in the order of `wanted`: from the store, or else drawn and stored one by one."""
    keys = [_key(model.identity, rollout) for rollout in wanted]
    found = {key: stored.text for key in keys if (stored := store.get(key)) is not None}
    missing = list({key: rollout for key, rollout in zip(keys, wanted, strict=True) if key not in found}.items())
    with progress(len(missing), "base model", "rollout") as bar:

        def done(index: int, text: str) -> None:
            key = missing[index][0]
            store.put(key, Stored(text, "ok", "", 0, 0))
            found[key] = text
            bar.update()

        if missing:
            model.sample([rollout for _, rollout in missing], done)
    return [found[key] for key in keys]


def _key(identity: str, rollout: Draw) -> str:
    return cache_key("base model", identity, [{"content": rollout.prompt}], {}, None, rollout.number)
