"""What mlx on Linux CPU gets: a fast BLAS, batch scheduling, kept memory, and faster parts of mlx-lm."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import activations, base, llama

import ppo_training
from models import cpu, loading
from models.cpu import attention, blas, linear, replacing, swiglu, wanted
from models.cpu.blas import ADVICE, TITLES
from tests.architectures import build
from tests.scripts import call

ROOT = Path(__file__).resolve().parent.parent


only_on_linux_cpu = pytest.mark.skipif(not wanted(), reason="only the Linux CPU build of mlx needs a BLAS")
NO_LIBRARY = "from models import cpu; cpu.blas._load = lambda name: False; cpu.enable(); print(cpu.BLAS)"


def python(*words, asked_for=""):
    """Run Python with TUNER_BLAS set to `asked_for`."""
    environment = os.environ | {"TUNER_BLAS": asked_for}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_script_says_which_library_is_taken():
    """`make test` installs torch, whose own library serves where there is no other."""
    done = python("models/cpu/blas.py")
    assert done.returncode == 0 and done.stderr == ""
    library = done.stdout.strip()
    if wanted():
        assert any(name in library for name in ("openblas", "mkl_rt", "torch_cpu")), library
    else:
        assert library == "none found"
    assert python("models/cpu/blas.py", "--needs-mkl").returncode in (0, 1)


@only_on_linux_cpu
def test_without_any_library_one_line_says_what_to_do():
    done = python("-c", NO_LIBRARY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "none\n", ADVICE + "\n")


@pytest.mark.parametrize(
    ("installed", "system", "expected"),
    [
        (["mlx", "mlx-cpu"], "Linux", True),
        (["mlx", "mlx_cpu", "mlx-cuda-13"], "Linux", False),  # as `pip install "mlx[cuda13]"` leaves it
        (["mlx", "mlx-cuda-12"], "Linux", False),
        (["mlx", "mlx-metal"], "Darwin", False),
        (["mlx", "mlx-cpu"], "Darwin", False),
    ],
)
def test_what_is_for_cpu_is_left_out_where_a_cuda_build_is_installed(installed, system, expected, monkeypatch):
    found = [SimpleNamespace(name=name) for name in installed]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    monkeypatch.setattr(platform, "system", lambda: system)
    assert wanted() is expected


@only_on_linux_cpu
@pytest.mark.parametrize(("simulating", "expected"), [("1", "torch True False False"), ("0", "torch False True True")])
def test_a_simulated_gpu_has_mlx_s_own_operations_its_fusing_and_the_blas(simulating, expected, monkeypatch):
    """A compiled function is one operation where mx.compile fuses, and so it stands in the drawing of the graph."""
    code = (
        "from models import cpu\n"
        "cpu.enable()\n"
        "import io, mlx.core as mx, mlx.nn as nn\n"
        "from mlx_lm.models import base, llama\n"
        "from models.cpu import adam, attention, linear\n"
        "file = io.StringIO()\n"
        "ones = mx.ones(3)\n"
        "mx.export_to_dot(file, mx.compile(lambda x: 1 / (1 + mx.abs(x)))(ones))\n"
        "ours = {llama.scaled_dot_product_attention is attention.attention, nn.Linear.__call__ is linear.linear}\n"
        "print(cpu.BLAS, 'Compiled' in file.getvalue(), adam.serves(ones), *ours)\n"
    )
    monkeypatch.setenv("TUNER_SIMULATE_GPU", simulating)
    done = python("-c", code, asked_for="torch")
    assert (done.stdout, done.returncode) == (f"{expected}\n", 0), done.stderr


@only_on_linux_cpu
@pytest.mark.parametrize("name", ["torch", "none"])  # torch is there wherever the tests run, and comes last by itself
def test_the_variable_chooses(name):
    done = python("-c", "from models import cpu; cpu.enable(); print(cpu.BLAS)", asked_for=name)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name}\n", "")


@only_on_linux_cpu
@pytest.mark.parametrize(
    ("name", "remedy"), [("openblas", "libopenblas0-pthread"), ("mkl", "pip install mkl"), ("torch", "install torch")]
)
def test_a_library_that_is_asked_for_and_not_there_is_one_line(name, remedy):
    """No other takes its place."""
    done = python("-c", NO_LIBRARY, asked_for=name)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: TUNER_BLAS is {name}, but {TITLES[name]} is not found; ")
    assert remedy in done.stderr and done.stderr.count("\n") == 1


@only_on_linux_cpu
@pytest.mark.parametrize("words", [["sft.py", "--help"], ["models/cpu/blas.py"]])
def test_an_unknown_library_is_one_line(words):
    done = python(*words, asked_for="blis")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: TUNER_BLAS is 'blis', which is no BLAS; it can be openblas, mkl, torch, none\n"


@pytest.mark.parametrize(
    ("asked_for", "openblas", "mkl", "needed"),
    [
        ("", None, None, True),
        ("", "libopenblas.so.0", None, False),
        ("", None, "libmkl_rt.so.3", False),
        ("mkl", "libopenblas.so.0", None, True),
        ("mkl", "libopenblas.so.0", "libmkl_rt.so.3", False),
        ("torch", None, None, False),
    ],
)
def test_setup_brings_mkl_if_there_is_no_openblas_or_mkl_is_asked_for(asked_for, openblas, mkl, needed, monkeypatch):
    monkeypatch.setenv("TUNER_BLAS", asked_for)
    monkeypatch.setattr(blas, "_openblas", lambda: openblas)
    monkeypatch.setattr(blas, "_mkl", lambda: mkl)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert blas.needs_mkl() is needed
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert blas.needs_mkl() is False


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("infinite", "infinite")])
def test_mkl_s_threads_wait_a_millisecond_unless_the_user_says_so(given, kept, tmp_path, monkeypatch):
    """The setting has to be there when libiomp5.so is loaded."""
    (tmp_path / "lib").mkdir()
    for name in ("libmkl_rt.so.3", "libiomp5.so"):
        (tmp_path / "lib" / name).touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("MKL_NUM_THREADS", "2")  # so that the library is not asked
    monkeypatch.delenv("KMP_BLOCKTIME", raising=False)
    if given:
        monkeypatch.setenv("KMP_BLOCKTIME", given)
    seen = []

    def load(name):
        seen.append((Path(name).name, os.environ["KMP_BLOCKTIME"]))
        return True

    monkeypatch.setattr(blas, "_load", load)
    assert blas._mkl() == str(tmp_path / "lib" / "libmkl_rt.so.3")
    assert seen == [("libiomp5.so", kept), ("libmkl_rt.so.3", kept)]


def threads_by_width(environment):
    """Of MKL: after it is loaded, once a narrow model is open, once a wide one is; and mlx's threads that are held."""
    code = (
        "import ctypes\n"
        "from models import cpu\n"
        "cpu.enable()\n"
        "from models.cpu import blas, process\n"
        "process.start_computing()\n"
        "def say(): print(ctypes.CDLL(None).MKL_Get_Max_Threads(), len(process._mlx_threads))\n"
        "say()\n"
        "for width in (blas.WIDE - 1, blas.WIDE, 64): cpu.prepare_for(width); say()\n"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment = {**inherited, "TUNER_BLAS": "mkl", "TUNER_SIMULATE_GPU": "0", "MKL_DYNAMIC": "FALSE", **environment}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


@only_on_linux_cpu
@pytest.mark.skipif(not list(Path(sys.prefix).glob("lib/libmkl_rt.so*")), reason="mkl is not installed")
def test_mkl_has_one_thread_until_a_wide_model_is_open_unless_the_user_says_so():
    cores = len(os.sched_getaffinity(0))
    all_cores = (cores, 0 if cores > 1 else 1)
    assert threads_by_width({}) == [(1, 1), (1, 1), all_cores, all_cores]
    assert threads_by_width({"MLX_RANK": "0"}) == 4 * [(1, 1)]
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        assert threads_by_width({name: "1"}) == 4 * [(1, 1)]
        assert threads_by_width({name: "3"}) == 4 * [(3, 0)]


def test_an_opened_model_s_width_is_told(tiny_folder, monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(loading, "prepare_for", seen.append)
    loading.load(str(tiny_folder))
    assert seen == [json.loads((tiny_folder / "config.json").read_text())["hidden_size"]]


def test_a_device_is_named_with_its_blas(monkeypatch):
    on_cpu, on_gpu = (SimpleNamespace(type=SimpleNamespace(name=name)) for name in ("cpu", "gpu"))
    for name, words in (("mkl", "the CPU (MKL)"), ("none", "the CPU (no fast BLAS)"), (None, "the CPU")):
        monkeypatch.setattr(cpu, "BLAS", name)
        assert (cpu.describe_device(on_cpu), cpu.describe_device(on_gpu)) == (words, "the GPU")
    assert cpu.describe_device(mx.default_device()).startswith(f"the {mx.default_device().type.name.upper()}")
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert cpu.describe_device(on_cpu) == "the CPU"
    assert cpu.describe_device(on_gpu).startswith("the GPU (CUDA; ")


@only_on_linux_cpu
def test_a_run_says_its_blas_keeps_it_and_tells_where_it_is_resumed_with_another(tiny_folder, tmp_path, capsys):
    settings = {
        "model": tiny_folder, "num-steps": 1, "batch-size": 4, "mini-batch-size": 4, "max-completion-length": 4,
        "save-file": tmp_path / "adapter", "output-dir": tmp_path / "run",
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    call(ppo_training.main, "--ground_truth_reward", *words)
    assert f" on the CPU ({TITLES[str(cpu.BLAS)]})\n" in capsys.readouterr().out
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["blas"] == cpu.BLAS and saved["num_steps"] == 1
    call(ppo_training.main, "--resume", tmp_path / "run")
    assert "began with" not in capsys.readouterr().out
    path.write_text(json.dumps({**saved, "blas": "blis"}), encoding="utf-8")
    call(ppo_training.main, "--resume", tmp_path / "run")
    said = capsys.readouterr().out
    assert f"this run began with the BLAS blis and continues with {cpu.BLAS}, so its numbers may differ" in said


@only_on_linux_cpu
def test_the_library_serves_the_whole_process():
    """mlx takes the first `cblas_sgemm` that it finds, so a global one has to be there before."""
    code = (
        "import ctypes\n"
        "def found():\n"
        "    return hasattr(ctypes.CDLL(None), 'cblas_sgemm') or hasattr(ctypes.CDLL(None), 'sgemm_')\n"
        "assert not found()\n"
        "import models.cpu\n"
        "models.cpu.enable()\n"
        "assert found()\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_tests_run_on_it_too():
    """test_imports.py walks the sources: each that is run and imports mlx calls cpu.enable() first."""
    assert not wanted() or cpu.BLAS in blas.LIBRARIES or os.environ.get("TUNER_BLAS") == "none"


@only_on_linux_cpu
def test_a_process_and_its_children_are_scheduled_as_batch_work():
    code = "import models.cpu, os; models.cpu.enable(); print(os.sched_getscheduler(0) == os.SCHED_BATCH)"
    assert python("-c", code).stdout == "True\n"
    assert os.sched_getscheduler(0) == os.SCHED_BATCH


@pytest.mark.skipif(not wanted() or platform.libc_ver()[0] != "glibc", reason="only glibc on Linux CPU is told to")
def test_freed_memory_serves_the_next_array():
    """By default the kernel would clear what is freed: some 50 000 pages here, each a fault."""
    code = (
        "import resource\n"
        "import models.cpu\n"
        "models.cpu.enable()\n"
        "import mlx.core as mx\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "ones = mx.ones(2**21)\n"
        "for count in range(25):\n"
        "    if count == 5: before = faults()\n"
        "    arrays = [mx.exp(ones + (count + i)) for i in range(8)]\n"
        "    mx.eval(arrays)\n"
        "    del arrays\n"
        "print(faults() - before)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5_000


@pytest.mark.parametrize(
    ("home", "ours", "theirs"),
    [
        (base, attention.attention, attention._original),
        (activations, swiglu.swiglu, swiglu._original),
    ],
)
def test_what_is_replaced_is_replaced_where_it_is_wanted_and_logits_stay(home, ours, theirs, monkeypatch):
    name = theirs.__name__
    assert getattr(home, name) is getattr(llama, name) is (ours if replacing() else theirs)
    model, tokens = build("llama-tied"), mx.array([[1, 2, 3, 4]])
    monkeypatch.setattr(llama, name, ours)
    logits = np.array(model(tokens))
    monkeypatch.setattr(llama, name, theirs)
    np.testing.assert_allclose(logits, np.array(model(tokens)), rtol=0, atol=1e-5)


def test_linear_layers_are_replaced_where_it_is_wanted():
    assert nn.Linear.__call__ is (linear.linear if replacing() else linear._original)
