"""The tuner's agents compared with each other, with no search, and where settings do not matter, on fresh data.

    python benchmarks/tuner_controls.py                          10 seeds, 20 iterations: some 4 minutes of one core
    python benchmarks/tuner_controls.py --environments simulated "simulated, null" --iterations 300 --output-dir DIR

Four environments. simulated: a metric that is a known function of the settings, plus noise. reviews: a scikit-learn
classifier of reviews written by the offline teacher, as in synth/tuning/examples (needs scikit-learn; tpe needs
optuna). Each has a null twin, whose metric varies as much but does not depend on the settings.

Every cell, one agent in one environment with one seed, makes the same number of target calls; then its best settings
and the initial ones are evaluated on fresh batches and, for reviews, on fresh test rows. Two questions: are they better
than the initial ones, and better than what the same search finds without learning? A cell is a file in the output
folder; existing ones are not run again. Ends with a table, also written to a file.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import cpu

cpu.enable()  # before mlx is imported

import numpy as np
from tqdm import tqdm

from common.cli import run
from common.errors import UserError
from common.files import atomic_file, read_json, write_json
from common.parser import Parser, positive
from synth.offline.reviews import Reviews
from synth.offline.server import OfflineTeacher
from synth.prompts import TEMPLATES
from synth.sampler import Results, Sampler, Settings, Space
from synth.task import SHIPPED, load_task
from synth.teacher import structured
from synth.teacher.completions import Ask, Reply, read_completion
from synth.teacher.limits import Cost
from synth.tuning.agents import Agent, Defaults, Outcome
from synth.tuning.config import Config, config_from
from synth.tuning.targets import TargetModel, load_target
from synth.tuning.task_generator import TaskGenerator
from synth.tuning.tuner import RLTuner
from training.intervals import difference

Rows = list[dict[str, Any]]
FAST: dict[str, Any] = {"step_size": 0.2, "learning_rate": 0.03}  # than the defaults, 0.05 and 0.001
# Ways to learn from few and noisy measurements that the library does not have; docs/tuner.md says what they are worth.
LEARNERS = (
    *("uniform draws, GP chooses", "GP", "GP, earlier run", "linear bandit", "sequential halving"),
    "earlier run's best",
)
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {"rl_algorithm": "defaults"},
    "uniform draws": {"rl_algorithm": "defaults"},  # takes the place of the agent
    "random search": {"rl_algorithm": "random_search"},
    "random search, fast": {"rl_algorithm": "random_search", "step_size": 0.2},
    "policy, never updated, fast": {"rl_algorithm": "reinforce", **FAST, "update_every": 10**9},
    "REINFORCE": {"rl_algorithm": "reinforce"},
    "REINFORCE, fast": {"rl_algorithm": "reinforce", **FAST},
    "PPO, fast": {"rl_algorithm": "ppo", **FAST},
    "TPE": {"rl_algorithm": "tpe"},
    **{name: {"rl_algorithm": "defaults"} for name in LEARNERS},  # which take the place of the agent
}
AGENTS = tuple(name for name in VARIANTS if name not in LEARNERS)  # those of the library, and their controls
# What an agent must beat to have learned anything: the same without learning.
CONTROLS = {
    "random search": "uniform draws",
    "random search, fast": "uniform draws",
    "REINFORCE, fast": "policy, never updated, fast",
    "PPO, fast": "policy, never updated, fast",
    "TPE": "uniform draws",
    **dict.fromkeys(LEARNERS[:-1], "uniform draws"),
    "GP, earlier run": "earlier run's best",
}
ENVIRONMENTS = ("simulated", "simulated, null", "reviews", "reviews, null")
NOISE = 0.02  # of the simulated metric, one standard deviation
BATCH = 100  # rows
VALIDATION, TEST, CLEAN = 200, 1000, 80  # rows of reviews; CLEAN: that the null twin trains on
LEVEL = 0.05
EARLIER = 1000  # added to the seed of an earlier run


class UniformDraws(Defaults):
    """Settings drawn uniformly from the whole space, whatever the last outcome."""

    def __init__(self, space: Space, seed: int):
        self.space, self.rng = space, Random(seed)

    def propose(self, last: Outcome) -> Settings:
        temperature, top_p = (self.rng.uniform(*limits) for limits in (self.space.temperature, self.space.top_p))
        return Settings(temperature, top_p, self.rng.choice(self.space.templates), self.rng.choice(self.space.methods))


class Surrogate(UniformDraws):
    """Uniform draws at first, then the candidate of the highest upper bound by a model of the metric.

    A model gives means and standard deviations: "gp", a Gaussian process with an RBF kernel; "linear", Bayesian
    regression on the settings, their squares and products, a bandit. explores: False: draws stay uniform, and the model
    only says at the end which of them is best. earlier: outcomes of an earlier run.
    """

    FIRST, CANDIDATES, BONUS = 6, 256, 1.0

    def __init__(self, space: Space, seed: int, model: str, explores: bool = True, earlier: Sequence[Outcome] = ()):
        super().__init__(space, seed)
        self.model, self.explores, self.seen = {"gp": gaussian_process, "linear": linear}[model], explores, [*earlier]

    def propose(self, last: Outcome) -> Settings:
        if last not in self.seen:
            self.seen.append(last)  # the baseline
        if not self.explores or len(self.seen) < self.FIRST:
            return super().propose(last)
        candidates = [super(Surrogate, self).propose(last) for _ in range(self.CANDIDATES)]
        means, deviations = self._posterior(candidates)
        return candidates[int((means + self.BONUS * deviations).argmax())]

    def learn(self, outcome: Outcome) -> None:
        self.seen.append(outcome)

    def recommended(self) -> Settings:
        """Of the settings that were tried, those of the highest mean."""
        tried = [one.settings for one in self.seen]
        return tried[int(self._posterior(tried)[0].argmax())]

    def _posterior(self, settings: Sequence[Settings]) -> tuple[np.ndarray, np.ndarray]:
        known, new = (np.array([self.space.as_vector(one) for one in some]) for some in (
            [one.settings for one in self.seen], settings
        ))  # fmt: skip
        metrics = np.array([one.metric for one in self.seen])
        scale = metrics.std() or 1.0
        means, deviations = self.model(known, (metrics - metrics.mean()) / scale, new)
        return means * scale + metrics.mean(), deviations * scale


def gaussian_process(known: np.ndarray, values: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations at (N, D) points; length scale and share of noise by the marginal likelihood."""

    def kernel(a: np.ndarray, b: np.ndarray, length: float, noise: float) -> np.ndarray:
        return (1 - noise) * np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * length**2))

    def likelihood(length: float, noise: float) -> float:
        covariance = kernel(known, known, length, noise) + noise * np.eye(len(known))
        return -float(values @ np.linalg.solve(covariance, values) + np.linalg.slogdet(covariance)[1])

    grid = [(length, noise) for length in (0.2, 0.4, 0.8, 1.6) for noise in (0.03, 0.1, 0.3, 0.6)]
    length, noise = max(grid, key=lambda one: likelihood(*one))
    inverse = np.linalg.inv(kernel(known, known, length, noise) + noise * np.eye(len(known)))
    across = kernel(new, known, length, noise)
    variances = 1 - noise - np.einsum("nk,kl,nl->n", across, inverse, across)
    return across @ inverse @ values, np.sqrt(np.maximum(variances, 0))


def linear(known: np.ndarray, values: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same by Bayesian regression on the columns, their squares and products; wide prior, noise of variance 0.3."""

    def terms(x: np.ndarray) -> np.ndarray:
        pairs = [x[:, i] * x[:, j] for i in range(x.shape[1]) for j in range(i, x.shape[1])]
        return np.column_stack([np.ones(len(x)), x, *pairs])

    x, z = terms(known), terms(new)
    covariance = np.linalg.inv(x.T @ x / 0.3 + np.eye(x.shape[1]) / 25)
    return z @ covariance @ x.T @ values / 0.3, np.sqrt(np.einsum("nk,kl,nl->n", z, covariance, z))


class Halving(UniformDraws):
    """Sequential halving: uniform draws in the first half of the budget, the better half of those left measured again.

    Each round measures as often as it has places; the best mean of the last round is recommended.
    """

    def __init__(self, space: Space, seed: int, iterations: int):
        super().__init__(space, seed)
        self.left = [super(Halving, self).propose(Outcome(Settings(), 0.0)) for _ in range(max(2, iterations * 2 // 5))]
        self.measured: dict[Settings, list[float]] = {one: [] for one in self.left}
        self.queue = [*self.left]

    def propose(self, last: Outcome) -> Settings:
        if not self.queue:
            self.left = sorted(self.left, key=self._mean, reverse=True)[: max(2, len(self.left) // 2)]
            self.queue = [*self.left]
        return self.queue.pop(0)

    def learn(self, outcome: Outcome) -> None:
        self.measured[outcome.settings].append(outcome.metric)

    def recommended(self) -> Settings:
        return max(self.left, key=self._mean)

    def _mean(self, settings: Settings) -> float:
        return mean(self.measured[settings]) if self.measured[settings] else float("-inf")


class Simulated:
    """A generator whose rows hold only the settings and a number, for `simulated_target`."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def generate_from_seed(self, count: int, first: int = 1) -> Results:
        return Results([{"settings": vars(self.sampler.get()), "number": first}])

    evolve_instructions = generate_from_seed


def quality(settings: Settings) -> float:
    """The simulated metric without noise: best, 0.8, at temperature 0.5 and top_p 0.8 with the template careful."""
    missed = 0.25 * (settings.temperature - 0.5) ** 2 + 0.1 * (settings.top_p - 0.8) ** 2
    return 0.8 - missed - 0.05 * (settings.template != "careful")


def digest(rows: Rows) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def simulated_target(seed: int, null: bool) -> Callable[[Rows], dict[str, float]]:
    def target(rows: Rows) -> dict[str, float]:
        noise = Random(f"{seed} {digest(rows)}").gauss(0, NOISE)
        return {"accuracy": quality(Settings() if null else Settings(**rows[0]["settings"])) + noise}

    return target


def reviews(identity: str, count: int) -> Rows:
    """Reviews with correct labels, made by rule."""
    rng, rule = Random(identity), Reviews()
    return [rule.sample(rng, None)._asdict() for _ in range(count)]


def reviews_target(null: bool) -> TargetModel:
    """The example's classifier; for the null twin trained on correct rows that only vary with the given ones."""
    accuracy = load_target(str(ROOT / "synth" / "tuning" / "examples" / "classifier.py:accuracy"))
    if not null:
        return accuracy
    return lambda rows, validation: accuracy(reviews(digest(rows), CLEAN), validation)


def direct(teacher: OfflineTeacher) -> Callable[[Sequence[Ask]], list[Reply]]:
    """Ask an offline teacher without HTTP, which is ten times as fast."""

    def reply(ask: Ask) -> Reply:
        assert ask.schema is not None, "samples are asked for by a schema"
        body = {"messages": ask.messages, "temperature": ask.temperature, "top_p": ask.top_p}
        body["response_format"] = structured.response_format(ask.schema)
        stored = read_completion(teacher.complete(body, str(ask.sample)), ask, str)
        parsed, reason = structured.read_json_answer(stored.text, ask.schema)
        return Reply(stored.text, parsed, "ok" if parsed else "malformed", Cost(0, 0), False, reason)

    return lambda asks: [reply(ask) for ask in asks]


def tuner_of(environment: str, config: Config, agent: Agent | None = None) -> RLTuner:
    """The tuner of a cell. agent: instead of the configuration's."""
    sampler, seed, null = Sampler(config.space, config.settings, config.templates), config.seed, "null" in environment
    if environment.startswith("simulated"):
        return RLTuner(config, simulated_target(seed, null), [], Simulated(sampler), agent)
    task = load_task(SHIPPED / "reviews.yaml")
    generator = TaskGenerator(task, sampler, direct(OfflineTeacher(seed=seed)))
    return RLTuner(config, reviews_target(null), reviews(f"validation {seed}", VALIDATION), generator, agent)


def agent_of(environment: str, variant: str, config: Config) -> Agent | None:
    """The agent of a variant that the library does not have; None for the others."""
    space, seed, iterations = config.space, config.seed, config.rl_tuning.num_iterations
    if variant == "sequential halving":
        return Halving(space, seed, iterations)
    if variant in ("GP", "linear bandit"):
        return Surrogate(space, seed, "gp" if variant == "GP" else "linear")
    if variant.startswith("uniform draws"):
        return Surrogate(space, seed, "gp", explores=False) if "GP" in variant else UniformDraws(space, seed)
    if "earlier" not in variant:
        return None
    # The user's run before this one: uniform draws with another teacher, other validation rows and other noise.
    before = replace(config, seed=EARLIER + seed)
    earlier = tuner_of(environment, before, UniformDraws(space, EARLIER + seed))
    outcomes = [one.outcome for one in earlier.train()]
    if variant == "GP, earlier run":
        return Surrogate(space, seed, "gp", earlier=outcomes)
    return Repeated(max(outcomes, key=lambda one: one.metric).settings)


class Repeated(Defaults):
    """The same settings in every iteration."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def propose(self, last: Outcome) -> Settings:
        return self.settings

    def recommended(self) -> Settings:
        return self.settings


def run_cell(environment: str, variant: str, seed: int, iterations: int, fresh: int) -> dict[str, Any]:
    """Search, then evaluate initial and best settings on `fresh` batches each, on rows that the search has not seen."""
    tuning = {"enable_rl_tuning": True, "num_iterations": iterations, "batch_size": BATCH, **VARIANTS[variant]}
    config = config_from({"templates": list(TEMPLATES), "seed": seed, "rl_tuning": tuning}, variant)
    agent = agent_of(environment, variant, config)
    tuner = tuner_of(environment, config, agent)
    tuner.train()
    if recommended := getattr(agent, "recommended", None):
        # `best` is the highest metric; an agent that averages says itself which settings it found best.
        tuner.history.append(replace(tuner.best, settings=recommended(), metric=float("inf")))
    tuner.validation_dataset = reviews(f"test {seed}", TEST)
    found = {name: sum(some) / len(some) for name, some in tuner.confirm(fresh).items()}
    measured = [one.metric for one in tuner.history if one.metric < float("inf")]
    promised = max(measured) - measured[0]
    late = measured[-max(1, iterations // 4) :]
    more = {"settings": str(tuner.best.settings), "calls": len(measured)}
    return {**found, "promised": promised, "late": sum(late) / len(late), **more}


def cell_path(folder: Path, environment: str, variant: str, seed: int) -> Path:
    return folder / "cells" / f"{environment} - {variant} - {seed}.json"


def sign_flip(deltas: Sequence[float]) -> float:
    """Exact two-sided p-value of paired differences: the share of sign patterns with a mean at least as far from 0."""
    sums = np.zeros(1)
    for delta in deltas:
        sums = np.concatenate([sums + delta, sums - delta])
    return float((np.abs(sums) >= abs(sum(deltas)) - 1e-12).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several questions, adjusted for multiple comparisons (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


def table(folder: Path, environments: Sequence[str], variants: Sequence[str], seeds: int) -> str:
    """One line per agent and environment; p-values are adjusted over the agents of an environment."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    controls = {name: control for name, control in CONTROLS.items() if {name, control} <= {*variants}}
    lines = []
    for environment in environments:
        cells = {name: read_cells(folder, environment, name, seeds) for name in variants}
        means = {(name, key): [cell[key] for cell in some] for name, some in cells.items() for key in KEYS}
        gains = compared({name: (means[name, "start"], means[name, "best"]) for name in variants if name != "defaults"})
        over, later = (
            compared({name: (means[control, key], means[name, key]) for name, control in controls.items()})
            for key in ("best", "late")
        )
        lines += [f"**{environment}**, {seeds} seeds; at the start {mean(means[variants[0], 'start']):.3f}", "", *head]
        for name in variants:
            best, promised, late = (f"{mean(means[name, key]):.3f}" for key in ("best", "promised", "late"))
            words = [name, best, gains.get(name, ""), over.get(name, ""), promised, late, later.get(name, "")]
            lines.append("| " + " | ".join(words) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


KEYS = ("start", "best", "promised", "late")
COLUMNS = (
    "agent",
    "best settings, fresh data",
    "gain on the start [95 %], p",
    "gain on its control [95 %], p",
    "gain that the search promised",
    "last quarter of the search",
    "gain there on its control [95 %], p",
)


def read_cells(folder: Path, environment: str, variant: str, seeds: int) -> list[dict[str, Any]]:
    return [read_json(cell_path(folder, environment, variant, seed)) for seed in range(seeds)]


def compared(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, str]:
    """Second minus first, paired by seed: bootstrap interval; exact adjusted p-value, * if below 0.05."""
    p_values = holm([sign_flip([b - a for a, b in zip(*pair, strict=True)]) for pair in pairs.values()])
    return {
        name: f"{difference(*pair).interval}, {p_value:.3f}{' *' if p_value < LEVEL else ''}"
        for (name, pair), p_value in zip(pairs.items(), p_values, strict=True)
    }


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--environments", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(AGENTS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=20, help="target calls of a search, beside the baseline's")
    parser.add_argument("--fresh", type=int, default=10, help="fresh batches, of the start and of the best each")
    parser.add_argument("--output-dir", default="runs/tuner_controls", help="folder of all cells")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for name in ("seeds", "iterations", "fresh"):
        positive(name, getattr(args, name))
    folder = Path(args.output_dir)
    budget, settings = folder / "settings.json", {"iterations": args.iterations, "fresh": args.fresh}
    if budget.is_file() and read_json(budget) != settings:
        raise UserError(f"{folder} holds cells of {read_json(budget)}; name another --output-dir")
    write_json(budget, settings)
    cells = [(e, v, seed) for seed in range(args.seeds) for e in args.environments for v in args.variants]
    for cell in tqdm(cells, desc="cells", unit="cell"):
        path = cell_path(folder, *cell)
        if not path.is_file():
            write_json(path, run_cell(*cell, args.iterations, args.fresh))
    text = table(folder, args.environments, args.variants, args.seeds)
    with atomic_file(folder / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\n{folder}/table.md")


if __name__ == "__main__":
    run(main)
