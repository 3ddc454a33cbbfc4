"""wandb and tensorboard themselves, offline: what they were told is read back from their own files."""

import json
import os
import struct
import subprocess
import sys
import time

import pytest

from common.files import read_json
from tests.scripts import ROOT, read_samples
from training.metrics import RunLog, read_metrics, start_run_folder

ROWS = [
    {"score": 0.5, "score_rule": 1.0, "prompt": "2 + 2\n=", "completion": "<b>4</b> | *four*"},
    {"score": 0.0, "score_rule": 0.0, "prompt": "1", "completion": ""},
]
FIGURES = [{"mean_score": 0.25, "kl": 1.5}, {"mean_score": 0.75, "kl": float("nan")}]


@pytest.fixture
def tracked(tmp_path):
    """Run two steps under a tracker; the run's folder."""

    def build(tracker):
        folder = start_run_folder(tmp_path / "run", {"seed": 3})
        log = RunLog(folder, 2, log_with=tracker)
        for step, figures in enumerate(FIGURES, 1):
            log.report(step, figures)
            log.samples(step, ROWS if step == 1 else [])
        log.close()
        return folder

    return build


def plain(folder):
    """Figures by step, and tables by step, of the run's own files."""
    figures = {
        row["step"]: {name: value for name, value in row.items() if name != "step" and value is not None}
        for row in read_metrics(folder)
    }
    return figures, [{name: value for name, value in row.items() if name != "step"} for row in read_samples(folder)]


def wandb_records(path):
    """The records of a .wandb file up to its last, which wandb's own process may write a moment after the run's end.

    7 bytes, then LevelDB's log format, in whose first block all of it lies here.
    """
    parse = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record.FromString
    for _ in range(200):
        content, at, records, parts = path.read_bytes(), 7, [], b""
        assert len(content) < 2**15
        while at + 7 < len(content):
            _, length, kind = struct.unpack("<IHB", content[at : at + 7])
            parts += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last of several
                records.append(parse(parts))
                parts = b""
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end")


def test_wandb_has_the_figures_and_the_table(tracked, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tracked("wandb")
    assert wandb.run is None  # ended with the run
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found: dict[int, dict[str, float]] = {}
    tables = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            tables += [items["_step"]] if any(name.startswith("samples") for name in items) else []
            figures = {name: value for name, value in items.items() if not name.startswith(("_", "samples"))}
            found[items["_step"]] = figures
    figures, rows = plain(folder)
    assert found == figures and tables == [1]
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/samples_1_*.table.json")
    content = json.loads(table.read_text(encoding="utf-8"))
    assert [dict(zip(content["columns"], row, strict=True)) for row in content["data"]] == rows == ROWS


def events(path):
    """The events of a tensorboard file, whose records are: length, its checksum, the event, its checksum."""
    Event = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def is_start(event):
    """Whether it tells tensorboard to forget earlier sessions from its step on."""
    return event.HasField("session_log") and event.session_log.status == event.session_log.START


def test_tensorboard_has_the_figures_and_the_table(tracked):
    pytest.importorskip("tensorboardX")
    folder = tracked("tensorboard")
    (path,) = folder.glob("tensorboard/events*")
    found: dict[int, dict[str, float]] = {}
    texts = []
    for event in events(path):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(event.step, {})[value.tag] = value.simple_value
            else:
                texts.append((event.step, value.tag, value.tensor.string_val[0].decode()))
    assert found == plain(folder)[0]
    ((step, tag, text),) = texts
    assert (step, tag) == (1, "samples/text_summary")
    assert [line[:4] for line in text.splitlines()] == ["    "] * 3  # Markdown shows it as it is
    assert "score_rule" in text and "2 + 2\\n=" in text and "<b>4</b> | *four*" in text


def test_without_wandb_s_server_a_run_goes_on_and_says_so_in_one_line(tmp_path):
    """In a process of its own, as wandb reads its environment once."""
    pytest.importorskip("wandb")
    code = f"""
import pathlib, wandb
from training.metrics import RunLog, start_run_folder
folder = start_run_folder(pathlib.Path({str(tmp_path / "run")!r}), {{}})
log = RunLog(folder, 2, log_with="wandb")
for step in (1, 2):
    log.report(step, {{"kl": 0.5}})
log.close()
assert wandb.run is None
"""
    key = "a1b2" * 10
    asked = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    # Nobody listens on port 9 ("discard").
    asked |= {"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=asked, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr and key not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "wandb cannot be used (CommError: " in line
    assert line.endswith("so this run goes on without it; set WANDB_MODE=offline to keep a run for `wandb sync`")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


def test_a_resumed_run_is_the_same_run_to_wandb(tracked, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tracked("wandb")
    log = RunLog(folder, 2, start_step=1, log_with="wandb")
    log.report(2, FIGURES[1])
    log.close()
    ids = [path.stem for path in folder.glob("wandb/offline-run-*/*.wandb")]
    assert ids and set(ids) == {f"run-{read_json(folder / 'wandb.json')['id']}"}


def test_a_resumed_run_takes_back_what_tensorboard_shows_past_its_checkpoint(tracked):
    pytest.importorskip("tensorboardX")
    folder = tracked("tensorboard")
    RunLog(folder, 2, start_step=1, log_with="tensorboard").close()
    starts = [event.step for path in folder.glob("tensorboard/events*") for event in events(path) if is_start(event)]
    assert sorted(starts) == [1, 2]
