"""The tables in README.md and docs/: flags, made from the parsers themselves; what opens what; memory on a Mac.

Each stands between markers, which tests/test_docs.py holds to what is made here.

python -m tests.flag_tables        writes them anew
"""

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path

import demo
import demo_real
import evaluate
import fuse
import ppo_training
import sft
import talk_to_model
from data import check, generate_constraint_data, generate_digit_data
from synth import tune
from synth.evolution import flags as evolve_flags
from synth.offline import server as offline_teacher
from synth.pipeline import difficulty, generate, report, selection, train, verify
from synth.pipeline import flags as run_flags
from tests import opens, plan_tables
from tests.scripts import parser_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"<!-- table: (.+?) -->\n.*?<!-- end -->", flags=re.DOTALL)
COMMON = {"help", "help_all", "config"}
# Script → the one whose flags its table leaves out where it has the same.
SHARED = {"pytorch_ppo_training.py": "ppo_training.py"}
STAGES = ("generate", "verify", "difficulty", "selection", "train")
SHARED |= {f"synth/pipeline/{stage}.py": "synth/run.py" for stage in STAGES}

# Where a default is not that of the walkthrough this toolkit grew out of, and why.
DIFFERENCES = {
    "sft.py": {
        "--learning-rate": "was 1e-6, which moves a LoRA's loss by 0.009 in 600 steps",
        "--save-file": "was `peft_weights.npz`; a folder is what mlx-lm opens, and a `.npz` name still works",
        "--num-prompt-tokens": "was 10; PPO ended higher with 32 in single runs that differed in more",
        "--val-batches": "was a batch size by its help; a number of batches, as in mlx-lm",
    },
    "ppo_training.py": {
        "--use-peft": "was not supported",
        "--num-prompt-tokens": "was 10",
        "--save-file": "was `peft_weights.npz`",
        "--init-kl-coef": "was 0.2, which holds the policy near its start",
        "--batch-size": "was 32; larger batches are steadier",
        "--ppo-epochs": "was 4",
        "--learning-rate": "chosen on this task; for large models, by the literature",
        "--optimizer": "was Adam; soft prompts end higher by Muon",
        "--horizon": "was 10000 completions, more than a whole run here",
        "--mini-batch-size": "was 32 in the walkthrough's commands",
        "--lr-schedule": "was constant",
        "--gae-lambda": "was 0.95, by which three seeds took a little longer to reach 0.9",
        "--vf-coef": "was 0.1; over three seeds it made no difference",
        "--max-grad-norm": "was none",
    },
}


def pytorch() -> argparse.ArgumentParser:
    """The parser of the PyTorch script, whose import takes torch's time."""
    import pytorch_ppo_training

    return parser_of(pytorch_ppo_training.parse_args)


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "data/generate_digit_data.py": lambda: parser_of(generate_digit_data.parse_args),
    "data/generate_constraint_data.py": lambda: parser_of(generate_constraint_data.parse_args),
    "data/check.py": lambda: parser_of(check.parse_args),
    "sft.py": lambda: parser_of(sft.parse_args),
    "ppo_training.py": lambda: parser_of(ppo_training.parse_args),
    "pytorch_ppo_training.py": pytorch,
    "evaluate.py": lambda: parser_of(evaluate.parse_args),
    "fuse.py": lambda: parser_of(fuse.parse_args),
    "talk_to_model.py": lambda: parser_of(talk_to_model.parse_args),
    "demo.py": lambda: parser_of(demo.parse_args),
    "demo_real.py": lambda: parser_of(demo_real.parse_args),
    "synth/run.py": lambda: run_flags.run_parser(""),
    "synth/pipeline/generate.py": lambda: parser_of(generate.main),
    "synth/pipeline/verify.py": lambda: parser_of(verify.main),
    "synth/pipeline/difficulty.py": lambda: parser_of(difficulty.main),
    "synth/pipeline/selection.py": lambda: parser_of(selection.main),
    "synth/pipeline/train.py": lambda: parser_of(train.parse_args),
    "synth/evolve.py": lambda: evolve_flags.evolve_parser(""),
    "synth/tune.py": lambda: parser_of(tune.parse_args),
    "synth/pipeline/report.py": lambda: parser_of(report.main),
    "synth/offline/__main__.py": lambda: parser_of(offline_teacher.parse_args),
}


def _said(action: argparse.Action) -> tuple:
    return (*action.option_strings, action.default, action.help)


def table(script: str) -> str:
    """The flag table of a script in Markdown, but for what it has from another (SHARED)."""
    shared = [_said(action) for action in PARSERS[SHARED[script]]()._actions] if script in SHARED else []
    differences = DIFFERENCES.get(script, {})
    columns = ["flag", "default", "what it does", *(["differs, because"] if differences else [])]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for action in PARSERS[script]()._actions:
        if action.dest in COMMON or _said(action) in shared:
            continue
        flags = ", ".join(f"`{flag}`" for flag in action.option_strings or [action.dest])
        nothing = action.default is None or action.default is False or action.default in ("", [])
        default = "" if nothing else f"`{_portable(action.default)}`"
        choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
        cells = [flags, default, f"{action.help or ''}{choices}".replace("|", "\\|")]
        if differences:
            cells.append(differences.get(action.option_strings[0], ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _portable(default: object) -> object:
    """A default without the place of this checkout."""
    if isinstance(default, list | tuple):
        return " ".join(map(str, default))
    path = Path(str(default))
    return f"{path.relative_to(ROOT)}/" if path.is_absolute() and path.is_relative_to(ROOT) else default


TABLES: dict[str, Callable[[], str]] = {
    **{f"flags of {script}": functools.partial(table, script) for script in PARSERS},
    "what opens what": opens.table,
    "what fits on which Mac": plan_tables.which_mac,
    **{f"recipe of {model}": functools.partial(plan_tables.recipe, model) for model in plan_tables.RECIPES},
}


def with_tables(text: str) -> str:
    """A page with every table between its markers as it should be."""
    return MARKED.sub(lambda match: f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
