"""The offline teacher's tasks: each has a rule that makes, solves, miscalculates, and makes harder or easier samples.

Each rule belongs to one shipped task: arithmetic, digits, library_facts. All randomness comes from the generator that
is passed in, so the same request gets the same answer.
"""

import re
from collections.abc import Sequence
from random import Random
from typing import NamedTuple, Protocol

SIZES = (1, 2, 3)  # digits of a new sum's operands
LARGEST = 9  # digits of the hardest sums' operands
YEARS = (1000, 1899)
TOWN_PARTS = (
    (
        "Bar",
        "Cor",
        "Dun",
        "El",
        "Fen",
        "Gal",
        "Har",
        "Is",
        "Kor",
        "Lan",
        "Mor",
        "Nor",
        "Os",
        "Per",
        "Quen",
        "Ros",
        "Sel",
    ),
    ("a", "e", "i", "o", "u", "an", "el", "in", "or", "ul"),
    ("bury", "dale", "field", "grad", "mouth", "stadt", "ton", "ville"),
)
SAME_GUESS = 0.75  # how often a teacher that does not know a year gives the same wrong one


class Sample(NamedTuple):
    """An input and its correct output (or a guess, if the rule does not know)."""

    input: str
    output: str


class Rule(Protocol):
    """One task. passage: the prompt's passage, or None. step: 1 for harder, -1 for easier."""

    @property
    def keywords(self) -> Sequence[str]:
        """For searching a library."""

    @property
    def summary(self) -> str:
        """What samples have in common."""

    def sample(self, rng: Random, passage: str | None) -> Sample:
        """A new sample."""

    def changed(self, rng: Random, input: str, step: int, passage: str | None) -> Sample:
        """A harder or an easier sample than `input`; a new one if `input` does not belong to the task."""

    def solve(self, rng: Random, input: str, passage: str | None) -> str | None:
        """The output for an input, or None if the input does not belong to the task."""

    def wrong(self, rng: Random, input: str, output: str) -> str:
        """A plausible wrong output, rarely the same twice. output: the correct one."""


class Arithmetic:
    """Sums of two whole numbers, "12 + 7 =". Harder and easier: one digit more or less in an operand."""

    keywords = ("addition", "sum", "whole numbers", "carry", "place value")
    summary = "Two whole numbers of one to several digits, to be added; the output is their sum. Larger is harder."

    def sample(self, rng: Random, passage: str | None) -> Sample:
        return self._sum(*(_number(rng, rng.choice(SIZES)) for _ in range(2)))

    def changed(self, rng: Random, input: str, step: int, passage: str | None) -> Sample:
        operands = _operands(input)
        if operands is None:
            return self.sample(rng, passage)
        sizes = [len(str(operand)) for operand in operands]
        if step < 0 and max(sizes) == 1:
            return self._sum(*(rng.randint(0, operand) for operand in operands))
        end = min(sizes) if step > 0 else max(sizes)
        place = rng.choice([place for place in (0, 1) if sizes[place] == end])
        other = operands[1 - place]
        lowest, highest = _span(sizes[1 - place])
        other = rng.randint(other, highest) if step > 0 else rng.randint(min(lowest, other), other)
        changed = _number(rng, min(end + step, max(LARGEST, end)))
        return self._sum(*((changed, other) if place == 0 else (other, changed)))

    def solve(self, rng: Random, input: str, passage: str | None) -> str | None:
        operands = _operands(input)
        return None if operands is None else str(sum(operands))

    def wrong(self, rng: Random, input: str, output: str) -> str:
        right = int(output)
        slips = {
            right + sign * off * 10**place for sign in (1, -1) for off in (1, 2, 3) for place in range(len(output))
        }
        slips |= {right + off * 10 ** len(output) for off in (1, 2)}
        slips |= {int(output[:n] + output[n + 1] + output[n] + output[n + 2 :]) for n in range(len(output) - 1)}
        carries = _carries(*(_operands(input) or (0, 0)))
        slips |= {right - carry for carry in carries} | {right - sum(carries)}
        return str(rng.choice(sorted(slip for slip in slips if slip >= 0 and slip != right)))

    @staticmethod
    def _sum(a: int, b: int) -> Sample:
        return Sample(f"{a} + {b} =", str(a + b))


def _span(size: int) -> tuple[int, int]:
    """The smallest and the largest whole number with `size` digits; 0 has one."""
    return (10 ** (size - 1) if size > 1 else 0), 10**size - 1


def _number(rng: Random, size: int) -> int:
    return rng.randint(*_span(size))


def _operands(input: str) -> tuple[int, int] | None:
    found = re.search(r"\b([0-9]{1,50}) ?\+ ?([0-9]{1,50})\b", input)
    return (int(found[1]), int(found[2])) if found else None


def _carries(a: int, b: int) -> list[int]:
    """What each carry of a + b adds to the sum: [10, 100] for 95 + 7."""
    powers = [10**place for place in range(1, len(str(max(a, b))) + 1)]
    return [power for power in powers if a % power + b % power >= power]


class Digits:
    """Even numbers, each larger than the one before. Harder and easier: a larger or a smaller first number."""

    keywords = ("even numbers", "increasing sequence", "multiples of two")
    summary = "The first number of a sequence; the output goes on with larger and larger even numbers."

    def sample(self, rng: Random, passage: str | None) -> Sample:
        return self._sequence(rng, 2 * rng.randint(0, 100))

    def changed(self, rng: Random, input: str, step: int, passage: str | None) -> Sample:
        first = _last_number(input)
        if first is None:
            return self.sample(rng, passage)
        return self._sequence(rng, 2 * (rng.randint(first, 2 * first + 10) if step > 0 else rng.randint(0, first // 4)))

    def solve(self, rng: Random, input: str, passage: str | None) -> str | None:
        first = _last_number(input)
        return None if first is None else self._sequence(rng, first).output

    def wrong(self, rng: Random, input: str, output: str) -> str:
        numbers = output.split()
        place = rng.randrange(len(numbers))
        numbers[place] = str(int(numbers[place]) + rng.choice((-1, 1)))  # odd
        return " ".join(numbers)

    @staticmethod
    def _sequence(rng: Random, first: int) -> Sample:
        numbers = [first - first % 2]
        while len(numbers) < 5:
            numbers.append(numbers[-1] + 2 * rng.randint(1, 12))
        return Sample(str(first), " ".join(map(str, numbers[1:])))


def _last_number(input: str) -> int | None:
    found = re.findall(r"[0-9]{1,50}", input)
    return int(found[-1]) if found else None


class Facts:
    """Founding years of towns: read from the passage, or guessed. Harder and easier: a question more or less indirect.

    seed: of the guesses. For one town mostly the same year is guessed, as models do with what they do not know, so a
    vote alone does not detect it.
    """

    keywords = ("town", "founded", "river", "Velmark", "known for")
    summary = "A question for the year in which a town was founded; the output is that year, which passages tell."
    questions = (  # from plain to roundabout
        "In which year was the town of {town} founded?",
        "What is the founding year of {town}?",
        "Name the year in which people founded the town that is called {town}.",
        "Somebody asks how old the town {town} is: since which year has it existed?",
        "If a chronicle of {town} opened with the act of its foundation, which year would stand on its first page?",
    )

    def __init__(self, seed: int):
        self.seed = seed

    def sample(self, rng: Random, passage: str | None) -> Sample:
        facts = _facts(passage)
        town = rng.choice(sorted(facts)) if facts else _invented_town(rng)
        return self._question(rng, town, rng.randrange(2), facts)

    def changed(self, rng: Random, input: str, step: int, passage: str | None) -> Sample:
        facts = _facts(passage)
        town = _town(input, facts)
        if town is None:
            return self.sample(rng, passage)
        level = next((n for n, asked in enumerate(self.questions) if asked.format(town=town) == input.strip()), 1)
        return self._question(rng, town, min(max(level + step, 0), len(self.questions) - 1), facts)

    def solve(self, rng: Random, input: str, passage: str | None) -> str | None:
        facts = _facts(passage)
        town = _town(input, facts)
        return None if town is None else self._year(rng, town, facts)

    def wrong(self, rng: Random, input: str, output: str) -> str:
        off = rng.choice((1, 2, 3, 7, 10, 20, 30, 50, 100, 200)) * rng.choice((1, -1))
        return str(int(output) + off)

    def _question(self, rng: Random, town: str, level: int, facts: dict[str, str]) -> Sample:
        return Sample(self.questions[level].format(town=town), self._year(rng, town, facts))

    def _year(self, rng: Random, town: str, facts: dict[str, str]) -> str:
        guess = Random(f"{self.seed} {town}") if rng.random() < SAME_GUESS else rng
        return facts.get(town) or str(guess.randint(*YEARS))


def _facts(passage: str | None) -> dict[str, str]:
    """Town → year, from a passage."""
    return dict(re.findall(r"town of (\w+) was founded in ([0-9]{3,4})", passage or ""))


def _town(input: str, facts: dict[str, str]) -> str | None:
    """The town a question asks about: one of the passage's, or else its last capitalised word."""
    known = [name for name in re.findall(r"\w+", input) if name in facts]
    names = known or re.findall(r"\b[A-Z]\w+", input[1:])
    return names[-1] if names else None


def _invented_town(rng: Random) -> str:
    return "".join(rng.choice(part) for part in TOWN_PARTS)
