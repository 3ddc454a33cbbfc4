"""A user's reward function: loading it, and checking its result."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from rewards.function import checked, load_reward_function

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def write(tmp_path):
    """Write a file with a reward and return the spec of a name in it."""

    def write_file(code, name="score", file="mine.py"):
        path = tmp_path / file
        path.write_text(code)
        return f"{path}:{name}"

    return write_file


def one_line_error(function, *args, **named):
    with pytest.raises(UserError) as caught:
        function(*args, **named)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_function_is_called_with_prompts_and_completions(write):
    reward = load_reward_function(write("def score(prompts, completions):\n    return [len(c) for c in completions]"))
    assert reward(["a", "b"], ["", "xyz"]) == [0.0, 3.0]
    assert all(type(value) is float for value in reward(["a"], ["b"]))
    assert reward([], []) == []


def test_any_callable_and_any_file_name_serve(write):
    code = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Constant:\n"
        "    value: float\n"
        "    def __call__(self, prompts, completions):\n"
        "        return [self.value] * len(prompts)\n"
        "score = Constant(0.5)\n"
    )
    assert load_reward_function(write(code, file="has-a hyphen.py"))(["a"], ["b"]) == [0.5]


def test_the_module_path_is_left_alone(write):
    before = list(sys.path)
    load_reward_function(write("def score(p, c): return c"))
    assert sys.path == before


@pytest.mark.parametrize(
    "result",
    [[1, 0.5], (1, 0.5), np.array([1, 0.5]), np.array([1, 0.5], np.float32), iter([True, 0.5]), [np.float16(1), 0.5]],
)
def test_any_vector_of_numbers_becomes_floats(result):
    values = checked(lambda prompts, completions: result)(["a", "b"], ["c", "d"])
    assert values == [1.0, 0.5] and all(type(value) is float for value in values)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (-np.inf, "not finite"),
        (10**400, "not a number"),
        ("1.0", "not a number"),
        (None, "not a number"),
        ([0.5], "not a number"),
        (1j, "not a number"),
        (np.zeros((2, 2)), "not a number"),
    ],
)
def test_a_value_that_is_no_finite_number_is_named_with_its_index(value, what):
    message = one_line_error(checked(lambda p, c: [0.0, value], "mine.py:score"), ["a", "b"], ["c", "d"])
    assert "mine.py:score" in message and "index 1" in message and what in message
    assert " ".join(repr(value).split())[:80] in message


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_scores_is_refused(count):
    message = one_line_error(checked(lambda p, c: [0.0] * count), ["a", "b"], ["c", "d"])
    assert f"{count} scores for 2 completions" in message


@pytest.mark.parametrize("result", [None, 0.5, np.array(0.5), "ab", {"a": 1.0, "b": 2.0}])
def test_a_result_that_is_no_list_is_refused(result):
    assert "return a list of 2 numbers" in one_line_error(checked(lambda p, c: result), ["a", "b"], ["c", "d"])


def test_what_the_function_does_to_its_arguments_stays_with_it():
    def clearing(prompts, completions):
        prompts.clear()
        completions.pop()
        return [0.0, 1.0]

    prompts, completions = ["a", "b"], ["c", "d"]
    assert checked(clearing)(prompts, completions) == [0.0, 1.0]
    assert (prompts, completions) == (["a", "b"], ["c", "d"])


def test_an_exception_of_the_function_is_named_with_its_line(write):
    reward = load_reward_function(write("def score(prompts, completions):\n    return [1 / 0 for _ in prompts]"))
    message = one_line_error(reward, ["a"], ["b"])
    assert "mine.py:score" in message and "ZeroDivisionError" in message and "(mine.py, line 2)" in message


def test_a_function_of_the_wrong_arguments_is_named(write):
    reward = load_reward_function(write("def score(completions):\n    return [0.0]"))
    assert "TypeError: score() takes 1 positional argument but 2 were given;" in one_line_error(reward, [], [])


def test_interrupting_the_function_is_no_mistake():
    def stopped(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked(stopped)(["a"], ["b"])


@pytest.mark.parametrize("spec", ["", "mine.py", ":score", "mine.py:", "missing.py:score"])
def test_a_spec_that_names_nothing_is_refused(spec):
    assert repr(spec) in one_line_error(load_reward_function, spec)


def test_a_file_that_is_no_python_file_is_refused(write):
    assert "not a .py file" in one_line_error(load_reward_function, write("score = len", file="mine.txt"))


def test_a_folder_is_refused(tmp_path):
    assert "does not exist" in one_line_error(load_reward_function, f"{tmp_path}:score")


def test_a_missing_or_uncallable_name_is_refused(write):
    assert "defines no 'other'" in one_line_error(load_reward_function, write("score = 3", name="other"))
    assert "is a int, not a function" in one_line_error(load_reward_function, write("score = 3"))


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("\n\nraise RuntimeError('two\\nlines')", "RuntimeError: two lines (mine.py, line 3)"),
        ("def score(:", "SyntaxError"),
    ],
)
def test_a_file_that_does_not_import_is_one_line(write, code, named):
    message = one_line_error(load_reward_function, write(code))
    assert "mine.py cannot be imported: " in message and named in message and "function.py" not in message
    assert "reward_function_mine" not in sys.modules


def test_the_spec_is_never_evaluated():
    source = (ROOT / "rewards" / "function.py").read_text()
    assert not re.search(r"\b(eval|exec|compile)\(", source)
    assert "does not exist" in one_line_error(load_reward_function, "__import__('os').getcwd():upper")


def test_mlx_and_torch_stay_unloaded():
    code = "import sys, rewards.function, rewards.digits, data.generate_digit_data as g; "
    code += "assert not {'mlx', 'torch', 'training'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("sys.exit(0)", "failed: SystemExit: 0 (rewards_of_a_user.py, line 5); fix it"),
        ("raise SystemExit", "failed: SystemExit (rewards_of_a_user.py, line 5)"),
        ("raise BaseException('any')", "failed: BaseException: any (rewards_of_a_user.py, line 5)"),
        ("raise GeneratorExit", "failed: GeneratorExit"),
        ("raise BaseExceptionGroup('two', [KeyError('a')])", "failed: ExceptionGroup: two"),
        ("return (1 / 0 for _ in c)", "failed: ZeroDivisionError: division by zero (rewards_of_a_user.py, line 5)"),
        ("return Score()", "failed: SystemExit"),
        ("return [Score()] * len(c)", "failed: SystemExit"),
        ("return itertools.repeat(1.0)", "returned 1002 scores for 2 completions"),
        ("return [1e39] * 2", "returned 1e+39 at index 0, which is too large; return numbers within ±1e+18"),
        ("return [0, -2e18]", "returned -2e+18 at index 1, which is too large"),
        ("return [10 ** 400] * 2", "at index 0, which is not a number"),
    ],
)
def test_whatever_a_function_raises_or_returns_is_a_line(tmp_path, code, named):
    path = tmp_path / "rewards_of_a_user.py"
    path.write_text(
        "import itertools, sys, time\n"
        "class Score:\n    __float__ = __iter__ = lambda self: sys.exit(0)\n"
        f"def score(p, c):\n    {code}\n"
    )
    assert named in one_line_error(load_reward_function(f"{path}:score"), ["a", "b"], ["c", "d"])


def test_an_exit_while_it_is_imported_is_a_line(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)\n")
    message = one_line_error(load_reward_function, f"{tmp_path / 'mine.py'}:score")
    assert "mine.py cannot be imported: SystemExit: 0 (mine.py, line 2); fix it" in message


@pytest.mark.parametrize("code", ["while True: pass", "time.sleep(60)", "re.match('(a*)*b', 'a' * 60)"])
def test_what_does_not_return_is_ended(tmp_path, code):
    swallowing = f"    try:\n        {code}\n    except Exception: pass\n    return [1.0]\n"
    (tmp_path / "mine.py").write_text(f"import re, time\ndef score(p, c):\n{swallowing}")
    before = signal.getsignal(signal.SIGALRM)
    started = time.perf_counter()
    message = one_line_error(load_reward_function(f"{tmp_path / 'mine.py'}:score", 0.2), ["a"], ["b"])
    assert time.perf_counter() - started < 5
    assert "has not returned after 0.2 s (" in message and "; fix it, or give a longer --reward-timeout" in message
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    (tmp_path / "hangs.py").write_text(f"import re, time\n{code}\n")
    message = one_line_error(load_reward_function, f"{tmp_path / 'hangs.py'}:f", timeout=0.2)
    assert "hangs.py has not returned" in message


def test_a_quick_call_is_not_hurried(tmp_path):
    def takes_its_time(prompts, completions):
        time.sleep(0.05)
        return [1.0]

    slow = checked(takes_its_time, timeout=0.5)
    assert [slow(["a"], ["b"]) for _ in range(12)] == [[1.0]] * 12  # longer than the limit together
    assert checked(lambda p, c: [1.0], timeout=0)(["a"], ["b"]) == [1.0]


def test_an_error_whose_own_text_fails_is_a_line(write):
    reward = load_reward_function(write("""
class Odd(Exception):
    def __str__(self):
        raise ValueError("no text")
def score(prompts, completions):
    raise Odd
"""))
    assert "failed: Odd: its text cannot be read (mine.py, line 6); fix it" in one_line_error(reward, ["a"], ["b"])


def test_a_function_that_leaves_the_working_folder_does_not_take_the_run_along(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = load_reward_function(write("""
import os
os.chdir("/")
def score(prompts, completions):
    os.chdir("/")
    return [1.0]
"""))
    assert Path.cwd() == tmp_path and reward(["a"], ["b"]) == [1.0] and Path.cwd() == tmp_path


@pytest.mark.filterwarnings("error")
def test_an_asynchronous_function_is_refused(write):
    reward = load_reward_function(write("async def score(prompts, completions):\n    return [1.0]"))
    assert "is asynchronous; write a plain function" in one_line_error(reward, ["a"], ["b"])
