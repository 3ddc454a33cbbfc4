"""The benchmark's own arithmetic, and one small run of all its arms, cut and gone on with."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks import evolve_controls as module
from benchmarks.evolve_controls import ARMS, MEASURES, cell_path, dealt_out, measures, table
from common.files import read_json, write_json
from synth.evolution.policy import Batch
from synth.offline.server import OfflineTeacher
from tests.scripts import call, with_words
from training import intervals


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)


def test_measures_by_hand():
    """Three choices, two kept, of 4 and 8 tokens: 3 and 7 pairs of words, none in common. Weights: 1, 1, -0.2."""
    first = {"novelty": 0.5, "difficulty": 1.0, "growth": 0.0, "score": 0.3}
    second = {"novelty": 0.6, "difficulty": None, "growth": 0.5, "score": 0.5}
    rows = [{"input": "Add 12 and 7.", "parts": first}, {"input": "x", "parts": {}, "dropped": "length"},
            {"input": "Work out 9 plus 7. Then add 3.", "parts": second}]  # fmt: skip
    found = measures(rows, 4)
    assert found == pytest.approx(dict(zip(MEASURES, ((1.5 + 0.5) / 4, 0.8 / 4, 0.5, 3 + 7, 2), strict=True)))
    same = measures([rows[0], {"input": "Add 34 and 5.", "parts": first}], 2)
    assert same["distinct kinds of sums"] == 1  # other numbers are no other kind


def test_rewards_are_dealt_out_from_an_even_policys():
    rng, relabel = np.random.default_rng(0), dealt_out(0)
    mask = np.array([[1, 1], [1, 0]], dtype=np.float32)
    first = Batch(np.zeros((2, 2, 1)), mask, mask, np.array([[1, 2], [3, 99]], dtype=np.float32), mask, 2)
    relabel(first)
    later = [relabel(first._replace(rewards=rng.random((2, 2)).astype(np.float32) + 50)).rewards for _ in range(50)]
    assert {value for rewards in later for value in rewards[mask > 0].tolist()} == {1.0, 2.0, 3.0}
    assert all(rewards[1, 1] == 0 for rewards in later)


def test_the_table_pairs_by_instruction():
    cells = {arm: [{"calls": 6, "kept": 3, **{name: [1.0 + k, 2.0 + k, 4.0 + k] for name in MEASURES}}]
             for k, arm in enumerate(("learned", "uniform"))}  # fmt: skip
    text = table(cells)
    assert "| learned | 2.333 [1.000, 4.000] |" in text and "| 6 | 3.00 |" in text
    assert "| uniform | -1.000 [-1.000, -1.000] |" in text and "| 0 of 1 |" in text


@contextmanager
def teacher_in_this_process(words):
    with OfflineTeacher(error_rate=float(words.split()[-1])) as server:
        yield server.url


def test_all_arms_run_and_finished_cells_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "offline_teacher", teacher_in_this_process)
    words = ["--seeds", 1, "--iterations", 2, "--starts", 2, "--group", 2, "--rounds", 2, "--calls", 2, "--answers", 2,
             "--training-instructions", 4, "--held-out-instructions", 3, "--output-dir", tmp_path]  # fmt: skip
    call(module.main, *words)
    text = capsys.readouterr().out
    assert all(f"seed 0, {arm}: " in text for arm in ARMS) and (tmp_path / "table.md").read_text() in text
    cell = read_json(cell_path(tmp_path, 0, "learned"))
    assert len(cell[MEASURES[0]]) == 3 and cell["calls"] <= 6
    assert cell["expert_calls_per_kept_row"] == pytest.approx((cell["calls"] + cell["kept"]) / max(cell["kept"], 1))
    cell_path(tmp_path, 0, "uniform").unlink()
    call(module.main, *words)
    again = capsys.readouterr().out
    assert "seed 0, uniform: " in again and "seed 0, learned: " not in again
    assert (tmp_path / "table.md").read_text() in text  # and it came out the same


def test_the_command_s_table_pairs_by_seed():
    """Two seeds, differences of 4 and 6 rows: Student's interval with one degree of freedom is 5 ± 12.706."""
    def cells(*rows):
        return [dict(zip(module.COMMAND_MEASURES, (kept, reward, 70, 3.0), strict=True)) for kept, reward in rows]

    text = module.command_table({"learned": cells((24, 5), (28, 7)), "uniform": cells((20, 1), (22, 1))})
    assert "| learned | 26 (24 to 28) | 6 (5 to 7) | 70 (70 to 70) | 3 (3 to 3) |" in text
    assert "| uniform | 5.000 [-7.706, 17.706] | 5.000 [-7.706, 17.706] | 0.000 [0.000, 0.000] |" in text
    assert text.endswith("| 2 of 2 |")


def test_the_command_is_run_once_for_each_policy_and_seed(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command[3:])
        folder = Path(command[command.index("--output-dir") + 1])
        write_json(folder / "summary.json", {"rows": 1, "expert_calls": 4})
        rows = [{"id": "i1", "parent": None}, {"id": "a", "parent": "i1", "operator": "breadth", "reward": 0.5}]
        for name in ("tree", "control"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(module.subprocess, "run", run)
    args = with_words(module.parse_args, "--command", "--seeds", 2, "--output-dir", tmp_path)
    found = module.command_cells(args)
    assert [words[words.index("--policy") + 1] for words in asked] == ["ppo", "uniform"] * 2
    assert found["learned"][1] == {"kept rows": 1, "reward": 0.5, "calls": 1, "expert calls per row": 4.0}
    assert found["uniform without stop"][0]["expert calls per row"] == 2.0
    module.command_cells(args)
    assert len(asked) == 4  # finished runs are kept
