"""Selection: the three rules by hand, ties without a favourite, and a reason for every row that is left out."""

import sys
from collections import Counter

import pytest

from common.errors import UserError
from synth.pipeline import selection as module
from synth.pipeline.selection import Selection, select, selected_or_lowest
from synth.stages import drop, kept, load_rows, new_row, write_rows


def tried(*rates):
    return [{**new_row(f"g{n}", f"input {n}", "1", "generated"), "pass_rate": rate} for n, rate in enumerate(rates)]


def ids(rows):
    return [row["id"] for row in kept(rows)]


def reasons(rows):
    return [row.get("dropped") for row in rows]


RATES = (0.0, 0.125, 0.5, 0.75, 0.875, 1.0, 0.03)


def test_the_band_is_ranked_by_p_times_one_minus_p():
    rows = select(tried(*RATES), Selection(count=2))
    assert ids(rows) == ["g2", "g3"]  # 0.25 and 0.1875, before 0.109
    out, low = "pass rate outside the band", "ranked below the first 2"
    assert reasons(rows) == [out, low, None, None, low, out, out]
    assert rows[0]["detail"] == "pass rate 0.00"
    wide = Selection(count=9, band=(0.0, 1.0))
    assert len(ids(select(tried(*RATES), wide))) == 7
    assert ids(select(tried(*RATES), Selection(band=(0.125, 0.875)))) == ["g1", "g2", "g3", "g4"]


def test_the_papers_rule_takes_the_lowest_pass_rates():
    assert ids(select(tried(*RATES), Selection(count=3, rule="lowest"))) == ["g0", "g1", "g6"]
    rows = select(tried(*RATES), Selection(count=3, rule="lowest", never_solved=False))
    assert ids(rows) == ["g1", "g2", "g6"]
    assert Counter(reasons(rows)) == {
        None: 3, "never solved": 1, "always solved": 1, "ranked below the first 3": 2
    }  # fmt: skip
    assert "g5" not in ids(select(tried(*RATES), Selection(count=7, rule="lowest")))


def test_where_the_rule_leaves_none_the_lowest_are_taken_and_the_measures_are_said(capsys):
    rows = [{**row, "rollouts": n} for row, n in zip(tried(0.0, 0.02, 1.0), (32, 50, 8), strict=True)]
    assert ids(selected_or_lowest(rows, Selection(count=1))) == ["g0"]
    said = capsys.readouterr().out
    assert "of 3 samples the base model solved 1 never and 1 always, in 8 to 50 rollouts each" in said
    assert "(pass rates 0.00 to 1.00); training on the lowest pass rates instead of --rule band" in said
    assert ids(selected_or_lowest(tried(0.5, 0.0), Selection())) == ["g0"] and not capsys.readouterr().out
    assert selected_or_lowest([], Selection()) == []
    with pytest.raises(UserError, match=r"solved 0 never and 2 always.*nothing is left to learn from; give a harder"):
        selected_or_lowest(tried(1.0, 1.0), Selection())
    with pytest.raises(UserError, match=r"solved 1 never and 1 always.*leave out --no-never-solved"):
        selected_or_lowest(tried(0.0, 1.0), Selection(never_solved=False))


def test_random_draws_any_and_every_sample_alike():
    assert reasons(select(tried(*RATES), Selection(count=6, rule="random"))).count("not drawn") == 1
    drawn = Counter(
        name for seed in range(400) for name in ids(select(tried(*RATES), Selection(2, "random", seed=seed)))
    )
    assert drawn.total() == 800 and all(75 < drawn[f"g{n}"] < 155 for n in range(7))  # 114 each, 4 standard errors
    assert len(ids(select([new_row("g0", "1", "1", "generated")], Selection(rule="random")))) == 1


@pytest.mark.parametrize("rule", ["band", "lowest", "random"])
def test_the_same_seed_selects_the_same_whatever_the_order(rule):
    rows = tried(*[0.5] * 40)
    chosen = set(ids(select(rows, Selection(10, rule, seed=3))))
    assert chosen == set(ids(select(rows[::-1], Selection(10, rule, seed=3)))) and len(chosen) == 10
    assert chosen != set(ids(select(rows, Selection(10, rule, seed=4))))
    assert chosen != {f"g{n}" for n in range(10)}  # those written first have no advantage


def test_all_rows_come_back_in_their_order_and_dropped_ones_as_they_were():
    gone = drop(new_row("x", "1", "1", "generated"), "tie", "2 of 4")
    rows = select([gone, *tried(0.5, 0.0)], Selection())
    assert rows[0] is gone and [row["id"] for row in rows] == ["x", "g0", "g1"] and ids(rows) == ["g0"]


def test_a_row_that_was_never_tried_is_a_users_error():
    with pytest.raises(UserError, match="row g1 has no pass rate"):
        select(tried(0.5, None), Selection())


@pytest.mark.parametrize("settings", [{"rule": "best"}, {"count": 0}, {"band": (0.9, 0.1)}])
def test_settings_that_cannot_be_are_a_users_error(settings):
    with pytest.raises(UserError):
        Selection(**settings)


def test_the_command(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "in.jsonl", tried(*RATES))
    command = ["selection", "--in", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(sys, "argv", [*command, "--count", "2", "--rule", "lowest", "--no-never-solved"])
    module.main()
    assert ids(load_rows(tmp_path / "out.jsonl")) == ["g1", "g6"]
    assert "selection: kept 2 of 7; dropped: 3 ranked below the first 2" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--band", "0.5"])
    with pytest.raises(UserError, match="--band has 1 values"):
        module.main()
