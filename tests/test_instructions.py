"""Initial instructions: what a user's file may look like, and where it is wrong."""

import json

import pytest

from common.errors import UserError
from synth.evolution.instructions import read_instructions

TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Name a river."},
         {"role": "assistant", "content": "Elbe."}, {"role": "user", "content": "Another."}]  # fmt: skip
SHAREGPT = [{"from": "human", "value": "Name a hill."}, {"from": "gpt", "value": "Brocken."}]


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_plain_lines(tmp_path):
    path = written(tmp_path, "i.txt", "\ufeff Name a river. \n\nname  a RIVER.\n{not json}\n")
    assert read_instructions(path) == ["Name a river.", "{not json}"]


def test_rows_of_every_kind(tmp_path):
    rows = [{"instruction": "Count it."}, {"instruction": "Translate.", "input": " Guten Tag ", "output": "x"},
            {"instruction": "Sum.", "input": "", "output": "x"}, {"messages": TURNS},
            {"conversations": SHAREGPT}]  # fmt: skip
    expected = ["Count it.", "Translate.\n\nGuten Tag", "Sum.", "Name a river.", "Name a hill."]
    assert read_instructions(written(tmp_path, "i.jsonl", lines(*rows))) == expected
    assert read_instructions(written(tmp_path, "i.json", json.dumps(rows))) == expected  # as Alpaca is published


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("i.txt", " \n", "holds no instruction"), ("i.jsonl", '{"instruction": "a b"}\n{', "i.jsonl:2"),
        ("i.jsonl", '{"text": "x"}', "text"), ("i.jsonl", '"Name a river."', "no instruction"),
        ("i.jsonl", '{"messages": []}', "no instruction"), ("i.jsonl", '{"instruction": " "}', "no instruction"),
        ("i.jsonl", '{"instruction": 3}', "no instruction"),
        ("i.jsonl", '{"instruction": "a", "input": [1]}', "no instruction"),
        ("i.jsonl", '{"messages": [{"role": "user", "content": [1]}]}', "no instruction"),
        ("i.json", "{}", "not a list"),
        ("i.json", "[1]", "row 1"), ("i.json", "[", "valid JSON"), ("i.jsonl", "[1]", "not an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_instructions(written(tmp_path, name, content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="check the path"):
        read_instructions(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"Z\xe4hle.\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_instructions(tmp_path / "latin.txt")
