"""demo_real.py on a small random model with a chat template: all stages, what a stop keeps, and what it refuses."""

import json
from collections.abc import Sequence

import pytest

import demo_real
import evaluate
import ppo_training
import sft
from common.cli import Stopped
from common.files import read_json
from data import generate_constraint_data
from data.constraints import Constraints
from tests.scripts import call, fails
from tests.torch_models import random_chat_llama

MAINS = {"data/generate_constraint_data.py": generate_constraint_data.main, "sft.py": sft.main,
         "evaluate.py": evaluate.main, "ppo_training.py": ppo_training.main}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_chat_llama(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture
def started(monkeypatch):
    """The scripts that were started, in this process; one whose name is in `stops` is stopped after it has run."""
    names: list[str] = []
    stops: list[str] = []

    def run_script(words: Sequence[str], go_on: str) -> None:
        names.append(words[0])
        call(MAINS[words[0]], *words[1:])
        if words[0] in stops:
            raise Stopped(f"go on with: {go_on}")

    monkeypatch.setattr(demo_real, "run_script", run_script)
    monkeypatch.setattr(demo_real, "MAX_TOKENS", 6)
    monkeypatch.setattr(Constraints, "score", lambda self, reply: len(reply) % 4 / 3)  # a random reply meets none
    return names, stops


def test_all_stages_a_stop_and_a_second_call(model, started, tmp_path, capsys):
    names, stops = started
    words = ("--short", "--model", model, "--output-dir", tmp_path / "out")
    stops.append("ppo_training.py")
    with pytest.raises(Stopped, match=r"go on with: .*demo_real.py"):
        call(demo_real.main, *words)
    assert names == ["data/generate_constraint_data.py", "sft.py", "ppo_training.py"]
    stops.clear()
    call(demo_real.main, *words)
    assert names[3:] == ["ppo_training.py", "evaluate.py", "sft.py"]
    said = capsys.readouterr().out
    table = [line.split() for line in said[said.rindex("mean score") :].splitlines()[1:5]]
    assert [line[0] for line in table] == ["base", "SFT", "PPO", "DPO"]
    assert said.count("=== SFT (finished before)") == 1 and said.count("\n  base ") == 5

    kept = read_json(tmp_path / "out/demo_real.json")
    assert kept["finished"] == ["data", "SFT", "PPO", "replies of the SFT model", "DPO"]
    results = {name: read_json(tmp_path / f"out/results/{name}.json") for name in ("base", "SFT", "PPO", "DPO")}
    assert abs(results["SFT"]["kl"]) < 1e-4 and results["DPO"]["kl"] != 0 and len(results["PPO"]["scores"]) == 2
    assert all((tmp_path / "out" / name).stat().st_size > 10_000 for name in ("ppo.png", "sft_dpo.png"))
    samples = [json.loads(line) for line in (tmp_path / "out/own/samples.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (tmp_path / "out/data/train.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * len(asked) == 24
    for index, sample in enumerate(samples):
        assert asked[index % 12]["messages"][0]["content"] in sample["prompt"]

    call(demo_real.main, *words)
    assert len(names) == 6 and capsys.readouterr().out.endswith(said[said.rindex("=== 2 replies") :])


def test_refusals(model, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("mine")
    assert "was not created by this demo" in fails(capsys, demo_real.main, "--output-dir", tmp_path)
    (tmp_path / "demo_real.json").write_text('{"flags": {"seed": 1}, "seconds": {}, "finished": []}')
    assert "was begun with {'seed': 1}" in fails(capsys, demo_real.main, "--output-dir", tmp_path)


def sample(reward, completion, tokens=5):
    return {"reward": reward, "completion": completion, "tokens": tokens}


def test_pairs_are_of_different_scores_and_what_is_chosen_has_ended(tmp_path):
    rows = [{"messages": [{"role": role, "content": str(n)} for role in ("user", "assistant")]} for n in range(5)]
    first = [sample(1, "a"), sample(0.5, "b"), sample(1, "c", demo_real.MAX_TOKENS), sample(0, "d"), sample(1, "e")]
    second = [sample(0, "A"), sample(0.5, "B"), sample(0, "C"), sample(0.5, "D"), sample(0, "E", demo_real.MAX_TOKENS)]
    demo_real.write_pairs(tmp_path, rows, first + second)
    pairs = [row for name in ("valid", "train") for row in demo_real.read_rows(tmp_path / f"pairs_{name}.jsonl")]
    assert [(row["messages"][0]["content"], row["chosen"], row["rejected"]) for row in pairs] == [
        ("0", "a", "A"), ("3", "D", "d"), ("4", "e", "E")]  # fmt: skip
    assert [len(row["messages"]) for row in pairs] == [1, 1, 1]
