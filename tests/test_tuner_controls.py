"""The arithmetic of the tuner's benchmark, and a cell of each kind."""

from random import Random

import numpy as np
import pytest

from benchmarks import tuner_controls as module
from benchmarks import tuner_learners as learners
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
    assert cell["rows"] == 3000 and cell["promised"] > 0
    assert (cell["best"] - cell["start"] > 0.05) == (environment == "simulated")
    assert cell == run_cell(environment, "uniform draws", 0, 30, 20)
    still = run_cell(environment, "defaults", 0, 5, 3)
    assert still["best"] == still["start"] and still["promised"] > 0  # the luck of six


def test_a_cell_of_reviews():
    pytest.importorskip("sklearn", reason="scikit-learn, which is optional, is not installed")
    cell = run_cell("reviews", "random search", 0, 1, 1)
    assert 0.6 < cell["start"] < 0.9 and cell["rows"] == 100
    assert 0.7 < run_cell("reviews, null", "random search", 0, 1, 1)["best"] < 0.95


def test_edges_are_where_they_are_said_to_be():
    assert module.edges(Settings(0.45, 0.7, "varied")) == pytest.approx(0.8)
    far = [module.edges(Settings(t, 0.7, "varied")) for t in (1.5, 2.0)]
    assert (
        far[0] - far[1] < 0.02 < module.edges(Settings(0.5, 0.7, "varied")) - module.edges(Settings(0.6, 0.7, "varied"))
    )


def test_the_bandit_s_model_by_hand(monkeypatch):
    """One measured point, 0, with value 1. Weights of variance 2, a process of 3, noise of 1: covariance 2 + 3.

    At the point itself: expected 5 / (5 + 1), variance 5 - 25 / 6. At 1, where terms are (1, 1, 1) and the process
    agrees by e^(-1/2): covariance 2 + 3e^(-1/2) to the first point, own variance 2 * 3 + 3.
    """
    for name, value in (("TREND", 2.0), ("REST", 3.0), ("LENGTH", 1.0), ("NOISE", 1.0)):
        monkeypatch.setattr(learners, name, value)
    expected, deviations = learners.trend_and_process(np.zeros((1, 1)), np.ones(1), np.array([[0.0], [1.0]]))
    across = 2 + 3 * np.exp(-0.5)
    assert expected == pytest.approx([5 / 6, across / 6])
    assert deviations**2 == pytest.approx([5 - 25 / 6, 9 - across**2 / 6])
    assert learners.quadratic_terms(np.array([[2.0, 3.0]])).tolist() == [[1, 2, 3, 4, 6, 9]]


def test_the_bandit_s_proposals_come_to_be_good_and_those_of_an_earlier_run_s_at_once():
    space = Space(templates=("plain", "varied", "careful"))

    def search(agent, count):
        last, found = Outcome(Settings(), quality(Settings())), []
        for _ in range(count):
            settings = agent.propose(last)
            space.check(settings)
            last = Outcome(settings, quality(settings))
            agent.learn(last)
            found.append(last)
        return found

    found = search(learners.Bandit(space, 0), 40)
    assert np.mean([one.metric for one in found[:10]]) < 0.74 < 0.77 < np.mean([one.metric for one in found[-10:]])
    assert search(learners.Bandit(space, 1, earlier=found), 1)[0].metric > 0.77


def test_the_bandit_chooses_the_highest_expectation_not_the_highest_metric():
    """A metric of 1 - (temperature - 1)² in a row of measurements, and one at the edge that was lucky."""
    outcomes = [Outcome(Settings(0.1 * n, 0.5), 1 - (0.1 * n - 1) ** 2) for n in range(21)]
    outcomes[4] = Outcome(outcomes[4].settings, 1.2)  # 0.64 without luck
    bandit = learners.Bandit(Space())
    assert outcomes[bandit.chosen(outcomes)].settings.temperature == pytest.approx(1, abs=0.2)
    assert bandit.chosen(outcomes[:1]) == 0  # a single one, whose metrics do not vary


def test_models_fit_a_metric_and_know_where_they_have_seen_nothing():
    x = np.linspace(0, 1, 65)[:, None]
    values = -((x[:, 0] - 0.3) ** 2)
    values = (values - values.mean()) / values.std()
    for model in (learners.gaussian_process, learners.linear):
        means, deviations = model(x, values, x)
        assert np.corrcoef(means, values)[0, 1] > 0.9 and (deviations > 0).all()
        near, far = model(x[:9], values[:9], np.array([[0.1], [5.0]]))[1]
        assert near < far


def test_batches_that_are_not_yet_made_have_predicted_features():
    """A feature that is the temperature as a share of its range, and is so predicted for other settings."""
    rng, agent = Random(0), learners.BatchFeatures(Space(), 0)
    settings = [learners.drawn(agent.space, rng) for _ in range(40)]
    outcomes = [Outcome(one, 0.0, features=(one.temperature / 2,)) for one in settings]
    known, new = agent._points(outcomes, [Settings(0.5, 0.5), Settings(1.5, 0.5)])
    assert known[:, -1].tolist() == [one.temperature / 2 for one in settings]
    assert new[:, -1] == pytest.approx([0.25, 0.75], abs=0.05)


def test_common_rows_are_those_of_the_first_batch_until_the_search_ends():
    made = module.CommonRows(module.Simulated(module.Sampler()))
    numbers = [made.generate_from_seed(4, first).data[0]["number"] for first in (1, 101, module.FRESH)]
    assert numbers == [1, 1, module.FRESH]


def test_growing_batches_have_as_many_rows_as_equal_ones():
    assert module.batches("TPE", 20) == [(100, 20)]
    assert module.batches(module.GROWING, 20) == [(41, 16), (82, 24), (164, 28)]  # 16, 8 and 4 of them: 1 968 rows


def test_halving_measures_the_better_half_again():
    agent, told = learners.Halving(Space(), 0, 8), []
    for _ in range(14):
        settings = agent.propose(Outcome(Settings(), 0.0))
        told.append(settings)
        agent.learn(Outcome(settings, quality(settings)))
    best = sorted(told[:8], key=quality, reverse=True)
    assert len(set(told[:8])) == 8 and set(told[8:12]) == set(best[:4]) and told[12:] == best[:2]
    assert agent.chosen([Outcome(one, 0.0) for one in told]) == told.index(best[0])


@pytest.mark.parametrize("variant", [*module.WITHOUT, *module.LEARNERS])
def test_each_way_to_learn_trains_on_as_many_rows(variant):
    cell = run_cell("edges", variant, 0, 8, 2)
    assert 700 < cell["rows"] <= 800 and 0 < cell["best"] < 1


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
