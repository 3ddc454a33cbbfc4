"""wandb and tensorboard themselves, offline: what they were told is read back from their own files."""

import json
import struct

from training.metrics import RunLog, read_metrics, read_samples, start_run_folder

import pytest

ROWS = [
    {"score": 0.5, "score_rule": 1.0, "prompt": "2 + 2\n=", "completion": "<b>4</b> | *four*"},
    {"score": 0.0, "score_rule": 0.0, "prompt": "1", "completion": ""},
]
FIGURES = [{"mean_score": 0.25, "kl": 1.5}, {"mean_score": 0.75, "kl": float("nan")}]


@pytest.fixture
def tracked(tmp_path):
    """Run two steps under a tracker; the run's folder and log."""

    def build(tracker):
        folder = start_run_folder(tmp_path / "run", {"seed": 3})
        log = RunLog(folder, 2, log_with=tracker)
        for step, figures in enumerate(FIGURES, 1):
            log.report(step, figures)
            log.samples(step, ROWS if step == 1 else [])
        log.close()
        return folder, log

    return build


def plain(folder):
    """Figures by step, and tables by step, of the run's own files."""
    figures = {
        row["step"]: {name: value for name, value in row.items() if name != "step" and value is not None}
        for row in read_metrics(folder)
    }
    return figures, [{name: value for name, value in row.items() if name != "step"} for row in read_samples(folder)]


def test_wandb_has_the_figures_and_the_table(tracked, monkeypatch):
    wandb = pytest.importorskip("wandb")
    datastore = pytest.importorskip("wandb.sdk.internal.datastore")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, log = tracked("wandb")
    log.tracker.run.finish()
    assert wandb.run is None
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    store, found = datastore.DataStore(), {}
    store.open_for_scan(str(path))
    while data := store.scan_data():
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            own = {name: value for name, value in items.items() if not name.startswith(("_", "samples"))}
            found[items["_step"]] = own
            assert ("samples" in items or "samples/_type" in items) is (items["_step"] == 1)
    figures, rows = plain(folder)
    assert found == figures
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/samples_1_*.table.json")
    content = json.loads(table.read_text(encoding="utf-8"))
    assert [dict(zip(content["columns"], row, strict=True)) for row in content["data"]] == rows == ROWS


def test_tensorboard_has_the_figures_and_the_table(tracked):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    folder, _ = tracked("tensorboard")
    (path,) = folder.glob("tensorboard/events*")
    content, found, texts = path.read_bytes(), {}, []
    while content:  # records of: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
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
