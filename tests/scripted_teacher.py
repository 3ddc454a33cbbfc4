"""A teacher without a server: it answers every question by a function, and remembers what it was asked.

ScriptedTeacher(lambda ask: said("19"))
"""

from synth.prompts import STAGES, NewSample
from synth.teacher.completions import Reply
from synth.teacher.limits import Cost


def said(text, status="ok", parsed=None):
    return Reply(text, parsed, status, Cost(1, 1), False, "" if status == "ok" else f"it was {status}")


def sample(text, output):
    return said("{}", parsed=NewSample(input=text, output=output))


def stage_of(ask):
    """The stage that a question's own wording names."""
    first = ask.messages[0]["content"].splitlines()[0]
    return next(name for name, line in STAGES.items() if line == first)


def section(ask, name):
    """The text of a delimited section of a question; None where there is none."""
    lines = ask.messages[-1]["content"].splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith(f"<{name} ")]
    return "\n".join(lines[starts[-1] + 1 : lines.index("</" + lines[starts[-1]][1:])]) if starts else None


class ScriptedTeacher:
    """asked: every question, in order; waves: how many came together."""

    def __init__(self, script):
        self.script = script
        self.asked = []
        self.waves = []

    async def ask_each(self, asks, take):
        asks = list(asks)
        self.waves.append(len(asks))
        self.asked += asks
        for number, ask in enumerate(asks):
            take(number, self.script(ask))
