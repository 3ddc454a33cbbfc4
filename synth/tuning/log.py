"""A tuner's run folder: each iteration with some of its rows, metrics, and a picture of the search.

RUN/iterations.jsonl    settings, metrics, reward, numbers of rows and a sample of them, one iteration a line
RUN/metrics.jsonl       its figures only             RUN/data/000003.jsonl    a whole batch
RUN/search.png          metric, reward and settings  RUN/summary.json         the best settings
"""

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synth.sampler import Settings, Space
from synth.stages import write_rows
from synth.tuning.agents import Outcome
from training.metrics import RunLog, read_metrics
from training.plots import Panel, plot_panels

PICTURE, ITERATIONS = "search.png", "iterations.jsonl"
LONGEST_LINE = 150  # characters of a printed row
FEATURES = 4


LOGGER = logging.getLogger("synth.tuning")


@dataclass(frozen=True)
class Iteration:
    """One iteration; number 0 is the baseline. reward: the metric's improvement over the previous iteration.

    asked: rows asked of the generator; rows: how many it returned; sample: some of them.
    """

    number: int
    settings: Settings
    metrics: dict[str, float]
    metric: float
    reward: float
    asked: int
    rows: int
    dropped: dict[str, int]
    features: tuple[float, ...]
    sample: list[dict[str, Any]]

    @property
    def outcome(self) -> Outcome:
        """What the agent is told of it."""
        return Outcome(self.settings, self.metric, self.reward, self.features)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def best_of(history: Sequence[Iteration]) -> Iteration:
    """The iteration with the highest metric, the earliest of equal ones."""
    return max(history, key=lambda one: one.metric)


def log_iteration(one: Iteration) -> None:
    """What a run folder's log says of an iteration, to the logging module: settings, metrics, reward, some rows."""
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in one.metrics.items())
    LOGGER.info("iteration %d: %s; %s; reward %.4g; %d rows", one.number, one.settings, metrics, one.reward, one.rows)
    for row in one.sample:
        LOGGER.info("    %s", f"{row}"[:LONGEST_LINE])


class TunerLog:
    """The log of a run in its folder, from an empty history or a resumed run's."""

    def __init__(self, folder: Path, total: int, history: Sequence[Iteration], space: Space, metric: str, name: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.space, self.metric = folder, space, metric
        done = max(len(history) - 1, 0)
        self.log = RunLog(folder, total, done, description=name)
        reported = {row["step"] for row in read_metrics(folder)}
        for one in history:  # those saved but, before a kill, not yet reported
            if one.number not in reported:
                self._figures(one, best_of(history[: one.number + 1]))

    def report(self, history: Sequence[Iteration]) -> None:
        """Show and record the last iteration."""
        last = history[-1]
        lost = f", dropped: {last.dropped}" if last.dropped else ""
        self.log.say(f"Iteration {last.number}: {last.settings}; {last.rows} rows{lost}")
        for row in last.sample:
            self.log.say(f"    {row}"[:LONGEST_LINE])
        self._figures(last, best_of(history))
        write_rows(self.folder / ITERATIONS, [one.as_dict() for one in history])
        if last.number:
            self.log.advance()

    def _figures(self, one: Iteration, best: Iteration) -> None:
        settings = {"temperature": one.settings.temperature, "top_p": one.settings.top_p}
        figures = {**one.metrics, "reward": one.reward, "best": best.metric, **settings, "rows": one.rows}
        self.log.report(one.number, figures)

    def close(self, history: Sequence[Iteration], finished: bool) -> None:
        """Draw the picture; if the run is finished, write and print the summary."""
        if not history:
            self.log.close()
            return
        best, path = best_of(history), self.folder / PICTURE
        plot_panels(path, panels(history, self.space, self.metric), self.folder.name, "iteration")
        summary = {"iterations": history[-1].number, "best_iteration": best.number, **asdict(best.settings)}
        summary |= {f"best_{self.metric}": best.metric, f"baseline_{self.metric}": history[0].metric}
        self.log.close({**summary, "picture": str(path)} if finished else None)


def panels(history: Sequence[Iteration], space: Space, metric: str) -> list[Panel]:
    """The search as curves over the iterations. Names are drawn as their index in the space."""

    def curve(values: Iterable[float]) -> list[tuple[float, float]]:
        return [(float(number), float(value)) for number, value in enumerate(values)]

    best = curve(best_of(history[:end]).metric for end in range(1, len(history) + 1))
    found = [
        Panel(metric, "", {"iteration": curve(one.metric for one in history), "best so far": best}),
        Panel("reward", f"change of {metric}", {"improvement": curve(one.reward for one in history)}),
        Panel("temperature", "", {"temperature": curve(one.settings.temperature for one in history)}),
        Panel("top_p", "", {"top_p": curve(one.settings.top_p for one in history)}),
        Panel("batch", "rows", {"rows": curve(one.rows for one in history)}),
    ]
    for name, known in (("template", space.templates), ("method", space.methods)):
        if len(known) > 1:
            listed = ", ".join(f"{place} {one}" for place, one in enumerate(known))
            values = curve(known.index(getattr(one.settings, name)) for one in history)
            found.append(Panel(f"{name}: {listed}", "number", {name: values}))
    return found


def batch_features(rows: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """A batch as FEATURES numbers of about 0 to 1: mean lengths of inputs and outputs, distinct words and word pairs.

    Lengths as log10 of characters, divided by 4; distinct ones as shares of all.
    """
    if not rows:
        return (0.0,) * FEATURES
    lengths = [[len(str(row.get(key, ""))) for row in rows] for key in ("input", "output")]
    words = [f"{row.get('input', '')} {row.get('output', '')}".split() for row in rows]
    pairs = [pair for some in words for pair in itertools.pairwise(some)]
    single = [word for some in words for word in some]
    means = [math.log10(1 + sum(some) / len(some)) / 4 for some in lengths]
    return (*means, *(len(set(some)) / max(len(some), 1) for some in (single, pairs)))
