"""How stages talk to a teacher: `Asker`, which they are given; `Asking`, its settings; two ways to ask, with a bar."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.progress import progress
from synth.teacher.completions import Ask, Reply

AskFunction = Callable[[Sequence[Ask]], list[Reply]]  # answers asks in order, for callers without an event loop


class Asker(Protocol):
    """What a stage needs of a teacher (synth.teacher.client.Teacher)."""

    async def ask_each(self, asks: Iterable[Ask], take: Callable[[int, Reply], object]) -> None: ...


@dataclass(frozen=True)
class Asking:
    """Sampling settings for generated and rewritten samples. max_tokens: per answer."""

    temperature: float = 1.0
    max_tokens: int = 1024


DEFAULT = Asking()


async def ask_each(
    teacher: Asker, asks: Iterable[Ask], count: int, label: str, take: Callable[[int, Reply], object]
) -> None:
    """Call `take` with the number and the reply of each ask, as they come, in any order.

    asks: `count` of them, made when they are asked, so that many of them and their replies need not be held. With a
    progress bar on a terminal; in a log a line now and then.
    """
    if not count:
        return
    with progress(count, label, "answer") as bar:

        def taken(number: int, reply: Reply) -> None:
            take(number, reply)
            bar.update()

        await teacher.ask_each(asks, taken)


async def ask_all(teacher: Asker, asks: Sequence[Ask], label: str) -> list[Reply]:
    """The replies in order of the asks, with the bar of `ask_each`."""
    replies: dict[int, Reply] = {}
    await ask_each(teacher, asks, len(asks), label, replies.__setitem__)
    return [replies[number] for number in range(len(asks))]
