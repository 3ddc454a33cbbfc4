"""What chooses the next settings: random search, Optuna's TPE, or nothing at all, behind one protocol.

An agent proposes settings and is told the outcome. Its behaviour depends only on what it is told and on `state` and
`arrays`, so a restored agent continues as if never interrupted.

Not here: agents trained by policy gradient (see synth/tuning/gradient_agents.py).
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from common.errors import UserError
from synth.sampler import Settings, Space

SWITCH = 0.25  # probability that random search redraws the template, or the method
TRIES = 100  # to draw settings that differ from the current ones
INSTALL = "pip install optuna"


class Outcome(NamedTuple):
    """One iteration. reward: the metric's improvement over the previous iteration; features: of its batch."""

    settings: Settings
    metric: float
    reward: float = 0.0
    features: tuple[float, ...] = ()


class Agent(Protocol):
    """Proposes settings and learns. `propose` and `learn` alternate; the first `last` is the baseline's."""

    def propose(self, last: Outcome) -> Settings:
        """The settings of the next iteration. last: the previous one."""

    def learn(self, outcome: Outcome) -> None:
        """Learn from the outcome of the proposed settings."""

    def state(self) -> dict[str, Any]:
        """The part of the state that JSON can hold."""

    def arrays(self) -> dict[str, Any]:
        """The rest of the state, as mlx arrays by name."""

    def restore(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Restore what `state` and `arrays` returned."""


class Defaults:
    """No search: always the initial settings. A control, which also shows how much a metric varies by chance."""

    def propose(self, last: Outcome) -> Settings:
        return last.settings

    def learn(self, outcome: Outcome) -> None:
        """Nothing."""

    def state(self) -> dict[str, Any]:
        return {}

    def arrays(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Nothing to restore."""


@dataclass
class RandomSearch:
    """Hill climbing: a step of ± step_size in temperature and in top_p from the best settings so far; kept if better.

    If there are several templates or methods, each is redrawn with probability 1/4. Better means a higher metric than
    the best settings', not than the previous iteration's.
    """

    space: Space
    step_size: float = 0.05
    seed: int = 0

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)
        self.kept: Outcome | None = None

    def propose(self, last: Outcome) -> Settings:
        self.kept = self.kept or last
        for _ in range(TRIES):
            settings = self._neighbour(self.kept.settings)
            if settings != self.kept.settings:
                break
        return settings

    def _neighbour(self, settings: Settings) -> Settings:
        def step() -> float:
            return float(self.rng.choice((-1, 1))) * self.step_size

        def drawn(now: str, known: tuple[str, ...]) -> str:
            return str(self.rng.choice(known)) if len(known) > 1 and self.rng.random() < SWITCH else now

        return self.space.within(
            Settings(
                settings.temperature + step(),
                settings.top_p + step(),
                drawn(settings.template, self.space.templates),
                drawn(settings.method, self.space.methods),
            )
        )

    def learn(self, outcome: Outcome) -> None:
        assert self.kept is not None, "propose comes before learn"
        if outcome.metric > self.kept.metric:
            self.kept = outcome

    def state(self) -> dict[str, Any]:
        return {"rng": rng_state(self.rng), "kept": self.kept and outcome_state(self.kept)}

    def arrays(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        self.rng = rng_from(state["rng"])
        self.kept = outcome_from(state["kept"]) if state["kept"] else None


class TreeParzen:
    """Optuna's TPE over the whole space, with its defaults: 10 random trials first. It sees metrics, not rewards.

    Raises UserError if optuna, which is optional, is not installed.
    """

    def __init__(self, space: Space, seed: int = 0):
        try:
            import optuna
        except ImportError:
            raise UserError(f"rl_algorithm tpe needs optuna, which is not installed; {INSTALL}") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.space, self.seed = optuna, space, seed
        distributions = optuna.distributions
        self.distributions = {
            "temperature": distributions.FloatDistribution(*space.temperature),
            "top_p": distributions.FloatDistribution(*space.top_p),
            "template": distributions.CategoricalDistribution(space.templates),
            "method": distributions.CategoricalDistribution(space.methods),
        }
        self.trials: list[Outcome] = []

    def propose(self, last: Outcome) -> Settings:
        if not self.trials:
            self.trials.append(last)  # the baseline is a trial as well
        # A new sampler per trial, so that its draws depend only on the number of trials.
        sampler = self.optuna.samplers.TPESampler(seed=self.seed * 1_000_003 + len(self.trials))
        study = self.optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(
            self.optuna.trial.create_trial(
                params=asdict(seen.settings), distributions=self.distributions, value=seen.metric
            )
            for seen in self.trials
        )
        return self.space.within(Settings(**study.ask(self.distributions).params))

    def learn(self, outcome: Outcome) -> None:
        self.trials.append(outcome)

    def state(self) -> dict[str, Any]:
        return {"trials": [outcome_state(seen) for seen in self.trials]}

    def arrays(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        self.trials = [outcome_from(seen) for seen in state["trials"]]


def rng_state(rng: np.random.Generator) -> dict[str, Any]:
    """A generator's state for JSON, whose integers are unbounded."""
    return dict(rng.bit_generator.state)


def rng_from(state: dict[str, Any]) -> np.random.Generator:
    """The generator that `rng_state` was given."""
    rng = np.random.default_rng()
    rng.bit_generator.state = state
    return rng


def outcome_state(outcome: Outcome) -> dict[str, Any]:
    return {**outcome._asdict(), "settings": asdict(outcome.settings), "features": list(outcome.features)}


def outcome_from(state: dict[str, Any]) -> Outcome:
    settings = Settings(**state["settings"])
    return Outcome(settings, state["metric"], state["reward"], tuple(state["features"]))
