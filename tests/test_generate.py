"""Generation: what is asked, from which passage, and why an answer becomes no sample. And the rows of all stages."""

import asyncio
import json
import sys
from collections import Counter
from dataclasses import replace

import pytest

from common.errors import UserError
from rewards.answers import answer_type
from synth.pipeline import generate as module
from synth.pipeline.generate import find_passages, generate, open_library, passage_texts, read_output, source_rows
from synth.prompts import Keywords, Pattern
from synth.stages import drop, kept, load_rows, new_row, stage, summary, write_rows
from synth.task import Task, load_task
from tests.faulty_server import FaultyServer, completion
from tests.scripted_teacher import ScriptedTeacher, said, sample, section, stage_of
from tests.scripts import fails

NUMBER = answer_type("number")
DEMOS = [{"input": "3 + 4 =", "output": "7"}]
TASK = Task("sums", "Add the two whole numbers.", answer=NUMBER, demos=DEMOS)
BARRELS = ["Gruva makes barrels of oak and sells them abroad.", "A long winter froze every barrels cart on the road."]


def script(ask):
    if stage_of(ask) == "keywords":
        return said("{}", parsed=Keywords(keywords=["barrels"]))
    if stage_of(ask) == "pattern":
        return said("{}", parsed=Pattern(summary="two numbers and a sign"))
    return sample(f"{ask.sample} + 1 =", str(ask.sample + 1))


def made(task, count, script=script, index=None):
    teacher = ScriptedTeacher(script)
    return asyncio.run(generate(task, teacher, count, index)), teacher


def test_samples_are_asked_for_apart_with_the_pattern_and_without_a_library():
    rows, teacher = made(TASK, 3)
    assert [stage_of(ask) for ask in teacher.asked] == ["pattern"] + ["new_sample"] * 3
    assert [ask.stage for ask in teacher.asked] == ["pattern"] + ["generate"] * 3
    assert [ask.sample for ask in teacher.asked[1:]] == [1, 2, 3]
    assert {section(ask, "pattern") for ask in teacher.asked[1:]} == {"two numbers and a sign"}
    assert rows[1] == new_row("g2", "2 + 1 =", "3", "generated")
    assert rows[1]["passage"] is None and section(teacher.asked[1], "passage") is None


def test_without_demos_there_is_no_pattern_and_a_refused_one_is_done_without(capsys):
    _, teacher = made(Task("sums", "Add.", answer=NUMBER), 1)
    assert [stage_of(ask) for ask in teacher.asked] == ["new_sample"]
    rows, teacher = made(TASK, 1, lambda ask: said("", "refusal") if stage_of(ask) == "pattern" else script(ask))
    assert section(teacher.asked[1], "pattern") is None and len(kept(rows)) == 1
    assert "pattern: none (it was refusal)" in capsys.readouterr().out


def library(folder, texts=BARRELS):
    path = folder / "library.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return open_library(TASK, folder / "run", [path])


def test_each_sample_remembers_its_passage_and_passages_come_in_turn(tmp_path):
    index = library(tmp_path)
    rows, teacher = made(TASK, 5, index=index)
    texts = passage_texts(rows, index)
    assert set(texts.values()) == set(BARRELS) and set(texts) == {"library.jsonl#0", "library.jsonl#1"}
    asked = [section(ask, "passage") for ask in teacher.asked if stage_of(ask) == "new_sample"]
    assert asked == [texts[row["passage"]] for row in rows]
    assert [row["passage"] for row in rows] == [rows[0]["passage"], rows[1]["passage"]] * 2 + [rows[0]["passage"]]
    assert rows[0]["passage"] != rows[1]["passage"]


@pytest.mark.parametrize("reply", [said("", "refusal"), said("{}", parsed=Keywords(keywords=["zebra"]))])
def test_the_instruction_is_searched_for_where_no_keyword_serves(tmp_path, capsys, reply):
    index = library(tmp_path, ["To add numbers, begin at the right.", "Nothing to see here."])
    keywords, passages = asyncio.run(find_passages(TASK, ScriptedTeacher(lambda ask: reply), index, 5))
    assert keywords == [TASK.instruction] and [passage.id for passage in passages] == ["library.jsonl#0"]
    assert "keywords: not usable" in capsys.readouterr().out


def test_a_library_without_any_word_of_the_task_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no passage of the library.*--no-library"):
        made(TASK, 1, index=library(tmp_path, ["Zebra."]), script=lambda ask: said("", "empty"))


def test_a_task_without_a_library_has_no_index(tmp_path):
    assert open_library(TASK, tmp_path) is None
    assert passage_texts([new_row("g1", "1", "1", "generated", passage="a#1")], None) == {}


def test_what_is_no_sample_or_cannot_be_read_is_dropped_with_its_reason():
    replies = [sample("1 + 1 =", "The sum is 2."), sample("1 + 2 =", "three"), said("I'm sorry", "refusal"),
               said("{", "truncated"), said("", "failed"), sample("0 + 0 =", "0")]  # fmt: skip
    rows, _ = made(Task("sums", "Add.", answer=NUMBER), 6, lambda ask: replies[ask.sample - 1])
    assert [row.get("dropped") for row in rows] == [
        None, "unreadable output", "no sample: refusal", "no sample: truncated", "no sample: failed", None
    ]  # fmt: skip
    assert [row["output"] for row in kept(rows)] == ["2", "0"]
    assert rows[1]["detail"] == "three" and rows[2]["detail"] == "it was refusal"
    assert [row["id"] for row in rows] == ["g1", "g2", "g3", "g4", "g5", "g6"]


def test_the_output_of_a_task_with_a_reward_is_kept_as_it_is():
    task = replace(load_task("synth/tasks/digits.yaml"), demos=[])
    rows, _ = made(task, 1, lambda ask: sample("8", "10 12 whatever"))
    assert rows[0]["output"] == "10 12 whatever" and "dropped" not in rows[0]


def test_a_bare_answer_is_read_even_where_the_reader_looks_for_more():
    marked = answer_type("regex", pattern=r"so (\d+)")
    assert (read_output(marked, "so 3, so 5"), read_output(marked, " 19 "), read_output(marked, " ")) == (
        "5",
        "19",
        None,
    )
    assert read_output(answer_type("choice"), "C. foo") == "C"


def test_a_source_of_the_task_itself_takes_the_place_of_the_teacher():
    task = Task(
        "own", "Solve.", answer=NUMBER, source=lambda count, seed: [{"input": f"{seed}", "output": "1"}] * count
    )
    assert source_rows(task, 2, 7)[1] == new_row("g2", "7", "1", "generated")


def test_the_command_writes_rows_and_a_second_run_asks_nothing(tmp_path, monkeypatch, capsys):
    def answer(body):
        text = '{"summary": "sums"}' if "in common" in body["messages"][0]["content"] else None
        number = len(server.bodies)
        return completion(text or json.dumps({"input": f"{number} + 1 =", "output": f"{number + 1}", "waves": 3}))

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FaultyServer(lambda body, seen: answer(body)) as server:
        command = ["generate", "--task", "synth/tasks/arithmetic.yaml", "--count", "3", "--teacher-url", server.url]
        command += ["--teacher-model", "m", "--cache", str(tmp_path / "cache"), "--no-library"]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "one.jsonl")])
        module.main()
        calls = server.calls
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "two.jsonl")])
        module.main()
        assert (calls, server.calls) == (5, 5)  # the probe, the pattern and the samples
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert len(kept(load_rows(tmp_path / "one.jsonl"))) == 3
    assert "generate: kept 3 of 3" in capsys.readouterr().out


def test_a_command_of_which_every_request_fails_ends_so(tmp_path, monkeypatch, capsys):
    """A rejected request is not sent again in the same form: with a schema, once with it and once without."""
    with FaultyServer(lambda body, seen: "400") as server:
        words = ["--task", "synth/tasks/arithmetic.yaml", "--count", 2, "--teacher-url", server.url, "--teacher-model"]
        words += ["m", "--cache", tmp_path / "cache", "--no-library", "--out", tmp_path / "out.jsonl"]
        line = fails(capsys, module.main, *words)
        asked = Counter(json.dumps(body, sort_keys=True) for body in server.bodies)
    assert line.startswith("no sample came of 2 requests (HTTP 400: context too long)")
    assert [row["dropped"] for row in load_rows(tmp_path / "out.jsonl")] == ["no sample: failed"] * 2
    assert max(asked.values()) <= 2  # two samples of one prompt are two requests


def test_a_command_without_a_teacher_says_so(tmp_path, monkeypatch):
    command = ["generate", "--task", "synth/tasks/arithmetic.yaml", "--out", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match="no teacher is named"):
        module.main()


def test_a_stage_that_was_finished_is_read_and_not_made_again(tmp_path, capsys):
    rows = [new_row("g1", "ü", "1", "generated"), drop(new_row("g2", "b", "2", "generated"), "tie", "2 of 4")]

    async def make():
        return rows

    async def never():
        raise AssertionError

    first = asyncio.run(stage(tmp_path, "verify", make))
    assert first == asyncio.run(stage(tmp_path, "verify", never)) == load_rows(tmp_path / "verify.jsonl") == rows
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "verify: kept 1 of 2; dropped: 1 tie" and lines[1].startswith(lines[0] + " (finished before:")


def test_a_stage_without_rows_is_finished_too(tmp_path):
    async def nothing():
        return []

    async def never():
        raise AssertionError

    assert asyncio.run(stage(tmp_path, "select", nothing)) == asyncio.run(stage(tmp_path, "select", never)) == []


def test_a_stage_that_fails_leaves_no_file(tmp_path):
    async def fail():
        raise UserError("no")

    with pytest.raises(UserError):
        asyncio.run(stage(tmp_path, "verify", fail))
    assert list(tmp_path.iterdir()) == []


def test_a_rows_file_of_ones_own_needs_three_keys(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"id": "a", "input": "1", "output": "2"}\n')
    assert load_rows(path) == [new_row("a", "1", "2", "generated")]
    path.write_text('{"id": "a", "input": "1"}\n')
    with pytest.raises(UserError, match=r"own\.jsonl:1"):
        load_rows(path)


def test_a_summary_names_the_most_frequent_reason_first(tmp_path):
    rows = [drop(new_row(f"g{n}", "", "", "generated"), "tie" if n else "outvoted") for n in range(3)]
    assert summary("verify", rows) == "verify: kept 0 of 3; dropped: 2 tie, 1 outvoted"
    write_rows(tmp_path / "a.jsonl", rows)
    assert kept(load_rows(tmp_path / "a.jsonl")) == []
