"""The benchmarks' own arithmetic, on runs made by hand."""

import argparse
import itertools
import json
import math
import sys
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import ModelArgs

from benchmarks import crash, digits_dpo, growth, ppo_passes, rollouts, scaling, sft_step, synth_ablation, synth_scale
from benchmarks.digits_seeds import measure, table
from benchmarks.mlx_step import Stepper
from benchmarks.ppo_step import MODELS, SMALL_TASK, Comparison, Worker, check_whole, compare, write_tokenizer
from benchmarks.ppo_step import measure as measure_sides
from benchmarks.ppo_step import table as comparison_table
from benchmarks.soak import slope
from common.errors import UserError
from common.files import write_json
from synth import prompts
from synth.near_duplicates import find_duplicates
from tests.scripts import call


def rows(scores):
    return [{"step": i + 1, "mean_score": s, "kl": float(i), "seconds": 2.0 * (i + 1)} for i, s in enumerate(scores)]


def test_a_run_is_measured_from_where_the_goal_was_first_reached():
    result = measure(rows([0.5] * 9 + [0.9] + [0.8] * 10 + [1.0] * 20), batch_size=100)
    assert result.completions_to_goal == 1000 and result.seconds_to_goal == 20.0
    assert result.last_fifth == pytest.approx(1.0)
    assert result.lowest_10_steps == result.lowest_1000 == pytest.approx(0.8)
    assert result.final_kl == pytest.approx(34.5) and result.seconds == 80.0


def test_a_run_falls_back_where_a_mean_of_1000_leaves_the_goal_that_one_had_reached():
    # One good step is not yet a mean of 1 000; from the first that is on, no later one is below.
    risen = measure(rows([0.5] * 9 + [0.9] + [0.8] * 10 + [1.0] * 20), batch_size=100)
    dropped = measure(rows([0.5] * 9 + [1.0] * 20 + [0.8] * 10 + [1.0] * 20), batch_size=100)
    assert (risen.fell_back, dropped.fell_back) == (False, True)
    line = table({("mlx", "lora"): [risen, dropped]}).splitlines()[2]
    assert "| 1 of 2 |" in line


def test_a_run_that_never_arrives_says_so():
    result = measure(rows([0.5] * 20), batch_size=100)
    assert math.isinf(result.completions_to_goal) and math.isnan(result.lowest_1000)
    assert "inf" in table({("mlx", "lora"): [result]})


def test_a_learned_reward_is_judged_by_the_ground_truth():
    made = [{**row, "true_score": 0.1} for row in rows([0.95] * 20)]
    assert math.isinf(measure(made, batch_size=100).completions_to_goal)


def test_a_ratio_is_taken_within_a_round():
    # A machine that slows both sides of the second round tenfold changes no ratio.
    def answers(*seconds):
        return [{"seconds": each, "peak_memory": 1e8 * each} for each in seconds]

    found = compare(answers(1.0, 10.0, 2.0), answers(2.0, 20.0, 3.0))
    assert found == Comparison(2.0, 1.0, trl=3.0, trl_memory=2.0, ratio=2.0, lowest=1.5, highest=2.0)
    assert compare(answers(1.0, 3.0))[:3] == (2.0, pytest.approx(0.3), None)
    *_, both, alone = comparison_table({"both": found, "ours alone": compare(answers(0.5))}).splitlines()
    assert both == "| both | 2.000 | 3.000 | 2.00 (1.50 to 2.00) | 1.00 | 2.00 |"
    assert alone == "| ours alone | 0.500 |  |  | 0.05 |  |"


ANSWERING = """
import sys
print("{}", flush=True)
for _ in sys.stdin:
    print('{"tokens": 768, "updates": 16}', flush=True)
"""


def test_rounds_are_counted_after_the_warm_up_and_a_dead_side_says_why():
    worker = Worker("TRL", [sys.executable, "-c", ANSWERING], {})
    try:
        whole = {"tokens": 768, "updates": 16}
        assert measure_sides({"TRL": worker}, SMALL_TASK, rounds=2, warm_up=1, title="") == {"TRL": [whole, whole]}
    finally:
        worker.close()
    with pytest.raises(UserError, match=r"TRL process ended with code 1 \(ModuleNotFoundError: .*no_such_module"):
        Worker("TRL", [sys.executable, "-c", "import no_such_module"], {})


def test_two_processes_take_a_step_together(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json", MODELS["hidden 64"]["vocab_size"])
    small = {**MODELS["hidden 64"], "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    work = {"task": SMALL_TASK, "model": small, "kind": "lora", "tokenizer": str(tmp_path / "tokenizer.json")}
    with scaling.group(2, work) as two, scaling.group(1, work) as alone:
        (shared, whole), added = (group.step() for group in (two, alone)), two.ask("1000")
    check_whole("ours", shared, SMALL_TASK)
    assert shared["score"] == whole["score"] and shared["sums"] > whole["sums"] == 0 < added["seconds"]
    assert shared["peak_memory"] > 1.5 * whole["peak_memory"] > 1e8


@pytest.mark.parametrize(("what", "number"), [("tokens", 767), ("updates", 15)])
def test_a_step_that_did_less_work_does_not_count(what, number):
    with pytest.raises(UserError, match=f"had {number} {what}, not {number + 1}"):
        check_whole("ours", {"tokens": 768, "updates": 16, what: number}, SMALL_TASK)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_our_step_is_whole_and_trains(tmp_path, kind):
    write_tokenizer(tmp_path / "tokenizer.json", MODELS["hidden 64"]["vocab_size"])
    small = {**MODELS["hidden 64"], "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    stepper = Stepper(SMALL_TASK, small, kind, str(tmp_path / "tokenizer.json"))
    before = dict(tree_flatten(stepper.policy.module.trainable_parameters()))
    answer = stepper.step()
    check_whole("ours", answer, SMALL_TASK)
    assert 0 < answer["rollout_seconds"] < answer["seconds"] and 0 < answer["score"] <= 1
    after = dict(tree_flatten(stepper.policy.module.trainable_parameters()))
    assert all(not mx.array_equal(before[name], after[name]) for name in before)
    # q and v of one layer, rank 16: 16 × (16 + 16) + 16 × (16 + 8); the value head has no bias.
    assert stepper.policy.sizes()[0] == {"lora": 896, "full": 2 * 64 * 16 + 768 + 768 + 3 * 16}[kind] + 16


def test_the_cost_of_a_step_on_several_machines_is_computed_by_hand(tmp_path, monkeypatch):
    half, link = {"seconds": 5.0, "rollout_seconds": 3.0}, scaling.Link(latency=0.01, bandwidth=1e6)
    alone, two = {"seconds": 9.0, "rollout_seconds": 5.0}, {"seconds": 6.0, "waited": 1.5, "sums": 10, "bytes": 4e6}
    measured: dict[str, Any] = {
        "alone": alone,
        "half": half,
        "two": two,
        "sums": {"1": 0.02, "1000001": 4.02},
        "speedups": [1.4, 1.5],
    }
    assert scaling.local_link(measured["sums"]) == pytest.approx((0.01, 1e6))
    step = scaling.step_of(measured)
    assert step == ((1.0, 4.0), (0.0, 4.0), 10, 4e6)
    # Two send two messages a sum, each of half of it: 2 (10 · 0.01 + 4/2); four send six: 6 (10 · 0.01 + 4/4).
    assert step.seconds(1, link) == 9 and step.seconds(2, link) == pytest.approx(1 + 4 + 0.2 + 4)
    assert step.seconds(4, link) == pytest.approx(1 + 2 + 0.6 + 6)
    assert step.efficiency(2, link) == pytest.approx(9 / 9.2 / 2) and step.limit(4, link) == "sums"
    fast = scaling.Link(0.0, 1e12)
    assert step.limit(64, fast) == "sampling's passes"
    # 9, 5, 3, 2, 1.5, 1.25, 1.125: twice 8 is 1.33 times sooner, twice 16 is 1.2.
    assert (step.most(link), step.most(fast)) == (1, 16)
    monkeypatch.setattr(scaling, "PAPER", {"counted": step})
    page = tmp_path / "page.md"
    page.write_text(f"a {scaling.BEGIN}\nold\n{scaling.END} z", encoding="utf-8")
    for _ in range(2):
        scaling.put_into(page, [scaling.measured_table({"kinds": {"lora": measured}}), scaling.paper_table()])
    text = page.read_text(encoding="utf-8")
    assert text.count("\n| lora | 9.00 s | 6.00 s | 9.20 s | +53% | 1.45 times | 72% | 25% | 10 | 4.0 |\n") == 1
    assert text.startswith("a <") and text.endswith("> z") and "old" not in text


def test_the_ablations_figures_are_counted_by_hand(tmp_path):
    right = {"input": "When was Gruvaby founded?", "output": "1473"}
    wrong = [{**right, "output": "1474"}, {"input": "When was Elton founded?", "output": "1473"}]
    dropped = {**right, "dropped": "tie"}
    assert synth_ablation.measure_facts([right, *wrong, dropped]) == {"kept": 3, "correct": 1 / 3}
    sums = [{"input": "12 + 7 =", "output": "19"}, {"input": "12 + 7 =", "output": "18"}]
    assert [synth_ablation.is_right_sum(row) for row in sums] == [True, False]
    cells = {
        "full": {0: {"base": 0.5, "trained": 0.8}, 1: {"base": 0.5, "trained": 0.9}},
        "no vote": {1: {"base": 0.5, "trained": 0.8}, 0: {"base": 0.5, "trained": 0.6}, 2: {"trained": 0.1}},
    }
    # Seed by seed: -0.2 and -0.1.
    less = synth_ablation.against_full(cells, "no vote")
    assert less is not None and less.mean == pytest.approx(-0.15)
    assert less.high - less.mean == pytest.approx(12.706 * 0.05)
    assert "| no vote | 3 |" in synth_ablation.table(cells)
    synth_ablation.draw(tmp_path / "picture.png", cells)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_soak_tells_a_leak_from_noise():
    noise = np.random.default_rng(0).normal(0, 1, 1800)
    found, low, high = slope(400 + noise)
    assert low <= 0 <= high and abs(found) < 0.5
    found, low, high = slope(400 + noise + 20 * np.arange(1800) / 1000)
    assert found == pytest.approx(20, abs=0.5) and low < 20 < high and low > 19


# Ten numbers, one at a time, into a file that is replaced whole; FAULT is put in before the last.
SLOW = """
import json, os, sys, time
from pathlib import Path
run = Path("run"); run.mkdir(exist_ok=True)
starts = Path("starts"); starts.write_text(starts.read_text() + "s" if starts.exists() else "s")
path = run / "config.json"
found = json.loads(path.read_text()) if path.exists() else []
while len(found) < 10:
    found.append({"n": len(found), "seconds": time.time()})
    time.sleep(0.05)
    Path("next").write_text(json.dumps(found)); os.replace("next", path)
FAULT
starts.unlink()
"""
FAULTS = {
    "none": "",
    "forgets": "Path('forgot').write_text(starts.read_text())",
    "leaves": "Path('run/.a.1.tmp').mkdir(exist_ok=True)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kills_find_what_is_not_the_same_in_the_end(tmp_path, fault):
    (tmp_path / "slow.py").write_text(SLOW.replace("FAULT", FAULTS[fault]))
    kind = crash.Kind([tmp_path / "slow.py"], [tmp_path / "slow.py", "--resume"])
    *_, result = crash.measure(kind, 3, "0", tmp_path / "runs")
    assert result.kills == 3 and result.runs >= 1 and result.compared == result.runs * (1 + (fault == "forgets"))
    different = ["forgot"] if fault == "forgets" else []
    last = f"cut{result.runs}"  # which was killed; an earlier one may have ended by itself
    assert [name for name in result.different if name.startswith(last)] == [f"{last}/{name}" for name in different]
    assert bool(result.left_over) == (fault == "leaves") and result.whole == (fault == "none")


def test_kills_go_on_from_those_so_far(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW.replace("FAULT", ""))
    kind = crash.Kind([tmp_path / "slow.py"], [tmp_path / "slow.py", "--resume"])
    results = list(crash.measure(kind, 8, "0", tmp_path / "runs", crash.Result(0.1, kills=1, runs=3, compared=3)))
    assert results[-1].kills == 8 and results[-1].whole
    assert not (tmp_path / "runs/cut3").exists() and (tmp_path / "runs/cut5").is_dir()  # at most 5 kills a run


def test_the_table_of_kills_has_a_line_a_kind():
    found = crash.Result(9.0, kills=25, runs=3, of_children=12, compared=60, asked_again=7, lost=100)
    lines = crash.table({"sft": asdict(found), "synth.run": asdict(found)}).splitlines()
    assert lines[2:] == ["| sft | 25 |  | 3 | 60 | 0 | 0 |  |", "| synth.run | 25 | 12 | 3 | 60 | 0 | 0 | 7 (100) |"]
    assert found.whole and not replace(found, asked_again=101).whole and not replace(found, different=["a"]).whole


def test_files_are_compared_without_their_times(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 2, "rollout_seconds": 3}\n{"step": 2')
    (tmp_path / "summary.json").write_text('{"loss": 1, "of": [{"seconds": 4}], "at": "http://a/v1"}')
    (tmp_path / "lock").touch()
    assert crash.left_by(tmp_path, "http://a/v1") == {
        "metrics.jsonl": [{"step": 1}, '{"step": 2'],
        "summary.json": [{"loss": 1, "of": [{}], "at": "URL"}],
    }


def test_every_side_of_the_sft_benchmark_has_every_round():
    seconds, losses = sft_step.measure(sft_step.make_rows(4, masked=False), batch_size=2, rounds=2)
    assert {sft_step.THEIRS, sft_step.OURS, sft_step.PACKED} <= losses.keys() == seconds.keys()
    assert {len(values) for values in seconds.values()} == {2}
    assert losses[sft_step.OURS] == pytest.approx(losses[sft_step.PACKED], abs=1e-4)
    assert losses[sft_step.OURS] == pytest.approx(losses[sft_step.THEIRS], rel=0.02)
    assert all(value > 0 for values in seconds.values() for value in values)


def test_the_sft_benchmark_divides_within_a_round():
    seconds = {sft_step.THEIRS: [2.0, 30.0, 4.0], sft_step.OURS: [1.0, 10.0, 2.0]}
    losses = {sft_step.THEIRS: 9.5, sft_step.OURS: 9.25}
    assert sft_step.table(seconds, losses, tokens=100).splitlines()[2:] == [
        "| mlx_lm.lora | 25 | 1.00 (1.00 to 1.00) | 9.500 |",
        "| sft.py | 50 | 2.00 (2.00 to 3.00) | 9.250 |",
    ]


def test_the_methods_at_equal_data_are_shown_by_their_spread_over_seeds(tmp_path):
    for name, score in (("dpo-0", 0.5), ("dpo-1", 0.75), ("dpo-10", 0.6), ("dpo, beta 0.3-0", 1.0)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "result.json", {"score": score, "perfect": 0.25, "kl": 2.0})
    (tmp_path / "dpo-3").mkdir()  # not yet measured
    perfect, kl = "0.250 (0.250 to 0.250)", "2.000 (2.000 to 2.000)"
    assert sorted(digits_dpo.table(tmp_path).splitlines()[2:]) == [
        f"| dpo | 3 | 0.600 (0.500 to 0.750) | {perfect} | {kl} |",
        f"| dpo, beta 0.3 | 1 | 1.000 (1.000 to 1.000) | {perfect} | {kl} |",
    ]


def test_the_endpoints_of_synth_scale_write_samples_unlike_each_other_and_right_votes():
    def asked(text, sample):
        return synth_scale.answer_to({"messages": [{"content": text}]}, sample)

    samples = [json.loads(asked("Write sample number ...", number)) for number in range(60)]
    assert find_duplicates([sample["input"] for sample in samples], threshold=0.4) == []
    answer = synth_scale.TASK.answer
    assert answer
    questions = [prompts.answer(synth_scale.TASK, sample["input"])[-1]["content"] for sample in samples]
    votes = [answer.extract(asked(question, 0)) for question in questions]
    assert votes == [sample["output"] for sample in samples]


@pytest.mark.parametrize("in_flight", [2, 6])
def test_rollouts_of_all_sides_have_the_lengths_that_were_drawn(in_flight):
    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    more = {"model_type": "llama", "vocab_size": 300, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    model = rollouts.Countdown(ModelArgs.from_dict({**settings, **more}))
    words = argparse.Namespace(prompts=3, repeats=2, prompt_length=6, mean_length=5, seed=0)
    prompts = rollouts.make_prompts(words, 300)
    assert [prompt[:-1] for prompt in prompts[::2]] == [prompt[:-1] for prompt in prompts[1::2]]
    seconds, tokens = rollouts.measure(rollouts.make_sides(model, prompts, 8, in_flight), rounds=2)
    # What ends by itself has an EOS beside the others; what is cut has none.
    assert tokens == sum(prompt[-1] - 1 if prompt[-1] <= 8 else 8 for prompt in prompts)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(seconds, 2) and len(seconds) == 3


def test_the_rollouts_benchmark_divides_within_a_round():
    ours, theirs = rollouts.lines("tiny", {rollouts.OURS: [1.0, 10.0, 2.0], rollouts.THEIRS: [2.0, 30.0, 3.0]}, 60)
    assert ours == "| tiny | ours | 30 |  |"
    assert theirs == "| tiny | mlx_lm.batch_generate | 20 | 2.00 (1.50 to 3.00) |"


def test_growth_is_measured_once_where_curves_meet(monkeypatch):
    seen = []
    measure_at = growth.measure_at

    def measured_at(*args):
        seen.append(args)
        return measure_at(*args)

    monkeypatch.setattr(growth, "OTHERS", {**growth.OTHERS, "hidden": 64, "prompt": 2})
    base = {"completions": 2, "length": 3, "layers": 2, "trained_layers": 1, "vocabulary": 50}
    monkeypatch.setattr(growth, "measure_at", measured_at)
    found = growth.curves(base, {"completions": (2, 4), "trained_layers": (1, 2)}, rounds=1)
    assert len(seen) == 3 and found["completions"][0] == found["trained_layers"][0]._replace(value=2)
    assert [point.value for points in found.values() for point in points] == [2, 4, 1, 2]
    assert all(point.seconds > 0 and point.peak > 0 for points in found.values() for point in points)
    left, right, *_ = growth.panels(found)
    assert left.curves[""][1] == (4, found["completions"][1].seconds) and right.unit == "GB"


def test_ppo_s_passes_are_measured_three_ways(capsys):
    sizes = {"hidden": 64, "layers": 3, "trained-layers": 1, "vocabulary": 50, "completions": 4, "of-a-prompt": 2}
    sizes |= {"mini-batch": 2, "prompt": 4, "mean-length": 3, "length": 5, "rounds": 1}
    call(ppo_passes.main, *itertools.chain(*((f"--{name}", value) for name, value in sizes.items())))
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {way}" for way in ppo_passes.WAYS]
    assert all(float(cell) > 0 for line in lines for cell in line.strip("| ").split(" | ")[1:])


def test_the_table_of_growth_divides_by_the_point_before():
    found = {"layers": [growth.Point(4, 1.0, 0.5), growth.Point(8, 1.5, 1.0)]}
    assert growth.table(found).splitlines()[2:] == [
        "| layers | 4 | 1.00 |  | 0.50 |  |",
        "| layers | 8 | 1.50 | 1.50 | 1.00 | 2.00 |",
    ]
