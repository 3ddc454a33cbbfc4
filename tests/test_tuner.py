"""The tuner's loop: rewards by hand, settings that reach the generation, a state that is exact, and what is logged."""

import json
import os
import signal
from dataclasses import asdict

import pytest
from safetensors.numpy import load_file

from common.cli import Stopped
from common.errors import UserError
from common.files import read_json, write_json
from common.schemas import conforming
from synth.evolution.generators import SampledGenerator
from synth.offline.instructions import read_sum
from synth.prompts import TEMPLATES
from synth.sampler import METHODS, Results, Sampler, Settings
from synth.tuning import log as tuner_log
from synth.tuning.agents import Outcome
from synth.tuning.config import Config, config_from
from synth.tuning.gradient_agents import PolicyAgent
from synth.tuning.log import Iteration, batch_features, panels
from synth.tuning.tuner import FRESH, RLTuner, make_agent
from tests.faulty_server import FaultyServer
from tests.test_task_generator import new_sums
from training.metrics import read_metrics

CHOICES = {"templates": ["plain", "careful"], "methods": list(METHODS)}


def config_of(**changes):
    tuning = {"enable_rl_tuning": True, "num_iterations": 3, "batch_size": 4, **changes.pop("rl_tuning", {})}
    return config_from({**CHOICES, **changes, "rl_tuning": tuning}, "the test")


class Recorder:
    """A generator whose rows say how they came about."""

    def __init__(self, config):
        self.sampler = Sampler(config.space, config.settings, config.templates)
        self.calls = []

    def generate_from_seed(self, count, first=1, method="generate_from_seed"):
        self.calls.append((method, self.sampler.get(), count, first))
        rows = [{"input": str(first + n), "output": f"{self.sampler.temperature:g}"} for n in range(count)]
        return Results(rows, {"repeated input": 1})

    def evolve_instructions(self, count, first=1):
        return self.generate_from_seed(count, first, "evolve_instructions")


class Scripted:
    """An agent that proposes given settings, and remembers what it was told."""

    def __init__(self, *proposals):
        self.proposals, self.seen, self.learned = list(proposals), [], []

    def propose(self, last):
        self.seen.append(last)
        return self.proposals[len(self.seen) - 1]

    def learn(self, outcome):
        self.learned.append(outcome)

    def state(self):
        return {}

    def arrays(self):
        return {}

    def restore(self, state, arrays):
        pass


def returning(*values):
    """A target whose metric takes these values, one after another."""
    left = list(values)
    return lambda rows: {"accuracy": left.pop(0), "rows": len(rows)}


def quality(rows):
    """A target that likes a temperature of 0.3."""
    return {"accuracy": 1 - abs(float(rows[0]["output"]) - 0.3)}


def tuner_of(config, target, *proposals):
    return RLTuner(config, target, [], Recorder(config), Scripted(*proposals) if proposals else None)


MOVES = (Settings(0.5, 0.9), Settings(0.6, 1.0, "careful", "evolve_instructions"), Settings(0.7))


def test_a_reward_is_the_improvement_over_the_iteration_before():
    tuner = tuner_of(config_of(), returning(0.5, 0.7, 0.6, 0.6), *MOVES)
    history = tuner.train()
    assert [one.metric for one in history] == [0.5, 0.7, 0.6, 0.6]
    assert [one.reward for one in history] == pytest.approx([0.0, 0.2, -0.1, 0.0])
    assert [one.number for one in history] == [0, 1, 2, 3] and history[1].metrics == {"accuracy": 0.7, "rows": 4.0}
    assert tuner.agent.seen[0] == Outcome(Settings(), 0.5) and tuner.agent.learned == [o.outcome for o in history[1:]]


def test_a_baseline_that_is_given_costs_no_call():
    config = config_of(rl_tuning={"baseline": 0.4, "num_iterations": 1})
    tuner = tuner_of(config, returning(0.7), *MOVES)
    history = tuner.train()
    assert [one.metric for one in history] == [0.4, 0.7] and history[1].reward == pytest.approx(0.3)
    assert len(tuner.generator.calls) == 1 and tuner.best.number == 1


def test_settings_reach_the_generation_that_follows():
    tuner = tuner_of(config_of(), returning(0.5, 0.7, 0.6, 0.6), *MOVES)
    tuner.train(3, 4)
    methods = ["generate_from_seed", "generate_from_seed", "evolve_instructions", "generate_from_seed"]
    assert [call[0] for call in tuner.generator.calls] == methods
    assert [call[1] for call in tuner.generator.calls] == [Settings(), *MOVES]
    assert [call[2:] for call in tuner.generator.calls] == [(4, 1), (4, 5), (4, 9), (4, 13)]  # no row twice
    assert tuner.best.number == 1 and tuner.generator.sampler.get() == MOVES[0]  # the best ones, at the end


def test_learned_settings_are_in_the_teachers_requests(tmp_path, no_picture):
    task = tmp_path / "sums.yaml"
    task.write_text("instruction: Add the two whole numbers.\nanswer: {type: number}\n")
    with FaultyServer(new_sums) as server:
        teacher = {"teacher_url": server.url, "teacher_model": "m"}
        config = config_of(task=str(task), teacher=teacher, output_dir=str(tmp_path / "run"), methods=METHODS[:1])
        agent = Scripted(Settings(0.35, 0.7, "careful"), Settings(0.1, 0.2))
        with RLTuner(config, returning(0.5, 0.6, 0.7), [], rl_agent=agent) as tuner:
            tuner.train(2)
            bodies = [body for body in server.bodies if "sample number" in body["messages"][-1]["content"]]
            assert [(body["temperature"], body["top_p"]) for body in bodies] == (
                [(1.0, 1.0)] * 4 + [(0.35, 0.7)] * 4 + [(0.1, 0.2)] * 4
            )
            careful = TEMPLATES["careful"].removeprefix("{request}")
            assert [careful in body["messages"][-1]["content"] for body in bodies] == [False] * 4 + [True] * 4 + [
                False
            ] * 4
            tuner.generator.generate_from_seed(1, first=99)
        assert (server.bodies[-1]["temperature"], server.bodies[-1]["top_p"]) == (0.1, 0.2)


@pytest.mark.parametrize("metrics", [{"loss": 0.1}, {"accuracy": float("nan")}])
def test_a_missing_metric_ends_the_run_and_nothing_is_learned(metrics):
    tuner = tuner_of(config_of(), lambda rows: metrics, *MOVES)
    with pytest.raises(UserError, match="accuracy"):
        tuner.train()
    assert tuner.history == [] and tuner.agent.learned == []


def test_a_batch_without_rows_is_an_error():
    config = config_of()
    tuner = tuner_of(config, quality, *MOVES)
    tuner.generator.generate_from_seed = lambda count, first: Results([], {"repeated input": 4})
    with pytest.raises(UserError, match=r"no row of 4 is left \(4 repeated input\)"):
        tuner.train()


def test_a_name_for_every_agent():
    for name in ("random_search", "reinforce", "ppo", "defaults"):
        agent = make_agent(config_of(rl_tuning={"rl_algorithm": name, "batch_features": True}))
        assert agent.propose(Outcome(Settings(), 0.5, 0.0, (0.1,) * 4)).temperature <= 2
    for name, (epochs, value_head) in {"ppo": (4, True), "reinforce": (1, False)}.items():
        agent = make_agent(config_of(rl_tuning={"rl_algorithm": name}))
        assert isinstance(agent, PolicyAgent) and agent.settings.epochs == epochs
        assert agent.settings.value_head is value_head


def saved_in(folder):
    """The state's text, and the arrays' bytes by name: a restored optimizer may write them in another order."""
    arrays = load_file(folder / "agent.safetensors") if (folder / "agent.safetensors").is_file() else {}
    return {"state": (folder / "tuner.json").read_text(), **{name: one.tobytes() for name, one in arrays.items()}}


@pytest.mark.parametrize("name", ["random_search", "reinforce", "ppo", "tpe"])
def test_a_loaded_tuner_goes_on_to_the_bit(tmp_path, name):
    if name == "tpe":
        pytest.importorskip("optuna", reason="optuna, which is optional, is not installed")
    config = config_of(rl_tuning={"rl_algorithm": name, "update_every": 2, "batch_features": True, "step_size": 0.1})
    whole = tuner_of(config, quality)
    whole.train(9)
    whole.save(tmp_path / "whole")
    begun = tuner_of(config, quality)
    begun.train(4)
    begun.save(tmp_path / "cut")
    other = tuner_of(config, quality)
    other.load(tmp_path / "cut")
    assert other.history == begun.history and other.generator.sampler.get() == begun.best.settings
    other.train(until=9)
    other.save(tmp_path / "cut")
    assert other.history == whole.history
    assert saved_in(tmp_path / "cut") == saved_in(tmp_path / "whole")
    assert (len(saved_in(tmp_path / "whole")) > 10) == (name in ("reinforce", "ppo"))


def test_what_was_saved_by_another_configuration_is_not_loaded(tmp_path):
    tuner_of(config_of(), quality).save(tmp_path / "t")
    for changes, key in (
        ({"rl_tuning": {"rl_algorithm": "ppo"}}, r"rl_tuning.rl_algorithm 'ppo' \(it has 'random_search'\)"),
        ({"seed": 1}, r"seed 1 \(it has 0\)"),
        ({"temperature_range": [0, 1.5]}, r"temperature_range .*\(it has \[0.0, 2.0\]\)"),
    ):
        with pytest.raises(UserError, match=key):
            tuner_of(config_of(**changes), quality).load(tmp_path / "t")
    tuner_of(config_of(rl_tuning={"num_iterations": 99}, task="elsewhere.yaml"), quality).load(tmp_path / "t")
    with pytest.raises(UserError, match="does not exist"):
        tuner_of(config_of(), quality).load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("format", "1", "format"),
        ("history", {}, "history"),
        ("history", [{"number": 0}], "history.0.settings"),
        ("sampler", {"temperature": "hot"}, "'hot' as sampler.temperature"),
        ("config", {}, "set it back"),
        ("config", {"rl_tuning": 3}, "rl_tuning"),
        ("agent", [], "agent"),
        ("agent", {"kept": None}, "agent"),
        ("agent", {"rng": {"bit_generator": "PCG64", "state": {}}, "kept": None}, "agent"),
    ],
)
def test_a_damaged_state_is_a_line_with_file_and_key(tmp_path, key, value, said):
    tuner = tuner_of(config_of(seed=3), quality)
    tuner.train(1)
    tuner.save(tmp_path / "t")
    state = tmp_path / "t" / "tuner.json"
    write_json(state, {**read_json(state), key: value})
    with pytest.raises(UserError) as caught:
        tuner_of(config_of(seed=3), quality).load(tmp_path / "t")
    assert said in str(caught.value) and str(tmp_path / "t") in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def no_picture(monkeypatch):
    drawn = []
    monkeypatch.setattr(tuner_log, "plot_panels", lambda *given: drawn.append(given))
    return drawn


def test_every_iteration_is_logged_with_some_of_its_rows(tmp_path, no_picture, capsys):
    tuner = tuner_of(config_of(output_dir=str(tmp_path)), returning(0.5, 0.7, 0.6, 0.6), *MOVES)
    tuner.train()
    rows = [json.loads(line) for line in (tmp_path / "iterations.jsonl").read_text().splitlines()]
    assert [row["settings"] for row in rows] == [asdict(one) for one in (Settings(), *MOVES)]
    assert rows[1]["metrics"] == {"accuracy": 0.7, "rows": 4.0} and rows[1]["reward"] == pytest.approx(0.2)
    assert rows[1]["sample"] == [{"input": str(n), "output": "0.5"} for n in (5, 6, 7)]
    assert rows[1]["dropped"] == {"repeated input": 1}
    data = (tmp_path / "data" / "000001.jsonl").read_text().splitlines()
    assert [json.loads(line)["input"] for line in data] == ["5", "6", "7", "8"]
    figures = read_metrics(tmp_path)
    assert [row["step"] for row in figures] == [0, 1, 2, 3] and [row["best"] for row in figures] == [0.5] + [0.7] * 3
    summary = read_json(tmp_path / "summary.json")
    assert summary["best_iteration"] == 1 and summary["temperature"] == 0.5 and summary["baseline_accuracy"] == 0.5
    said = capsys.readouterr().out
    assert "Iteration 1: temperature 0.5, top_p 0.9, template plain, generate_from_seed; 4 rows" in said
    assert "{'input': '5', 'output': '0.5'}" in said and " 0.2 " in said
    assert len(no_picture) == 1


def test_the_picture_shows_metric_reward_and_settings(tmp_path):
    tuner = tuner_of(config_of(output_dir=str(tmp_path)), returning(0.5, 0.7, 0.6, 0.6), *MOVES)
    tuner.train()
    found = {panel.title: panel.curves for panel in panels(tuner.history, tuner.config.space, "accuracy")}
    assert found["accuracy"]["best so far"] == [(0, 0.5), (1, 0.7), (2, 0.7), (3, 0.7)]
    assert found["temperature"]["temperature"] == [(0, 1.0), (1, 0.5), (2, 0.6), (3, 0.7)]
    assert found["template: 0 plain, 1 careful"]["template"] == [(0, 0), (1, 0), (2, 1), (3, 0)]
    assert found["method: 0 generate_from_seed, 1 evolve_instructions"]["method"][2] == (2, 1)
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


def test_a_stop_ends_after_its_iteration_and_goes_on(tmp_path, no_picture):
    config = config_of(output_dir=str(tmp_path), rl_tuning={"num_iterations": 5})
    calls = []

    def target(rows):
        calls.append(rows[0]["input"])
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return quality(rows)

    with pytest.raises(
        Stopped, match=f"2 of 5 iterations are done; go on with: python -m synth.tune --resume {tmp_path}"
    ):
        tuner_of(config, target).train()
    assert not (tmp_path / "summary.json").exists() and len(no_picture) == 1
    # A kill after the state was saved and before it was reported:
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    other = tuner_of(config, target)
    other.load(tmp_path / "tuner")
    other.train()
    whole = tuner_of(config_of(rl_tuning={"num_iterations": 5}), quality)
    assert other.history == whole.train() and len(calls) == 6
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert other.train() == whole.history and len(calls) == 6  # nothing is left to do


def test_best_and_start_are_compared_on_fresh_rows_once(tmp_path, no_picture):
    config = config_of(output_dir=str(tmp_path))
    tuner = tuner_of(config, quality, *MOVES)
    with pytest.raises(UserError, match="has not been trained"):
        tuner.confirm(1)
    tuner.train()
    before = len(tuner.generator.calls)
    found = tuner.confirm(2)
    assert found == {"start": pytest.approx([0.3, 0.3]), "best": pytest.approx([0.8, 0.8])}
    numbers = [(call[1], call[3]) for call in tuner.generator.calls[before:]]
    start, best = Settings(), MOVES[0]
    assert numbers == [(start, FRESH), (best, FRESH), (start, FRESH + 4), (best, FRESH + 4)]
    assert tuner.confirm(2) == found and len(tuner.generator.calls) == before + 4
    tuner.confirm(3)
    assert len(tuner.generator.calls) == before + 6
    assert tuner.generator.sampler.get() == MOVES[0]


def test_features_of_a_batch_by_hand():
    rows = [{"input": "a b", "output": "c"}, {"input": "a b", "output": "d"}]
    words, pairs = 4 / 6, 3 / 4  # a b c d of six; ab bc bd of four
    assert batch_features(rows) == pytest.approx((0.60206 / 4, 0.30103 / 4, words, pairs), abs=1e-5)
    assert batch_features([]) == (0, 0, 0, 0)


def test_an_iteration_survives_json():
    one = Iteration(3, MOVES[1], {"accuracy": 1 / 3}, 1 / 3, 0.1 + 0.2, 4, 3, {"x": 1}, (0.1, 0.2), [{"input": "é"}])
    assert conforming(Iteration, json.loads(json.dumps(one.as_dict())), "a file") == one


def test_training_is_counted_in_more_or_in_all():
    """n more by train(n), a total by until=, none by train(0), not even the baseline; without, the configuration's."""
    tuner = tuner_of(config_of(), quality)
    assert tuner.train(0) == [] and tuner.generator.calls == []
    for words, done in (((2,), 2), ((0,), 2), ((1,), 3), ((), 3)):
        assert len(tuner.train(*words)) == done + 1
    assert len(tuner.train(until=2)) == 4 and len(tuner.train(until=5)) == 6 and len(tuner.train(2)) == 8
    for wrong in ({"num_iterations": 1, "until": 2}, {"num_iterations": -1}, {"until": -1}):
        with pytest.raises(UserError, match=r"num_iterations|until"):
            tuner.train(**wrong)


def test_where_tuning_is_not_enabled_every_batch_has_the_initial_settings():
    tuner = tuner_of(config_of(rl_tuning={"enable_rl_tuning": False}), quality)
    assert [one.settings for one in tuner.train()] == [Settings()] * 4
    given = tuner_of(config_of(rl_tuning={"enable_rl_tuning": False}), quality, *MOVES)  # an agent that is passed acts
    assert [one.settings for one in given.train()] == [Settings(), *MOVES]


def test_without_a_run_folder_each_iteration_is_logged(caplog, capsys):
    tuner = tuner_of(config_of(), returning(0.5, 0.7), *MOVES)
    with caplog.at_level("INFO", logger="synth.tuning"):
        tuner.train(1)
    lines = [record.getMessage() for record in caplog.records if record.name == "synth.tuning"]
    assert lines[4].startswith(
        "iteration 1: temperature 0.5, top_p 0.9, template plain, generate_from_seed; accuracy 0.7"
    )
    assert lines[4].endswith("reward 0.2; 4 rows") and lines[5] == "    {'input': '5', 'output': '0.5'}"
    assert len(lines) == 8 and capsys.readouterr().out == ""


def test_a_config_a_target_and_rows_are_enough(capsys):
    """By Self-Instruct on the offline teacher: instructions with responses."""
    given = []

    def target(rows, validation):
        given.append((rows, validation))
        return {"accuracy": len({row["instruction"] for row in rows}) / 10}

    with RLTuner(Config(), target, [{"instruction": "Add 1 and 2.", "output": "3"}]) as tuner:
        history = tuner.train(1, batch_size=3)
        assert isinstance(tuner.generator, SampledGenerator)
    assert len(history) == 2 and all(set(row) == {"instruction", "output"} for rows, _ in given for row in rows)
    assert given[0][1] == [{"instruction": "Add 1 and 2.", "output": "3"}] and given[0][0] != given[1][0]
    assert all(read_sum(row["instruction"]) for rows, _ in given for row in rows)


def test_the_generators_method_is_the_agents_to_choose(tmp_path, no_picture):
    """Self-Instruct and Evol-Instruct are switched between by the sampler's method while a search runs."""
    config = config_of(generator="self_instruct", templates=["plain"], output_dir=str(tmp_path))
    agent = Scripted(Settings(method="evolve_instructions"), Settings(), Settings(method="evolve_instructions"))
    with RLTuner(config, lambda rows: {"accuracy": 0.5}, [], rl_agent=agent) as tuner:
        tuner.train(batch_size=3)
    assert [one.settings.method for one in tuner.history] == [METHODS[n % 2] for n in range(4)]
    assert set(read_json(tmp_path / "ledger.json")) > {"self-instruct", "evol-instruct: rewrite", "respond"}
    assert config_of(generator="evol_instruct", methods=METHODS[:1]).settings.method == "evolve_instructions"
    both = config_of(generator="evol_instruct")
    assert both.space.methods == METHODS and both.settings.method == "evolve_instructions"
    teacher = {"teacher_url": "http://127.0.0.1:1/v1", "teacher_model": "m"}
    with pytest.raises(UserError, match="set seed_data to a file"):
        RLTuner(config_of(generator="self_instruct", teacher=teacher), quality, [])
    with pytest.raises(UserError, match="no task is named"):
        RLTuner(config_of(generator="task"), quality, [])
