"""The ways to evolve an instruction, and stop: what each one asks, how the answer is read, and what it has to keep to.

The default six are those of Evol-Instruct and TeaMs-RL (arXiv:2304.12244, arXiv:2403.08694) in our own words
(synth/prompts.py). A file gives others, with limits that are checked, not only asked for; synth/evolution/teams_rl.yaml
has the six as they are published:

    longest: 2048                  words of an instruction, at most
    changed: [10, 20]              words added or replaced, at least and at most
    frame: "{demand} ..."          the request, with {demand} and {instruction}; without: ours
    operators:
      constraints: Add one constraint.
      breadth: {demand: Write another one., changed: null}        its own limits or frame
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidfuzz.distance import LCSseq

from common.errors import UserError
from common.parser import read_yaml
from synth import prompts
from synth.near_duplicates import normalise
from synth.teacher.asking import Asking
from synth.teacher.completions import Ask, Reply

OPERATORS = tuple(prompts.OPERATOR_DEMANDS)
STOP = "stop"
ACTIONS = (*OPERATORS, STOP)
LIMITS = ("longest", "changed", "frame")


@dataclass(frozen=True)
class Operator:
    """One way. frame: see above; longest: words of the result; changed: least and most words added or replaced."""

    demand: str
    frame: str = ""
    longest: int | None = None
    changed: tuple[int, int] | None = None

    def messages(self, instruction: str) -> list[dict]:
        """What the writer is asked."""
        return prompts.rewrite(self.demand, instruction, self.frame)

    def fault(self, text: str, parent: str) -> tuple[str, str]:
        """(reason, detail) of the limit that a result does not keep to; two empty strings if it keeps to all."""
        words = len(text.split())
        if self.longest is not None and words > self.longest:
            return "too long", f"{words} words; {self.longest} at most"
        count = changed_words(text, parent)
        if self.changed is not None and not self.changed[0] <= count <= self.changed[1]:
            return "changed too little or too much", f"{count} words; {self.changed[0]} to {self.changed[1]}"
        return "", ""


@dataclass(frozen=True)
class Operators:
    """The operators of a run, by name."""

    by_name: Mapping[str, Operator]

    @property
    def actions(self) -> tuple[str, ...]:
        """What a policy chooses from: the names, and stop."""
        return (*self.by_name, STOP)

    def rewriting(self, operator: str, instruction: str, asking: Asking, sample: int, stage: str) -> Ask:
        """The question for `instruction` evolved by `operator`. sample: index of the draw; stage: the ledger's.

        Raises KeyError for STOP, which asks nothing.
        """
        messages = self.by_name[operator].messages(instruction)
        return Ask(messages, prompts.Instruction, asking.temperature, asking.max_tokens, sample, stage)


OWN = Operators({name: Operator(demand) for name, demand in prompts.OPERATOR_DEMANDS.items()})


def changed_words(text: str, parent: str) -> int:
    """How many words of a text were added or replaced: those outside its longest common subsequence with the parent.

    Case and punctuation do not count.
    """
    old, new = (normalise(re.sub(r"[^\w\s]", " ", words)).split() for words in (parent, text))
    return len(new) - int(LCSseq.similarity(old, new))


def read_rewriting(reply: Reply) -> tuple[str, str, str]:
    """(instruction, "", ""), or ("", reason, detail) if there is none."""
    if reply.status != "ok":
        return "", f"no instruction: {reply.status}", reply.reason
    return reply.parsed.instruction, "", ""


def load_operators(path: str | Path) -> Operators:
    """The operators of a YAML file. Raises UserError for a wrong key or value."""
    content = read_yaml(path)
    given = content.pop("operators", None)
    if not isinstance(given, dict) or not given or set(content) - set(LIMITS):
        known = ", ".join(("operators", *LIMITS))
        raise UserError(f"{path} needs `operators: {{name: demand}}` and knows {known} only; see synth/evolution")
    found = {}
    for name, one in given.items():
        own = one if isinstance(one, dict) else {"demand": one}
        if not isinstance(name, str) or name == STOP or not re.fullmatch(r"\w+", name):
            raise UserError(f"{path} names an operator {name!r}; use a word, other than {STOP}")
        if set(own) - {"demand", *LIMITS}:
            raise UserError(f"{path} gives {name} unknown keys; known are demand, {', '.join(LIMITS)}")
        found[name] = _operator({**content, **own}, f"{path}, operator {name},")
    return Operators(found)


def _operator(given: Mapping[str, Any], place: str) -> Operator:
    demand, frame, longest, changed = (given.get(key) for key in ("demand", *("frame", "longest", "changed")))
    if not isinstance(demand, str) or not demand.strip():
        raise UserError(f"{place} has no demand; write what is asked, in words")
    if frame is not None and not (isinstance(frame, str) and "{demand}" in frame and "{instruction}" in frame):
        raise UserError(f"{place} has a frame without {{demand}} or {{instruction}}; write where they go")
    if longest is not None and not _counts(longest):
        raise UserError(f"{place} has {longest!r:.40} as longest; write a number of words, 1 or more")
    if changed is not None:
        if not isinstance(changed, list) or len(changed) != 2 or not _counts(changed[1]) or not _rising(changed):
            raise UserError(f"{place} has {changed!r:.40} as changed; write two numbers of words, the lower first")
        changed = (changed[0], changed[1])
    return Operator(demand.strip(), (frame or "").strip(), longest, changed)


def _counts(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _rising(pair: list[Any]) -> bool:
    return _counts(pair[0], 0) and pair[0] <= pair[1]
