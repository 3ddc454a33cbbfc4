"""What tests/test_many_macs.py runs by mlx.launch, and by itself in one process: short runs of every kind.

mlx.launch -n 2 python -m tests.launched train FOLDER          writes FOLDER/weights-2.npz and FOLDER/found-2.json
mlx.launch -n 2 python -m tests.launched kill RANK STEP ...    sft.py with the flags ..., until a rank kills itself
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import sft  # which calls cpu.enable() before mlx is imported

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

from common.cli import run
from common.errors import UserError
from models.adapters import AdapterConfig
from models.loading import load
from training.mlx_ranks import launched
from training.ranks import ALONE, Ranks
from training.settings import SFTSettings
from training.sft_loop import build_trainee, sft_steps, train_sft

# (adapter, whether of a reward model, rows, settings). With 13 rows a batch of 6 leaves one of a single row, so that a
# rank has none.
SFT_RUNS: dict[str, tuple[AdapterConfig, bool, str, dict[str, Any]]] = {
    "lora": (AdapterConfig(), False, "texts", {"gradient_accumulation_steps": 3}),
    "soft prompt": (AdapterConfig("soft_prompt", num_prompt_tokens=4), False, "texts", {"batch_size": 6}),
    "full": (AdapterConfig("full"), False, "texts", {"pack": True}),
    "reward model, ranked": (AdapterConfig(), True, "rewards", {}),
    "reward model, pairs": (AdapterConfig(), True, "pairs", {"batch_size": 3}),
    "dpo": (AdapterConfig(), False, "pairs", {"dpo": True}),
}
SHORT = {"iters": 5, "batch_size": 4, "learning_rate": 1e-3, "optimizer": "adam", "steps_per_report": 2,
         "steps_per_eval": 3}  # fmt: skip
Trained = tuple[dict[str, mx.array], list[dict[str, float]]]  # weights by name, and the figures of every report


def train(folder: Path, name: str, ranks: Ranks = ALONE) -> Trained:
    """One run of SFT_RUNS on the model and the rows in `folder`."""
    adapter, reward_model, rows, changes = SFT_RUNS[name]
    loaded, settings = load(str(folder / "model")), SFTSettings(**{**SHORT, **changes})
    trainee = build_trainee(loaded, settings, adapter, reward_model)
    paths = (folder / f"{rows}_train.jsonl", folder / f"{rows}_valid.jsonl")
    history = train_sft(trainee, loaded.tokenizer, *paths, settings, ranks)
    return dict(tree_flatten(trainee.module.trainable_parameters())), history


def refusal(ranks: Ranks) -> str:
    """What is said where a rank has other data."""
    try:
        ranks.check_same(data="ab" if ranks.rank else "cd", base_model="ef")
    except UserError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    weights: dict[str, mx.array] = {}
    found: dict[str, Any] = {}
    with launched() as ranks:
        for name in SFT_RUNS:
            trained, found[name] = train(folder, name, ranks)
            weights |= {f"{name}/{key}": array for key, array in trained.items()}
        found["refusal"] = ranks.gather([refusal(ranks)])
        if ranks.writes:
            mx.savez(str(folder / f"weights-{ranks.size}.npz"), **weights)
            (folder / f"found-{ranks.size}.json").write_text(json.dumps(found), encoding="utf-8")


def kill(rank: str, step: int) -> None:
    """sft.py, of which `rank` ends after `step` steps as by `kill -9`, the others at work on the next."""
    is_victim = os.environ["MLX_RANK"] == rank

    def steps(*arguments: Any) -> Iterator[Any]:
        for each in sft_steps(*arguments):
            yield each
            if is_victim and each.number == step:
                os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(sft, "sft_steps", steps):
        run(sft.main)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        main(Path(sys.argv[2]))
    else:
        _, _, rank, step, *sys.argv[1:] = sys.argv
        kill(rank, int(step))
