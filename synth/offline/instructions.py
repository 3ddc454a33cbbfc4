"""The offline teacher's instructions: sums in words, which rules evolve, compare and solve.

An instruction is a first sum, further steps and rules about the result, told plainly, as a story or as a table. It is
parsed from its text alone, and its wording is always drawn anew. The more digits are involved, the likelier is a wrong
response: each digit fails at the teacher's error rate. Rewriting fails at that rate too (the instruction comes back
unchanged, or with words of the request), reviews at half of it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from synth.prompts import EVOLUTION_STAGES, OPERATOR_DEMANDS

MOST_STEPS, MOST_RULES, MOST_DIGITS = 4, 2, 4
NAMES, GOODS = ("Ada", "Bo", "Cem", "Dana", "Eva", "Finn"), ("lamps", "chairs", "books", "jars", "coins", "bricks")
STARTS = {
    ("add", "plain"): ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "Work out {a} plus {b}."),
    ("subtract", "plain"): ("Subtract {b} from {a}.", "Take {b} away from {a}.", "Work out {a} minus {b}."),
    ("multiply", "plain"): ("Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Work out {a} times {b}."),
    ("add", "story"): (
        "{name} owns {a} {goods} and buys {b} more; count all of them.",
        "A shelf holds {a} {goods}, on which {name} puts another {b}; how many stand there?",
    ),
    ("subtract", "story"): (
        "{name} had {a} {goods} and gave {b} to a friend; how many were kept?",
        "Of {a} {goods} in a store {name} sells {b}; say what remains.",
    ),
    ("multiply", "story"): (
        "{name} packs {a} boxes with {b} {goods} each; how many is that in all?",
        "There are {a} rooms, and {name} carries {b} {goods} into every one; count them.",
    ),
    ("add", "table"): (
        "| place | {goods} |\n| left | {a} |\n| right | {b} |\nGive the total of the table's last column.",
        "Stock list of {name}: row one says {a} {goods}, row two {b}. Which number belongs in the row for the sum?",
    ),
    ("subtract", "table"): (
        "| entry | {goods} |\n| bought | {a} |\n| sold | {b} |\nGive the balance that the table leads to.",
        "Account of {name}: {a} {goods} came in by line one, {b} went out by line two. What is the final entry?",
    ),
    ("multiply", "table"): (
        "| crates | {goods} per crate |\n| {a} | {b} |\nGive the number of all pieces that the table describes.",
        "Order of {name}: quantity {a}, {goods} in each unit {b}. Which figure belongs in the field for pieces?",
    ),
}
STEPS = {
    "add": ("Then add {n}.", "After that put {n} on top.", "Increase what you have by {n}."),
    "subtract": ("Then subtract {n}.", "After that take off {n}.", "Lower what you have by {n}."),
    "multiply": ("Then multiply by {n}.", "After that take it {n} times.", "Scale what you have by {n}."),
}
RULES = {
    "tens": ("Round the result down to a multiple of ten.", "Replace the last digit of the answer with zero."),
    "reverse": ("Write the digits of the result backwards.", "Give the answer read from right to left."),
    "sum": ("State only the digit sum of the result.", "Instead of the answer name the sum of its digits."),
}
FORMS = ("plain", "story", "table")
KINDS = ("add", "subtract", "multiply")
WORK: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
}
# Words by which the operators of synth/evolution/teams_rl.yaml are known.
PUBLISHED = {
    "constraints": "adding one more constraint",
    "deepen": "the depth and breadth",
    "concretize": "more specific concepts",
    "reasoning": "multiple-step reasoning",
    "complicate_input": "adding data",
    "breadth": "a brand new prompt",
}
PLACES = {"a": r"(?P<a>\d{1,9})", "b": r"(?P<b>\d{1,9})", "n": r"(?P<n>\d{1,9})", "name": r"\w+", "goods": r"\w+"}


@dataclass(frozen=True)
class Sum:
    """What an instruction asks for, without its wording. steps: (kind, number); rules: about the result, in order."""

    kind: str
    form: str
    a: int
    b: int
    steps: tuple[tuple[str, int], ...] = ()
    rules: tuple[str, ...] = ()

    @property
    def values(self) -> list[int]:
        """After the first sum and after each step."""
        found = [WORK[self.kind](self.a, self.b)]
        for kind, number in self.steps:
            found.append(WORK[kind](found[-1], number))
        return found

    @property
    def result(self) -> int:
        value = self.values[-1]
        for rule in self.rules:
            sign, size = (-1 if value < 0 else 1), abs(value)
            if rule == "tens":
                size = size // 10 * 10
            else:
                size = int(str(size)[::-1]) if rule == "reverse" else sum(map(int, str(size)))
            value = sign * size
        return value

    @property
    def load(self) -> int:
        """The number of digits to process: the places where a response may go wrong."""
        given = [(self.kind, self.a, self.b)]
        given += [(kind, value, n) for value, (kind, n) in zip(self.values, self.steps, strict=False)]
        digits = [(kind, len(str(abs(x))), len(str(abs(y)))) for kind, x, y in given]
        work = sum(x * y if kind == "multiply" else max(x, y) for kind, x, y in digits)
        return work + len(self.rules) + (self.form == "table")


def _pattern(template: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(PLACES[part] if n % 2 else re.escape(part) for n, part in enumerate(parts)))


START_PATTERNS = [(key, _pattern(text)) for key, texts in STARTS.items() for text in texts]
STEP_PATTERNS = [(kind, _pattern(text)) for kind, texts in STEPS.items() for text in texts]
RULE_PATTERNS = [(rule, _pattern(text)) for rule, texts in RULES.items() for text in texts]


def read_sum(text: str) -> Sum | None:
    """What an instruction asks for; None if it is not one of these."""
    found = [(key, match) for key, pattern in START_PATTERNS if (match := pattern.match(text.strip()))]
    if len(found) != 1:
        return None
    (kind, form), start = found[0]
    rest = text.strip()[start.end() :]
    steps = sorted((m.start(), m.end(), kind, int(m["n"])) for kind, p in STEP_PATTERNS for m in p.finditer(rest))
    rules = sorted((m.start(), m.end(), rule) for rule, p in RULE_PATTERNS for m in p.finditer(rest))
    # Including the space before each sentence.
    read = sum(1 + step[1] - step[0] for step in steps) + sum(1 + rule[1] - rule[0] for rule in rules)
    if read != len(rest):
        return None  # it asks for something that no rule knows
    return Sum(
        kind, form, int(start["a"]), int(start["b"]), tuple(step[2:] for step in steps), tuple(r[2] for r in rules)
    )


def worded(rng: Random, task: Sum) -> str:
    """An instruction's text, in one of many wordings."""
    names = {"name": rng.choice(NAMES), "goods": rng.choice(GOODS)}
    sentences = [rng.choice(STARTS[task.kind, task.form]).format(a=task.a, b=task.b, **names)]
    sentences += [rng.choice(STEPS[kind]).format(n=number) for kind, number in task.steps]
    sentences += [rng.choice(RULES[rule]) for rule in task.rules]
    return " ".join(sentences)


def starting(count: int, seed: int) -> list[str]:
    """Initial instructions: plain sums, half of them with a story, a step or a rule; no two the same."""
    rng, found = Random(f"{seed} starting"), dict[str, None]()
    while len(found) < count:
        task = _new(rng, rng.choice((1, 2)))
        if rng.random() < 0.5:
            task = evolved(rng, task, rng.choice(("concretize", "reasoning", "constraints")))
        found[worded(rng, task)] = None
    return list(found)


def evolved(rng: Random, task: Sum, operator: str) -> Sum:
    """The task after an operator; unchanged if the operator can add nothing more."""
    if operator == "breadth":
        fresh = _new(rng, max(len(str(task.a)), len(str(task.b))), [kind for kind in KINDS if kind != task.kind])
        steps = tuple(_step(rng, fresh) for _ in task.steps)
        return replace(fresh, form=task.form, steps=steps, rules=tuple(rng.sample(list(RULES), len(task.rules))))
    if operator == "constraints" and len(task.rules) < MOST_RULES:
        return replace(task, rules=(*task.rules, rng.choice([rule for rule in RULES if rule not in task.rules])))
    if operator == "deepen" and max(task.a, task.b) < 10 ** (MOST_DIGITS - 1):
        return replace(task, a=10 * task.a + rng.randrange(10), b=10 * task.b + rng.randrange(10))
    if operator == "concretize" and task.form == "plain":
        return replace(task, form="story")
    if operator == "reasoning" and len(task.steps) < MOST_STEPS:
        return replace(task, steps=(*task.steps, _step(rng, task)))
    if operator == "complicate_input" and task.form != "table":
        return replace(task, form="table")
    return task


def _new(rng: Random, digits: int, kinds: list[str] | tuple[str, ...] = KINDS) -> Sum:
    low, high = (10 ** (digits - 1), 10**digits - 1) if digits > 1 else (2, 9)
    return Sum(rng.choice(kinds), "plain", rng.randint(low, high), rng.randint(low, high))


def _step(rng: Random, task: Sum) -> tuple[str, int]:
    kind = rng.choice(KINDS)
    return kind, rng.randint(2, 9) if kind == "multiply" else rng.randint(2, 10 ** len(str(task.b)))


class Question:
    """A prompt of instruction evolution, parsed. sections: the texts in it, in order, with their names."""

    def __init__(self, stage: str, sections: list[tuple[str, str]], operator: str = ""):
        self.stage, self.sections, self.operator = stage, sections, operator

    def content(self, rng: Random, draw: float, error_rate: float) -> dict[str, Any] | str:
        """The answer. draw: a random number, 0..1, which decides whether it is wrong."""
        texts = [text for _, text in self.sections]
        tasks = [read_sum(text) for text in texts]
        if self.stage == "respond":
            return _response(rng, tasks[0], draw, error_rate)
        if self.stage == "review":
            same = tasks[0] == tasks[1] if None not in tasks else texts[0] == texts[1]
            return {"equal": same != (draw < error_rate / 2)}
        if self.stage == "score":
            return {"score": _difference(rng, tasks[0], tasks[1], draw < error_rate)}
        if self.stage == "self_instruct" or tasks[0] is None:
            task = _new(rng, rng.choice((1, 2, 3)))
            return {"instruction": worded(rng, evolved(rng, task, rng.choice(list(OPERATOR_DEMANDS))))}
        if draw < error_rate / 2:
            return {"instruction": f"Rewritten instruction: {worded(rng, tasks[0])}"}
        return {"instruction": worded(rng, tasks[0] if draw < error_rate else evolved(rng, tasks[0], self.operator))}


def _difference(rng: Random, first: Sum | None, second: Sum | None, wrong: bool) -> int:
    """0 to 10: how much two sums differ, in kind, form, steps, rules and length of their numbers; off by up to 3."""
    if first is None or second is None:
        return rng.randrange(11) if wrong else 0
    parts = (
        3 * (first.kind != second.kind), 2 * (first.form != second.form),
        min(2, abs(len(first.steps) - len(second.steps))), 2 * (set(first.rules) != set(second.rules)),
        len(str(first.a)) != len(str(second.a)),
    )  # fmt: skip
    return max(0, min(10, sum(parts) + wrong * rng.choice((-3, -2, -1, 1, 2, 3))))


def _response(rng: Random, task: Sum | None, draw: float, error_rate: float) -> str:
    if task is None:
        return "This one is a nice exercise for the reader."
    right = task.result
    if draw >= 1 - (1 - error_rate) ** task.load:
        return f"The result is {right}."
    slip = rng.choice((1, 2, 3, 4, 5, 6, 8, 9, 10, 20, 30, 100)) * rng.choice((1, -1))
    return f"The result is {right + slip}."


def read_question(messages: list[dict], section: re.Pattern) -> Question | None:
    """A request as a Question, None for any other. section: matches a delimited text; its name and text are groups."""
    first_line = messages[0]["content"].split("\n")[0]
    if messages[0]["role"] == "user" and len(messages) == 1:
        text = messages[0]["content"]
        return Question("respond", [("instruction", text)]) if read_sum(text) else None
    stage = next((name for name, line in EVOLUTION_STAGES.items() if line == first_line), None)
    if stage is None:
        return None
    prompt = next((message["content"] for message in messages if message["role"] == "user"), "")
    demand = section.sub("", prompt)
    operator = next((name for name, text in OPERATOR_DEMANDS.items() if text in demand), "")
    operator = operator or next((name for name, text in PUBLISHED.items() if text in demand), "")
    sections = [(name, text) for name, _, text in section.findall(prompt)]
    whole = {"rewrite": len(sections) == 1 and bool(operator), **dict.fromkeys(("review", "score"), len(sections) == 2)}
    return Question(stage, sections, operator) if whole.get(stage, True) else None
