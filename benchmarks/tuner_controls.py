"""The tuner's agents compared with each other, with no search, and where settings do not matter, on fresh data.

    python benchmarks/tuner_controls.py                          10 seeds, 20 iterations: some 4 minutes of one core
    python benchmarks/tuner_controls.py --environments simulated "simulated, null" --iterations 300 --output-dir DIR

The environments. simulated: a metric that is a quadratic of the settings, plus noise; edges: one that no quadratic
fits. reviews: a scikit-learn classifier of reviews written by the offline teacher, as in synth/tuning/examples (needs
scikit-learn; tpe needs optuna). Two have a null twin, whose metric varies as much but does not depend on the settings.

Every cell, one agent in one environment with one seed, trains its target on the same number of rows; then its best
settings and the initial ones are evaluated on fresh batches and, for reviews, on fresh test rows. Two questions: are
they better than the initial ones, and better than what the same search finds without learning? A cell is a file in the
output folder; existing ones are not run again. Ends with a table, also written to a file.
"""

import argparse
import hashlib
import json
import math
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

from benchmarks.tuner_learners import (
    Bandit,
    BanditChooses,
    BatchFeatures,
    Halving,
    Repeated,
    UniformDraws,
    gaussian_process,
    linear,
)
from common.cli import run
from common.errors import UserError
from common.files import atomic_file, read_json, write_json
from common.parser import Parser, positive
from synth.offline.reviews import Reviews
from synth.offline.server import OfflineTeacher
from synth.prompts import TEMPLATES
from synth.sampler import Generator, Results, Sampler, Settings
from synth.task import SHIPPED, load_task
from synth.teacher import structured
from synth.teacher.completions import Ask, Reply, read_completion
from synth.teacher.limits import Cost
from synth.tuning.agents import Agent, Outcome
from synth.tuning.config import Config, config_from
from synth.tuning.targets import TargetModel, load_target
from synth.tuning.task_generator import TaskGenerator
from synth.tuning.tuner import FRESH, RLTuner
from training.intervals import difference

Rows = list[dict[str, Any]]
GROWING = "halving, growing batches"
FAST: dict[str, Any] = {"step_size": 0.2, "learning_rate": 0.03}  # than the defaults, 0.05 and 0.001
# Ways to learn from few and noisy measurements that the library does not have; docs/tuner.md says what they are worth.
LEARNERS = (
    *("bandit", "uniform draws, bandit chooses", "GP", "linear bandit", "bandit, batch features"),
    *("bandit, common rows", "bandit, earlier run", "sequential halving", GROWING),
)
WITHOUT = ("uniform draws", "uniform draws, common rows", "earlier run's best")  # the same without learning
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
    **{name: {"rl_algorithm": "defaults"} for name in (*WITHOUT[1:], *LEARNERS)},  # which take the place of the agent
}
AGENTS = tuple(name for name in VARIANTS if name not in (*WITHOUT[1:], *LEARNERS))  # those of the library, and controls
# What an agent must beat to have learned anything: the same without learning.
CONTROLS = {
    "random search": "uniform draws",
    "random search, fast": "uniform draws",
    "REINFORCE, fast": "policy, never updated, fast",
    "PPO, fast": "policy, never updated, fast",
    "TPE": "uniform draws",
    **dict.fromkeys(LEARNERS, "uniform draws"),
    "bandit, common rows": "uniform draws, common rows",
    "bandit, earlier run": "earlier run's best",
}
ENVIRONMENTS = ("simulated", "simulated, null", "edges", "reviews", "reviews, null")
NOISE = {"simulated": 0.02, "edges": 0.03}  # of a simulated metric, one standard deviation
BATCH = 100  # rows
VALIDATION, TEST, CLEAN = 200, 1000, 80  # rows of reviews; CLEAN: that the null twin trains on
LEVEL = 0.05
EARLIER = 1000  # added to the seed of an earlier run


class CommonRows:
    """A generator whose batches, up to those of `confirm`, all have the same numbers, and so the same requests."""

    def __init__(self, generator: Generator):
        self.generator, self.sampler = generator, generator.sampler

    def generate_from_seed(self, count: int, first: int = 1) -> Results:
        return self.generator.generate_from_seed(count, first if first >= FRESH else 1)

    evolve_instructions = generate_from_seed  # the space has no other method


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


def edges(settings: Settings) -> float:
    """Another metric, which no quadratic fits: steep near its best, 0.8, flat far away; at 0.45, 0.7, varied."""
    missed = 0.35 * abs(math.tanh(2 * (settings.temperature - 0.45))) + 0.1 * abs(settings.top_p - 0.7)
    return 0.8 - missed - {"varied": 0.0, "plain": 0.03, "careful": 0.05}[settings.template]


def digest(rows: Rows) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def simulated_target(environment: str, seed: int) -> Callable[[Rows], dict[str, float]]:
    name, null = environment.removesuffix(", null"), "null" in environment

    def target(rows: Rows) -> dict[str, float]:
        noise = Random(f"{seed} {digest(rows)}").gauss(0, NOISE[name])
        settings = Settings() if null else Settings(**rows[0]["settings"])
        return {"accuracy": METRICS[name](settings) + noise}

    return target


METRICS = {"simulated": quality, "edges": edges}


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


def tuner_of(environment: str, config: Config, agent: Agent | None = None, common: bool = False) -> RLTuner:
    """The tuner of a cell. agent: instead of the configuration's; common: all batches have the same requests."""
    sampler, seed = Sampler(config.space, config.settings, config.templates), config.seed
    if not environment.startswith("reviews"):
        return RLTuner(config, simulated_target(environment, seed), [], Simulated(sampler), agent)
    task = load_task(SHIPPED / "reviews.yaml")
    generator: Generator = TaskGenerator(task, sampler, direct(OfflineTeacher(seed=seed)))
    generator = CommonRows(generator) if common else generator
    rows = reviews(f"validation {seed}", VALIDATION)
    return RLTuner(config, reviews_target("null" in environment), rows, generator, agent)


def agent_of(environment: str, variant: str, config: Config) -> Agent | None:
    """The agent of a variant that the library does not have; None for the others."""
    space, seed, iterations = config.space, config.seed, config.rl_tuning.num_iterations
    made: dict[str, Callable[[], Agent]] = {
        "uniform draws": lambda: UniformDraws(space, seed),
        "uniform draws, common rows": lambda: UniformDraws(space, seed),
        "uniform draws, bandit chooses": lambda: BanditChooses(space, seed),
        "bandit": lambda: Bandit(space, seed),
        "GP": lambda: Bandit(space, seed, gaussian_process),
        "linear bandit": lambda: Bandit(space, seed, linear),
        "bandit, batch features": lambda: BatchFeatures(space, seed),
        "bandit, common rows": lambda: Bandit(space, seed),
        "bandit, earlier run": lambda: Bandit(space, seed, earlier=earlier_run(environment, config)),
        "earlier run's best": lambda: Repeated(max(earlier_run(environment, config), key=lambda o: o.metric).settings),
        "sequential halving": lambda: Halving(space, seed, iterations * 2 // 5),
        GROWING: lambda: Halving(space, seed, iterations * 4 // 5),
    }
    return made[variant]() if variant in made else None


def earlier_run(environment: str, config: Config) -> list[Outcome]:
    """The user's run before this one: uniform draws with another teacher, other validation rows and other noise."""
    before = replace(config, seed=EARLIER + config.seed)
    return [one.outcome for one in tuner_of(environment, before, UniformDraws(config.space, before.seed)).train()]


def batches(variant: str, iterations: int) -> list[tuple[int, int]]:
    """(rows of a batch, iterations until then) of a search; all have the same number of rows in all, at most."""
    if variant != GROWING:
        return [(BATCH, iterations)]
    first = max(2, iterations * 4 // 5)
    rounds = [first, max(2, first // 2), max(2, first // 4)]
    size = iterations * BATCH // sum(count << place for place, count in enumerate(rounds))
    return [(size << place, sum(rounds[: place + 1])) for place in range(len(rounds))]


def run_cell(environment: str, variant: str, seed: int, iterations: int, fresh: int) -> dict[str, Any]:
    """Search, then evaluate initial and best settings on `fresh` batches each, on rows that the search has not seen."""
    tuning = {"enable_rl_tuning": True, "num_iterations": iterations, "batch_size": BATCH, **VARIANTS[variant]}
    tuning["batch_features"] = variant == "bandit, batch features"
    config = config_from({"templates": list(TEMPLATES), "seed": seed, "rl_tuning": tuning}, variant)
    agent = agent_of(environment, variant, config)
    tuner = tuner_of(environment, config, agent, "common rows" in variant)
    for size, until in batches(variant, iterations):
        tuner.train(until=until, batch_size=size)
    measured, rows = [one.metric for one in tuner.history], sum(one.asked for one in tuner.history[1:])
    best = tuner.best
    if chosen := getattr(agent, "chosen", None):
        # The tuner's best is the highest metric; an agent with a model says itself which settings are the best.
        best = tuner.history[chosen([one.outcome for one in tuner.history])]
        tuner.history.append(replace(best, metric=float("inf")))
    tuner.validation_dataset = reviews(f"test {seed}", TEST)
    found = {name: sum(some) / len(some) for name, some in tuner.confirm(fresh).items()}
    promised, late = best.metric - measured[0], measured[-max(1, iterations // 4) :]
    more = {"settings": str(best.settings), "rows": rows}
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
