"""The README's flag tables, made from the parsers themselves; tests/test_readme.py holds the README to them.

python -m tests.flag_tables        writes them into README.md, between the markers
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import evaluate
import fuse
import ppo_training
import sft
import talk_to_model
from data import check, generate_digit_data
from training import config

README = Path(__file__).resolve().parent.parent / "README.md"
COMMON = {"help", "config"}

# Where a default is not that of the walkthrough this toolkit grew out of, and why.
DIFFERENCES = {
    "sft.py": {
        "--learning-rate": "was 1e-6, which moves a LoRA's loss by 0.009 in 600 steps",
        "--save-file": "was `peft_weights.npz`; a folder is what mlx-lm opens, and a `.npz` name still works",
        "--val-batches": "was a batch size by its help; a number of batches, as in mlx-lm",
    },
    "ppo_training.py": {
        "--use-peft": "was not supported",
        "--save-file": "was `peft_weights.npz`",
        "--init-kl-coef": "was 0.2, which holds the policy near its start",
        "--batch-size": "was 32; larger batches are steadier",
        "--ppo-epochs": "was 4",
        "--learning-rate": "chosen on this task",
        "--horizon": "was 10000 completions, more than a whole run here",
        "--mini-batch-size": "was 32 in the walkthrough's commands",
        "--lr-schedule": "was constant",
        "--gae-lambda": "was 0.95, by which three seeds needed longer to reach 0.9",
        "--vf-coef": "was 0.1; ended higher at a lower KL in one paired run on an earlier tiny-digits",
        "--max-grad-norm": "was none",
    },
}


class _Captured(Exception):
    """Carries the parser out of a function that would go on to parse."""


def parser_of(parse_args: Callable) -> argparse.ArgumentParser:
    """The parser that `parse_args` builds."""

    def capture(self, *_, **__):
        raise _Captured(self)

    with mock.patch.object(config.Parser, "parse_args", capture):
        try:
            parse_args()
        except _Captured as captured:
            return captured.args[0]
    raise AssertionError(f"{parse_args} parsed nothing")


def pytorch_only() -> argparse.ArgumentParser:
    """The parser of the flags that only the PyTorch script has."""
    import pytorch_ppo_training

    return parser_of(pytorch_ppo_training.parse_args)


PARSERS = {
    "data/generate_digit_data.py": lambda: parser_of(generate_digit_data.parse_args),
    "data/check.py": lambda: parser_of(check.parse_args),
    "sft.py": lambda: parser_of(sft.parse_args),
    "ppo_training.py": lambda: parser_of(ppo_training.parse_args),
    "pytorch_ppo_training.py": pytorch_only,
    "evaluate.py": lambda: parser_of(evaluate.parse_args),
    "fuse.py": lambda: parser_of(fuse.parse_args),
    "talk_to_model.py": lambda: parser_of(talk_to_model.parse_args),
}


def table(script: str) -> str:
    """The flag table of a script in Markdown."""
    shared = {a.dest for a in PARSERS["ppo_training.py"]()._actions} if script == "pytorch_ppo_training.py" else COMMON
    differences = DIFFERENCES.get(script, {})
    columns = ["flag", "default", "what it does", *(["differs, because"] if differences else [])]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for action in PARSERS[script]()._actions:
        if action.dest in shared:
            continue
        flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
        default = "" if action.default in (None, False, "") else f"`{_portable(action.default)}`"
        choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
        cells = [flags, default, f"{action.help}{choices}".replace("|", "\\|")]
        if differences:
            cells.append(differences.get(action.option_strings[0], ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _portable(default: object) -> object:
    """A default without the place of this checkout."""
    path = Path(str(default))
    return f"{path.relative_to(README.parent)}/" if path.is_absolute() else default


def with_tables(text: str) -> str:
    """README text with every table between its markers as it should be."""

    def fill(match: re.Match) -> str:
        return f"<!-- flags: {match[1]} -->\n{table(match[1])}\n<!-- end -->"

    return re.sub(r"<!-- flags: (\S+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
