"""docs/tasks.md against the code: its keys, answer types and offline tasks, and its worked task, run as printed.

The teacher of the worked task is a local server that sorts messages by their words, in place of mlx_lm.server; the base
model is an untrained one.
"""

import json
import re
import shlex

import pytest

from common.errors import UserError
from common.files import read_json
from common.yaml_files import parse_yaml
from rewards.answers import _BUILDERS, answer_type
from synth import run as module
from synth.examples import read_examples
from synth.offline.reviews import WORDS
from synth.offline.server import TASKS
from synth.pipeline import generate
from synth.prompts import MOST_DEMOS, STAGES
from synth.stages import kept, load_rows
from synth.task import KNOWN_KEYS, SHIPPED, load_task
from tests.faulty_server import FaultyServer, completion
from tests.scripts import ROOT, call
from tests.test_run import in_this_process

PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
URL = "http://127.0.0.1:8080/v1"
SENTENCES = {
    "billing": "Charge {} on my card is wrong.", "delivery": "Parcel {} is late.",
    "returns": "I want to send article {} back.", "technical": "Page {} does not open.",
}  # fmt: skip
KNOWN_BY = {"billing": "card", "delivery": "Parcel", "returns": "send", "technical": "open"}


def printed(name):
    """The text of the file that the page prints after `name`."""
    _, rest = PAGE.split(f"`{name}`,", 1)
    block = re.search(r"((?:^ {4}.*\n)+)", rest, flags=re.MULTILINE)
    assert block is not None
    return re.sub(r"^ {4}", "", block[1], flags=re.MULTILINE)


def table(heading):
    """The rows of the first table below a heading, as lists of cells."""
    _, rest = PAGE.split(f"## {heading}\n", 1)
    rows = [line.strip("|").split(" | ") for line in rest.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def code(cell):
    found = re.match(r"`(.+?)`$", cell)
    assert found is not None, cell
    return found[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with everything that the page's examples name."""
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"input": "2 + 2 =", "output": "4"}) + "\n"
    for name in ("test.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text(row)
    (tmp_path / "my_reward.py").write_text("def score(prompts, completions):\n    return [0.0] * len(prompts)\n")
    (tmp_path / "my_rows.py").write_text("def made(rows):\n    return rows\n")
    (tmp_path / "my_answer.py").write_text("def read(text):\n    return text\n\n\ndef same(a, b):\n    return a == b\n")
    (tmp_path / "handbook").mkdir()
    (tmp_path / "notes.md").write_text("# Notes")
    for name in ("support.yaml", "support_test.jsonl"):
        (tmp_path / name).write_text(printed(name))
    return tmp_path


def test_every_key_is_on_the_page_and_every_example_is_read(folder):
    keys = [code(row[0]) for row in table("Every key")]
    assert sorted(keys) == sorted(KNOWN_KEYS)
    needed = {"instruction": "instruction: Add.\n", "answer": "answer: {type: number}\n"}
    for key, example, said in table("Every key"):
        key, example = code(key), code(example)
        assert list(parse_yaml(example, key)) == [key]
        rest = [line for name, line in needed.items() if name not in (key, {"reward": "answer"}.get(key))]
        path = folder / "mine.yaml"
        path.write_text("".join(rest) + example + "\n")
        assert load_task(path).instruction and said
    assert load_task(folder / "support.yaml").near_duplicates == 0.7 and MOST_DEMOS == 8


def test_every_answer_type_is_on_the_page_with_all_its_options(folder):
    shown = [parse_yaml(code(row[0]), "the page") for row in table("Answer types")]
    assert [options["type"] for options in shown] == list(dict.fromkeys(options["type"] for options in shown))
    assert {options["type"]: set(options) - {"type"} for options in shown} == {
        name: set(known) for name, (_, known, _) in _BUILDERS.items()
    }
    for options in shown:
        answer_type(options.pop("type"), **options)


def test_the_traps_are_as_the_page_says(folder):
    (folder / "mine.yaml").write_text("instruction: Do.\nanswer: {type: label, labels: [yes, no]}\n")
    with pytest.raises(UserError, match="quote it"):
        load_task(folder / "mine.yaml")
    with pytest.raises(UserError, match="quote it"):
        read_examples([{"input": "a", "output": True}], "demos")


def test_what_the_offline_teacher_knows_is_on_the_page():
    assert tuple(code(row[0]) for row in table("What the offline teacher knows")) == TASKS
    assert sum(map(len, WORDS.values())) == 60 and len(list(SHIPPED.glob("*.yaml"))) == 12


def sorts_messages(body, seen):
    """A teacher of the worked task: a message of some label for every new sample, and the label of any message."""
    first, asked = body["messages"][0]["content"], body["messages"][-1]["content"]
    stage = next((name for name, line in STAGES.items() if first.startswith(line)), "")
    number = re.search(r"sample number (\d+)", asked)
    if stage == "new_sample" and number:
        label = list(SENTENCES)[int(number[1]) % len(SENTENCES)]
        made = {"input": SENTENCES[label].format(f"{number[1]} {'abcdefgh'[int(number[1]) % 8]}"), "output": label}
        return completion(json.dumps(made))
    if stage == "answer":
        message = asked.split("<input ")[-1]
        return completion(next(label for label, word in KNOWN_BY.items() if word in message))
    return completion('{"summary": "Messages to a shop.", "waves": 1}')


def test_the_worked_task_from_nothing_to_report(folder, tiny_folder, monkeypatch, capsys):
    """The page's three commands on the page's two files; shortened by flags of ours."""
    commands = re.findall(r"^ {4}python -m (synth\.(?:run|pipeline\.generate) --task support.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    started = in_this_process(monkeypatch)
    short = ["--count", 12, "--votes", 3, "--rounds", 0, "--rollouts", 2, "--max-rollouts", 2, "--rule", "random"]
    short += ["--max-completion-length", 3, "--num-steps", 1, "--batch-size", 4, "--duplicate-threshold", 1]
    with FaultyServer(sorts_messages) as server:
        for command in commands:
            name, *words = shlex.split(command.replace(URL, server.url).replace("MODEL", str(tiny_folder)))
            if name == "synth.pipeline.generate":
                call(generate.main, *words)
                assert len(kept(load_rows(folder / "looked_at.jsonl"))) == 8
            elif "--dry-run" in words:
                for more in ((), ("--count", 100, "--votes", 5, "--rounds", 1)):
                    call(module.main, *words, *more)
                    total = re.search(r"^total +(\S+)", capsys.readouterr().out, re.MULTILINE)
                    assert total and f"at most {total[1]}" in PAGE
                assert server.calls == 0
            else:
                call(module.main, *words, *short, "--training-flags=--num-generations 2")
    run = folder / "runs" / "support"
    assert started and len(kept(load_rows(run / "verify.jsonl"))) == 12
    assert read_json(run / "evaluation.json")["questions"] == 6
    assert (run / "adapter" / "adapters.safetensors").is_file()
    assert "Task: support.yaml." in (run / "report.html").read_text()
