"""Upper bounds on what a run may ask a teacher, and the table that `--dry-run` prints.

Each system counts its own stages: synth/pipeline/estimate.py, synth/evolution/estimate.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

from synth.chat_api import count_tokens


class Bound(NamedTuple):
    """The most calls that a stage makes, and their tokens."""

    stage: str
    calls: int
    prompt_tokens: int
    completion_tokens: int


def bound(stage: str, count: int, messages: list[dict], max_tokens: int, corrected: bool) -> Bound:
    """`count` calls with these messages. corrected: each may be followed by a correction turn, which repeats it."""
    asked = count_tokens(messages)
    if not corrected:
        return Bound(stage, count, count * asked, count * max_tokens)
    return Bound(stage, 2 * count, count * (2 * asked + max_tokens), 2 * count * max_tokens)


def table(bounds: Sequence[Bound], price_in: float, price_out: float) -> str:
    """The bounds line by line, with their sum and what that would cost. Prices: per million tokens; both 0: unknown."""
    asked, answered = sum(one.prompt_tokens for one in bounds), sum(one.completion_tokens for one in bounds)
    total = Bound("total", sum(one.calls for one in bounds), asked, answered)
    lines = ["at most                 calls  prompt tokens  answer tokens        money"]
    for stage, calls, asked, answered in [*bounds, total]:
        money = f"{(asked * price_in + answered * price_out) / 1e6:.4g}" if price_in or price_out else "unknown"
        lines.append(f"{stage:<16}{calls:>13,}{asked:>15,}{answered:>15,}{money:>13}")
    priced = "" if price_in or price_out else "; for money give --price-in and --price-out"
    return "\n".join([*lines, f"nothing was sent{priced}"])
