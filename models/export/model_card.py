"""Model cards: the README.md of a fused model, with its base, the runs that produced it, and how to use it.

The runs are those in the base's provenance.json, followed by those in the adapter's `provenance` (training.metrics) and
the fusing itself, with what it kept of each layer's change.
Absolute paths are shortened to their last part. Runs may be a stranger's, so what they say is shown as text: none of it
is read as markdown or HTML.
"""

import html
import math
import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from common.files import Kind, read_json, write_json
from common.schemas import conforming
from models.adapter_config import SavedRun

PROVENANCE_FILE = "provenance.json"
FUSE = "fuse.py"
# A fused model: what mlx-lm and the tokenizers write, and our own.
FUSED = Kind(
    PROVENANCE_FILE,
    ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*",
     "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
     "value_head.safetensors", "README.md", PROVENANCE_FILE),
    lambda content: isinstance(content, list),
)  # fmt: skip
# Flags about storing and logging a run, which do not affect its result.
BOOKKEEPING = {"config", "output_dir", "resume", "keep_checkpoints", "log_with", "save_every", "save_file"}


def provenance_of(base: Path, adapter_runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that produced a fused model, in order: those of its base, then those of its adapter.

    Raises UserError if the base's provenance.json is no list of runs.
    """
    path = base / PROVENANCE_FILE
    base_runs = read_json(path) if path.is_file() else []
    conforming(list[SavedRun], base_runs, path, "restore it, or delete it to leave those runs out of the model card")
    return [*base_runs, *map(_shown, adapter_runs)]


def fuse_run(flags: dict[str, Any], figures: dict[str, Any], layers: dict[str, Any]) -> dict[str, Any]:
    """The run of fuse.py for a model's provenance. layers: by name, what was kept of each."""
    # JSON has no infinity.
    flags = {key: str(value) if value == math.inf else value for key, value in flags.items()}
    return _shown({"script": FUSE, "flags": flags, "figures": figures, "layers": layers})


def write_card(folder: Path, name: str, base: str, runs: list[dict[str, Any]], is_reward_model: bool) -> None:
    """Write README.md and provenance.json. name: of the model; base: name of the adapter's base."""
    base = str(runs[0]["flags"].get("model", base)) if runs else base
    write_json(folder / PROVENANCE_FILE, runs)
    on_hub = base.count("/") == 1 and not base.startswith((".", "~")) and not base.endswith("/")
    data = ModelCardData(
        base_model=base if on_hub and not os.path.exists(base) else None,
        library_name="mlx",
        pipeline_tag="text-classification" if is_reward_model else "text-generation",
        tags=["mlx", *(["reward-model"] if is_reward_model else [])],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        f"A {'reward model' if is_reward_model else 'model'} tuned from {_code(_last(base))}.\n",
    ]
    parts += ["## How it was made\n"] if runs else []
    for number, run in enumerate(runs, start=1):
        parts.append(_run_text(number, run))
    parts.append(_use_text(name, is_reward_model))
    ModelCard("\n".join(parts)).save(folder / "README.md")


def _run_text(number: int, run: dict[str, Any]) -> str:
    file = f"run{number}.yaml"
    figures = [f"| {_plain(name.replace('_', ' '))} | {value} |" for name, value in run["figures"].items()]
    if run["script"] == FUSE:
        return "\n".join([f"{number}. `{FUSE}`:\n", "| against the adapter | |\n|---|---|", *figures, ""])
    flags = yaml.safe_dump(run["flags"], sort_keys=False).rstrip()
    fence = _longer_than_any(flags, 3)
    command = _code(f"python {run['script']} -c {file}")
    return "\n".join(
        [
            f"{number}. {command} on {_data_text(run['flags'])}, with {file}:\n",
            f"{fence}yaml",
            flags,
            f"{fence}\n",
            "| figure at its end | |\n|---|---|",
            *figures,
            "",
        ]
    )


def _data_text(flags: dict[str, Any]) -> str:
    """A description of a run's data, from its flags."""
    if "data" in flags or "data_base" in flags:
        of = f" of {_code(flags['data'])}" if "data" in flags else ""
        return f"{_code(str(flags.get('data_base', '')) + 'train.jsonl')}{of}"
    prompts = f"the prompts of {_code(flags['prompts'])}" if flags.get("prompts") else "starts of the digit rule"
    scores = {"reward_model": "a reward model", "reward_function": "a reward function", "answer": "the rows' answers"}
    scored = next((text for name, text in scores.items() if flags.get(name)), "the digit rule")
    return f"{prompts}, scored by {scored}"


def _code(value: object) -> str:
    """`value` on one line as a code span, in which markdown and HTML are only text."""
    line = " ".join(str(value).split())
    fence = _longer_than_any(line, 1)
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{room}{line}{room}{fence}"


def _longer_than_any(text: str, least: int) -> str:
    """Backticks, at least `least`, that nothing in `text` closes."""
    return "`" * max([least, *(len(ticks) + 1 for ticks in re.findall("`+", text))])


def _plain(text: str) -> str:
    """`text` on one line of a table, with what markdown and HTML would read escaped."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _use_text(name: str, is_reward_model: bool) -> str:
    if is_reward_model:
        return f"## Use\n\n```\npython ppo_training.py --reward-model {name}\n```\n"
    return (
        f'## Use\n\n```\nmlx_lm.generate --model {name} --prompt "..."\npython talk_to_model.py --model {name}\n```\n'
    )


def _shown(run: dict[str, Any]) -> dict[str, Any]:
    """A run without bookkeeping, unset flags and local folders."""
    flags = {
        key: _without_folder(value)
        for key, value in run["flags"].items()
        if key not in BOOKKEEPING and value not in (None, False, "")
    }
    return {**run, "flags": flags}


def _without_folder(value: Any) -> Any:
    """A flag's value without the folders of this machine; of a function by file and name, the name alone."""
    if isinstance(value, list):
        return [_without_folder(item) for item in value]
    if not isinstance(value, str):
        return value
    file, _, name = value.rpartition(":")
    return name if file.endswith(".py") else _last(value)


def _last(value: str) -> str:
    """The last part of an absolute path; anything else unchanged."""
    return Path(value).name if value.startswith(("/", "~")) else value
