"""A run under a limit of the kernel, as a process of its own.

Not here: a single file under a limit (tests/test_files.py), streams closed before the start and SIGHUP
(tests/test_cli.py), kills (tests/test_kill_resume.py).
"""

import resource
import subprocess
import sys

from common.files import read_json
from tests.scripts import ROOT

WORDS = ["--train", "--iters", "6", "--save-every", "2", "--val-batches", "1", "--steps-per-report", "1",
         "--batch-size", "2", "--lora-rank", "2", "--steps-per-eval", "100", "--save-file", "adapter",
         "--output-dir", "run", "--data-base", "increasing_mult_2_", "--data", str(ROOT / "data")]  # fmt: skip


def test_a_run_under_a_limit_of_64_open_files_ends_well(tiny_folder, tmp_path):
    """mlx-lm asks for more as it is imported."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "sft.py"), *WORDS, "--model", str(tiny_folder)], cwd=tmp_path, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)), capture_output=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("this process may open 64 files at most") == 1
    assert read_json(tmp_path / "run/summary.json")["steps"] == 6
