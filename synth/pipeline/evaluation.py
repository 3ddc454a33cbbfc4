"""Which checkpoint is best on held-out samples, and how base and trained model compare on the evaluation set.

Every completion is kept (synth/pipeline/rollouts.py), so a restart draws none again.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.files import atomic_file, atomic_folder, write_json
from common.schemas import Schema, read_as, read_key
from models.adapter_config import ADAPTER, CONFIG_FILE
from synth.pipeline.pass_rates import BaseModelSettings
from synth.pipeline.rollouts import Draw, draw
from synth.stages import StageRow
from synth.task import Task
from synth.teacher.cache import Cache
from training.checkpoint_folders import all_checkpoints
from training.intervals import difference, mean_interval


class Mean(Schema):
    """A mean score, or a difference of two, with its 95 % interval."""

    mean: float
    low: float
    high: float


class Evaluation(Schema):
    """evaluation.json, as far as it is read again."""

    questions: int
    base: Mean
    trained: Mean
    difference: Mean
    mcnemar_p: float


def completions_of(model: BaseModelSettings, task: Task, rows: Sequence[StageRow], store: Cache) -> list[str]:
    """One completion of each row's prompt."""
    return draw([Draw(task.prompt(row["input"]), 0) for row in rows], model.open(), store)


def scores_of(task: Task, rows: Sequence[StageRow], completions: Sequence[str]) -> list[float]:
    """The score of each row's completion."""
    pairs = zip(rows, completions, strict=True)
    return [task.score(row["input"], completion, row["output"]) for row, completion in pairs]


def choose_checkpoint(
    model: BaseModelSettings, task: Task, run_folder: Path, held_out: Sequence[StageRow], folder: Path, store: Cache
) -> Path:
    """The adapter of the checkpoint with the best mean score on the held-out samples, copied to FOLDER/adapter.

    model: the base model, as checkpoints are sampled. The first checkpoint, the untrained model, is a candidate; among
    equals the earliest wins. Without held-out samples the last is taken. The scores go to FOLDER/checkpoints.json.
    """
    chosen, found = folder / "adapter", folder / "checkpoints.json"
    if found.is_file() and (chosen / CONFIG_FILE).is_file():
        print(f"checkpoint: step {read_key(int, found, 'chosen')} (chosen before)", flush=True)
        return chosen
    rows = []
    for checkpoint in all_checkpoints(run_folder)[0 if held_out else -1 :]:
        texts = completions_of(replace(model, adapter=checkpoint / "adapter"), task, held_out, store)
        scores = scores_of(task, held_out, texts)
        rows.append({"step": int(checkpoint.name), "mean_score": sum(scores) / max(len(scores), 1)})
    best = max(rows, key=lambda row: row["mean_score"])
    with atomic_folder(chosen, ADAPTER) as temporary:
        shutil.copytree(run_folder / "checkpoints" / f"{best['step']:06d}" / "adapter", temporary, dirs_exist_ok=True)
    write_json(found, {"held_out": len(held_out), "checkpoints": rows, "chosen": best["step"]})
    listed = ", ".join(f"{row['step']}: {row['mean_score']:.3f}" for row in rows)
    print(f"checkpoint: step {best['step']} of {listed} on {len(held_out)} held-out samples", flush=True)
    return chosen


def evaluate(
    model: BaseModelSettings, task: Task, adapter: Path, folder: Path, store: Cache, label: str | None = None
) -> dict[str, Any] | None:
    """Base model against trained one on the evaluation set, once; to FOLDER/evaluation.json, and by row to .jsonl.

    adapter: the trained one; label: how reports call the base model (default: its name). None if the task names no
    evaluation set.
    """
    path = folder / "evaluation.json"
    if path.is_file():
        return read_as(Evaluation, path, "delete it to evaluate again").model_dump()
    if not task.evaluation:
        return None
    models = {"base": model, "trained": replace(model, adapter=adapter)}
    texts = {name: completions_of(one, task, task.evaluation, store) for name, one in models.items()}
    scores = {name: scores_of(task, task.evaluation, found) for name, found in texts.items()}
    with atomic_file(path.with_suffix(".jsonl")) as temporary:
        rows = [
            {**row, **{name: texts[name][n] for name in texts}, **{f"{name}_score": scores[name][n] for name in texts}}
            for n, row in enumerate(task.evaluation)
        ]
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    paired = difference(scores["base"], scores["trained"])
    result = {
        "model": label or model.name,
        "questions": len(task.evaluation),
        **{name: mean_interval(found)._asdict() for name, found in scores.items()},
        "difference": {**paired.interval._asdict(), "gained": paired.gained, "lost": paired.lost},
        "mcnemar_p": paired.p_value,
    }
    write_json(path, result)
    return result


def evaluation_line(result: dict[str, Any] | None) -> str:
    """The evaluation in one line."""
    if result is None:
        return "evaluation: the task names no evaluation set; give --dataset-path"
    shown = {
        name: "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**result[name]) for name in ("base", "trained", "difference")
    }
    return (
        f"evaluation on {result['questions']} questions, 95 % intervals: base {shown['base']}, trained "
        f"{shown['trained']}, difference {shown['difference']} (paired; McNemar p = {result['mcnemar_p']:.2g})"
    )
