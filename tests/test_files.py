"""Writing files: however a writer is interrupted, either the old or the new content is there, and nothing else."""

import json
import math
import os
import resource
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import common.files
from common.errors import UserError
from common.files import (
    Kind,
    atomic_file,
    atomic_folder,
    check_file,
    check_replaceable,
    expanded,
    read_json,
    restore_old,
    say_replaced,
    sweep,
    sweep_all,
    write_json,
)

ROOT = Path(__file__).resolve().parent.parent
KIND = Kind("marker.json", ("marker.json", "weights", "stray"), lambda content: content == {})


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def write_folder(path, **files):
    with atomic_folder(path, KIND) as folder:
        (folder / "marker.json").write_text("{}")
        for name, text in files.items():
            (folder / name).write_text(text)


def test_a_file_is_written_on_the_same_disk_under_the_same_name(tmp_path):
    path = tmp_path / "new" / "deep" / "a.b.npz"
    with atomic_file(path) as temporary:
        assert (temporary.parent.parent, temporary.name) == (path.parent, "a.b.npz")
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names_in(path.parent) == ["a.b.npz"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
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


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_failed_writer_leaves_the_old_folder_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "adapter"
    write_folder(path, weights="old")

    def write():
        with atomic_folder(path, KIND) as folder:
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
        "with atomic_file('file') as f, atomic_folder('folder', Kind('marker.json', ('weights',))) as d:\n"
        "    f.write_text('half'); (d / 'weights').write_text('half'); os._exit(9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=60, check=False)
    assert done.returncode == 9
    assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "folder" / "weights").read_text() == "old"
    write_folder(tmp_path / "folder", weights="new")
    assert (tmp_path / "folder" / "weights").read_text() == "new"
    assert [name for name in names_in(tmp_path) if name.startswith(".folder")] == []
    sweep(tmp_path)
    assert names_in(tmp_path) == ["file", "folder"]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "adapter"
    write_folder(path, weights="old", stray="of the old one")
    write_folder(path, weights="new")
    assert names_in(path) == ["marker.json", "weights"]
    assert (path / "weights").read_text() == "new"
    assert names_in(tmp_path) == ["adapter"]


def no_exchange(monkeypatch):
    """As on a disk that cannot exchange two folders in one call."""
    monkeypatch.setattr(common.files, "RENAMES", {})


def test_without_an_exchange_in_one_call_a_folder_is_replaced_whole(tmp_path, monkeypatch):
    no_exchange(monkeypatch)
    test_a_folder_is_replaced_whole(tmp_path)


def test_a_folder_moved_aside_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    write_folder(path, weights="old")
    rename = os.rename

    def second_fails(source, target):
        if Path(target) == path and Path(source).name == "adapter":
            raise OSError("disk")
        rename(source, target)

    no_exchange(monkeypatch)
    monkeypatch.setattr(common.files.os, "rename", second_fails)
    with pytest.raises(UserError, match=r"adapter cannot be written .disk."):
        write_folder(path, weights="new")
    assert (path / "weights").read_text() == "old"
    assert names_in(tmp_path) == ["adapter"]


def test_a_folder_moved_aside_by_a_killed_process_comes_back(tmp_path):
    aside = tmp_path / f".adapter.{os.getpid()}.tmp" / "adapter.old"
    aside.mkdir(parents=True)
    (aside / "weights").write_text("old")
    sweep(tmp_path)
    assert (tmp_path / "adapter" / "weights").read_text() == "old"
    assert names_in(tmp_path) == ["adapter"]


def test_a_folder_moved_aside_is_there_for_the_next_reader(tmp_path):
    aside = tmp_path / ".adapter.999999999.tmp" / "adapter.old"
    aside.mkdir(parents=True)
    (aside / "weights").write_text("old")
    restore_old(tmp_path / "other")
    assert not (tmp_path / "adapter").exists()
    restore_old(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "weights").read_text() == "old" and names_in(tmp_path) == ["adapter"]


def test_all_folders_of_a_run_are_swept(tmp_path):
    for place in (tmp_path, tmp_path / "training" / "checkpoints"):
        (place / ".000020.999999999.tmp" / "000020").mkdir(parents=True)
        (place / ".000040.999999999.tmp").mkdir()
        (place / ".others.999999999.tmp").mkdir()
        (place / ".others.999999999.tmp" / "file").touch()
    sweep_all(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    others = ".others.999999999.tmp"
    assert [name for name in left if not name.endswith("file")] == [
        others, "training", "training/checkpoints", f"training/checkpoints/{others}"]  # fmt: skip
    sweep_all(tmp_path / "missing")


def test_the_exchange_of_folders_is_one_call(tmp_path, monkeypatch):
    """A kill finds the old folder or the new one at its place, and never none."""
    write_folder(tmp_path / "adapter", weights="old")
    monkeypatch.setattr(common.files.os, "rename", lambda *names: pytest.fail(f"renamed {names}"))
    write_folder(tmp_path / "adapter", weights="new")
    assert (tmp_path / "adapter" / "weights").read_text() == "new"


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path):
    for name in (f".adapter.{os.getpid()}.tmp", ".adapter.99999999.tmp"):
        (tmp_path / name / "adapter").mkdir(parents=True)
    kept = [f".adapter.{os.getppid()}.tmp", ".adapter.notes.tmp", ".adapter.99999998.tmp", ".other.99999999.tmp"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".adapter.99999998.tmp" / "thesis.tex").write_text("not of ours")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".adapter.99999997.tmp").symlink_to(tmp_path / "elsewhere")
    write_folder(tmp_path / "adapter", weights="new")
    assert names_in(tmp_path) == sorted([*kept, ".adapter.99999997.tmp", "adapter", "elsewhere"])


def test_what_is_not_ours_stays_in_a_replaced_folder(tmp_path):
    path = tmp_path / "model"
    write_folder(path, weights="old", stray="old")
    (path / "RESULTS.md").write_text("mine")
    (path / "notes").mkdir()
    (path / "notes" / "one.txt").write_text("mine, too")
    (path / "link").symlink_to("RESULTS.md")
    inode = (path / "RESULTS.md").stat().st_ino
    write_folder(path, weights="new")
    assert names_in(path) == ["RESULTS.md", "link", "marker.json", "notes", "weights"]
    assert (path / "RESULTS.md").read_text() == "mine" and (path / "RESULTS.md").stat().st_ino == inode
    assert (path / "notes" / "one.txt").read_text() == "mine, too" and (path / "link").is_symlink()
    assert (path / "weights").read_text() == "new"


def test_where_there_are_no_hard_links_what_is_not_ours_is_copied(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError("no links")

    monkeypatch.setattr(common.files.os, "link", refuse)
    path = tmp_path / "model"
    write_folder(path, weights="old")
    (path / "RESULTS.md").write_text("mine")
    write_folder(path, weights="new")
    assert (path / "RESULTS.md").read_text() == "mine" and (path / "weights").read_text() == "new"


@pytest.mark.parametrize("content", ['{"of": "another program"}', "[]", "3", "{", ""])
def test_a_marker_of_others_is_not_ours(tmp_path, content):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "marker.json").write_text(content)
    with pytest.raises(UserError, match=r"holds other files .no marker\.json of ours.; choose another name"):
        write_folder(tmp_path / "app", weights="new")
    assert names_in(tmp_path / "app") == ["marker.json"]


def irregular(folder):
    """What is neither a file nor a folder, by name."""
    os.mkfifo(folder / "fifo")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "there").mkdir()
    (folder / "to_folder").symlink_to(folder / "there")
    (folder / "file").write_text("old")
    (folder / "to_file").symlink_to(folder / "file")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    return [folder / name for name in ("fifo", "dangling", "to_folder", "to_file", "socket")] + [Path("/dev/null")]


def test_only_a_regular_file_or_folder_is_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    paths = irregular(Path("."))
    before = {path: path.lstat() for path in paths}
    for path in paths:
        for check in (check_file, lambda path: check_replaceable(path, KIND), lambda path: write_json(path, {})):
            with pytest.raises(UserError, match=r"is a (link|pipe|device or socket), where a f.* would be written"):
                check(path)
        with pytest.raises(UserError, match="where a folder would be written"):
            write_folder(path, weights="new")
    for path in paths:
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before[path].st_ino, before[path].st_mode)
    with pytest.raises(UserError, match="there is a folder, where a file would be written"):
        check_file("there")


def test_a_planted_link_under_the_temporary_name_is_not_opened(tmp_path):
    (tmp_path / "secret").write_text("mine")
    (tmp_path / f".out.jsonl.{os.getpid()}.tmp").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"out.jsonl cannot be written .File exists."):
        write_json(tmp_path / "out.jsonl", {})
    assert (tmp_path / "secret").read_text() == "mine"


IMPOSSIBLE = {
    "file/out": "(Not a directory|File exists)",
    "file/deep/out": "(Not a directory|File exists)",
    "n" * 256: "File name too long.; choose a shorter name",
    "new/" + "n" * 250: "File name too long.; choose a shorter name",  # the temporary name is longer
    "/proc/out": "No such file",
    "/proc/new/out": "No such file",
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_written_is_found_before_and_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("old")
    calls = (check_file, lambda path: check_replaceable(path, KIND), lambda path: write_json(path, {}), write_folder)
    for call in calls:
        with pytest.raises(UserError, match=f"(out|n+) cannot be written .{IMPOSSIBLE[name]}") as caught:
            call(tmp_path / name)
        assert "\n" not in str(caught.value) and ".tmp" not in str(caught.value)
    assert "file" in names_in(tmp_path) and not (tmp_path / "out").exists()


def test_a_check_leaves_nothing(tmp_path):
    check_file(tmp_path / "new" / "deep" / "rows.jsonl")
    check_replaceable(tmp_path / "other" / "adapter", KIND)
    assert names_in(tmp_path) == []


@contextmanager
def small_files():
    """Files of at most 1000 bytes: what a full disk is to a writer. Not a fixture: pytest writes between its parts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_old_content_stands(tmp_path):
    write_json(tmp_path / "a.json", "old")
    write_folder(tmp_path / "adapter", weights="old")
    with (
        small_files(),
        pytest.raises(UserError, match=r"a\.json cannot be written .File too large.; raise the limit on the size"),
    ):
        write_json(tmp_path / "a.json", "new" * 1000)
    with small_files(), pytest.raises(UserError, match=r"adapter cannot be written .File too large."):
        write_folder(tmp_path / "adapter", weights="new" * 1000)
    with (
        small_files(),
        pytest.raises(UserError, match=r"adapter cannot be written .File too large."),
        atomic_folder(tmp_path / "adapter", KIND) as folder,
    ):
        write_json(folder / "marker.json", "new" * 1000)
    assert read_json(tmp_path / "a.json") == "old" and (tmp_path / "adapter" / "weights").read_text() == "old"
    assert names_in(tmp_path) == ["a.json", "adapter"]


def test_a_writer_s_runtime_error_is_one_line(tmp_path):
    fact = r"a cannot be written .Unable to write 9 bytes.; check that the disk has room"
    with pytest.raises(UserError, match=fact), atomic_file(tmp_path / "a"):
        raise RuntimeError("Unable to write 9 bytes\nof many")
    with pytest.raises(RecursionError), atomic_file(tmp_path / "a"):
        raise RecursionError("a fault of the program")


def test_a_home_that_does_not_exist_is_one_line():
    with pytest.raises(UserError, match="~nosuchuser/a names a home folder that does not exist"):
        expanded("~nosuchuser/a")
    assert expanded("~") == Path.home()
    for write in (check_file, lambda path: write_json(path, {}), write_folder):
        with pytest.raises(UserError, match="~nosuchuser/a names a home folder"):
            write("~nosuchuser/a")


def test_a_tilde_is_the_home_where_it_is_written_as_where_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_json("~/a.json", "mine")
    write_folder("~/adapter", weights="new")
    assert read_json(tmp_path / "a.json") == "mine" and (tmp_path / "adapter" / "weights").read_text() == "new"


def test_a_relative_folder_with_dots_is_written_where_it_points(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_folder("../out/", weights="new")
    assert names_in(tmp_path) == ["out", "work"]


def test_an_empty_or_missing_folder_may_be_written(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing", "missing/too"):
        check_replaceable(tmp_path / name, KIND)
        write_folder(tmp_path / name, weights="new")
        assert (tmp_path / name / "weights").read_text() == "new"


def test_what_a_save_will_replace_is_named_with_its_date(tmp_path, capsys):
    file, folder = tmp_path / "a.npz", tmp_path / "adapters"
    folder.mkdir()
    for path in (file, folder):
        say_replaced(path)
    assert capsys.readouterr().out == ""
    for path in (file, folder / "own"):
        path.touch()
    os.utime(file, (0, time.mktime((2026, 3, 9, 8, 5, 0, 0, 0, -1))))
    say_replaced(file)
    say_replaced(folder)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{file}, written 2026-03-09 08:05, will be replaced at the end"
    assert second.startswith(f"{folder}, written ")


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"no marker\.json of ours.*choose another name"):
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


def test_a_temporary_folder_in_one_of_the_same_name_is_swept(tmp_path):
    """As write_json leaves it, killed within an atomic_file of its own path."""
    inner = tmp_path / ".a.json.4194305.tmp" / ".a.json.4194305.tmp"
    inner.mkdir(parents=True)
    (inner / "a.json").write_text("{}")
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
