"""How every command opens a task: a YAML file, or one of reasoning-gym's by `reasoning_gym:NAME`."""

from pathlib import Path

from synth.pipeline.reasoning_gym_tasks import PREFIX, reasoning_gym_task
from synth.task import Task, load_task


def open_task(spec: str | Path) -> Task:
    """The task. Raises UserError where the file, a key, a value, a path or a row is wrong."""
    if str(spec).startswith(PREFIX):
        return reasoning_gym_task(str(spec).removeprefix(PREFIX))
    return load_task(spec)
