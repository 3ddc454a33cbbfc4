"""The reward by known answers: by itself, by its flag, and within PPO."""

import json
from argparse import Namespace
from typing import Any

import pytest

import ppo_training
from common.errors import UserError
from data.prompts import read_answers
from data.tokenizer import open_tokenizer
from rewards.answer_reward import AnswerReward, answer_from_flag
from rewards.answers import answer_type
from rewards.build import build_reward
from synth.task import load_task, task_from_flags
from tests.scripts import call, fails
from training import ppo_flags, ppo_learner
from training.metrics import read_metrics

NO_MODEL: Any = Namespace(tokenizer=None)  # none of these rewards needs one


@pytest.fixture
def rows(tmp_path):
    def write(*pairs):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in pairs))
        return path

    return write


def test_each_completion_is_held_to_its_own_prompts_answer():
    reward = AnswerReward(answer_type("number"), {"2 + 2 =": "4", "2 + 3 =": "5"}).reward
    assert reward(["2 + 3 =", "2 + 2 =", "2 + 2 ="], [" 5", " 5", " 4.0"]) == [1.0, 0.0, 1.0]
    # Only the completion is read, not the numbers in the prompt.
    assert reward(["2 + 2 ="], [""]) == [0.0]


def test_an_answer_that_is_none_is_refused():
    with pytest.raises(UserError, match="'many' of the prompt 'p' is not a valid number answer"):
        AnswerReward(answer_type("number"), {"p": "many"})


@pytest.mark.parametrize("spec", ["number", "{type: number}", '{"type": "number"}'])
def test_the_flag_is_a_name_or_what_a_task_file_has(spec):
    assert answer_from_flag(spec) == answer_type("number")
    assert answer_from_flag("{type: label, labels: [a, b]}") == answer_type("label", labels=["a", "b"])


@pytest.mark.parametrize("spec", ["[1]", "{labels: [a]}", "{type: 3}", "{", "numbr"])
def test_a_flag_that_is_neither_is_refused(spec):
    with pytest.raises(UserError, match=r"--answer|unknown"):
        answer_from_flag(spec)


def test_a_prompt_with_two_answers_is_refused(rows):
    assert read_answers(rows(("a", "1"), ("b", "2"), ("a", "1"))) == {"a": "1", "b": "2"}
    with pytest.raises(UserError, match="two answers for the prompt 'a'"):
        read_answers(rows(("a", "1"), ("a", "2")))


@pytest.mark.parametrize("name", ["arithmetic", "mednli", "math", "gpqa", "digits"])
def test_a_tasks_flags_score_as_the_task_does(name, rows):
    """The flags that synth.run passes to ppo_training.py give the task's own score."""
    task = load_task(f"synth/tasks/{name}.yaml")
    truth = {"arithmetic": "4", "mednli": "neutral", "math": "\\frac{1}{4}", "gpqa": "B", "digits": "x"}[name]
    prompt = task.prompt("8")
    words = [*task.scoring_flags, "--prompts", str(rows((prompt, truth)))]
    args = ppo_flags.ppo_parser("").parse_args(words)
    ppo_flags.check_reward(args)
    completions = [" 4", "<answer>neutral</answer>", "so \\boxed{0.25}", "B.", " 10 12 14 16", " 9", ""]
    scores = build_reward(args, NO_MODEL)([prompt] * len(completions), completions)
    assert scores == [task.score("8", completion, truth) for completion in completions] and 1.0 in scores


def test_a_custom_readers_flags_hold_wherever_they_are_used(tmp_path, monkeypatch, rows):
    (tmp_path / "read.py").write_text("def last(completion):\n    return completion.split()[-1]\n")
    (tmp_path / "task.yaml").write_text("instruction: Do.\nanswer: {type: custom, reader: 'read.py:last'}\n")
    path = rows(("p", "word"))
    flags = load_task(tmp_path / "task.yaml").scoring_flags
    monkeypatch.chdir("/")
    args = ppo_flags.ppo_parser("").parse_args([*flags, "--prompts", str(path)])
    assert flags[0] == "--answer" and build_reward(args, NO_MODEL)(["p"], ["the last word"]) == [1.0]
    assert task_from_flags("other", "Do.").scoring_flags == ("--answer", "exact")


@pytest.mark.parametrize("form", ["text", "messages"])
def test_ppo_learns_from_rows_with_answers(tmp_path, tiny_folder, rows, monkeypatch, capsys, form):
    monkeypatch.setattr(ppo_training, "plot_run", lambda folder: folder / "curves.png")
    seen = []

    def score(self, completion, truth):
        seen.append(truth)
        return 0.5

    monkeypatch.setattr(type(answer_type("number")), "score", score)
    words = ["--model", tiny_folder, "--answer", "number", "--batch-size", 4, "--mini-batch-size", 4]
    words += ["--num-steps", 2, "--max-completion-length", 2, "--advantage", "group", "--num-generations", 2]
    words += ["--save-every", 1, "--save-file", tmp_path / "adapter", "--output-dir", tmp_path / "run"]
    assert "--prompts FILE.jsonl" in fails(capsys, ppo_training.main, *words)
    asked = ["2 + 2 =", "3 + 3 ="]
    written = asked if form == "text" else [[{"role": "user", "content": text}] for text in asked]
    path = rows(*zip(written, ("4", "6"), strict=True))
    given: list[list[int]] = []
    sample = ppo_learner.sample

    def watched(model, prompt_ids, *more, **keys):
        given.extend(prompt_ids)
        return sample(model, prompt_ids, *more, **keys)

    monkeypatch.setattr(ppo_learner, "sample", watched)
    call(ppo_training.main, *words, "--prompts", path, "--keep-checkpoints", 0)
    # Both forms give the same tokens: one BOS, and the question.
    ids = map(open_tokenizer(str(tiny_folder)).encode, asked)
    assert {tuple(prompt) for prompt in given} == set(map(tuple, ids)) and len(given) == 8
    assert sorted(seen) == ["4"] * 4 + ["6"] * 6  # two of the first before the run, to try the reward
    assert [row["mean_score"] for row in read_metrics(tmp_path / "run")] == [0.5, 0.5]
    # All checkpoints are kept where that is asked for, two otherwise.
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["000000", "000001", "000002"]
