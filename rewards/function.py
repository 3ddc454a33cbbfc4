"""A user's own reward function, `file.py:name`, checked against the contract of every reward.

The function takes two lists of strings of equal length, prompts and completions, and returns one finite number per
completion. Loading imports the file, so its code runs with all the user's rights, without a sandbox: name only files
that you would run yourself. What it raises, and a call that does not return in time, is one line (rewards.user_code).

    python ppo_training.py --reward-function my_rewards.py:shortest
"""

import functools
import hashlib
import importlib.util
import inspect
import itertools
import math
import sys
from collections.abc import Callable
from importlib.abc import Loader
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import UserError
from common.files import expanded
from rewards.user_code import TIMEOUT, user_code

PACKAGES = {"sklearn": "scikit-learn"}  # what our examples import → the optional package that brings it
LARGEST = 1e18  # of a score: its square still is a float32, as a loss takes it
RewardFunction = Callable[[list[str], list[str]], list[float]]


def load_reward_function(spec: str, timeout: float = TIMEOUT) -> RewardFunction:
    """The reward function named by `spec`, "file.py:name", wrapped in `checked`. Raises as `load_function` does."""
    return checked(load_function(spec, timeout=timeout), spec, timeout)


def load_function(spec: str, what: str = "reward function", timeout: float = TIMEOUT) -> Callable[..., Any]:
    """The callable named by `spec`, "file.py:name". what: how errors refer to it; timeout: seconds, 0: no limit.

    Imports the file, so its top-level code runs. The file's folder is not added to the module path. Raises UserError if
    the spec is malformed, the file is missing or fails to import, or the name is missing or not callable.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file or not name:
        raise UserError(f"{what} {spec!r} is not of the form file.py:name; write, for example, my_rewards.py:score")
    path = expanded(file)
    if not path.is_file():
        raise UserError(f"{what} {spec!r}: {path} does not exist; check the path")
    if path.suffix != ".py":
        raise UserError(f"{what} {spec!r}: {path} is not a .py file; name a Python file")
    module = _import(path, timeout)
    if not hasattr(module, name):
        raise UserError(f"{what} {spec!r}: {path} defines no {name!r}; check the name")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"{what} {spec!r}: {name!r} is a {type(function).__name__}, not a function; name one")
    return function


def function_label(spec: str) -> str:
    """What can be told of a function without its path: its name, and the hash of its file while that is there.

    For what may be published: NAME (sha256 of its file: the first 16 digits). A label is its own label.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py"):
        return spec
    path = expanded(file)
    if not path.is_file():
        return name
    return f"{name} (sha256 of its file: {hashlib.sha256(path.read_bytes()).hexdigest()[:16]})"


def checked(
    function: Callable[[list[str], list[str]], Any], name: str | None = None, timeout: float = TIMEOUT
) -> RewardFunction:
    """`function`, with its result converted to a list of floats and every breach of the contract to a UserError.

    name: how errors refer to it; by default the function's own name. timeout: seconds a call may take, 0: no
    limit. Accepts any iterable of numbers (lists, tuples, NumPy, mlx or torch vectors; True counts as 1). Rejects a
    wrong count, text, and what is not within ±LARGEST, and reports whatever the function raises with its type, message,
    file and line.
    """
    label = str(name or getattr(function, "__name__", type(function).__name__))
    what = f"reward function {label}"

    @functools.wraps(function, updated=())
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        count = len(completions)
        with user_code(what, timeout):
            # Copies, in case the function modifies its arguments.
            result = function(list(prompts), list(completions))
            if inspect.iscoroutine(result):
                result.close()
                raise UserError(f"{what} is asynchronous; write a plain function that returns {count} numbers")
            if isinstance(result, str | bytes | dict) or not _iterable(result):
                raise UserError(f"{what} returned {_shown(result)}; return a list of {count} numbers")
            values = list(itertools.islice(result, count + 1000))  # of what may have no end
            if len(values) != count:
                raise UserError(f"{what} returned {len(values)} scores for {count} completions; return one for each")
            return [_finite(value, index, what) for index, value in enumerate(values)]

    if (top := getattr(function, "top", None)) is not None:  # its highest score, which it may declare
        reward.top = float(top)  # type: ignore[attr-defined]
    return reward


def _import(path: Path, timeout: float) -> ModuleType:
    name = f"reward_function_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look up a class's module by name, so it is registered before its code runs.
    sys.modules[name] = module
    try:
        with user_code(str(path), timeout, "cannot be imported"):
            _execute(spec.loader, module, path)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _execute(loader: Loader, module: ModuleType, path: Path) -> None:
    try:
        loader.exec_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in PACKAGES:
            raise
        remedy = f"{sys.executable} -m pip install {PACKAGES[missing]}"
        raise UserError(f"{path} needs {missing}, which is not installed; run: {remedy}") from error


def _iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _finite(value: Any, index: int, what: str) -> float:
    try:
        # float() would parse a string, and hide the mistake of returning one.
        number = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not abs(number) <= LARGEST:
        wrong = "not a number" if number is None else "too large" if math.isfinite(number) else "not finite"
        raise UserError(
            f"{what} returned {_shown(value)} at index {index}, which is {wrong}; return numbers within ±{LARGEST:g}"
        )
    return number


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:80]
