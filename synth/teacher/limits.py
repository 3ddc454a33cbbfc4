"""What a teacher may cost and what it has cost: limits on calls, tokens and money, and the ledger by stage.

Every attempt is a call, retries and probes included. Tokens are those the endpoint reports; an attempt without an
answer counts as a call with no tokens, since its cost is unknown. Prices are arguments, in the currency of the limit on
money.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from common.errors import UserError


class LimitReached(UserError):
    """A user's limit was reached; everything that was in flight is stored."""


class Cost(NamedTuple):
    """Tokens of one call, or of many."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Limits:
    """Upper bounds (None: no bound) and prices per million tokens."""

    calls: int | None = None
    tokens: int | None = None
    money: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value is not None and not value >= 0:
                raise UserError(f"the limit or price {name} is {value}; give a number of at least 0")
        if self.money is not None and not (self.price_in or self.price_out):
            raise UserError(f"a limit of {self.money:g} in money needs prices; give those per million tokens")

    def price(self, cost: Cost) -> float:
        return (cost.prompt_tokens * self.price_in + cost.completion_tokens * self.price_out) / 1e6


@dataclass
class Count:
    """One stage's row of the ledger. cached: responses found in the cache; retries are among the calls."""

    calls: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Ledger:
    """Counts by stage, and what the calls in flight may still cost: no limit is passed by their coming back.

    (But for the prompt's tokens, which are estimated until the endpoint has counted them.)
    """

    def __init__(self, limits: Limits | None = None):
        self.limits = limits or Limits()
        self.stages: dict[str, Count] = {}
        self.total = Count()
        self._reserved = Cost(0, 0)

    def _add(self, stage: str, **amounts: float) -> None:
        for count in (self.stages.setdefault(stage, Count()), self.total):
            for name, amount in amounts.items():
                setattr(count, name, getattr(count, name) + amount)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """For a JSON file: one row a stage, and "total"."""
        rows = {name: asdict(count) for name, count in self.stages.items()}
        return {**rows, "total": asdict(self.total)}

    def restore(self, saved: Mapping[str, Count]) -> None:
        """Go on from what `as_dict` gave, so that limits hold for a run and not for each of its processes."""
        self.stages = dict(saved)
        self.total = self.stages.pop("total", Count())

    def reserve(self, stage: str, cost: Cost, retry: bool) -> LimitReached | None:
        """Count a call that is about to be sent, or return the error that says which limit it would pass."""
        error = self._passed(cost)
        if error is None:
            self._reserved = _plus(self._reserved, cost)
            self._add(stage, calls=1, retries=int(retry))
        return error

    def release(self, cost: Cost) -> None:
        """The call has come back, or never will."""
        self._reserved = Cost(*(a - b for a, b in zip(self._reserved, cost, strict=True)))

    def receive(self, stage: str, cost: Cost) -> None:
        """Count what a call did cost."""
        self._add(stage, **cost._asdict(), money=self.limits.price(cost))

    def found(self, stage: str) -> None:
        """Count a response that was in the cache."""
        self._add(stage, cached=1)

    def _passed(self, cost: Cost) -> LimitReached | None:
        limits, spent = self.limits, self.total
        then = _plus(self._reserved, cost)
        made = f"{spent.calls} calls ({spent.retries} retries), {spent.tokens} tokens, {spent.money:.4g} in money"
        remedy = "raise the limit and start again: nothing stored is asked for twice"
        for name, limit, value in (
            ("calls", limits.calls, spent.calls + 1),
            ("tokens", limits.tokens, spent.tokens + then.tokens),
            ("money", limits.money, spent.money + limits.price(then)),
        ):
            if limit is not None and value > limit:
                return LimitReached(f"the next call may pass the limit of {limit:g} {name} after {made}; {remedy}")
        return None


def _plus(a: Cost, b: Cost) -> Cost:
    return Cost(a.prompt_tokens + b.prompt_tokens, a.completion_tokens + b.completion_tokens)
