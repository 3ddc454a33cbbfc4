"""Reading `.jsonl`: every valid form of row, and the place of the first invalid one."""

import json

import numpy as np
import pytest

from common.errors import UserError
from data.batching import draw_pairs
from data.records import read_rows
from data.sources import find_split

TEXT = [("text",)]
SCORED = [("text", "reward"), ("chosen", "rejected")]


@pytest.fixture
def write(tmp_path):
    """Write bytes or text as a `.jsonl` file, without changing line ends."""

    def write_file(content, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write_file


def error_of(path, required):
    with pytest.raises(UserError) as caught:
        read_rows(path, required)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_rows_are_read_in_order_with_all_their_keys(write):
    path = write('{"text": "2 4", "source": "a"}\n{"text": ""}\n')
    assert read_rows(path, TEXT) == [{"text": "2 4", "source": "a"}, {"text": ""}]


def test_any_alternative_serves_row_by_row(write):
    path = write('{"prompt": "2", "completion": " 4"}\n{"text": "2 4"}\n')
    rows = read_rows(path, [("text",), ("prompt", "completion")])
    assert [sorted(row) for row in rows] == [["completion", "prompt"], ["text"]]


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        b'\n{"text": "a"}\n\n   \n{"text": "b"}',
        b'  {"text": "a"}\n\t{"text": "b"}  \n\n',
    ],
    ids=["BOM", "CRLF", "blank lines", "indented"],
)
def test_what_editors_add_is_no_fault(write, content):
    assert read_rows(write(content), TEXT) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_row(write, separator):
    # JSON allows these unescaped in strings, and `str.splitlines` splits at each.
    row = {"text": f"one{separator}two"}
    content = json.dumps(row, ensure_ascii=False)
    assert separator in content
    assert read_rows(write(content + "\n" + content), TEXT) == [row, row]


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ('{"text": "a"', "not valid JSON"),
        ("text: a", "not valid JSON"),
        ('{"text": "a"} {"text": "b"}', "not valid JSON"),
        ('["a"]', "is list, not an object"),
        ("null", "is NoneType, not an object"),
        ('"a"', "is str, not an object"),
        ('{"txt": "a"}', "has the keys ['txt']"),
        ("{}", "has the keys []"),
        ('{"text": 5}', "'text' of type int"),
        ('{"text": null}', "'text' of type NoneType"),
        ('{"text": ["a"]}', "'text' of type list"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(write, line, fact):
    # Blank lines count, as in an editor.
    path = write('{"text": "good"}\n\n' + line + '\n{"text": "good"}\n')
    message = error_of(path, TEXT)
    assert f"{path}:3 " in message and fact in message


def test_every_alternative_is_offered_for_a_row_that_fits_none(write):
    message = error_of(write('{"prompt": "2"}'), [("text",), ("prompt", "completion")])
    assert '{"text": "..."}' in message and '{"prompt": "...", "completion": "..."}' in message


@pytest.mark.parametrize(
    ("written", "number"),
    [("1", 1.0), ("1.0", 1.0), ('"1.0"', 1.0), ('" 0.25 "', 0.25), ("-3", -3.0), ('"1e-2"', 0.01), ("0", 0.0)],
)
def test_a_reward_is_a_number_however_it_is_written(write, written, number):
    (row,) = read_rows(write(f'{{"text": "a", "reward": {written}}}'), SCORED)
    assert row["reward"] == number and type(row["reward"]) is float


@pytest.mark.parametrize(
    "written",
    ["true", "false", "null", "NaN", "Infinity", "-Infinity", "1e999", '"NaN"', '"inf"', '"good"', '""', "[1]", "{}"],
)
def test_a_reward_that_is_no_finite_number_is_refused(write, written):
    path = write(f'{{"text": "a", "reward": 1}}\n{{"text": "b", "reward": {written}}}')
    message = error_of(path, SCORED)
    assert f"{path}:2 has the reward" in message and "finite number" in message


def test_an_integer_beyond_all_floats_is_refused_too(write):
    assert "finite number" in error_of(write('{"text": "a", "reward": 1' + "0" * 400 + "}"), SCORED)


def test_rewards_are_compared_as_numbers(write):
    """As strings, "10" would be below "9"."""
    path = write('{"text": "nine", "reward": "9"}\n{"text": "ten", "reward": "10"}\n{"text": "one", "reward": 1}')
    rewards = [row["reward"] for row in read_rows(path, SCORED)]
    assert rewards == [9.0, 10.0, 1.0]
    pairs = {pair for seed in range(20) for pair in draw_pairs(rewards, np.random.default_rng(seed))}
    assert pairs == {(1, 0), (1, 2), (0, 2)}


def test_equal_numbers_written_unlike_are_a_tie(write):
    path = write('{"text": "a", "reward": "1.0"}\n{"text": "b", "reward": 1}\n{"text": "c", "reward": 1.0}')
    with pytest.raises(UserError, match="all 3 rewards are equal"):
        draw_pairs([row["reward"] for row in read_rows(path, SCORED)], np.random.default_rng(0))


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_a_file_without_rows_is_refused(write, content):
    assert "holds no rows" in error_of(write(content), TEXT)


def test_a_file_that_cannot_be_read_is_named(write, tmp_path):
    assert "cannot be read (No such file" in error_of(tmp_path / "missing.jsonl", TEXT)
    assert "cannot be read (Is a directory" in error_of(tmp_path, TEXT)
    assert "is not UTF-8 (byte 10)" in error_of(write(b'{"text": "\xff"}'), TEXT)


def test_the_file_of_a_split_is_found_or_the_bases_that_are_there_are_listed(write, tmp_path):
    path = write("", "increasing_mult_2_train.jsonl")
    write("", "mine_train.jsonl")
    assert find_split(tmp_path, "increasing_mult_2_", "train") == path
    with pytest.raises(UserError, match="'increasing_mult_2_', 'mine_'"):
        find_split(tmp_path, "decreasing_", "train")
    with pytest.raises(UserError, match="nor for any other base"):
        find_split(tmp_path, "increasing_mult_2_", "valid")
    with pytest.raises(UserError, match="is not a folder"):
        find_split(tmp_path / "missing", "a_", "train")
