"""synth.evolve from instructions to a trained model; killed and resumed, it asks nothing again and ends the same."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

import sft
from benchmarks.crash import repeated
from common.errors import UserError
from common.files import read_json
from data.records import read_rows
from synth import evolve as module
from synth import prompts
from synth.evolution.control import verdict
from synth.evolution.features import Situation, features
from synth.evolution.files import load_policy
from synth.evolution.flags import OFFLINE_ANSWERS, evolve_settings, parse_evolve_args
from synth.evolution.operators import ACTIONS, load_operators
from synth.evolution.responses import data_row, respond, response_fault, write_data
from synth.offline.instructions import starting
from synth.offline.server import OfflineTeacher
from synth.stages import kept, load_rows
from synth.teacher.asking import Asking
from tests.scripted_teacher import ScriptedTeacher, said
from tests.scripts import ROOT, call, fails, with_words
from training import intervals
from training.metrics import read_metrics


def send_kill(process, server, calls):
    """Kill the process once it has made `calls` calls; returns its exit status, 0 if it ended before."""
    before = server.calls
    while process.poll() is None and server.calls < before + calls:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait()


SMALL = ["--rounds", 2, "--iterations", 2, "--starts", 2, "--group", 2, "--answers", 2, "--answer", "number"]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 100)


@pytest.fixture
def teacher():
    with OfflineTeacher(error_rate=0.1) as server:
        yield server


@pytest.fixture
def instructions(tmp_path):
    path = tmp_path / "instructions.txt"
    path.write_text("\n".join(starting(5, 0)) + "\n")
    return path


def words_of(server, instructions, folder):
    return [*SMALL, "--instructions", instructions, "--teacher-url", server.url, "--teacher-model", "m",
            "--output-dir", folder]  # fmt: skip


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_instructions_to_data(tmp_path, teacher, instructions, capsys):
    folder = tmp_path / "run"
    call(module.main, *words_of(teacher, instructions, folder))
    tree = rows_of(folder / "tree.jsonl")
    roots, choices = tree[:5], tree[5:]
    assert [row["input"] for row in roots] == starting(5, 0) and all(row["parent"] is None for row in roots)
    ids = {row["id"]: row for row in tree}
    assert len(ids) == len(tree) and all(
        row["parent"] in ids and "dropped" not in ids[row["parent"]] for row in choices
    )
    assert all(row["propensities"][row["operator"]] == row["propensity"] >= 0.02 for row in choices)
    for row in kept(choices):
        parts = row["parts"]
        assert parts["equal"] == [False, False] and 0 < row["pass_rate"] <= 1
        assert row["reward"] == pytest.approx(parts["novelty"] + parts["difficulty"] - 0.2 * parts["growth"])
    # Only what was kept is answered, afresh, and stands in the data.
    answered = load_rows(folder / "responses.jsonl")
    assert [row["id"] for row in answered] == [row["id"] for row in kept(choices)]
    data = rows_of(folder / "dataset.jsonl")
    assert data == [data_row(row, "messages") for row in kept(answered)] and len(data) > 1
    assert data[0]["messages"][0] == {"role": "user", "content": answered[0]["input"]}
    # The log of the training, the policy, and the ledger by role.
    log = rows_of(folder / "policy_training" / "choices.jsonl")
    assert {row["iteration"] for row in log} == {1, 2} and len({row["chain"] for row in log}) == 8
    assert load_policy(folder / "policy").kind == "ppo" and len(read_metrics(folder)) == 2
    ledger = read_json(folder / "ledger.json")
    assert ledger["total"]["calls"] == teacher.calls and ledger["respond"]["calls"] == len(answered)
    summary = read_json(folder / "summary.json")
    expert = ledger["evolve: rewrite"]["calls"] + ledger["respond"]["calls"]
    assert summary["rows"] == len(data) and summary["expert_calls"] == expert
    out = capsys.readouterr().out
    for line in (f"rows: {len(data)}; expert calls per row: {expert / len(data):.2f}", "operators: breadth 0.",
                 "tree: kept", "choosing evenly, judged from these logs:"):  # fmt: skip
        assert line in out
    # Again: nothing is asked.
    calls = teacher.calls
    call(module.main, "--resume", folder)
    assert teacher.calls == calls and rows_of(folder / "dataset.jsonl") == data
    with pytest.raises(UserError, match=r"other flags: --policy uniform \(the run: ppo\); leave them out"):
        call(module.main, "--resume", folder, "--policy", "uniform", "--concurrency", 2)


def test_the_expert_has_no_part_in_the_training(tmp_path, instructions):
    """Three endpoints: who rewrites and solves, who reviews, and who only guides the data."""
    with OfflineTeacher() as expert, OfflineTeacher() as instructor, OfflineTeacher() as reviewer:
        words = words_of(expert, instructions, tmp_path / "run")
        for role, server in (("instructor", instructor), ("reviewer", reviewer)):
            words += [f"--{role}-url", server.url, f"--{role}-model", "m"]
        call(module.main, *words, "--price-in", 1, "--price-out", 1)
        ledgers = [read_json(tmp_path / "run" / path / "ledger.json") for path in ("", "instructor", "reviewer")]
    asked = [{name.split(": ")[-1] for name in ledger} - {"probe", "total"} for ledger in ledgers]
    assert asked == [{"rewrite", "respond"}, {"rewrite", "answers"}, {"review"}]
    assert "train: rewrite" not in ledgers[0] and "evolve: rewrite" not in ledgers[1]
    assert [ledger["total"]["money"] > 0 for ledger in ledgers] == [True, False, False]
    assert [ledger["total"]["calls"] for ledger in ledgers] == [s.calls for s in (expert, instructor, reviewer)]


def test_the_published_reward_and_operators_in_a_run(tmp_path, instructions):
    """--reviewer-score and --operators: the reviewer scores, the limits are gates, the policy is of these six."""
    with OfflineTeacher(error_rate=0.1) as expert, OfflineTeacher(error_rate=0.1) as reviewer:
        words = words_of(expert, instructions, tmp_path / "run")
        words += ["--reviewer-url", reviewer.url, "--reviewer-model", "m", "--reviewer-score", "--rounds", 3]
        words += ["--operators", ROOT / "synth/evolution/teams_rl.yaml", "--answers", 0, "--answer", ""]
        call(module.main, *words)
        ledgers = [read_json(tmp_path / "run" / path / "ledger.json") for path in ("", "reviewer")]
    assert not [name for name in ledgers[0] if "score" in name or "review" in name]
    assert {"train: score", "evolve: score"} <= set(ledgers[1])
    choices = [row for row in rows_of(tmp_path / "run" / "tree.jsonl") if row["parent"]]
    assert all(row["reward"] == row["parts"]["score"] for row in kept(choices))
    assert "changed too little or too much" in {row.get("dropped") for row in choices}
    operators = load_operators(ROOT / "synth/evolution/teams_rl.yaml")
    texts = {row["id"]: row["input"] for row in rows_of(tmp_path / "run" / "tree.jsonl")}
    for row in kept(choices):
        assert operators.by_name[row["operator"]].fault(row["input"], texts[row["parent"]]) == ("", "")
    assert load_policy(tmp_path / "run" / "policy", operators.actions).names == operators.actions
    assert set(read_json(tmp_path / "run" / "summary.json")) > set(operators.actions)


def test_a_policy_of_operators_of_ones_own(tmp_path, teacher, instructions, capsys):
    own = tmp_path / "own.yaml"
    demands = {name: prompts.OPERATOR_DEMANDS[known] for name, known in (("twist", "constraints"), ("dig", "deepen"))}
    own.write_text(json.dumps({"operators": demands}))
    words = [*words_of(teacher, instructions, tmp_path / "run"), "--operators", own]
    call(module.main, *words)
    assert "operators: twist 0." in capsys.readouterr().out
    choices = [row for row in rows_of(tmp_path / "run" / "tree.jsonl") if row["parent"]]
    assert {row["operator"] for row in choices} <= {"twist", "dig", "stop"} and kept(choices)
    call(module.main, *words, "--policy", "dig", "--output-dir", tmp_path / "also")
    again = [*words_of(teacher, instructions, tmp_path / "other"), "--policy-path", tmp_path / "run" / "policy"]
    assert "other operators" in fails(capsys, module.main, *again)
    assert "--policy is 'breadth'; use one of" in fails(capsys, module.main, *words, "--policy", "breadth")


@pytest.mark.parametrize("kind", ["self", "evol"])
def test_without_a_policy_the_generators_make_the_data(tmp_path, teacher, instructions, kind, capsys):
    words = [
        *words_of(teacher, instructions, tmp_path / "run"),
        "--without-policy",
        kind,
        "--answers",
        0,
        "--answer",
        "",
    ]
    call(module.main, *words)
    rows = kept(load_rows(tmp_path / "run" / "responses.jsonl"))
    assert rows_of(tmp_path / "run" / "dataset.jsonl") == [data_row(row, "messages") for row in rows] and len(rows) > 2
    ledger = read_json(tmp_path / "run" / "ledger.json")
    assert ("self-instruct" in ledger) == (kind == "self") and ("evolve: rewrite" in ledger) == (kind == "evol")
    assert not [name for name in ledger if name.startswith("train")]
    out = capsys.readouterr().out
    assert f"rows: {len(rows)}; expert calls per row:" in out and ("stop 0.00" in out) == (kind == "evol")
    calls = teacher.calls
    call(module.main, "--resume", tmp_path / "run")
    assert teacher.calls == calls
    call(module.main, *words, "--dry-run", "--output-dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()


KILLABLE = "from synth import evolve\nfrom common.cli import run\nrun(evolve.main)"


def test_killed_and_resumed_it_asks_nothing_again(tmp_path, instructions):
    cut, rng = tmp_path / "cut", random.Random(0)
    with OfflineTeacher(latency_ms=5) as server:
        words = [*words_of(server, instructions, cut), "--chains", 3, "--iterations", 3]
        process = subprocess.Popen(
            [sys.executable, "-c", KILLABLE, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        assert send_kill(process, server, rng.randrange(5, 15)) == -signal.SIGKILL
        # Stopped again, by limits: within the training of the policy and in the generation of the data.
        done = []
        for limit in (20, 35, 110):
            with pytest.raises(UserError, match=f"limit of {limit} calls"):
                call(module.main, "--resume", cut, "--max-calls", limit)
            saved = cut / "policy_training" / "progress.json"
            done.append(read_json(saved)["iterations"] if saved.is_file() else 0)
        assert {1, 2} & set(done) and (cut / "policy").is_dir() and not (cut / "tree.jsonl").exists()
        call(module.main, "--resume", cut, "--max-calls", 10_000)
        assert repeated(server) <= 8  # what was in flight at the kill
        disturbed = server.asked.keys()
    with OfflineTeacher() as server:
        call(module.main, *words_of(server, instructions, tmp_path / "whole"), "--chains", 3, "--iterations", 3)
        assert repeated(server) == 0 and server.asked.keys() == disturbed
    for name in ("tree.jsonl", "responses.jsonl", "dataset.jsonl", "policy_training/choices.jsonl",
                 "policy/policy.safetensors"):  # fmt: skip
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_sft_is_one_flag(tmp_path, teacher, instructions, tiny_folder, monkeypatch):
    started = []

    def run_script(words, go_on, files=()):
        started.append(list(words))
        call(sft.main, *words[1:])

    monkeypatch.setattr(module, "run_script", run_script)
    monkeypatch.setattr(sft, "plot_run", lambda folder: folder / "curves.png")
    folder = tmp_path / "run"
    words = [*words_of(teacher, instructions, folder), "--policy", "uniform", "--format", "prompt", "--sft"]
    call(module.main, *words, "--base-model", tiny_folder, "--sft-flags=--iters 2 --batch-size 2", "--held-out", 0.3)
    assert (folder / "adapter" / "adapters.safetensors").is_file() and started[0][:2] == ["sft.py", "--train"]
    for split in ("train", "valid"):
        assert read_rows(folder / "sft" / f"{split}.jsonl", [("prompt", "completion")])
    call(module.main, "--resume", folder)
    assert len(started) == 1  # it was finished
    (folder / "training" / "summary.json").unlink()
    call(module.main, "--resume", folder)
    assert started[1] == ["sft.py", "--resume", str(folder / "training")]


@pytest.mark.parametrize("policy", ["linucb", "breadth", "uniform"])
def test_every_policy_makes_data(tmp_path, teacher, instructions, policy):
    call(
        module.main,
        *words_of(teacher, instructions, tmp_path / "run"),
        "--policy",
        policy,
        "--answers",
        0,
        "--answer",
        "",
    )
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["rows"] > 0 and (policy != "breadth" or summary["breadth"] == 1)
    assert ("evenly_from_these_logs" in summary) == (policy != "breadth")
    assert (tmp_path / "run" / "policy_training").exists() == (policy == "linucb")
    # What chose was the frozen policy: without the bonus that explores.
    frozen = load_policy(tmp_path / "run" / "policy")
    frozen.freeze()
    choices = [row for row in rows_of(tmp_path / "run" / "tree.jsonl") if row["parent"]]
    expected = frozen.probabilities(features([Situation(**row["situation"]) for row in choices]))
    assert np.array([list(row["propensities"].values()) for row in choices]) == pytest.approx(expected)
    # A trained policy serves another run as it is.
    calls = teacher.calls
    call(module.main, *words_of(teacher, instructions, tmp_path / "next"), "--policy-path", tmp_path / "run" / "policy",
         "--answers", 0, "--answer", "")  # fmt: skip
    assert not (tmp_path / "next" / "policy_training").exists() and teacher.calls > calls


def test_a_dry_run_sends_nothing_and_bounds_what_a_run_costs(tmp_path, teacher, instructions, capsys):
    words = words_of(teacher, instructions, tmp_path / "run")
    call(module.main, *words, "--dry-run")
    assert teacher.calls == 0 and not (tmp_path / "run").exists()
    lines = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    call(module.main, *words)
    ledger = read_json(tmp_path / "run" / "ledger.json")
    assert ledger.keys() == {name for name in lines if name in ledger}
    for name, spent in ledger.items():
        calls, asked, told = (float(figure.replace(",", "")) for figure in lines[name][:3])
        assert spent["calls"] <= calls and spent["prompt_tokens"] <= asked and spent["completion_tokens"] <= told
    assert ledger["evolve: rewrite"]["calls"] * 2 <= float(lines["evolve: rewrite"][0]) == 2 * 5 * 2


def test_without_flags_it_runs_off_line_with_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = with_words(lambda: parse_evolve_args(None))
    assert args.answers == OFFLINE_ANSWERS and args.answer == "number"
    assert with_words(lambda: parse_evolve_args(None), "--instructions", "x.txt").answers == 0
    words = ["--iterations", 0, "--count", 3, "--rounds", 1, "--offline-teacher=--error-rate 0"]
    call(module.main, *words, "--output-dir", "run")
    assert rows_of(tmp_path / "run" / "dataset.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher-url", "http://127.0.0.1:1/v1", "--teacher-model", "m"], "no instructions"),
        (["--instructions", "names.txt"], "offline teacher knows sums"), (["--floor", 0.5], "--floor"),
        (["--answers", 1, "--answer", "number"], "--answers"), (["--rounds", 0], "--rounds"),
        (["--reviewer-url", "http://127.0.0.1:1/v1"], "--reviewer-model"), (["--held-out", 1], "--held-out"),
        (["--policy-path", "nowhere"], "does not exist"), (["--resume", "nowhere"], "holds no run"),
        (["--group", 1], "--group"), (["--answer", "nonsense"], "nonsense"), (["--near-duplicates", 0], "threshold"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_made(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("Name a river.\n")
    assert message in fails(capsys, module.main, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["names.txt"]


def test_answer_types_with_options_are_read():
    """As synth.run and a task file have them."""
    words = ["--answers", 2, "--answer", "{type: choice, choices: [A, B]}"]
    answer = evolve_settings(with_words(lambda: parse_evolve_args(None), *words)).difficulty.answer
    assert answer is not None and answer.name == "choice"
    assert answer.extract("B") == "B" and answer.extract("C") is None


def test_where_nothing_is_left_it_says_so(tmp_path, instructions, capsys):
    with OfflineTeacher(refusal_rate=1) as server:
        words = [*words_of(server, instructions, tmp_path / "run"), "--policy", "breadth"]
        assert "no row is left" in fails(capsys, module.main, *words)
    reasons = Counter(row.get("dropped") for row in rows_of(tmp_path / "run" / "tree.jsonl"))
    assert reasons == {None: 5, "no instruction: refusal": 10}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Sorry, I have no answer.", "apology"), ("I'm sorry, but I can't help with that.", "apology"),
        ("I am sorry. " + "The river is long. " * 20, ""), ("It is what it is.", "response of stop words"),
        ("?", "response of stop words"), ("4", ""), ("Ja.", ""),
    ],
)  # fmt: skip
def test_response_filters(text, fault):
    assert response_fault(text) == fault


def test_responses_are_asked_by_the_instruction_alone_and_never_inherited():
    row = {"id": "a", "input": "Name a river.", "output": "the parent's"}
    teacher = ScriptedTeacher(
        lambda ask: said(" The Elbe. ") if "river" in ask.messages[0]["content"] else said("", "empty")
    )
    found = asyncio.run(respond([row, {**row, "input": "Name a hill."}], teacher, Asking(0.5, 99)))
    assert [ask.messages for ask in teacher.asked] == [prompts.respond(row["input"]), prompts.respond("Name a hill.")]
    assert found[0]["output"] == "The Elbe." and found[1]["dropped"] == "no response: empty" and not found[1]["output"]
    assert {(ask.temperature, ask.max_tokens, ask.stage) for ask in teacher.asked} == {(0.5, 99, "respond")}


def test_data_rows_and_their_split(tmp_path):
    rows = [{"id": f"{n}", "root": f"i{n // 2}", "input": f"Q{n}", "output": f"A{n}"} for n in range(20)]
    assert data_row(rows[0], "alpaca") == {"instruction": "Q0", "input": "", "output": "A0"}
    assert data_row(rows[0], "prompt") == {"prompt": "Q0", "completion": " A0"}
    assert data_row({"input": "Q\n", "output": "A"}, "prompt")["completion"] == "A"
    for form in ("messages", "alpaca", "prompt"):
        write_data(rows, form, tmp_path / form, 0.3, 0)
        assert rows_of(tmp_path / form / "dataset.jsonl") == [data_row(row, form) for row in rows]
        train, valid = (rows_of(tmp_path / form / "sft" / f"{split}.jsonl") for split in ("train", "valid"))
        assert len(train) == 14 and len(valid) == 6 and not any(row in train for row in valid)
        assert train[0].keys() == ({"messages"} if form == "messages" else {"prompt", "completion"})
    numbers = {int(row["prompt"][1:]) // 2 for row in valid}
    assert len(numbers) == 3  # both of an initial instruction's rows stand on one side
    write_data(rows[:2], "prompt", tmp_path / "one", 0.1, 0)
    assert rows_of(tmp_path / "one" / "sft" / "valid.jsonl")


def test_every_action_is_in_the_summary(tmp_path):
    summary = {
        "rows": 4,
        "expert_calls": 10,
        "kept_share": 0.5,
        "reward_of_a_chain": "1",
        **dict.fromkeys(ACTIONS, 0.1),
    }
    text = module.summary_text(summary, tmp_path)
    assert "expert calls per row: 2.50" in text and all(f"{name} 0.10" in text for name in ACTIONS)


def test_the_verdict_pairs_initial_instructions_and_counts_rewritings():
    """Two roots: the policy earns 3 and 1 of two choices each, one of them a stop; the control 1 and 1."""

    def choice(root, reward, operator="breadth", **more):
        return {"root": root, "reward": reward, "operator": operator, **more}

    own = [choice("i1", 2.0), choice("i1", 1.0), choice("i2", 1.0), choice("i2", 0.0, "stop", dropped="stopped")]
    even = [choice("i1", 1.0), choice("i1", 0.0, dropped="length"), choice("i2", 1.0)]
    found = verdict(own, even)
    assert found[:3] == ((3, 2), (3, 3), (4.0, 2.0)) and found.gain.mean == 1.0 and found.gain.low == 0.0
    assert found.lines()[0] == "rewritings kept: 3 of 3 by the policy, 2 of 3 by choosing evenly"
    for gain, words in (((1, 0.5, 2), "was better than choosing evenly (reward"), ((0, -1, 1), "not shown to differ"),
                        ((-1, -2, -0.1), "worse than choosing evenly; use --policy uniform")):  # fmt: skip
        assert words in found._replace(gain=intervals.Interval(*gain)).lines()[1]


def test_a_learned_policy_is_compared_with_even_choice_where_all_is_offline(tmp_path, teacher, instructions, capsys):
    assert with_words(lambda: parse_evolve_args(None)).control
    for words in (["--teacher-url", "u"], ["--reviewer-url", "u"], ["--no-control"]):
        assert not with_words(lambda words=words: parse_evolve_args(None), *words).control
    folder = tmp_path / "run"
    call(module.main, *words_of(teacher, instructions, folder), "--control")
    control = [row for row in rows_of(folder / "control.jsonl") if row["parent"]]
    assert len(control) == 10 and not any(row["operator"] == "stop" for row in control)
    own = [row for row in rows_of(folder / "tree.jsonl") if row["parent"]]
    assert len(rows_of(folder / "responses.jsonl")) == len(kept(own))  # the control's are not part of the data
    found = read_json(folder / "summary.json")["control"]
    assert found["kept"] == [len(kept(own)), len(kept(control))] and found["calls"][1] == 10
    out = capsys.readouterr().out
    assert "verdict: the policy was " in out and "judged from these logs" not in out
    call(module.main, *words_of(teacher, instructions, tmp_path / "even"), "--control", "--policy", "uniform")
    assert not (tmp_path / "even" / "control.jsonl").exists()
