"""Writing files: however a writer is interrupted, either the old or the new content is there, and nothing else."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import common.files
from common.errors import UserError
from common.files import atomic_file, atomic_folder, check_replaceable, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def write_folder(path, **files):
    with atomic_folder(path, "marker.json") as folder:
        (folder / "marker.json").write_text("{}")
        for name, text in files.items():
            (folder / name).write_text(text)


def test_a_file_is_written_in_the_same_folder_under_the_same_suffix(tmp_path):
    path = tmp_path / "new" / "deep" / "a.b.npz"
    with atomic_file(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (path.parent, ".npz")
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names_in(path.parent) == ["a.b.npz"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_writer_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_writer_leaves_the_old_folder_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "adapter"
    write_folder(path, weights="old")

    def write():
        with atomic_folder(path, "marker.json") as folder:
            (folder / "weights").write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert (path / "weights").read_text() == "old"
    assert names_in(tmp_path) == ["adapter"]


def test_a_killed_process_leaves_the_old_file_and_folder(tmp_path):
    (tmp_path / "file").write_text("old")
    write_folder(tmp_path / "folder", weights="old")
    code = (
        "import os, sys; from common.files import *\n"
        "with atomic_file('file') as f, atomic_folder('folder', 'marker.json') as d:\n"
        "    f.write_text('half'); (d / 'weights').write_text('half'); os._exit(9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=60, check=False)
    assert done.returncode == 9
    assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "folder" / "weights").read_text() == "old"
    write_folder(tmp_path / "folder", weights="new")
    assert (tmp_path / "folder" / "weights").read_text() == "new"


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "adapter"
    write_folder(path, weights="old", stray="of the old one")
    write_folder(path, weights="new")
    assert names_in(path) == ["marker.json", "weights"]
    assert (path / "weights").read_text() == "new"
    assert names_in(tmp_path) == ["adapter"]


def test_a_folder_moved_aside_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    write_folder(path, weights="old")
    rename = os.rename

    def second_fails(source, target):
        if Path(target) == path and str(source).endswith(".tmp"):
            raise OSError("disk")
        rename(source, target)

    monkeypatch.setattr(common.files.os, "rename", second_fails)
    with pytest.raises(OSError, match="disk"):
        write_folder(path, weights="new")
    assert (path / "weights").read_text() == "old"
    assert names_in(tmp_path) == ["adapter"]


def test_what_earlier_stops_left_is_removed(tmp_path):
    path = tmp_path / "adapter"
    (tmp_path / ".adapter.old").mkdir()
    stale = tmp_path / f".adapter.{os.getpid()}.tmp"
    stale.mkdir()
    (stale / "stray").write_text("half")
    write_folder(path, weights="new")
    assert names_in(path) == ["marker.json", "weights"]
    assert names_in(tmp_path) == ["adapter"]


def test_a_relative_folder_with_dots_is_written_where_it_points(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_folder("../out/", weights="new")
    assert names_in(tmp_path) == ["out", "work"]


def test_an_empty_or_missing_folder_may_be_written(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing", "missing/too"):
        check_replaceable(tmp_path / name, "marker.json")
        write_folder(tmp_path / name, weights="new")
        assert (tmp_path / name / "weights").read_text() == "new"


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"no marker\.json.*choose another name"):
        write_folder(tmp_path, weights="new")
    assert names_in(tmp_path) == ["thesis.tex"]


def test_a_file_where_a_folder_should_go_is_refused(tmp_path):
    path = tmp_path / "adapter"
    path.write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        write_folder(path)
    assert path.read_text() == "a file"


def test_json_goes_and_comes_back(tmp_path):
    content = {"rank": 8, "keys": ["a", "b"], "scale": 10.0, "name": "größer", "none": None}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_what_json_cannot_hold_leaves_the_old_file(tmp_path, value):
    write_json(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", {"loss": value})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.0}
    assert names_in(tmp_path) == ["a.json"]


def test_unreadable_json_is_one_line(tmp_path):
    (tmp_path / "bad.json").write_text('{"a": 1,\n}')
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "folder").mkdir()
    for name, fact in (
        ("bad.json", "not valid JSON"),
        ("latin.json", "not valid JSON"),
        ("missing.json", "does not exist"),
        ("bad.json/inside.json", "cannot be read"),
        ("folder", "cannot be read"),
    ):
        with pytest.raises(UserError) as caught:
            read_json(tmp_path / name)
        assert fact in str(caught.value) and "\n" not in str(caught.value), name
