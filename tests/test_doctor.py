"""The doctor's report: a line per check, one verdict, one exit code."""

import json
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from models import cpu, doctor, tiny
from models.doctor import Finding
from tests.scripts import with_words

TITLES = ["machine", "Python", "memory", "open files", "versions", "mlx", "product", "kernel", "compiled step",
          "attention", "PPO step"]  # fmt: skip


def report(capsys, *words):
    """The exit code and the report's lines."""
    try:
        with_words(doctor.main, *words)
    except SystemExit as ended:
        return ended.code, capsys.readouterr().out.splitlines()
    return 0, capsys.readouterr().out.splitlines()


def test_a_report_is_one_screen_and_nothing_looks_wrong(monkeypatch, capsys):
    monkeypatch.setattr(tiny, "is_built", lambda name: False)
    code, lines = report(capsys)
    assert (code, len(lines)) == (0, len(TITLES) + 1), lines
    assert all(line.startswith(f"{title:<14} ") for title, line in zip([*TITLES, "looks wrong"], lines, strict=True))
    assert lines[-1].split() == ["looks", "wrong", "nothing"]
    assert "tiny-digits is not built; run: python -m models.tiny" in lines[-2]
    assert report(capsys, "--quick")[1][-2].startswith("attention ")


def test_it_says_what_is_installed_and_what_mlx_computes_on(capsys):
    lines = report(capsys, "--quick")[1]
    assert f"mlx {mx.__version__}, mlx-lm {metadata.version('mlx-lm')}" in lines[4]
    assert cpu.describe_device(mx.default_device()) in lines[5]
    assert platform.machine() in lines[0] and platform.python_version() in lines[1]


def wrong(name):
    return lambda: Finding(name, "text", f"{name} is wrong")


def test_what_looks_wrong_is_listed_and_the_exit_code_is_1(monkeypatch, capsys):
    def breaks():
        raise RuntimeError("[METAL] no\nsecond line")

    monkeypatch.setattr(doctor, "CHECKS", (wrong("a"), lambda: Finding("b", "fine"), breaks, wrong("left out")))
    code, lines = report(capsys, "--quick")
    assert code == 1
    assert lines == [
        "a              text",
        "b              fine",
        "breaks         RuntimeError: [METAL] no",
        "looks wrong    a: a is wrong",
        "               breaks: the breaks check failed",
    ]


@pytest.mark.parametrize(
    ("processor", "apple_silicon", "said"),
    [("arm64", "1", ""), ("x86_64", "1", "under Rosetta; install one for"), ("x86_64", "", "an Intel Mac")],
)
def test_an_intel_python_on_a_mac_looks_wrong(processor, apple_silicon, said, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(doctor, "system", lambda *words: apple_silicon)
    got = doctor.machine().wrong
    assert said in got and bool(got) == bool(said)


def test_an_old_python_looks_wrong(monkeypatch):
    assert doctor.python().wrong == ""
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert doctor.python().wrong == "too old; install 3.11 or newer"


@pytest.mark.parametrize(("limit", "low"), [(255, True), (256, False), (resource.RLIM_INFINITY, False)])
def test_few_open_files_look_wrong(limit, low, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert bool(doctor.open_files().wrong) == low


def test_a_missing_package_looks_wrong_and_a_missing_torch_does_not(monkeypatch):
    there = [SimpleNamespace(name=name, version="1.0") for name in ("MLX", "mlx-lm")]
    monkeypatch.setattr(metadata, "distributions", lambda: there)
    found = doctor.versions()
    assert found.text == "mlx 1.0, mlx-lm 1.0, transformers is not installed, torch is not installed"
    assert found.wrong == "transformers missing; run: make setup"


@pytest.mark.parametrize(
    ("system", "installed", "blas", "said"),
    [
        ("Linux", ["mlx", "mlx-lm", "mlx-cpu"], "mkl", ""),
        ("Linux", ["mlx", "mlx-lm", "mlx-cpu"], "none", "no fast BLAS"),
        ("Linux", ["mlx", "mlx-cpu", "mlx-cuda-13"], None, "no GPU"),
        ("Darwin", ["mlx", "mlx-metal"], None, "no GPU"),
    ],
)
def test_a_build_that_computes_on_cpu_where_it_should_not_looks_wrong(system, installed, blas, said, monkeypatch):
    monkeypatch.setattr(metadata, "distributions", lambda: [SimpleNamespace(name=name) for name in installed])
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(cpu, "BLAS", blas)
    found = doctor.device()
    assert said in found.wrong and bool(found.wrong) == bool(said)
    assert found.text.startswith(", ".join(sorted(set(installed) - {"mlx", "mlx-lm"})))


@pytest.mark.parametrize(
    ("check", "name", "broken"),
    [
        ("product", "array", lambda x: mx.zeros(x.shape)),
        ("compiled", "compile", lambda step: lambda *x: [2 * y for y in step(*x)]),
        ("attention", "vjp", lambda f, primals, cotangents: ([f(*primals) + 1], cotangents)),
    ],
)
def test_a_wrong_number_looks_wrong(check, name, broken, monkeypatch):
    assert getattr(doctor, check)().wrong == ""
    fake = SimpleNamespace(**{key: getattr(mx, key) for key in dir(mx) if not key.startswith("_")})
    setattr(fake, name, broken)
    monkeypatch.setitem(sys.modules, "mlx.core", fake)
    monkeypatch.setattr(sys.modules["mlx"], "core", fake)
    assert "comes out wrong" in getattr(doctor, check)().wrong


@pytest.mark.parametrize("outcome", ["works", "fails", "hangs"])
def test_the_ppo_step_is_read_from_a_run(outcome, monkeypatch):
    def run(words, **_):
        if outcome == "hangs":
            raise subprocess.TimeoutExpired(words, 1)
        folder = Path(words[words.index("--output-dir") + 1])
        folder.mkdir()
        rows = [{"rollout_seconds": 9.0, "update_seconds": 9.0}, {"rollout_seconds": 0.5, "update_seconds": 0.75}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SimpleNamespace(returncode=2 * (outcome == "fails"), stderr="one\nerror: no such thing\n")

    monkeypatch.setattr(tiny, "is_built", lambda name: True)
    monkeypatch.setattr(doctor.subprocess, "run", run)
    found = doctor.ppo_step()
    begins = {"works": "1.25 s", "fails": "exit code 2: error: no such", "hangs": "no three steps"}
    assert found.text.startswith(begins[outcome])
    assert bool(found.wrong) == (outcome != "works")


def test_the_real_run_takes_these_flags(tiny_digits):
    found = doctor.ppo_step()
    assert found.wrong == "" and found.text.endswith(" s (tiny-digits, 32 completions of 24 tokens)"), found
