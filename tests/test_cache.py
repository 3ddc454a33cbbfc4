"""The cache: what was put is there for every later process, and a file that cannot serve is one line."""

import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from synth.teacher.cache import Cache, Stored, cache_key

ROOT = Path(__file__).resolve().parent.parent
STORED = Stored("zwölf\n'\"", "ok", "", 3, 4)
PARTS: dict[str, Any] = {
    "endpoint": "http://a/v1",
    "model": "m",
    "messages": [{"role": "user", "content": "q"}],
    "parameters": {"temperature": 1.0, "max_tokens": 8},
    "schema": None,
    "sample": 0,
}
OTHERS: list[dict[str, Any]] = [
    {"endpoint": "http://b/v1"},
    {"model": "n"},
    {"messages": [{"role": "user", "content": "p"}]},
    {"messages": [{"role": "system", "content": "q"}]},
    {"parameters": {"temperature": 0.5, "max_tokens": 8}},
    {"parameters": {"temperature": 1.0, "max_tokens": 9}},
    {"schema": {}},
    {"sample": 1},
]


def test_what_was_put_is_there_for_the_next(tmp_path):
    path = tmp_path / "new" / "cache.sqlite"
    with Cache(path) as cache:
        assert cache.get("k") is None and cache.note("n") is None
        cache.put("k", STORED)
        cache.set_note("n", "a")
        cache.set_note("n", "b")
    with Cache(path) as cache:
        assert cache.get("k") == STORED and cache.note("n") == "b"
        cache.put("l", STORED._replace(status="refusal"))
        assert cache.counts() == {"ok": 1, "refusal": 1}


def test_the_first_response_under_a_key_stays(tmp_path):
    with Cache(tmp_path / "c") as one, Cache(tmp_path / "c") as two:
        one.put("k", STORED)
        two.put("k", STORED._replace(text="later"))
        assert one.get("k") == two.get("k") == STORED


def test_every_part_of_the_key_counts():
    keys = [cache_key(**{**PARTS, **other}) for other in [{}, *OTHERS]]
    assert len(set(keys)) == len(OTHERS) + 1
    turned = dict(reversed(PARTS["parameters"].items()))
    assert cache_key(**{**PARTS, "parameters": turned}) == keys[0]


def test_a_put_survives_a_kill_at_once(tmp_path):
    code = (
        "import os, signal, sys\nfrom synth.teacher.cache import Cache, Stored\n"
        "cache = Cache(sys.argv[1])\ncache.put('k', Stored('a', 'ok', '', 1, 2))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    with Cache(tmp_path / "c") as cache:
        assert cache.get("k") == Stored("a", "ok", "", 1, 2)


def test_two_may_write_at_once(tmp_path):
    with Cache(tmp_path / "c") as one, Cache(tmp_path / "c") as two:
        for index in range(50):
            (one, two)[index % 2].put(str(index), STORED)
        assert one.counts() == two.counts() == {"ok": 50}


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and "; " in text
    return text


@pytest.mark.parametrize("content", [b"no database, but long enough to be taken for one" * 50, b"{}\n"])
def test_another_file_is_refused_and_left_as_it_was(tmp_path, content):
    path = tmp_path / "c"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Cache(path)
    assert "not a database" in one_line(error)
    assert path.read_bytes() == content


def test_a_damaged_cache_is_one_line(tmp_path):
    path = tmp_path / "c"
    with Cache(path) as cache:
        for index in range(200):
            cache.put(f"{index:03}", STORED._replace(text="x" * 1000))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    with pytest.raises(UserError) as error, Cache(path) as cache:
        [cache.get(f"{index:03}") for index in range(200)]
    assert str(path) in one_line(error)


def test_a_locked_cache_is_one_line(tmp_path):
    with Cache(tmp_path / "c", wait=0.05) as cache:
        other = sqlite3.connect(tmp_path / "c", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert cache.get("k") is None  # readers are not held up
        with pytest.raises(UserError) as error:
            cache.put("k", STORED)
        assert "another process" in one_line(error)
        other.close()


def test_a_folder_or_a_file_on_the_way_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "c"):
        with pytest.raises(UserError) as error:
            Cache(path)
        one_line(error)


@pytest.mark.parametrize("made", ["PRAGMA user_version = 7", "CREATE TABLE responses (name TEXT)"])
def test_another_format_or_program_is_refused_and_left_as_it_was(tmp_path, made):
    path = tmp_path / "c"
    db = sqlite3.connect(path)
    db.execute(made)
    db.close()
    before = path.read_bytes()
    with pytest.raises(UserError, match="not a cache of format"):
        Cache(path)
    assert path.read_bytes() == before


def test_many_may_make_the_file_at_once(tmp_path):
    def make(index):
        with Cache(tmp_path / "c") as cache:
            cache.put(str(index), STORED)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(16)))
    with Cache(tmp_path / "c") as cache:
        assert cache.counts() == {"ok": 16}
