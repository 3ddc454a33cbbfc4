"""What synth.evolve may ask its teachers at most, before the first call.

python -m synth.evolve --dry-run
"""

from collections.abc import Mapping, Sequence

from synth import prompts
from synth.chat_api import CHARACTERS_PER_TOKEN
from synth.estimate import Bound, bound
from synth.evolution.generators import OWN_EXAMPLES, SEED_EXAMPLES, TRIES
from synth.evolution.judge import REVIEW_TOKENS
from synth.evolution.operators import OWN, Operators
from synth.teacher.client import PROBE_TOKENS
from synth.teacher.structured import PROBE_MESSAGES


def upper_bounds(
    instructions: Sequence[str],
    chains: Mapping[str, int],
    rounds: int,
    answers: int,
    max_tokens: int,
    operators: Operators = OWN,
    scored: bool = False,
) -> list[Bound]:
    """The stages of synth.evolve. chains: how many are started in training ("train") and for the data ("evolve").

    answers: per instruction, for its pass rate; scored: whether the reviewer also scores. Assumes that every choice
    asks and every rewriting passes its gates.
    """
    longest = "x" * min(max_tokens * CHARACTERS_PER_TOKEN, prompts.MOST_INSTRUCTION)
    longest_given = max([*instructions, longest], key=len)
    rewriting = max((one.messages(longest_given) for one in operators.by_name.values()), key=str)
    reviewing, responding = prompts.review(longest_given, longest), prompts.respond(longest)
    bounds = [bound("probe", 1, PROBE_MESSAGES, PROBE_TOKENS, False)]
    for name, count in chains.items():
        made = count * rounds
        answered = answers * (made + len(instructions) * (count > 0))
        bounds += [
            bound(f"{name}: rewrite", made, rewriting, max_tokens, True),
            bound(f"{name}: review", 2 * made, reviewing, REVIEW_TOKENS, True),
            bound(f"{name}: score", 2 * made * scored, prompts.score(longest_given, longest), REVIEW_TOKENS, True),
            bound(f"{name}: answers", answered, responding, max_tokens, False),
        ]
    bounds.append(bound("respond", chains["evolve"] * rounds, responding, max_tokens, False))
    return [one for one in bounds if one.calls]


def self_instruct_bounds(count: int, max_tokens: int) -> list[Bound]:
    """The stages of synth.evolve --without-policy self, for `count` rows."""
    longest = "x" * min(max_tokens * CHARACTERS_PER_TOKEN, prompts.MOST_INSTRUCTION)
    asking = prompts.self_instruct([longest] * (SEED_EXAMPLES + OWN_EXAMPLES), TRIES * count)
    return [
        bound("probe", 1, PROBE_MESSAGES, PROBE_TOKENS, False),
        bound("self-instruct", TRIES * count, asking, max_tokens, True),
        bound("respond", count, prompts.respond(longest), max_tokens, False),
    ]
