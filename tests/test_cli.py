"""Running a script's main: one line for what went wrong, a stop that is clean, streams that take any text."""

import os
import signal
import subprocess
import sys

import pytest

from common.cli import StopSignal, run
from common.errors import LONGEST_LINE, UserError
from common.parser import Parser
from tests.scripts import ROOT, fails

NO_MEMORY = [
    "[metal::malloc] Attempting to allocate 17179869184 bytes which is greater than the maximum allowed buffer size of "
    "14311686144 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "[malloc] Unable to allocate 8000000000000 bytes.",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10.00 GiB",
    "MPS backend out of memory (MPS allocated: 17.99 GiB, other allocations: 96.00 MiB, max allowed: 18.13 GiB).",
]
KILLED = [
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
    "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
    "cudaStreamSynchronize(stream) failed: the launch timed out and was terminated",
]


def line_of(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(flag in said for flag in ("--mini-batch-size", "--logits-memory", "--grad-checkpoint", "--resume"))
    return said


@pytest.mark.parametrize("message", NO_MEMORY)
def test_no_memory_left_is_a_line_of_advice(message, capsys):
    said = line_of(RuntimeError(f"{message}\nmore of it"), capsys)
    assert f"the device is out of memory ({message});" in said and "more of it" not in said


@pytest.mark.parametrize("message", KILLED)
def test_a_killed_kernel_is_a_line_of_advice(message, capsys):
    assert f"the device stopped a computation ({message});" in line_of(RuntimeError(message), capsys)


def test_so_is_python_s_own_error(capsys):
    assert "out of memory (std::bad_alloc)" in line_of(MemoryError("std::bad_alloc"), capsys)


@pytest.mark.parametrize(
    "error", [RuntimeError("[matmul] shapes (2, 3) and (4, 5)"), RuntimeError(), ValueError("out of memory")]
)
def test_another_error_stays_what_it_is(error):
    def main():
        raise error

    with pytest.raises(type(error)) as raised:
        run(main)
    assert raised.value is error


def test_what_a_name_holds_makes_no_second_line(capsys):
    def main():
        raise UserError("a\nb\r\x1b[2Jc\u2028 is missing; check it")

    assert fails(capsys, main) == "a\\nb\\r\\x1b[2Jc\\u2028 is missing; check it"
    with pytest.raises(SystemExit):
        Parser("").parse_args(["a\nb"])
    error = capsys.readouterr().err
    assert error.startswith("error: unrecognized arguments: a\\nb; see ") and error.count("\n") == 1


def test_an_endless_line_keeps_its_beginning_and_its_remedy(capsys):
    def main():
        raise UserError("x is " + "y" * 10**6 + "; fix it")

    line = fails(capsys, main)
    assert line.startswith("x is yyy") and line.endswith("yyy; fix it") and len(line) < LONGEST_LINE + 10


def test_a_null_character_in_a_path_is_a_line(capsys, tmp_path):
    assert "null character" in fails(capsys, (tmp_path / "a\0b").read_text)


def test_a_bar_ends_before_the_line():
    """Seen from outside: on a pipe a bar has no line end of its own."""
    code = """
import tqdm, common.cli, common.errors
def main():
    bar = tqdm.tqdm(total=3); bar.update()
    raise common.errors.UserError("wrong")
common.cli.run(main)
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True).stderr
    assert said.endswith("\nerror: wrong\n")


def test_a_hang_up_stops_unless_nohup_ignores_it():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, expected in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with StopSignal() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.requested is expected
            assert signal.getsignal(signal.SIGHUP) == handler
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopSignal() as stop:  # the kernel's and the shell's
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_script_runs_with_a_stream_closed(closed, tmp_path):
    """And no file that it opens takes the number of the stream, where stray output would go."""
    code = f"""
import os, sys, common.cli
def main():
    file = open(r"{tmp_path / "file"}", "w")
    assert file.fileno() > 2
    print("out"); print("err", file=sys.stderr); sys.stdin.readline()
    os.write({closed}, b"stray") if {closed} else None
    file.write("kept")
common.cli.run(main)
"""
    script = f"exec {closed}>&-; exec {sys.executable} -c '{code}'"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, (tmp_path / "file").read_text()) == (0, "kept"), done.stderr
    assert (done.stdout, done.stderr) == ("" if closed == 1 else "out\n", "" if closed == 2 else "err\n")


def test_streams_take_any_text():
    code = "import sys, common.cli; common.cli.run(lambda: print(ascii(input()), 'ä█\\ud800'))"
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code], cwd=ROOT, capture_output=True, input=b"hall\xff",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"'hall\\ufffd' \\xe4\\u2588\\ud800\n"
