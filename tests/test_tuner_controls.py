"""The arithmetic of the tuner's benchmark, and a cell of each kind."""

import numpy as np
import pytest

from benchmarks import tuner_controls as module
from benchmarks.tuner_controls import cell_path, compared, holm, quality, run_cell, sign_flip, table
from common.files import read_json, write_json
from synth.sampler import Settings, Space
from synth.tuning.agents import Outcome
from tests.scripts import call, fails
from training import intervals


def test_the_exact_test_by_hand():
    assert sign_flip([1.0, 1.0, 1.0]) == pytest.approx(2 / 8)
    assert sign_flip([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert sign_flip([1.0, -1.0]) == 1.0 and sign_flip([0.0, 0.0]) == 1.0
    assert sign_flip([3.0, -1.0]) == pytest.approx(1.0) and sign_flip([0.1] * 10) == pytest.approx(2 / 1024)


def test_holms_adjustment_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


def test_a_star_only_where_it_is_earned():
    found = compared({"a": ([0.0] * 10, [0.1 + n / 100 for n in range(10)]), "b": ([0.0] * 10, [0.1, -0.1] * 5)})
    assert found["a"].endswith("0.004 *") and found["b"].endswith("1.000")


def test_the_simulated_metric_is_best_where_it_says():
    best = Settings(0.5, 0.8, "careful")
    assert quality(best) == pytest.approx(0.8) and quality(Settings()) == pytest.approx(0.8 - 0.0625 - 0.004 - 0.05)
    assert all(quality(Settings(t, p)) < 0.8 for t in (0, 0.5, 1) for p in (0.5, 0.8, 1))


@pytest.mark.parametrize("environment", ["simulated", "simulated, null"])
def test_a_cell_makes_its_calls_and_the_null_twin_has_nothing_to_find(environment):
    cell = run_cell(environment, "uniform draws", 0, 30, 20)
    assert cell["calls"] == 31 and cell["promised"] > 0
    assert (cell["best"] - cell["start"] > 0.05) == (environment == "simulated")
    assert cell == run_cell(environment, "uniform draws", 0, 30, 20)
    still = run_cell(environment, "defaults", 0, 5, 3)
    assert still["best"] == still["start"] and still["promised"] > 0  # the luck of six


def test_a_cell_of_reviews():
    pytest.importorskip("sklearn", reason="scikit-learn, which is optional, is not installed")
    cell = run_cell("reviews", "random search", 0, 1, 1)
    assert 0.6 < cell["start"] < 0.9 and cell["calls"] == 2
    assert 0.7 < run_cell("reviews, null", "random search", 0, 1, 1)["best"] < 0.95


def test_surrogates_model_a_metric_and_know_where_they_have_seen_nothing():
    x = np.linspace(0, 1, 65)[:, None]
    values = -((x[:, 0] - 0.3) ** 2)
    values = (values - values.mean()) / values.std()
    for model in (module.gaussian_process, module.linear):
        means, deviations = model(x, values, x)
        assert np.corrcoef(means, values)[0, 1] > 0.9 and (deviations > 0).all()
        near, far = model(x[:9], values[:9], np.array([[0.1], [5.0]]))[1]
        assert near < far


def test_a_surrogate_sees_each_outcome_once_and_recommends_what_was_tried():
    agent = module.Surrogate(Space(), 0, "gp")
    last = Outcome(Settings(), 0.5)
    for n in range(9):
        settings = agent.propose(last)
        last = Outcome(settings, quality(settings) + n / 1000)
        agent.learn(last)
    assert len(agent.seen) == 10 and agent.recommended() in [one.settings for one in agent.seen]


def test_halving_measures_the_better_half_again():
    agent, told = module.Halving(Space(), 0, 20), []
    for _ in range(14):
        settings = agent.propose(Outcome(Settings(), 0.0))
        told.append(settings)
        agent.learn(Outcome(settings, quality(settings)))
    best = sorted(told[:8], key=quality, reverse=True)
    assert len(set(told[:8])) == 8 and set(told[8:12]) == set(best[:4]) and told[12:] == best[:2]
    assert agent.recommended() == best[0]


@pytest.mark.parametrize("variant", module.LEARNERS)
def test_each_way_to_learn_makes_the_same_number_of_target_calls(variant):
    cell = run_cell("simulated", variant, 0, 8, 2)
    assert cell["calls"] == 9 and 0 < cell["best"] < 1 and cell["promised"] >= 0


def test_cells_are_kept_and_tabled(tmp_path, monkeypatch, capsys):
    made = []

    def cell(environment, variant, seed, iterations, fresh):
        made.append((environment, variant, seed))
        best = 0.6 + 0.01 * seed if variant == "TPE" else 0.5
        return {"start": 0.5, "best": best, "promised": 0.2, "late": 0.4}

    monkeypatch.setattr(module, "run_cell", cell)
    monkeypatch.setattr(intervals, "RESAMPLES", 100)
    words = ["--environments", "simulated", "--seeds", 8, "--output-dir", tmp_path]
    write_json(cell_path(tmp_path, "simulated", "TPE", 0), cell("simulated", "TPE", 0, 20, 10))
    call(module.main, *words)
    assert len(made) == len(set(made)) == 8 * len(module.AGENTS)
    call(module.main, *words)
    assert len(made) == 8 * len(module.AGENTS)
    text = (tmp_path / "table.md").read_text()
    assert text.strip() == table(tmp_path, ["simulated"], list(module.AGENTS), 8) and text.strip() in (
        capsys.readouterr().out
    )
    (line,) = (line for line in text.splitlines() if line.startswith("| TPE"))
    assert line.startswith("| TPE | 0.635 | 0.135 [") and line.count("*") == 1 and "| 0.200 | 0.400 |" in line
    assert read_json(tmp_path / "settings.json") == {"iterations": 20, "fresh": 10}
    assert "name another --output-dir" in fails(capsys, module.main, *words, "--iterations", 5)
