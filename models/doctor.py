"""What this machine is, whether mlx works on it, and what looks wrong: to run first, and to send with a report.

    python -m models.doctor            with a few PPO steps of tiny-digits, if that is built
    python -m models.doctor --quick    without them

Exit code 0 if nothing looks wrong, else 1.
"""

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import cpu

if __name__ == "__main__":
    cpu.enable()  # before mlx is imported

from common.cli import run
from common.errors import reason
from common.parser import Parser

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
FEWEST_OPEN_FILES = 256  # macOS's own; a teacher's eight requests in flight and a run's files fit
PACKAGES = ("mlx", "mlx-lm", "transformers", "torch")
HEAD_SIZE = 64  # at which Metal has a fused kernel of attention
# mlx writes the rest of a kernel around its body.
METAL_BODY = "uint i = thread_position_in_grid.x; out[i] = 2 * inp[i];"
CUDA_BODY = "auto i = cooperative_groups::this_grid().thread_rank(); out[i] = 2 * inp[i];"
STEPS = ("--num-steps", "3", "--batch-size", "32", "--mini-batch-size", "32", "--max-completion-length", "24")
SLOWEST_STEPS = 300  # seconds
FAILURES = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class Finding(NamedTuple):
    """A line of the report; wrong: what looks wrong about it and what to do, if anything does."""

    title: str
    text: str
    wrong: str = ""


def system(*words: str) -> str:
    """What a command of the system prints, or nothing."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def machine() -> Finding:
    """The system and the processor; wrong is an Intel build of Python on a Mac, which mlx has no wheels for."""
    name = f"{platform.system()} {platform.mac_ver()[0] or platform.release()}, {platform.machine()}"
    text = f"{name}, {os.cpu_count()} cores"
    if platform.system() != "Darwin" or platform.machine() == "arm64":
        return Finding("machine", text)
    if system("sysctl", "-n", "hw.optional.arm64") == "1":
        return Finding("machine", text, "this Python is an Intel build under Rosetta; install one for Apple silicon")
    return Finding("machine", text, "an Intel Mac, for which there is no mlx; use Apple silicon or Linux")


def python() -> Finding:
    """The interpreter."""
    text = f"{platform.python_version()}, {sys.prefix}"
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Finding("Python", text, f"too old; install {oldest} or newer" if sys.version_info < OLDEST_PYTHON else "")


def memory() -> Finding:
    """The machine's memory, and what of it a GPU may use."""
    import mlx.core as mx

    from models.gpu import system_memory

    text = f"{system_memory() / 1e9:.1f} GB"
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended:
        text += f", of which mlx may keep {int(recommended) / 1e9:.1f} GB resident"
    if limit := system("sysctl", "-n", "iogpu.wired_limit_mb") if platform.system() == "Darwin" else "":
        text += f"; iogpu.wired_limit_mb = {limit}"
    return Finding("memory", text)


def open_files() -> Finding:
    """The limit of open files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = 0 <= limit < FEWEST_OPEN_FILES
    return Finding("open files", str(limit), "so few serve no teacher; run: ulimit -n 4096" if low else "")


def versions() -> Finding:
    """What is installed."""
    found = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
    missing = [name for name in PACKAGES[:-1] if name not in found]
    text = ", ".join(f"{name} {found.get(name, 'is not installed')}" for name in PACKAGES)
    return Finding("versions", text, f"{' and '.join(missing)} missing; run: make setup" if missing else "")


def device() -> Finding:
    """The build of mlx and what it computes on."""
    import mlx.core as mx

    names = sorted({distribution.name for distribution in importlib.metadata.distributions()})
    builds = [name for name in names if name.startswith(("mlx-", "mlx_")) and name not in ("mlx-lm", "mlx_lm")]
    used = mx.default_device()
    text = f"{', '.join(builds) or 'its own build'}; computes on {cpu.describe_device(used)}"
    if cpu.simulating_gpu():
        text += ", simulating a GPU"
    on_gpu = used == mx.Device(mx.gpu)
    if not on_gpu and (platform.system() == "Darwin" or any(name.startswith("mlx-cuda") for name in builds)):
        return Finding("mlx", text, "mlx finds no GPU here; a virtual machine, or a driver that is missing?")
    return Finding("mlx", text, cpu.blas.ADVICE.removeprefix("warning: ") if cpu.BLAS == "none" else "")


def product() -> Finding:
    """A float32 product against NumPy's in float64. TF32 has ten bits of a number."""
    import mlx.core as mx
    import numpy as np

    left, right = np.random.default_rng(0).uniform(-1, 1, (2, 512, 512)).astype(np.float32)
    exact = left.astype(np.float64) @ right.astype(np.float64)
    error = float(np.abs(np.array(mx.array(left) @ mx.array(right)) - exact).max() / np.abs(exact).max())
    kind = "float32" if error < 1e-5 else "TF32"
    wrong = "a product comes out wrong" if not error < 1e-2 else ""
    return Finding("product", f"off by {error:.0e} of the largest number: {kind}", wrong)


def kernel() -> Finding:
    """A kernel that is compiled here, on a GPU."""
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.gpu):
        return Finding("kernel", "none on CPU")
    of_metal = mx.metal.is_available()
    make, body = (mx.fast.metal_kernel, METAL_BODY) if of_metal else (mx.fast.cuda_kernel, CUDA_BODY)
    double = make(name="double", input_names=["inp"], output_names=["out"], source=body)
    numbers = mx.arange(1024, dtype=mx.float32)
    (doubled,) = double(
        inputs=[numbers],
        grid=(1024, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(1024,)],
        output_dtypes=[mx.float32],
    )
    works = mx.array_equal(doubled, 2 * numbers).item()
    return Finding("kernel", "works" if works else "wrong numbers", "" if works else "a custom kernel comes out wrong")


def compiled() -> Finding:
    """Loss and gradient of a small net, compiled, against the same uncompiled."""
    import mlx.core as mx

    def loss(weight: mx.array, x: mx.array) -> mx.array:
        return mx.mean(mx.square(mx.tanh(x @ weight) * mx.sigmoid(x)))

    key = mx.random.key(0)
    arrays = mx.random.normal((32, 32), key=key), mx.random.normal((16, 32), key=key)
    step = mx.value_and_grad(loss)
    began = time.perf_counter()
    pairs = list(zip(mx.compile(step)(*arrays), step(*arrays), strict=True))
    works = all(mx.allclose(ours, theirs, atol=1e-3).item() for ours, theirs in pairs)
    text = f"works ({time.perf_counter() - began:.1f} s)" if works else "wrong numbers"
    text += ", though here mx.compile is switched off" if cpu.replacing() else ""
    return Finding("compiled step", text, "" if works else "a compiled step comes out wrong")


def attention() -> Finding:
    """Attention in bf16 without a gradient, where Metal has a fused kernel, and with one, where it has none."""
    import mlx.core as mx

    key = mx.random.key(0)
    q, k, v = mx.random.normal((3, 2, 4, 128, HEAD_SIZE), key=key).astype(mx.bfloat16)

    def attend(queries: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, k, v, scale=HEAD_SIZE**-0.5, mask="causal")

    (with_gradient,), (gradient,) = mx.vjp(attend, [q], [mx.ones_like(q)])
    difference = mx.abs(attend(q).astype(mx.float32) - with_gradient.astype(mx.float32)).max().item()
    works = difference < 0.1 and bool(mx.isfinite(gradient).all().item())
    text = f"bf16 with a gradient differs from without by up to {difference:.1e}"
    return Finding("attention", text, "" if works else "attention comes out wrong")


def ppo_step() -> Finding:
    """Seconds of a PPO step of tiny-digits: ppo_training.py on 32 completions of 24 tokens, the last of three steps."""
    from models.tiny import is_built

    if not is_built("tiny-digits"):
        return Finding("PPO step", "not tried: tiny-digits is not built; run: python -m models.tiny")
    with tempfile.TemporaryDirectory() as folder:
        files = ("--save-file", f"{folder}/adapter", "--output-dir", f"{folder}/run")
        words = (sys.executable, "ppo_training.py", "--model", "tiny-digits", "--ground-truth-reward", *STEPS, *files)
        try:
            done = subprocess.run(
                words, cwd=ROOT, capture_output=True, text=True, timeout=SLOWEST_STEPS, check=False
            )
        except subprocess.TimeoutExpired:
            return Finding("PPO step", f"no three steps in {SLOWEST_STEPS} s", "PPO hangs or is very slow here")
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            return Finding("PPO step", f"exit code {done.returncode}: {said}", "ppo_training.py fails")
        rows = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(rows[-1])
    seconds = last["rollout_seconds"] + last["update_seconds"]
    return Finding("PPO step", f"{seconds:.2f} s (tiny-digits, 32 completions of 24 tokens)")


CHECKS = (machine, python, memory, open_files, versions, device, product, kernel, compiled, attention, ppo_step)


def found(check: Callable[[], Finding]) -> Finding:
    """What a check finds. Whatever it raises looks wrong."""
    title = check.__name__.replace("_", " ")
    try:
        return check()
    except FAILURES as error:
        return Finding(title, reason(error), f"the {title} check failed")


def main() -> None:
    parser = Parser(__doc__, yaml_file=False)
    parser.add_argument("--quick", action="store_true", help="leave out the PPO steps")
    quick = parser.parse_args().quick
    findings = []
    for check in CHECKS[:-1] if quick else CHECKS:
        findings.append(found(check))
        print(f"{findings[-1].title:<14} {findings[-1].text}", flush=True)
    wrong = [f"{finding.title}: {finding.wrong}" for finding in findings if finding.wrong]
    print(f"{'looks wrong':<14} {wrong[0] if wrong else 'nothing'}")
    for line in wrong[1:]:
        print(f"{'':<14} {line}")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
