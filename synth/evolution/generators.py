"""Instruction generators without a policy: Self-Instruct and Evol-Instruct, each with its published filters.

    SelfInstructGenerator    new instructions in the style of examples: six seeds and two of its own (arXiv:2212.10560)
    EvolInstructGenerator    instructions evolved by uniformly drawn operators, round by round (arXiv:2304.12244)
    SampledGenerator         either of them, for the RLTuner

Both make new instructions from seed rows and evolve given ones; rows are {"instruction", "output"}, with fresh
responses of the same teacher. Rows that a filter dropped are kept in `dropped`, with the reason.

    generator = EvolInstructGenerator(ask)          # ask: answers asks in order, by a Teacher for example
    rows = generator.generate_from_seed([{"instruction": "Name three rivers."}], count=100)
"""

import asyncio
import itertools
import random
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from common.errors import UserError
from synth import prompts
from synth.evolution.chains import Chain, Evolution, root_row
from synth.evolution.judge import EVOL_GATES, Judge, Pool
from synth.evolution.operators import read_rewriting
from synth.evolution.policy import without_stop
from synth.evolution.responses import respond
from synth.near_duplicates import THRESHOLD, normalise
from synth.sampler import DataRow, Results, Sampler, in_turn
from synth.stages import StageRow, drop, kept, new_row
from synth.teacher.asking import AskFunction, Asking, ask_all
from synth.teacher.completions import Ask, Reply

SEED_EXAMPLES, OWN_EXAMPLES = 6, 2
WAVE = 8  # instructions asked for at once, before they can serve as examples for the next ones
TRIES = 4  # maximum asks per wanted instruction
# What a language model without tools cannot do, and what came too often (the published lists).
UNFIT = {"image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot"}
UNFIT_PAIR, OFTEN = ("go", "to"), "write a program"
SHORTEST, LONGEST = 4, 150  # words


class _Answering:
    """Wraps a function that answers asks as the Asker that stages expect."""

    def __init__(self, ask: AskFunction):
        self.ask = ask

    async def ask_each(self, asks: Iterable[Ask], take: Callable[[int, Reply], object]) -> None:
        replies = await asyncio.to_thread(self.ask, list(asks))  # it may run an event loop of its own
        for number, reply in enumerate(replies):
            take(number, reply)


class _Generator:
    """What both share. dropped: the rows of the last call that a filter dropped, with the reason."""

    def __init__(self, ask: AskFunction, asking: Asking | None = None, seed: int = 0):
        self.teacher = _Answering(ask)
        self.asking, self.seed = asking or Asking(), seed
        self.dropped: list[StageRow] = []

    async def _finished(self, rows: Sequence[StageRow]) -> list[DataRow]:
        """The kept rows with fresh responses."""
        answered = await respond(kept(rows), self.teacher, self.asking)
        self.dropped = [row for row in (*rows, *answered) if "dropped" in row]
        return [{"instruction": row["input"], "output": row["output"]} for row in kept(answered)]


class SelfInstructGenerator(_Generator):
    """New instructions in the style of examples. threshold: the highest ROUGE-L to any other that is kept."""

    threshold = THRESHOLD

    def generate_from_seed(self, seed_rows: Sequence[Mapping[str, Any]], count: int) -> list[DataRow]:
        """`count` new rows; fewer if TRIES times as many asks do not yield them."""
        return asyncio.run(self._generate(instructions_of(seed_rows), count))

    def evolve_instructions(self, rows: Sequence[Mapping[str, Any]]) -> list[DataRow]:
        """At most one new row in the style of each."""
        texts = instructions_of(rows)

        async def made() -> list[DataRow]:
            return await self._finished(await self._ask([[text] for text in texts], 1, Pool(texts)))

        return asyncio.run(made())

    async def _generate(self, seeds: list[str], count: int) -> list[DataRow]:
        rows: list[StageRow] = []
        pool = Pool(seeds)
        while len(kept(rows)) < count and len(rows) < TRIES * count:
            own = [row["input"] for row in kept(rows)]
            numbers = range(len(rows) + 1, len(rows) + 1 + min(WAVE, count - len(own), TRIES * count - len(rows)))
            rows += await self._ask([self._examples(seeds, own, number) for number in numbers], numbers[0], pool)
        return await self._finished(rows)

    def _examples(self, seeds: list[str], own: list[str], number: int) -> list[str]:
        rng = random.Random(f"{self.seed} {number}")
        some_own = rng.sample(own, min(OWN_EXAMPLES, len(own)))
        found = rng.sample(seeds, min(SEED_EXAMPLES + OWN_EXAMPLES - len(some_own), len(seeds))) + some_own
        return rng.sample(found, len(found))

    async def _ask(self, examples: Sequence[list[str]], first: int, pool: Pool) -> list[StageRow]:
        """One row per list of examples, numbered from `first`; kept ones are added to the pool."""
        asks = [
            Ask(
                prompts.self_instruct(some, number),
                prompts.Instruction,
                self.asking.temperature,
                self.asking.max_tokens,
                number,
                "self-instruct",
            )
            for number, some in enumerate(examples, first)
        ]
        rows = []
        for number, reply in enumerate(await ask_all(self.teacher, asks, "self-instruct"), first):
            text, reason, detail = read_rewriting(reply)
            reason = reason or self_instruct_fault(text)
            nearest = 0.0 if reason else pool.nearest(text)
            if nearest > self.threshold:
                reason, detail = "near-duplicate", f"ROUGE-L {nearest:.2f}"
            row = new_row(f"s{number}", text, "", "self-instruct")
            rows.append(drop(row, reason, detail) if reason else row)
            if not reason:
                pool.add(text)
        return rows


class EvolInstructGenerator(_Generator):
    """Instructions evolved by one of the six operators, drawn uniformly: in depth or in breadth.

    Dropped are instructions that equal their parent, leak words of the request, or have only stop words; and responses
    that are apologies or only stop words.
    """

    def generate_from_seed(self, seed_rows: Sequence[Mapping[str, Any]], count: int) -> list[DataRow]:
        """`count` rows evolved from the seed rows, which are used in turn and evolved further in each round.

        Fewer if TRIES times as many asks do not yield them.
        """
        texts = instructions_of(seed_rows)
        size = min(len(texts), count)
        chains = self._chains(texts[:size])

        async def made() -> list[DataRow]:
            rows: list[StageRow] = []
            evolution = self._evolution(-(-TRIES * count // size))
            for number in range(1, evolution.rounds + 1):
                missing = count - len(kept(rows))
                rows += await evolution.step(chains[:missing], without_stop(), number)
            return await self._finished(rows)

        return asyncio.run(made())

    def evolve_instructions(self, rows: Sequence[Mapping[str, Any]]) -> list[DataRow]:
        """At most one row evolved from each."""
        chains = self._chains(instructions_of(rows))

        async def made() -> list[DataRow]:
            return await self._finished(await self._evolution(1).run(chains, without_stop()))

        return asyncio.run(made())

    def _chains(self, texts: Sequence[str]) -> list[Chain]:
        pool = Pool(texts)
        return [Chain(number, root_row(number, text, 1.0, None), pool) for number, text in enumerate(texts)]

    def _evolution(self, rounds: int) -> Evolution:
        judge = Judge(self.teacher, self.teacher, EVOL_GATES)
        return Evolution(self.teacher, judge, rounds, self.asking, self.seed, "evol-instruct")


class SampledGenerator:
    """Both as one generator for RLTuner (synth/sampler.py): the sampler's method switches between them.

    generate_from_seed is Self-Instruct's, evolve_instructions is Evol-Instruct's. seed_rows: to start from. Settings
    are read at every ask, the template goes about requests for instructions, and an ask's sample index grows with the
    row numbers, so that other rows are other answers.
    """

    def __init__(self, ask: AskFunction, seed_rows: Sequence[Mapping[str, Any]], sampler: Sampler):
        self.ask, self.seed_rows, self.sampler = ask, list(seed_rows), sampler

    def generate_from_seed(self, count: int, first: int = 1) -> Results:
        """At most `count` new rows."""
        generator = SelfInstructGenerator(self._asking(first), seed=first)
        return self._results(generator, generator.generate_from_seed(self.seed_rows, count))

    def evolve_instructions(self, count: int, first: int = 1) -> Results:
        """At most one row from each of `count` seed rows, which are used in turn."""
        generator = EvolInstructGenerator(self._asking(first), seed=first)
        rows = [in_turn(self.seed_rows, number) for number in range(first, first + count)]
        return self._results(generator, generator.evolve_instructions(rows))

    def _asking(self, first: int) -> AskFunction:
        def ask(asks: Sequence[Ask]) -> list[Reply]:
            settings, text = self.sampler.get(), self.sampler.template_text
            return self.ask([
                replace(
                    one,
                    messages=prompts.with_template(one.messages, text)
                    if one.schema is prompts.Instruction
                    else one.messages,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    sample=one.sample + TRIES * (first - 1),
                )
                for one in asks
            ])  # fmt: skip

        return ask

    @staticmethod
    def _results(generator: _Generator, rows: list[DataRow]) -> Results:
        return Results(rows, dict(Counter(row["dropped"] for row in generator.dropped)))


def self_instruct_fault(text: str) -> str:
    """Why Self-Instruct drops an instruction; "" if it does not (its bootstrap_instructions.py)."""
    words = [word.strip(string.punctuation) for word in normalise(text).split()]
    if not SHORTEST <= len(words) <= LONGEST:
        return "length"
    if not UNFIT.isdisjoint(words) or UNFIT_PAIR in itertools.pairwise(words):
        return "unfit for a language model"
    if normalise(text).startswith(OFTEN):
        return OFTEN
    return "first character" if text[0] in string.punctuation or not text[0].isascii() else ""


def instructions_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The "instruction", or else the "input", of each row. Raises UserError if a row has neither, and for no rows."""
    texts = [row.get("instruction", row.get("input")) for row in rows]
    wrong = next((n for n, text in enumerate(texts, 1) if not isinstance(text, str) or not text.strip()), None)
    if wrong is not None or not texts:
        which = f"seed row {wrong} has" if wrong else "there are no seed rows, so there is"
        raise UserError(f"{which} no instruction; rows are {{'instruction': '...'}}")
    return [str(text) for text in texts]
