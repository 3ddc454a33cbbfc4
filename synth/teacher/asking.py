"""How stages talk to a teacher: `Asker`, which they are given; `Asking`, their settings; and `ask_all`, with a bar."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.progress import progress
from synth.teacher.completions import Ask, Reply

AskFunction = Callable[[Sequence[Ask]], list[Reply]]  # answers asks in order, for callers without an event loop


class Asker(Protocol):
    """What a stage needs of a teacher (synth.teacher.client.Teacher)."""

    async def ask_all(self, asks: Sequence[Ask], progress: Callable[[Reply], object] | None = None) -> list[Reply]: ...


@dataclass(frozen=True)
class Asking:
    """Sampling settings for generated and rewritten samples. max_tokens: per answer."""

    temperature: float = 1.0
    max_tokens: int = 1024


DEFAULT = Asking()


async def ask_all(teacher: Asker, asks: Sequence[Ask], label: str) -> list[Reply]:
    """The replies in order of the asks, with a progress bar on a terminal; in a log a line now and then."""
    if not asks:
        return []
    with progress(len(asks), label, "answer") as bar:
        return await teacher.ask_all(asks, lambda _: bar.update())
