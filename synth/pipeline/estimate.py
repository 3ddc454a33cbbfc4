"""What synth.run may ask the teacher at most, stage by stage, before its first call.

Assumes that every sample is kept, every vote is asked, every answer is as long as allowed and every JSON answer needs
its one correction turn, so most runs cost far less. Retries after failed calls are not counted; the limits count them.

    python -m synth.run --task synth/tasks/arithmetic.yaml --dry-run
"""

from synth import prompts
from synth.chat_api import CHARACTERS_PER_TOKEN
from synth.estimate import Bound, bound
from synth.pipeline.difficulty import Spread
from synth.pipeline.verify import Voting
from synth.task import Task
from synth.teacher.client import PROBE_TOKENS
from synth.teacher.structured import PROBE_MESSAGES


def upper_bounds(
    task: Task, count: int, voting: Voting, spread: Spread, max_tokens: int, passage: str | None = None
) -> list[Bound]:
    """The stages that ask the teacher. count: samples asked for; max_tokens: per answer; passage: the longest one."""
    if task.source is not None:
        return []
    text = "x" * min(max_tokens * CHARACTERS_PER_TOKEN, prompts.MOST_INPUT)
    output = text[: prompts.MOST_OUTPUT]
    summary = text[: prompts.MOST_SUMMARY] if task.demos else None
    rewritten = 0 if task.answer is None and task.reward is None else spread.most_rewritten(count)
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
