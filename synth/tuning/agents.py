"""Who chooses the next settings: random search, Optuna's TPE, and no one at all, behind one protocol.

An agent proposes settings, and is told what came of them. All that it will ever do follows from what it is told and
from `state` and `arrays`, so a restored one goes on as if nothing had been. The policies stand in
synth/tuning/gradient_agents.py. Leaves out generation and the target model (synth/tuning/tuner.py).

    python -m pytest tests/test_tuner_agents.py
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from common.errors import UserError
from synth.sampler import Settings, Space

SWITCH = 0.25  # the chance that random search draws a template, or a method, anew
TRIES = 100  # to draw settings that are not the same again
INSTALL = "pip install optuna"


class Outcome(NamedTuple):
    """One iteration. reward: the metric's improvement over the iteration before; features: of its batch."""

    settings: Settings
    metric: float
    reward: float = 0.0
    features: tuple[float, ...] = ()


class Agent(Protocol):
    """Proposes settings and learns. `propose` and `learn` are called in turn; the first `last` is the baseline's."""

    def propose(self, last: Outcome) -> Settings:
        """The settings of the next iteration. last: the iteration before."""

    def learn(self, outcome: Outcome) -> None:
        """What came of the settings that were proposed."""

    def state(self) -> dict[str, Any]:
        """All that JSON can hold."""

    def arrays(self) -> dict[str, Any]:
        """All else, as mlx arrays by name."""

    def restore(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Be as the agent was that gave these."""


class Defaults:
    """No search: the settings of the start again and again. The control, and how much a metric varies by itself."""

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
    """From the settings that are kept a step of ± step_size in temperature and in top_p; kept if better, else undone.

    Where there are several templates or methods, each is drawn anew with a chance of 1/4. Better means a higher metric
    than that of the settings that are kept: the iteration before may have been a bad one that was undone.
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
    """Optuna's TPE over the whole space, by its own defaults: 10 random trials first. It sees metrics, not rewards.

    Raises UserError where optuna, which is optional, is not installed.
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
            self.trials.append(last)  # the baseline is a trial, too
        # A sampler of its own for each trial, so that what it draws follows from the trials' number alone.
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
    """A generator's state for JSON, whose integers have no limit."""
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
