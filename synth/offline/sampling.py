"""How the offline teacher's answers depend on temperature, top_p and template: a stand-in for a model's behaviour.

With spread = temperature · top_p, which is 1 if a request sets neither:

- errors: the odds of a wrong answer are those of --error-rate, times e^(3 · (spread − 1));
- variety: below a spread of 1 a new sample is, with probability 1 − spread, one of 40 favourites, and so repeats;
- the template "varied" halves that probability and doubles the odds of an error; "careful" divides the odds by 3.

At a spread of 1 and without a template nothing changes. So data is best at some spread in between, which depends on how
sensitive a task's learner is to wrong rows and to few distinct ones.
"""

import math
from collections.abc import Mapping
from random import Random
from typing import Any, NamedTuple

from synth.prompts import TEMPLATES

STEEPNESS = 3.0  # of the log odds of an error, per unit of spread
FAVOURITES = 40  # of a task
VARIED_ODDS, CAREFUL_ODDS = 2.0, 1 / 3
VARIED_REPEATS = 0.5


class Sampling(NamedTuple):
    """error_rate: of this request, 0..1; repeats: the probability that its sample is a favourite."""

    error_rate: float
    repeats: float


def sampling_of(body: Mapping[str, Any], prompt: str, error_rate: float) -> Sampling:
    """The teacher's error rate and repeats, given a request's parameters and template. prompt: the user's message."""
    temperature, top_p = (_number(body.get(name)) for name in ("temperature", "top_p"))
    spread = temperature * top_p
    template = next((name for name, text in TEMPLATES.items() if _demand(text) and _demand(text) in prompt), "")
    odds = {"varied": VARIED_ODDS, "careful": CAREFUL_ODDS}.get(template, 1.0) * math.exp(STEEPNESS * (spread - 1))
    repeats = max(0.0, 1 - spread) * (VARIED_REPEATS if template == "varied" else 1.0)
    return Sampling(error_rate * odds / (1 - error_rate + error_rate * odds), repeats)


def favourite(identity: str, repeats: float, seed: int, task: str) -> Random | None:
    """The generator of a favourite sample, shared by all requests; None if the sample is to be a new one.

    identity: what the answer depends on.
    """
    rng = Random(f"favourite {identity}")
    return Random(f"{seed} {task} favourite {rng.randrange(FAVOURITES)}") if rng.random() < repeats else None


def _demand(template: str) -> str:
    return template.removeprefix("{request}")


def _number(given: Any) -> float:
    """A parameter, clipped to 0..5; 1 if it is not a number."""
    return min(max(float(given), 0.0), 5.0) if isinstance(given, int | float) and not isinstance(given, bool) else 1.0
