"""The tuner: learns generator settings from how much a target model improves on the generated data.

One iteration: an agent chooses settings, the generator makes a batch with them, the target model is trained on it and
evaluated, and the agent learns from the improvement. Iteration 0 is the baseline: a batch with the initial settings.
Everything is saved after each target call, so a stopped run repeats none.

    with RLTuner(load_config("tuner.yaml"), my_target, validation_rows) as tuner:
        tuner.train(num_iterations=10, batch_size=100)
        print(tuner.best.settings, tuner.confirm(5))
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from common.cli import Stopped, StopSignal
from common.errors import UserError
from common.files import Kind, atomic_folder, reading, write_json
from common.schemas import Schema, read_as, read_key
from models.arrays import read_arrays
from synth.evolution.generators import SampledGenerator
from synth.evolution.instructions import read_instructions
from synth.examples import read_examples
from synth.offline.instructions import starting
from synth.pipeline.tasks import open_task
from synth.sampler import Generator, Results, Sampler, Settings
from synth.stages import write_rows
from synth.teacher.flags import teacher_from_mapping
from synth.tuning.agents import Agent, Defaults, RandomSearch, TreeParzen
from synth.tuning.config import Config, config_from
from synth.tuning.gradient_agents import AgentSettings, PolicyAgent
from synth.tuning.log import FEATURES, Iteration, TunerLog, batch_features, best_of, log_iteration
from synth.tuning.targets import Metrics, TargetModel, call_target
from synth.tuning.task_generator import asking, task_generator

STATE, ARRAYS = "tuner.json", "agent.safetensors"
TUNER = Kind(STATE, (STATE, ARRAYS), lambda content: "format" in content)
FORMAT = 1
SEEDS = 24  # instructions to start from, if none are given
SHOWN = 3  # rows of a batch shown in the log
FRESH = 1_000_000  # rows from this number on are for `confirm`; no search gets that far
# What may differ in a loaded state: paths, the teacher, and the length of the search.
FREE_TUNING = ("num_iterations", "enable_rl_tuning", "target_model_path", "validation_data_path")
FREE = ("output_dir", "teacher", "task", "seed_data", *(f"rl_tuning.{name}" for name in FREE_TUNING))


class Confirmation(Schema):
    """confirmation.json: the metric by batch."""

    best_iteration: int
    start: list[float]
    best: list[float]


class SavedTuner(Schema):
    """tuner.json."""

    config: dict[str, Any]
    agent: dict[str, Any]
    sampler: Settings
    history: list[Iteration]


class RLTuner:
    """The search for settings of a generator. history: every iteration so far.

    target_model: f(rows) -> metrics, or f(rows, validation_dataset); generator: see synth/sampler.py (default: that of
    config.generator, which asks config.teacher, or an offline teacher); rl_agent: see synth/tuning/agents.py (default:
    by config.rl_tuning.rl_algorithm, and where enable_rl_tuning is false none, so that every batch has the initial
    settings). If config.output_dir is set, everything is logged and saved there; without, iterations are logged by
    logging.getLogger("synth.tuning"), at level INFO.
    Raises UserError for an invalid configuration.
    """

    def __init__(
        self,
        config: Config,
        target_model: TargetModel,
        validation_dataset: Sequence[Mapping[str, Any]],
        generator: Generator | None = None,
        rl_agent: Agent | None = None,
    ):
        config.space.check(config.settings)
        self.config, self.target_model = config, target_model
        self.validation_dataset = [dict(row) for row in validation_dataset]
        self.folder = Path(config.output_dir) if config.output_dir else None
        self.history: list[Iteration] = []
        self.agent = rl_agent if rl_agent is not None else make_agent(config)
        self._open = ExitStack()
        self.generator: Generator = (
            generator if generator is not None else self._open.enter_context(default_generator(config))
        )

    def __enter__(self) -> "RLTuner":
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    @property
    def best(self) -> Iteration:
        """The iteration with the highest metric, the earliest of equal ones; the baseline may be it.

        Its metric is the highest of several that vary by chance, so it is biased upward: see `confirm`.
        """
        if not self.history:
            raise UserError("the tuner has not been trained; call train first")
        return best_of(self.history)

    def train(
        self, num_iterations: int | None = None, batch_size: int | None = None, until: int | None = None
    ) -> list[Iteration]:
        """Search `num_iterations` more, or until there are `until` with those of a loaded state; returns the history.

        Before the first comes iteration 0, the baseline, beside those that are counted; train(0) does nothing. Without
        either: until the configuration's num_iterations. At the end the generator's sampler has the best settings.
        Raises UserError if a batch has no rows or the target fails, and Stopped after a Ctrl-C or SIGTERM.
        """
        size, total = batch_size or self.config.rl_tuning.batch_size, self._total(num_iterations, until)
        if total == 0:
            return self.history
        log = self._log(total)
        try:
            with StopSignal() as stop:
                while len(self.history) <= total:
                    self.history.append(self._iterate(size) if self.history else self._baseline(size))
                    if self.folder and log:
                        self.save(self.folder / "tuner")
                        log.report(self.history)
                    else:
                        log_iteration(self.history[-1])
                    if stop.requested and len(self.history) <= total:
                        raise Stopped(f"{len(self.history) - 1} of {total} iterations are done; {self._go_on()}")
            self.generator.sampler.set(self.best.settings)
        finally:
            if log:
                log.close(self.history, finished=len(self.history) > total)
        return self.history

    def _total(self, more: int | None, until: int | None) -> int:
        """How many iterations there are to be."""
        for name, given in (("num_iterations", more), ("until", until)):
            if given is not None and given < 0:
                raise UserError(f"{name} is {given}; it has to be at least 0")
        if more is not None and until is not None:
            raise UserError(f"num_iterations is {more} and until {until}; give one of them")
        if more is not None:
            return max(len(self.history) - 1, 0) + more
        return self.config.rl_tuning.num_iterations if until is None else until

    def confirm(self, batches: int) -> dict[str, list[float]]:
        """The metric of the best settings ("best") and of the initial ones ("start"), on fresh batches.

        The lists are paired: batch by batch both get rows with the same numbers. With a run folder the figures are kept
        in confirmation.json, and none is measured twice.
        """
        settings = {"start": self.config.settings, "best": self.best.settings}
        path = self.folder / "confirmation.json" if self.folder else None
        found: dict[str, Any] = {"best_iteration": self.best.number, "start": [], "best": []}
        if path and path.is_file() and read_key(int, path, "best_iteration") == self.best.number:
            found = read_as(Confirmation, path, "delete it").model_dump()
        size = self.config.rl_tuning.batch_size
        for name, number in ((name, n) for n in range(batches) for name in settings):
            if len(found[name]) <= number:
                rows = self.generate(settings[name], size, FRESH + number * size).data
                found[name].append(self._metrics(rows)[self.config.rl_tuning.reward_metric])
                if path:
                    write_json(path, found)
        self.generator.sampler.set(self.best.settings)
        return {name: found[name][:batches] for name in settings}

    def _baseline(self, size: int) -> Iteration:
        """Iteration 0: with the initial settings, or a number from the configuration."""
        tuning = self.config.rl_tuning
        if tuning.baseline is None:
            return self._evaluated(self.config.settings, size, None)
        metrics = {tuning.reward_metric: tuning.baseline}
        return Iteration(0, self.config.settings, metrics, tuning.baseline, 0.0, 0, 0, {}, (), [])

    def _iterate(self, size: int) -> Iteration:
        last = self.history[-1]
        iteration = self._evaluated(self.agent.propose(last.outcome), size, last.metric)
        self.agent.learn(iteration.outcome)
        return iteration

    def _evaluated(self, settings: Settings, size: int, before: float | None) -> Iteration:
        """Generate, call the target, compute the reward. before: the previous iteration's metric, if any."""
        number, first = len(self.history), 1 + sum(one.asked for one in self.history)
        results = self.generate(settings, size, first)
        if self.folder:
            write_rows(self.folder / "data" / f"{number:06d}.jsonl", results.data)
        metrics = self._metrics(results.data)
        metric = metrics[self.config.rl_tuning.reward_metric]
        reward = 0.0 if before is None else metric - before
        features = batch_features(results.data) if self.config.rl_tuning.batch_features else ()
        shown, count, dropped = results.data[:SHOWN], len(results.data), dict(results.dropped)
        return Iteration(number, settings, metrics, metric, reward, size, count, dropped, features, shown)

    def _metrics(self, rows: list[dict[str, Any]]) -> Metrics:
        return call_target(self.target_model, rows, self.validation_dataset, self.config.rl_tuning.reward_metric)

    def generate(self, settings: Settings, size: int, first: int) -> Results:
        """A batch with the settings, which the generator's sampler then keeps. Raises UserError if it is empty.

        first: the number of its first row.
        """
        self.generator.sampler.set(settings)
        results: Results = getattr(self.generator, settings.method)(size, first)
        if not results.data:
            lost = ", ".join(f"{count} {reason}" for reason, count in results.dropped.items()) or "none came"
            raise UserError(
                f"with {settings} no row of {size} is left ({lost}); narrow the ranges, or check the teacher"
            )
        return results

    def save(self, path: str | Path) -> None:
        """Write the whole state to a folder, atomically: configuration, history, agent, sampler."""
        arrays = self.agent.arrays()
        state = {
            "format": FORMAT,
            "config": self.config.as_dict(),
            "agent": self.agent.state(),
            "sampler": asdict(self.generator.sampler.get()),
            "history": [one.as_dict() for one in self.history],
        }
        with atomic_folder(path, TUNER) as temporary:
            if arrays:
                mx.save_safetensors(str(temporary / ARRAYS), arrays)
            write_json(temporary / STATE, state)

    def load(self, path: str | Path) -> None:
        """Resume from what `save` wrote, bit for bit. Raises UserError if it was saved with another configuration.

        Paths, the teacher and the number of iterations may differ.
        """
        place, remedy = Path(path) / STATE, "start a new run"
        version = read_key(int, place, "format", remedy)
        if version != FORMAT:
            raise UserError(f"{path} was written by another version (format {version}); {remedy}")
        state = read_as(SavedTuner, place, remedy)
        refuse_changes(str(path), config_from(state.config, str(place)).as_dict(), self.config.as_dict())
        arrays = Path(path) / ARRAYS
        found = read_arrays(arrays, remedy, weights=False) if arrays.is_file() else {}
        with reading(f"{place} (agent)", remedy):
            self.agent.restore(state.agent, found)
        self.generator.sampler.set(state.sampler)
        self.history = state.history

    def _log(self, total: int) -> TunerLog | None:
        if self.folder is None:
            return None
        tuning = self.config.rl_tuning
        return TunerLog(self.folder, total, self.history, self.config.space, tuning.reward_metric, tuning.rl_algorithm)

    def _go_on(self) -> str:
        if self.folder is None:
            return "save it, and go on with load and train"
        return f"go on with: python -m synth.tune --resume {self.folder}"


def changes(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key → what `saved` and `own`, configurations as dicts, have where they differ. Tuples are lists, as in JSON."""
    before, now = (_flat(config) for config in (saved, own))
    return {key: (before.get(key), value) for key, value in now.items() if before.get(key) != value}


def refuse_changes(place: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise UserError, which begins with `place`, if `own` differs from `saved` where a search may not change."""
    others = [f"{key} {now!r} (it has {had!r})" for key, (had, now) in changes(saved, own).items() if key not in FREE]
    if others:
        raise UserError(f"{place} was begun with another configuration: {', '.join(others)}; set it back")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    tuning = {f"rl_tuning.{key}": value for key, value in config["rl_tuning"].items()}
    rest = {key: value for key, value in config.items() if key != "rl_tuning"}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in (rest | tuning).items()}


def make_agent(config: Config) -> Agent:
    """The agent that config.rl_tuning.rl_algorithm names; one that changes nothing where tuning is not enabled.

    Raises UserError if its package is missing.
    """
    tuning, space = config.rl_tuning, config.space
    if not tuning.enable_rl_tuning:
        return Defaults()
    if tuning.rl_algorithm == "random_search":
        return RandomSearch(space, tuning.step_size, config.seed)
    if tuning.rl_algorithm == "tpe":
        return TreeParzen(space, config.seed)
    if tuning.rl_algorithm == "defaults":
        return Defaults()
    ppo = tuning.rl_algorithm == "ppo"
    settings = AgentSettings(
        tuning.learning_rate,
        tuning.step_size,
        tuning.update_every,
        tuning.gamma,
        tuning.gae_lambda,
        tuning.clip_range,
        epochs=tuning.ppo_epochs if ppo else 1,
        value_head=ppo,
    )
    return PolicyAgent(space, settings, FEATURES if tuning.batch_features else 0, config.seed)


@contextmanager
def default_generator(config: Config) -> Iterator[Generator]:
    """The generator of config.kind, which asks config.teacher; its cache is in config.output_dir, or else temporary."""
    sampler, teacher = Sampler(config.space, config.settings, config.templates), teacher_from_mapping(config.teacher)
    teacher.check()
    with ExitStack() as stack:
        folder = config.output_dir or stack.enter_context(tempfile.TemporaryDirectory())
        if config.kind != "task":
            ask = stack.enter_context(asking(teacher, folder))
            yield SampledGenerator(ask, seed_instructions(config), sampler)
            return
        if not config.task:
            raise UserError(
                "no task is named; write `task: FILE.yaml`, or generator: self_instruct, or pass a generator"
            )
        task = open_task(config.task)
        rows = read_examples(config.seed_data, config.seed_data, reading=task.reading) if config.seed_data else None
        yield stack.enter_context(task_generator(task, sampler, teacher, folder, rows))


def seed_instructions(config: Config) -> list[dict[str, str]]:
    """The rows that instructions are made from: those of seed_data, or, for the offline teacher, sums in words."""
    if config.seed_data:
        return [{"instruction": text} for text in read_instructions(config.seed_data)]
    if config.teacher.get("teacher_url"):
        raise UserError("no instructions to start from; set seed_data to a file of them, one a line")
    return [{"instruction": text} for text in starting(SEEDS, config.seed)]
