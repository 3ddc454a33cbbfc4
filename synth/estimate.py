"""What a run may cost before its first call: upper bounds of calls, tokens and money, stage by stage.

Every sample is taken to be kept, every vote to be asked, every answer to be as long as it may be, and every answer in
JSON to need its one correction turn; so a run mostly costs far less. Leaves out retries after failed calls, which no
one can foresee and which the limits do count.

    python -m synth.run --task synth/tasks/arithmetic.yaml --dry-run
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from synth import prompts
from synth.evolution.judge import REVIEW_TOKENS
from synth.pipeline.difficulty import ASKED_PER_WANTED, Spread
from synth.pipeline.verify import Voting
from synth.task import Task
from synth.teacher.client import PROBE_TOKENS
from synth.teacher.limits import CHARACTERS_PER_TOKEN, Cost, Limits, count_tokens
from synth.teacher.structured import PROBE_MESSAGES


class Bound(NamedTuple):
    """At most so many calls of a stage, and their tokens."""

    stage: str
    calls: int
    cost: Cost


def upper_bounds(
    task: Task, count: int, voting: Voting, spread: Spread, max_tokens: int, passage: str | None = None
) -> list[Bound]:
    """The stages that ask the teacher. count: samples to ask for; max_tokens: of an answer; passage: a long one."""
    if task.source is not None:
        return []
    text = "x" * min(max_tokens * CHARACTERS_PER_TOKEN, prompts.MOST_INPUT)
    output = text[: prompts.MOST_OUTPUT]
    summary = text[: prompts.MOST_SUMMARY] if task.demos else None
    rewritten = 0 if task.answer is None and task.reward is None else _rewritten(count, spread)
    votes = voting.votes if task.answer is not None else 0
    rewriting = max(prompts.harder(task, text, output, passage), prompts.easier(task, text, output, passage), key=str)
    asks = [
        ("probe", 1, PROBE_MESSAGES, PROBE_TOKENS, False),
        ("keywords", int(passage is not None), prompts.keywords(task), max_tokens, True),
        ("pattern", int(bool(task.demos)), prompts.pattern(task), max_tokens, True),
        ("generate", count, prompts.new_sample(task, summary, passage, count), max_tokens, True),
        ("harder, easier", rewritten, rewriting, max_tokens, True),
        ("verify", (count + rewritten) * votes, prompts.answer(task, text, passage), max_tokens, False),
    ]
    return [bound(*ask) for ask in asks if ask[1]]


def evolution_bounds(
    instructions: Sequence[str], chains: Mapping[str, int], rounds: int, answers: int, max_tokens: int
) -> list[Bound]:
    """The stages of synth.evolve. chains: how many begin in training ("train") and for the data ("evolve").

    answers: to each instruction, for its pass rate. Every choice is taken to ask, and every rewriting to pass.
    """
    longest = "x" * min(max_tokens * CHARACTERS_PER_TOKEN, prompts.MOST_INSTRUCTION)
    texts = [*instructions, longest]
    rewriting = max((prompts.rewrite(name, max(texts, key=len)) for name in prompts.OPERATOR_DEMANDS), key=str)
    asks: list[tuple[str, int, list[dict], int, bool]] = [("probe", 1, PROBE_MESSAGES, PROBE_TOKENS, False)]
    for name, count in chains.items():
        made = count * rounds
        asks += [
            (f"{name}: rewrite", made, rewriting, max_tokens, True),
            (f"{name}: review", 2 * made, prompts.review(max(texts, key=len), longest), REVIEW_TOKENS, True),
            (
                f"{name}: answers",
                answers * (made + len(instructions) * (count > 0)),
                prompts.respond(longest),
                max_tokens,
                False,
            ),
        ]
    asks.append(("respond", chains["evolve"] * rounds, prompts.respond(longest), max_tokens, False))
    return [bound(*ask) for ask in asks if ask[1]]


def _rewritten(count: int, spread: Spread) -> int:
    """In each round at most so many samples as lack a successor, which stay as many as there are samples."""
    wanted = -(-spread.wanted // spread.bins) * spread.bins
    return spread.rounds * min(count, ASKED_PER_WANTED * wanted)


def bound(stage: str, count: int, messages: list[dict], max_tokens: int, corrected: bool) -> Bound:
    """corrected: a second turn, which repeats the first with its answer, may follow each call."""
    asked = count_tokens(messages)
    if not corrected:
        return Bound(stage, count, Cost(count * asked, count * max_tokens))
    return Bound(stage, 2 * count, Cost(count * (2 * asked + max_tokens), 2 * count * max_tokens))


def table(bounds: Sequence[Bound], limits: Limits) -> str:
    """The bounds line by line, with their sum and what that would cost."""
    total = Cost(sum(b.cost.prompt_tokens for b in bounds), sum(b.cost.completion_tokens for b in bounds))
    rows = [*bounds, Bound("total", sum(bound.calls for bound in bounds), total)]
    lines = ["at most                 calls  prompt tokens  answer tokens        money"]
    lines += [
        f"{stage:<16}{calls:>13,}{cost.prompt_tokens:>15,}{cost.completion_tokens:>15,}{limits.price(cost):>13.4g}"
        for stage, calls, cost in rows
    ]
    priced = "" if limits.price_in or limits.price_out else "; for money give --price-in and --price-out"
    return "\n".join([*lines, f"nothing was sent{priced}"])
