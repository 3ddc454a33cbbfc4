"""A system that refuses in the middle of a run: a full disk, a disk that became read-only, no memory, few open files, a
reader that leaves, a terminal that hangs up. The last good checkpoint stands, and `--resume` goes on from it to the end
of an undisturbed run, bit for bit. All but one end with their exit code and one line: under a limit on memory
(RLIMIT_AS) mlx may die of a signal in native code, before any line could be said.

Disk, memory and files are limits that the kernel holds. The read-only disk is not: these tests may run as root, whom no
permission bit stops, so `os.mkdir` raises what a read-only disk raises; nor is the error of mlx's own. A start
costs seconds, so the runs are forks of one process that has imported all. Not here: a single file under a limit
(tests/test_files.py), streams closed before the start (tests/test_cli.py), kills (tests/test_kill_resume.py).
"""

import json
import os
import re
import resource
import subprocess
import sys
from typing import NamedTuple

import pytest

from common.files import read_json
from tests.scripts import ROOT

FAULT_STEP = 3  # checkpoints are written after steps 2, 4 and 6
# Runs sft.py in a fork for each command line, with a fault that begins at the end of step 3.
PROGRAM = f"""
import errno, json, os, resource, signal, sys, traceback
from pathlib import Path
from models import cpu
cpu.enable()
import sft
from common.cli import run
from data.tokenizer import open_tokenizer
from training.metrics import RunLog

sft.plot_run = lambda folder: folder / "curves.png"  # which would take most of a run's time

def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

def read_only_disk():
    def mkdir(path, *rest, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    os.mkdir = mkdir

def no_memory():
    raise RuntimeError("[malloc] Unable to allocate 8000000000000 bytes.")  # in mlx's words

def memory_limit():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    sft.mx.zeros((2**24,), sft.mx.float32).tolist()

def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))

def reader_leaves():
    os.close(3)

def hang_up():
    os.kill(os.getpid(), signal.SIGHUP)

def child(fault, words, out):
    os.chdir(out)
    reader, writer = os.pipe()
    os.dup2(reader, 3)
    if fault == "reader_leaves":
        os.dup2(writer, 1)
    else:
        os.dup2(os.open("out", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.closerange(4, 64)
    report = RunLog.report
    def reporting(self, step, *parts):
        report(self, step, *parts)
        if step == {FAULT_STEP} and fault:
            globals()[fault]()
    RunLog.report = reporting
    sys.argv = ["sft.py", *words]
    run(sft.main)

open_tokenizer(sys.argv[2])  # imports what each run would
ends = []
for fault, words, out in json.loads(sys.argv[1]):
    process = os.fork()
    if not process:
        try:
            child(fault, words, out)
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(int(end.code or 0))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    ends.append((code, Path(out, "err").read_text(), sorted(os.listdir(Path(out, "run/checkpoints")))))
print(json.dumps(ends))
"""
FAULTS = {
    "full_disk": (
        2,
        r"error: run/checkpoints/000004 cannot be written .*Unable to write .*; check that the disk has room",
    ),
    "read_only_disk": (2, r"error: run/checkpoints/000004 cannot be written .Read-only file system.; "),
    "no_memory": (2, r"error: the device is out of memory .*malloc.*; try a smaller .*--resume continues"),
    "memory_limit": (None, ""),
    "few_files": (2, r"error: run/.* cannot be .*Too many open files.; raise the limit on open files"),
    "reader_leaves": (130, r"stopped\. .*--resume"),
    "hang_up": (130, r"stopped\. .*--resume"),
}
# Who is stopped finishes the step in which that is noticed, and saves.
SAVED = {"reader_leaves": ["000002", "000004"], "hang_up": ["000002", "000003"]}
WORDS = ["--train", "--iters", "6", "--save-every", "2", "--val-batches", "1", "--steps-per-report", "1",
         "--batch-size", "2", "--lora-rank", "2", "--steps-per-eval", "100", "--save-file", "adapter",
         "--output-dir", "run", "--data-base", "increasing_mult_2_", "--data", str(ROOT / "data")]  # fmt: skip


class End(NamedTuple):
    """How a process ended."""

    code: int
    said: str  # on stderr
    checkpoints: list[str]  # names, temporary ones included


def weights(folder):
    return (folder / "adapter/adapters.safetensors").read_bytes()


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """By fault ("": none): folder, end, and end of the resumed run."""
    folders = {fault: tmp_path_factory.mktemp(fault or "undisturbed") for fault in ("", *FAULTS)}
    lives = [(fault, [*WORDS, "--model", str(tiny_folder)], str(folder)) for fault, folder in folders.items()]
    lives += [("", ["--resume", "run"], str(folder)) for folder in folders.values()]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lives), str(tiny_folder)], cwd=ROOT, env={**os.environ, **threads},
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    ends = [End(*end) for end in json.loads(done.stdout)]
    rows = zip(folders.values(), ends, ends[len(folders) :], strict=False)
    return dict(zip(folders, rows, strict=True))


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_in_the_middle_the_last_good_checkpoint_stands(runs, fault):
    folder, end, resumed = runs[fault]
    expected, line = FAULTS[fault]
    assert "Traceback" not in end.said + resumed.said
    if expected is None:
        assert end.code
    else:
        lines = [text for text in end.said.splitlines() if re.search(line, text)]
        assert (end.code, len(lines)) == (expected, 1), end.said
        assert end.said.count("error: ") == (expected == 2)
    assert end.checkpoints == SAVED.get(fault, ["000000", "000002"])
    whole, undisturbed, _ = runs[""]
    assert (resumed.code, undisturbed.code) == (0, 0), resumed.said
    assert weights(folder) == weights(whole)
    assert resumed.checkpoints[-1] == "000006" and not list(folder.rglob(".*.tmp"))


def test_a_run_under_a_limit_of_64_open_files_ends_well(tiny_folder, tmp_path):
    """A process of its own, since mlx-lm asks for more as it is imported."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "sft.py"), *WORDS, "--model", str(tiny_folder)], cwd=tmp_path, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)), capture_output=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("this process may open 64 files at most") == 1
    assert read_json(tmp_path / "run/summary.json")["steps"] == 6
