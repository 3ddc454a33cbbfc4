"""Running a script as a process of its own: what it said in the end is passed on in one line.

python -m pytest tests/test_script.py
"""

import os
import signal
import subprocess
import sys

import pytest

from common.errors import UserError
from synth.pipeline.script import run_script
from tests.scripts import ROOT

FAILING = """
import subprocess, sys
sys.path.insert(0, {root!r})
from common.cli import run
from common.errors import UserError

def main():
    print("a bar", file=sys.stderr)
    # What this one starts in its turn has nobody who takes its last words.
    code = "from common.cli import run, UserError\\ndef main(): raise UserError('inner')\\nrun(main)"
    subprocess.run([sys.executable, "-c", code], cwd={root!r})
    raise UserError("the facts, \\ud800 1; the remedy")

run(main)
"""


@pytest.fixture
def failing(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING.format(root=str(ROOT)))
    return str(tmp_path / "failing.py")


def test_its_error_is_part_of_the_one_line(failing, capfd):
    with pytest.raises(UserError) as caught:
        run_script([failing], "python again.py")
    assert str(caught.value) == (
        rf"{failing} failed: the facts, \ud800 1; the remedy; then go on with: python again.py"
    )
    assert capfd.readouterr().err == "a bar\nerror: inner\n"


def test_without_last_words_its_exit_code_is_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os; os._exit(9)")
    with pytest.raises(UserError, match="failed with exit code 9; its message stands above; then go on with: again"):
        run_script([str(script)], "again")
    script.write_text("print('done')")
    run_script([str(script)], "again")


def test_where_the_starter_was_killed_it_says_its_error_itself(failing, tmp_path):
    slow = tmp_path / "slow.py"
    begin = "import time; print('started', flush=True); time.sleep(3)\n"
    slow.write_text(begin + (tmp_path / 'failing.py').read_text())
    code = f"from synth.pipeline.script import run_script; print(flush=True); run_script([{str(slow)!r}], 'again')"
    with (tmp_path / "said").open("w") as said:
        starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=said)
        assert starter.stdout is not None
        assert any(line == b"started\n" for line in starter.stdout)
        os.kill(starter.pid, signal.SIGKILL)
        starter.stdout.read()  # until the script has ended, too
        starter.wait()
    assert (tmp_path / "said").read_text().endswith("error: the facts, \\ud800 1; the remedy\n")
