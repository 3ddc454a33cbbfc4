"""A user's own reward function, `file.py:name`, checked against the contract of every reward.

The function takes two lists of strings of equal length, prompts and completions, and returns one finite number per
completion. Loading imports the file, so its code runs with all the user's rights, without a sandbox or time limit: name
only files that you would run yourself.

    python ppo_training.py --reward-function my_rewards.py:shortest
"""

import functools
import hashlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import UserError
from common.files import expanded

PACKAGES = {"sklearn": "scikit-learn"}  # what our examples import → the optional package that brings it
RewardFunction = Callable[[list[str], list[str]], list[float]]


def load_reward_function(spec: str) -> RewardFunction:
    """The reward function named by `spec`, "file.py:name", wrapped in `checked`. Raises as `load_function` does."""
    return checked(load_function(spec), spec)


def load_function(spec: str, what: str = "reward function") -> Callable[..., Any]:
    """The callable named by `spec`, "file.py:name". what: how errors refer to it.

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
    module = _import(path)
    if not hasattr(module, name):
        raise UserError(f"{what} {spec!r}: {path} defines no {name!r}; check the name")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"{what} {spec!r}: {name!r} is a {type(function).__name__}, not a function")
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


def checked(function: Callable[[list[str], list[str]], Any], name: str | None = None) -> RewardFunction:
    """`function`, with its result converted to a list of floats and every breach of the contract to a UserError.

    name: how errors refer to it; by default the function's own name. Accepts any iterable of numbers (lists, tuples,
    NumPy, mlx or torch vectors; True counts as 1). Rejects a wrong count, text, NaN and infinity, and reports an
    exception of the function with its type, message, file and line.
    """
    label = str(name or getattr(function, "__name__", type(function).__name__))

    @functools.wraps(function, updated=())
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        count = len(completions)
        try:
            # Copies, in case the function modifies its arguments.
            result = function(list(prompts), list(completions))
            values = None if isinstance(result, str | bytes | dict) or not _iterable(result) else list(result)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"reward function {label} failed: {error_summary(error)}; fix it") from error
        if values is None:
            raise UserError(f"reward function {label} returned {_shown(result)}; return a list of {count} numbers")
        if len(values) != count:
            raise UserError(
                f"reward function {label} returned {len(values)} scores for {count} completions; return one for each"
            )
        return [_finite(value, index, label) for index, value in enumerate(values)]

    return reward


def _import(path: Path) -> ModuleType:
    name = f"reward_function_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look up a class's module by name, so it is registered before its code runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        missing = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and missing in PACKAGES:
            remedy = f"{sys.executable} -m pip install {PACKAGES[missing]}"
            raise UserError(f"{path} needs {missing}, which is not installed; run: {remedy}") from error
        raise UserError(f"{path} cannot be imported: {error_summary(error)}; fix it") from error
    return module


def _iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _finite(value: Any, index: int, label: str) -> float:
    try:
        # float() would parse a string, and hide the mistake of returning one.
        number = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not math.isfinite(number):
        what = "not a number" if number is None else "not finite"
        raise UserError(
            f"reward function {label} returned {_shown(value)} at index {index}, which is {what}; return finite numbers"
        )
    return number


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:80]


def error_summary(error: Exception) -> str:
    """Type, message and location of an exception, in one line."""
    traced = traceback.extract_tb(error.__traceback__)
    # Frames of this file and of the import machinery are not informative; a SyntaxError names its line itself.
    frames = [frame for frame in traced if frame.filename != __file__ and not frame.filename.startswith("<")]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{place}" if message else f"{type(error).__name__}{place}"
