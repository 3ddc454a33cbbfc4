"""What the figures of a PPO run say of a run that does not learn: the likely cause, and the flag to turn.

    signs = Signs(settings)
    for step in steps:
        for line in signs.see(step.figures): ...

Each sign is named once in a run. A run that learns, slowly too, shows none.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from training.settings import PPOSettings

WINDOW = 10  # steps that are compared: the first with the last ones
PATIENCE = 30  # steps before a run can be said not to learn
MOVES = 0.01  # nats per completion; a step that moves the policy by less does not show in the texts
NO_ENTROPY = 0.02  # nats per token; all but every completion of a prompt is the same


class Window(NamedTuple):
    """The run so far, as signs see it."""

    settings: PPOSettings
    steps: int
    first: Sequence[float]  # scores of the first `WINDOW` steps
    best: float  # mean score of any `WINDOW` steps in a row
    first_coef: float  # the KL coefficient of the first step
    rows: Sequence[Mapping[str, float]]  # figures of the last `WINDOW` steps

    def recent(self, name: str) -> np.ndarray:
        """A figure in the last `WINDOW` steps; NaN where a step has none."""
        return np.array([row.get(name) for row in self.rows], dtype=float)

    @property
    def rises(self) -> bool:
        """Whether the score is higher than at the start, by more than its spread explains."""
        first, last = np.array(self.first), self.recent("mean_score")
        return last.mean() - first.mean() > 2 * math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / WINDOW)

    @property
    def no_rise(self) -> str:
        """How it is said that the score does not rise."""
        return f"the score has not clearly risen in {self.steps} steps"

    @property
    def moved(self) -> float:
        """Nats per completion that a step's updates move the policy, on average over the last steps."""
        return float(np.mean(self.recent("approx_kl") * self.recent("completion_length")))


def constant_score(window: Window) -> str:
    """Every completion of the last steps has the same score, and the run did not climb there."""
    if window.rises or not np.all(window.recent("score_std") == 0):
        return ""
    score = window.rows[-1]["mean_score"]
    return (
        f"every completion of the last {WINDOW} steps scored {score:.4g}, so there is nothing to learn from: look at "
        "samples.jsonl; a reward with degrees, a higher --temperature or easier prompts tell completions apart"
    )


def alike_in_groups(window: Window) -> str:
    """Completions differ between prompts, but never within one, which is all that group and rloo compare."""
    if window.rises or not np.all(window.recent("equal_groups") == 1):
        return ""
    return (
        f"the {window.settings.num_generations} completions of a prompt always score alike, so all advantages are 0: "
        "a higher --temperature, more --num-generations or a reward with degrees tells them apart"
    )


def fallen(window: Window) -> str:
    """The score is below half of what it was."""
    score, coef = window.recent("mean_score").mean(), window.recent("kl_coef").mean()
    if not 0 <= score < 0.5 * window.best:
        return ""
    if window.settings.target is not None and coef > 2 * window.first_coef:
        cure = f"its KL penalty has grown to {coef:.2g} a nat; a higher --target leaves the policy what it has learned"
    else:
        cure = "a lower --step-kl or --learning-rate, a higher --init-kl-coef or a lower --target holds the policy"
    return (
        f"the score has fallen from {window.best:.3g} to {score:.3g}: {cure}; "
        "checkpoints from before may still be there"
    )


def unmoved(window: Window) -> str:
    """The score is flat, and the policy stands still."""
    if window.rises or not window.moved < MOVES:
        return ""
    return (
        f"{window.no_rise}, and a step moves the policy by {window.moved:.2g} nats "
        "a completion only: raise --learning-rate, or --step-kl, or --ppo-epochs"
    )


def held_by_kl(window: Window) -> str:
    """The score is flat, and the KL is at its target."""
    settings, kl, coef = window.settings, window.recent("kl").mean(), window.recent("kl_coef").mean()
    at_target = settings.adap_kl_ctrl and settings.target is not None and kl > 0.9 * settings.target
    if window.rises or not (at_target or coef * kl > window.recent("score_std").mean() > 0):
        return ""
    return (
        f"{window.no_rise}, and the KL is {kl:.2g} nats a completion at a penalty "
        f"of {coef:.2g} each: a higher --target or a lower --init-kl-coef lets the policy move on"
    )


def no_entropy(window: Window) -> str:
    """The score is flat, and sampling tries nothing new."""
    entropy = window.recent("entropy").mean()
    if window.rises or not entropy < NO_ENTROPY:
        return ""
    return (
        f"{window.no_rise}, and the entropy is {entropy:.2g} nats a token: sampling "
        "tries nothing new; --entropy-coef 0.01, a higher --temperature or a lower --step-kl keeps it open"
    )


SIGNS: list[Callable[[Window], str]] = [constant_score, alike_in_groups, fallen, unmoved, held_by_kl, no_entropy]


class Signs:
    """The signs of a run, each said once."""

    def __init__(self, settings: PPOSettings, rows: Sequence[Mapping[str, float]] = ()) -> None:
        """rows: the figures of the steps that a resumed run has behind it, whose signs have been said."""
        self.settings, self.left = settings, list(SIGNS)
        self.steps, self.best, self.first_coef = 0, -math.inf, math.nan
        self.first: list[float] = []
        self.rows: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        for row in rows:
            if row.get("mean_score") is not None:  # else it is no step's, or damaged
                self.see(row)

    def see(self, figures: Mapping[str, float]) -> list[str]:
        """The lines that one more step's figures give reason to; none in most."""
        self.steps += 1
        self.rows.append(figures)
        if self.steps == 1:
            self.first_coef = figures.get("kl_coef", math.nan)
        if self.steps <= WINDOW:
            self.first.append(figures["mean_score"])
        if self.steps >= WINDOW:
            self.best = max(self.best, float(np.mean([row["mean_score"] for row in self.rows])))
        if self.steps < PATIENCE:
            return []
        window = Window(self.settings, self.steps, self.first, self.best, self.first_coef, list(self.rows))
        found = {sign: line for sign in self.left if (line := sign(window))}
        self.left = [sign for sign in self.left if sign not in found]
        return list(found.values())
