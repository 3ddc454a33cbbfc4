"""Running a script's main: a device that has no memory left is a line of advice."""

import pytest

from common.cli import run

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
