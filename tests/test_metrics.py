"""The run folder: metrics.jsonl, the report line, resuming, trackers, pictures."""

import json
import math
import subprocess
import sys
import threading
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import read_json
from tests.scripts import read_samples
from training.console import PPO_COLUMNS, SFT_COLUMNS, Table, figure
from training.metrics import (
    RunLog,
    read_metrics,
    resumed_config,
    say_if_another_blas,
    start_run_folder,
)
from training.plots import METRICS, LivePicture, Panel, plot_panels, plot_run, run_panels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path):
    """A started run."""
    return start_run_folder(tmp_path / "run", {"seed": 3})


def lines_of(folder):
    return (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


# --- rows and lines ---


def test_a_report_is_a_row_in_the_order_given_and_a_row_of_the_table(folder, capsys):
    log = RunLog(folder, total_steps=10)
    log.report(5, {"mean_score": 0.123456, "kl": 12345.678, "updates": 8})
    log.report(10, {"zeta": 1.0, "kl": 2.0})
    log.close()
    assert lines_of(folder) == [
        '{"step": 5, "mean_score": 0.123456, "kl": 12345.678, "updates": 8}',
        '{"step": 10, "zeta": 1.0, "kl": 2.0}',
    ]
    assert capsys.readouterr().out.splitlines() == [
        "  step    score       KL  updates",
        "     5    0.123  12345.678        8",
        "    10             2.000",
    ]


PPO_FIGURES = {
    "mean_score": 0.5, "kl": 1.25, "entropy": 1.0, "completion_length": 20.04, "eos_share": 0.984, "kl_coef": 0.01,
    "seconds": 1234.5, "tokens_per_second": 2345.6,
}  # fmt: skip


def test_ppo_shows_five_figures_and_where_there_is_no_bar_the_speed(folder, capsys):
    log = RunLog(folder, 10, columns=PPO_COLUMNS, peak_memory=lambda: 1.5e9)
    log.report(1, PPO_FIGURES)
    log.report(2, {**PPO_FIGURES, "mean_score": -2.0})
    log.close({"steps": 2, "mean_score": -2.0, "adapter": "adapters"})
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == [
        "  step    score       KL   length      EOS  seconds  tokens/s  peak GB",
        "     1    0.500    1.250     20.0      98%  1,234.5     2,346    1.500",
        "     2   -2.000    1.250     20.0      98%  1,234.5     2,346    1.500",
    ]
    assert all(len(line) <= 80 for line in shown[:3])
    assert read_metrics(folder)[1]["peak_memory_gb"] == 1.5
    summary = read_json(folder / "summary.json")
    assert list(summary) == ["steps", "mean_score", "tokens_per_second", "peak_memory_gb", "adapter"]
    assert (summary["tokens_per_second"], summary["peak_memory_gb"]) == (2345.6, 1.5)


def test_the_summary_has_the_median_speed(folder):
    log = RunLog(folder, 3)
    for step, rate in enumerate((1.0, 300.0, 200.0)):
        log.report(step, {"tokens_per_second": rate})
    log.close({})
    assert read_json(folder / "summary.json") == {"tokens_per_second": 200.0}


def test_the_ground_truth_has_a_column_only_where_it_is_known(folder):
    assert Table(PPO_COLUMNS).lines(1, {**PPO_FIGURES, "true_score": 0.25})[0].split()[:3] == ["step", "score", "true"]
    assert "true" not in Table(PPO_COLUMNS).lines(1, PPO_FIGURES)[0]


def test_parts_of_a_report_are_rows_of_their_own_and_one_line(folder, capsys):
    log = RunLog(folder, 10, columns=SFT_COLUMNS)
    log.report(0, {"valid_loss": 3.0, "valid_accuracy": 0.25})
    log.report(10, {"train_loss": 2.5, "train_accuracy": 0.5}, {"valid_loss": 2.0, "valid_accuracy": 0.75})
    log.close()
    assert [sorted(row) for row in read_metrics(folder)] == [
        ["step", "valid_accuracy", "valid_loss"], ["step", "train_accuracy", "train_loss"],
        ["step", "valid_accuracy", "valid_loss"],
    ]  # fmt: skip
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["0", "3.0000", "25.0%"], ["10", "2.5000", "2.0000", "50.0%", "75.0%"],
    ]  # fmt: skip


def test_the_header_repeats_on_a_terminal_only(monkeypatch):
    table = Table(PPO_COLUMNS)
    assert sum(len(table.lines(step, PPO_FIGURES)) for step in range(41)) == 42
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table = Table(PPO_COLUMNS)
    lines = [line for step in range(41) for line in table.lines(step, PPO_FIGURES)]
    assert [place for place, line in enumerate(lines) if line.startswith("  step")] == [0, 21, 42]
    assert len({len(line) for line in lines}) == 1  # aligned


def test_a_narrow_terminal_has_fewer_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = Table(PPO_COLUMNS).lines(1, PPO_FIGURES)
    assert lines[0] == "  step    score       KL   length" and all(len(line) <= 40 for line in lines)


def test_verbose_prints_every_figure_within_the_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    _, row, *others = Table(PPO_COLUMNS, verbose=True).lines(1, PPO_FIGURES)
    assert row.split()[1:] == ["0.500", "1.250", "20.0", "98%"]
    words = " ".join(others).split()
    others_shown = dict(zip(words[::2], words[1::2], strict=True))
    assert others_shown == {"entropy": "1", "kl_coef": "0.01", "seconds": "1234", "tokens_per_second": "2346"}
    assert all(len(line) <= 50 for line in others)


def test_a_row_is_on_disk_as_soon_as_it_is_reported(folder):
    log = RunLog(folder, total_steps=10)
    log.report(1, {"loss": 2.0})
    assert read_metrics(folder) == [{"step": 1, "loss": 2.0}]
    log.close()


def test_figures_that_are_not_finite_are_null(folder, capsys):
    log = RunLog(folder, total_steps=1)
    log.report(1, {"loss": math.nan, "kl": math.inf, "score": -math.inf, "good": 1.5})
    log.close()
    row = json.loads(lines_of(folder)[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row == {"step": 1, "loss": None, "kl": None, "score": None, "good": 1.5}
    assert capsys.readouterr().out.splitlines()[1].split() == ["1", "nan", "inf", "-inf", "1.5"]


def test_the_summary_is_written_and_printed(folder, capsys):
    log = RunLog(folder, total_steps=1)
    log.close({"steps": 1, "valid_loss": math.nan, "mean_score": 0.98765, "adapter": "adapters"})
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary == {"steps": 1, "valid_loss": None, "mean_score": 0.98765, "adapter": "adapters"}
    shown = capsys.readouterr().out
    assert "score                 0.988" in shown and str(folder) in shown


def test_the_bar_counts_from_where_the_run_goes_on(folder):
    log = RunLog(folder, total_steps=10, start_step=4)
    log.advance()
    assert (log.bar.n, log.bar.total) == (5, 10)
    log.close()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.000123456, "0.0001235"),
        (1.0, "1"),
        (math.nan, "nan"),
        (-2.134567e-5, "-0.00002135"),
        (123456.0, "123500"),
        (-math.inf, "-inf"),
    ],
)
def test_figures_have_four_digits(value, text):
    assert figure(value) == text


# --- run folders and resuming ---


def test_the_flags_are_written_as_run(folder):
    assert resumed_config(folder) == {"seed": 3}


def test_the_blas_is_written_beside_the_flags_and_is_none_of_them(tmp_path, capsys):
    folder = start_run_folder(tmp_path / "with", {"seed": 3}, "mkl")
    assert read_json(folder / "config.json") == {"seed": 3, "blas": "mkl"}
    assert resumed_config(folder) == {"seed": 3}
    say_if_another_blas(folder, "mkl")
    say_if_another_blas(start_run_folder(tmp_path / "without", {"seed": 3}), "openblas")
    assert capsys.readouterr().out == ""
    say_if_another_blas(folder, "openblas")
    say_if_another_blas(folder, None)  # on a Mac, say
    lines = capsys.readouterr().out.splitlines()
    assert [("with openblas" in line, "without it" in line) for line in lines] == [(True, False), (False, True)]


def test_a_folder_with_a_run_is_refused_and_left_as_it_is(folder):
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        start_run_folder(folder, {"seed": 4})
    assert (folder / "config.json").read_bytes() == before


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        resumed_config(tmp_path)


def test_resuming_drops_the_rows_that_come_again(folder):
    log = RunLog(folder, total_steps=9)
    for step in (0, 3, 3, 6, 9):
        log.report(step, {"loss": float(step)})
    log.close()
    RunLog(folder, total_steps=9, start_step=3).close()
    assert [row["step"] for row in read_metrics(folder)] == [0, 3, 3]


def test_resuming_drops_a_last_line_cut_off_by_a_kill(folder):
    log = RunLog(folder, total_steps=9)
    for step in (1, 2):
        log.report(step, {"loss": 1.0})
    log.close()
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(folder)] == [1, 2]
    log = RunLog(folder, total_steps=9, start_step=2)
    log.report(3, {"loss": 2.0})
    log.close()
    assert [json.loads(line)["step"] for line in lines_of(folder)] == [1, 2, 3]


def test_a_new_run_begins_with_no_rows(folder):
    RunLog(folder, total_steps=1).close()
    assert lines_of(folder) == [] == read_metrics(folder) == read_samples(folder)
    assert not (folder / "samples.jsonl").exists()


def test_resuming_drops_the_samples_that_come_again(folder):
    log = RunLog(folder, total_steps=9)
    for step in (1, 3, 6):
        log.samples(
            step, [{"score": step / 2, "completion": "a\u2028\n"}, {"score": math.inf, "completion": "\ud800é"}]
        )
    log.samples(7, [])
    log.close()
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "sc')
    RunLog(folder, total_steps=9, start_step=3).close()
    rows = read_samples(folder)
    assert [(row["step"], row["score"]) for row in rows] == [(1, 0.5), (1, None), (3, 1.5), (3, None)]
    assert [row["completion"] for row in rows[:2]] == ["a\u2028\n", "\ud800é"]
    assert "é" in (folder / "samples.jsonl").read_text(encoding="utf-8")


# --- trackers ---


@pytest.mark.parametrize(("tracker", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_missing_tracker_is_one_line_that_names_its_package(folder, monkeypatch, tracker, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        RunLog(folder, total_steps=1, log_with=tracker)
    assert f"pip install {package}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("tracker", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_without_its_tracker_a_run_leaves_no_folder_behind(tmp_path, monkeypatch, tracker, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        start_run_folder(tmp_path / "new", {"log_with": tracker})
    assert not (tmp_path / "new").exists()


def test_an_unknown_tracker_is_refused(folder):
    with pytest.raises(UserError, match="none, wandb, tensorboard"):
        RunLog(folder, total_steps=1, log_with="paper")


def test_trackers_are_imported_only_when_asked_for(tmp_path):
    code = (
        "import sys\n"
        "from training.metrics import RunLog, start_run_folder\n"
        f"log = RunLog(start_run_folder({str(tmp_path / 'run')!r}, {{}}), 1)\n"
        "log.report(1, {'loss': 1.0}); log.close({})\n"
        "print([name for name in ('wandb', 'tensorboardX', 'torch', 'matplotlib', 'mlx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({}, "machine example.org login me password x", "offline"),
        ({}, "machine api.wandb.ai login user password k", "online"),
        ({"WANDB_API_KEY": "k"}, "", "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "", "disabled"),
    ],
)
def test_wandb_gets_the_same_figures_and_is_offline_without_an_account(
    folder, monkeypatch, tmp_path, environment, netrc, mode
):
    started, logged = {}, []
    run = types.SimpleNamespace(id="a1", log=lambda figures, step: logged.append((step, figures)), finish=lambda: None)
    wandb = types.SimpleNamespace(
        __spec__=ModuleSpec("wandb", None),  # installed
        Settings=lambda **settings: settings,
        init=lambda **settings: started.update(settings) or run,
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    if netrc:
        (tmp_path / ".netrc").write_text(netrc, encoding="utf-8")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    log = RunLog(folder, total_steps=1, log_with="wandb")
    log.report(7, {"loss": 1.25, "kl": math.nan})
    log.close()
    assert started["mode"] == mode
    assert (started["config"], started["name"], started["dir"]) == ({"seed": 3}, "run", str(folder))
    assert logged == [(7, {"loss": 1.25})]


def test_tensorboard_gets_the_same_figures(folder, monkeypatch):
    scalars: list[object] = []

    class Writer:
        def __init__(self, path, **settings):
            assert Path(path) == folder / "tensorboard"

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def close(self):
            scalars.append("closed")

    installed = ModuleSpec("tensorboardX", None)
    tensorboard = types.SimpleNamespace(SummaryWriter=Writer, __spec__=installed)
    monkeypatch.setitem(sys.modules, "tensorboardX", tensorboard)
    log = RunLog(folder, total_steps=1, log_with="tensorboard")
    log.report(7, {"loss": 1.25, "kl": math.inf, "updates": 2})
    log.close()
    assert scalars == [("loss", 1.25, 7), ("updates", 2, 7), "closed"]


# --- pictures ---


def is_whole_png(path):
    content = path.read_bytes()
    return content.startswith(b"\x89PNG\r\n\x1a\n") and content[-8:-4] == b"IEND"


def test_the_picture_of_a_run_is_a_png(folder):
    log = RunLog(folder, total_steps=3)
    log.report(0, {"valid_loss": 3.0})
    log.report(1, {"train_loss": 2.0, "kl": math.nan, "mean_score": 0.5})
    log.report(2, {"train_loss": 1.0, "kl": 0.1, "mean_score": 0.6})
    log.close()
    assert plot_run(folder) == folder / "curves.png"
    assert is_whole_png(folder / "curves.png")
    assert [path.name for path in folder.glob("*.png")] == ["curves.png"]


def test_every_metric_of_a_panel_is_drawn():
    panels = run_panels([{"step": 1, **{name: 1.0 for metric in METRICS for name in metric.names}, "unknown": 1.0}])
    assert [list(panel.curves) for panel in panels] == [list(metric.names.values()) for metric in METRICS]
    assert all(points == [(1, 1.0)] for panel in panels for points in panel.curves.values())
    # Several curves share an axis only where their scale is the same: training and validation.
    assert {panel.title for panel in panels if len(panel.curves) > 1} == {"loss", "accuracy", "implicit rewards"}
    assert all(panel.unit for panel in panels if panel.title != "policy loss")


def test_the_rewards_of_a_sum_have_panels_of_their_own_beside_the_score():
    panels = run_panels([{"step": 1, "mean_score": 0.5, "score_short": -25.0, "true_score": 0.75, "kl": 1.0}])
    assert [panel.title for panel in panels] == ["score", "score short", "true score", "KL"]
    assert panels[1].curves == {"": [(1, -25.0)]}


def test_a_picture_of_a_running_run_takes_a_hundredth_of_its_time_at_most(folder, monkeypatch):
    now, drawn = [0.0], []

    def draw(path):
        drawn.append(now[0])
        now[0] += 3.0 if len(drawn) == 1 else 1.0  # the first imports matplotlib

    monkeypatch.setattr("training.plots.time.monotonic", lambda: now[0])
    monkeypatch.setattr("training.plots.plot_run", draw)
    picture = LivePicture(folder)
    while now[0] < 2000:
        picture.draw_if_due()
        now[0] += 10
    assert drawn[0] == 200 and len(drawn) > 10
    assert all(3 + place <= 0.01 * time + 1 for place, time in enumerate(drawn[1:]))
    assert 3 + len(drawn) - 1 <= 0.01 * now[0]


def test_with_nothing_to_draw_there_is_no_picture(folder):
    assert plot_run(folder) is None
    log = RunLog(folder, total_steps=1)
    log.report(1, {"steps_per_second": 5.0, "train_loss": math.nan})
    log.close()
    assert plot_run(folder) is None
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize("count", [1, 4])
def test_any_number_of_panels_fits(tmp_path, count):
    path = tmp_path / "panels.png"
    curves = {"a": [(0, 1.0), (1, 2.0)], "b": [(0, 0.0)]}
    plot_panels(path, [Panel(f"panel {i}", "%", curves, (0.0, 1.0)) for i in range(count)], "title")
    assert is_whole_png(path)


def test_a_report_is_out_of_the_process_before_the_next_step(tmp_path):
    """Whoever reads the output of a run as it comes is not behind it."""
    code = (
        "import sys\nfrom training.metrics import RunLog, start_run_folder\n"
        f"log = RunLog(start_run_folder({str(tmp_path / 'run')!r}, {{}}), 2)\n"
        "log.report(1, {'policy_loss': 0.5})\nsys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        killer = threading.Timer(20, process.kill)
        killer.start()
        try:
            assert process.stdout.readline().split() == ["step", "policy", "loss"]  # while it waits for its input
        finally:
            killer.cancel()
            process.stdin.close()
