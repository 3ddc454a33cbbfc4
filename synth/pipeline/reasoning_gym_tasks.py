"""reasoning-gym as a source of tasks: rows made by rule, scored by its own scorers. Optional.

`open_task("reasoning_gym:chain_sum")`. Answers are read by our reader (the last `<answer>`, else the whole
completion) and then scored by its scorer, which may give partial credit. The tasks of EXCLUDED are refused.

    pip install reasoning-gym
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError
from rewards.answers import answer_type
from synth.examples import Example
from synth.task import Task

PREFIX = "reasoning_gym:"
ROWS = 2000  # of a task's one dataset, made with seed 0; the first EVALUATION of them are never trained on
EVALUATION = 100
INSTRUCTION = "Solve the problem."
DEMOS = 3  # the rows after them
OUTPUT_FORMAT = "Think step by step, then give the final answer alone, between <answer> and </answer>."

_EVALUATES = "its scorer evaluates what the model wrote as Python"
EXCLUDED = {
    "game_of_life_halting": "any text scores 1",
    "prime_factorization": "its scorer fails on any text that is not a factorisation",
    "list_functions": "its rows differ from run to run",
    "codeio": "its rows come from running the programs it holds",
    **dict.fromkeys(
        ("binary_matrix", "spiral_matrix", "string_insertion", "n_queens", "countdown", "puzzle24"), _EVALUATES
    ),
    **dict.fromkeys(("simple_integration", "intermediate_integration", "polynomial_multiplication"), _EVALUATES),
}
ANSWER = answer_type("exact")


def __getattr__(name: str) -> Any:
    """`reasoning_gym_tasks.chain_sum` is that task's reward, so that `--reward-function FILE.py:chain_sum` names it."""
    if name.startswith("_"):
        raise AttributeError(name)
    return ReasoningGym(name).reward


def reasoning_gym_task(name: str) -> Task:
    """A task with reasoning-gym's rows, demos and scores. Raises UserError as ReasoningGym does."""
    rows = ReasoningGym(name)
    return Task(
        name=PREFIX + name,
        instruction=INSTRUCTION,
        output_format=OUTPUT_FORMAT,
        answer=ANSWER,
        reward=rows.reward,
        template=rows.prompt("{input}"),
        demos=rows.demos(),
        evaluation=rows.evaluation(),
        source=rows.source,
        near_duplicates=1.0,  # rows made by rule share their wording and differ in what fills it
        scoring_flags=("--reward-function", f"{Path(__file__).resolve()}:{name}"),
    )


class ReasoningGym:
    """A dataset of reasoning-gym: which of its rows are for what, and which row a prompt comes from.

    Raises UserError where the package is missing, or the name is unknown, excluded, or has no text answers.
    """

    def __init__(self, name: str):
        if name in EXCLUDED:
            raise UserError(f"{PREFIX}{name} is excluded: {EXCLUDED[name]}; choose another task")
        try:
            import reasoning_gym
        except ImportError as error:
            raise UserError(f"reasoning-gym cannot be imported ({error}); pip install reasoning-gym") from None
        try:
            self.dataset = reasoning_gym.create_dataset(name, size=ROWS, seed=0)
        except Exception as error:  # noqa: BLE001  (whatever it raises for unknown names or missing options)
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"reasoning-gym cannot make {name!r} ({reason}); check the name") from None
        self.name = name

    def demos(self) -> list[Example]:
        """The rows shown to a teacher."""
        return [self.example(index) for index in range(EVALUATION, EVALUATION + DEMOS)]

    def evaluation(self) -> list[Example]:
        """The rows that are never trained on."""
        return [self.example(index) for index in range(EVALUATION)]

    def entry(self, index: int) -> dict[str, Any]:
        """A row in reasoning-gym's form. The same index gives the same row in every process."""
        return self.dataset[index]

    def example(self, index: int) -> Example:
        """A row in our form."""
        entry = self.entry(index)
        if not isinstance(entry["answer"], str):
            raise UserError(f"{PREFIX}{self.name} has problems without a text answer; choose another task")
        return {"input": entry["question"], "output": entry["answer"]}

    def source(self, count: int, seed: int) -> list[Example]:
        """`count` distinct rows, neither demos nor for evaluation; the same for the same seed."""
        first = EVALUATION + DEMOS
        if count > ROWS - first:
            raise UserError(f"{PREFIX}{self.name} gives at most {ROWS - first} rows, not {count}")
        start = seed * 7919 % (ROWS - first)
        return [self.example(first + (start + index) % (ROWS - first)) for index in range(count)]

    @cached_property
    def entries(self) -> dict[str, dict[str, Any]]:
        """Every row by its prompt."""
        return {self.prompt(entry["question"]): entry for entry in map(self.entry, range(ROWS))}

    @staticmethod
    def prompt(question: str) -> str:
        """What the model sees of a row: the task's prompt."""
        return f"{question}\n\n{OUTPUT_FORMAT}"

    def reward(self, prompts: list[str], completions: list[str]) -> list[float]:
        """One score per completion, in 0..1. Raises UserError for a prompt that is not a row of the dataset."""
        return [self._score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]

    def _score(self, prompt: str, completion: str) -> float:
        entry = self.entries.get(prompt)
        if entry is None:
            raise UserError(f"{prompt!r:.60} is not a problem of {PREFIX}{self.name}; its scorer knows only its own")
        answer = ANSWER.extract(completion)
        try:
            return 0.0 if answer is None else float(self.dataset.score_answer(answer, entry))
        except Exception:  # noqa: BLE001  (several scorers raise on unexpected text, which is a wrong answer)
            return 0.0
