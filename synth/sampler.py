"""How data is generated, as settings that can be read, set and learned: the sampler, and the generator protocol.

A generator has a `sampler` and the two methods of `Generator`; each of its requests to a teacher uses the sampler's
settings at that moment.

Not here: what changes them (see synth/tuning/tuner.py and synth/tuning/agents.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from common.errors import UserError
from synth.prompts import TEMPLATES

DataRow = dict[str, Any]  # one row of training data, such as {"input": ..., "output": ...}
METHODS = ("generate_from_seed", "evolve_instructions")
DIGITS = 9  # decimals kept of a setting, so that steps of 0.05 do not add up to 0.8500000000000001


@dataclass(frozen=True)
class Settings:
    """One way to generate. template: the name of one; method: the generator's, of METHODS."""

    temperature: float = 1.0
    top_p: float = 1.0
    template: str = "plain"
    method: str = METHODS[0]

    def __str__(self) -> str:
        return f"temperature {self.temperature:.3g}, top_p {self.top_p:.3g}, template {self.template}, {self.method}"


@dataclass(frozen=True)
class Space:
    """The possible settings: two ranges (lowest, highest) and two lists of names.

    Raises UserError for an empty range or list, an invalid range and an unknown method.
    """

    temperature: tuple[float, float] = (0.0, 2.0)
    top_p: tuple[float, float] = (0.05, 1.0)
    templates: tuple[str, ...] = ("plain",)
    methods: tuple[str, ...] = METHODS[:1]

    def __post_init__(self):
        for name, (low, high), most in (("temperature", self.temperature, 100.0), ("top_p", self.top_p, 1.0)):
            if not 0 <= low <= high <= most:
                raise UserError(f"the range of {name} is {low:g} to {high:g}; 0 <= lowest <= highest <= {most:g}")
        if not self.top_p[0] > 0:
            raise UserError("the range of top_p starts at 0, with which nothing could be drawn; start it above 0")
        if not self.templates or not self.methods or not set(self.methods) <= set(METHODS):
            raise UserError(
                f"the templates are {self.templates} and the methods {self.methods}; give one template at least, and "
                f"methods of {', '.join(METHODS)}"
            )

    def within(self, settings: Settings) -> Settings:
        """The settings with both numbers clipped to their ranges, and rounded."""
        held = {
            name: round(min(max(getattr(settings, name), low), high), DIGITS)
            for name, (low, high) in (("temperature", self.temperature), ("top_p", self.top_p))
        }
        return replace(settings, **held)

    def check(self, settings: Settings) -> None:
        """Raise UserError for settings outside this space."""
        for name in ("temperature", "top_p"):
            value, (low, high) = getattr(settings, name), getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name} is {value:g}; it must lie within {low:g} to {high:g}")
        for name, known in (("template", self.templates), ("method", self.methods)):
            if getattr(settings, name) not in known:
                raise UserError(f"{name} is {getattr(settings, name)!r}; use one of {', '.join(known)}")

    def as_vector(self, settings: Settings) -> list[float]:
        """Settings as numbers in 0..1: the two ranges, then the names one-hot."""
        pairs = ((settings.temperature, self.temperature), (settings.top_p, self.top_p))
        numbers = [(value - low) / (high - low) if high > low else 0.0 for value, (low, high) in pairs]
        names = ((settings.template, self.templates), (settings.method, self.methods))
        return numbers + [float(name == one) for name, known in names for one in known]


class Sampler:
    """The settings that a generator asks with. Each of the four can be read and set, or all of them together.

    templates: name → text with {request} where the request goes. Raises UserError for settings outside the space.
    """

    def __init__(
        self, space: Space | None = None, settings: Settings | None = None, templates: dict[str, str] | None = None
    ):
        self.space = space or Space()
        self.templates = dict(TEMPLATES if templates is None else templates)
        for name in self.space.templates:
            if "{request}" not in self.templates.get(name, ""):
                raise UserError(f"the template {name!r} has no text with {{request}} in it; write one, or remove it")
        self._settings = Settings()
        self.set(settings or Settings())

    def get(self) -> Settings:
        """All four."""
        return self._settings

    def set(self, settings: Settings) -> None:
        """Set all four. Raises UserError, and changes nothing, for settings outside the space."""
        self.space.check(settings)
        self._settings = settings

    @property
    def template_text(self) -> str:
        """The text that the template's name stands for."""
        return self.templates[self.template]

    @property
    def temperature(self) -> float:
        return self._settings.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.set(replace(self._settings, temperature=value))

    @property
    def top_p(self) -> float:
        return self._settings.top_p

    @top_p.setter
    def top_p(self, value: float) -> None:
        self.set(replace(self._settings, top_p=value))

    @property
    def template(self) -> str:
        return self._settings.template

    @template.setter
    def template(self, name: str) -> None:
        self.set(replace(self._settings, template=name))

    @property
    def method(self) -> str:
        return self._settings.method

    @method.setter
    def method(self, name: str) -> None:
        self.set(replace(self._settings, method=name))


@dataclass(frozen=True)
class Results:
    """A generator's output. data: the usable rows; dropped: the number of others, by reason."""

    data: list[DataRow]
    dropped: dict[str, int] = field(default_factory=dict)


class Generator(Protocol):
    """What the tuner needs of a generator. Both methods use `sampler` and ask a teacher for `count` rows.

    first: the number of the first row. Other numbers give other rows, and the same number with the same settings gives
    the same row again, so that a resumed run pays for nothing twice.
    """

    sampler: Sampler

    def generate_from_seed(self, count: int, first: int = 1) -> Results:
        """New rows, in the style of the seed rows."""

    def evolve_instructions(self, count: int, first: int = 1) -> Results:
        """Rows evolved from the seed rows, which are used in turn."""


def in_turn(rows: Sequence[Any], number: int) -> Any:
    """The seed row from which row `number` (from 1) is evolved."""
    return rows[(number - 1) % len(rows)]
