"""What tests/test_many_macs.py runs by mlx.launch, and by itself in one process: short runs of every kind.

mlx.launch -n 2 python -m tests.launched train FOLDER          writes FOLDER/weights-2.npz and FOLDER/found-2.json
mlx.launch -n 2 python -m tests.launched synth ...             synth.run with the flags ...
mlx.launch -n 2 python -m tests.launched lose HOW RANK STEP ...    sft.py with the flags ..., until a rank is lost
"""

import gc
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import evaluate  # which calls cpu.enable() before mlx is imported

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

import ppo_training
import sft
import talk_to_model
from common import watchdog
from common.cli import run
from common.errors import UserError
from models.adapters import AdapterConfig
from models.loading import load
from models.sharding import load_share
from synth import run as synth_run
from synth.pipeline import base_model, many
from synth.pipeline.pass_rates import BaseModelSettings
from synth.pipeline.rollouts import Draw
from tests.scripts import with_words
from training import ppo_learner
from training.evaluation import evaluate_model
from training.mlx_ranks import MLXRanks, launched
from training.ppo_learner import build_policies, train_ppo
from training.ranks import ALONE, Ranks
from training.settings import PPOSettings, SFTSettings
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
# Of a mini batch both ranks have the same number of rows; in "group" one may have none, as completions of a prompt stay
# together, in "pieces" 2 and 1.
PPO_RUNS: dict[str, tuple[AdapterConfig, dict[str, Any]]] = {
    "gae": (AdapterConfig(num_layers=1), {"adap_kl_ctrl": True, "target": 0.5, "horizon": 20, "step_kl": 0.3}),
    "group": (
        AdapterConfig("soft_prompt", num_prompt_tokens=4),
        {"advantage": "group", "num_generations": 4, "batch_size": 12, "mini_batch_size": 2},
    ),
    "rloo": (
        AdapterConfig("full"),
        {"advantage": "rloo", "num_generations": 2, "target_kl": 1e-6, "learning_rate": 1e-4},
    ),
    "pieces": (AdapterConfig(), {"batch_size": 9, "mini_batch_size": 3, "gradient_accumulation_steps": 3}),
    "not finite": (AdapterConfig(), {}),
}
SHORT_PPO = {"num_steps": 3, "batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "max_completion_length": 8,
             "learning_rate": 1e-3, "optimizer": "adam", "step_kl": 0.0}  # fmt: skip
PROMPTS = [str(number) for number in range(2, 24, 3)]
SILENCE = 12.0  # seconds without a word after which a rank counts as lost here
FAMILIES = {"tensor": "model", "pipeline": "qwen2"}  # way of dividing → folder of a model whose family has it
Trained = tuple[dict[str, mx.array], list[dict[str, float]]]  # weights by name, and the figures of every report


def train_by_sft(folder: Path, name: str, ranks: Ranks = ALONE) -> Trained:
    """One run of SFT_RUNS on the model and the rows in `folder`."""
    adapter, reward_model, rows, changes = SFT_RUNS[name]
    loaded, settings = load(str(folder / "model")), SFTSettings(**{**SHORT, **changes})
    trainee = build_trainee(loaded, settings, adapter, reward_model)
    paths = (folder / f"{rows}_train.jsonl", folder / f"{rows}_valid.jsonl")
    history = train_sft(trainee, loaded.tokenizer, *paths, settings, ranks)
    return dict(tree_flatten(trainee.module.trainable_parameters())), history


def evens(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A reward: the share of even digits."""
    return [sum(letter in "02468" for letter in text) / max(len(text), 1) for text in completions]


def train_by_ppo(folder: Path, name: str, ranks: Ranks = ALONE) -> Trained:
    """One run of PPO_RUNS. In "not finite" the gradients of the third mini batch are not, on the last rank."""
    adapter, changes = PPO_RUNS[name]
    settings = PPOSettings(**{**SHORT_PPO, **changes})
    loaded = load(str(folder / "model"))
    policy, reference = build_policies(loaded, settings, adapter)
    calls = itertools.count()

    def spoiled(loss_function: Callable) -> Callable:
        def spoiled_loss(*arrays: Any) -> Any:
            loss, stats = loss_function(*arrays)
            is_third = next(calls) == 2 and ranks.rank == ranks.size - 1
            return loss * (float("nan") if is_third and name == "not finite" else 1.0), stats

        return spoiled_loss

    real = ppo_learner.make_loss
    with mock.patch.object(ppo_learner, "make_loss", lambda *arguments: spoiled(real(*arguments))):
        history = train_ppo(policy, reference, loaded.tokenizer, PROMPTS, evens, settings, ranks)
    return dict(tree_flatten(policy.module.trainable_parameters())), history


def evaluated(folder: Path, ranks: Ranks = ALONE) -> dict[str, Any]:
    """What evaluate.py finds, of 9 completions in batches of 2, against another model."""
    loaded, other = load(str(folder / "model")), load(str(folder / "other"))
    prompts = [*PROMPTS, PROMPTS[0]]
    words = (loaded.model, loaded.tokenizer, prompts, evens, 8, 0.9, other.model, 5, 2)
    return evaluate_model(*words, ranks=ranks)._asdict()


def rollouts(folder: Path) -> list[str]:
    """19 rollouts as a stage of synth has them drawn, in batches of 2."""
    model = BaseModelSettings(str(folder / "model"), max_tokens=6, seed=1, batch_size=2).open()
    texts: dict[int, str] = {}
    model.sample([Draw(prompt, number) for prompt in PROMPTS[:-1] for number in range(3)][:19], texts.__setitem__)
    return [texts[index] for index in range(19)]


def shared_rollouts(folder: Path, ranks: Ranks) -> list[str]:
    """The same, asked for by rank 0; the others serve it."""
    if not ranks.writes:
        many.serve(ranks)
        return []
    many.RANKS.set(ranks)
    texts = rollouts(folder)
    ranks.gather([None])
    return texts


def divided(folder: Path, way: str, ranks: Ranks = ALONE) -> dict[str, Any]:
    """What evaluate.py and talk_to_model.py print of a model with an adapter, and evaluate.py's rows.

    The model is divided among the ranks; a single process holds it whole.
    """
    name, rows = folder / FAMILIES[way], folder / f"{way}-{ranks.size}.jsonl"
    model = ["--model", name, "--resume-file", f"{name}-adapter", *(["--shard", way] if ranks.size > 1 else [])]
    compared = ["--against", name, "--reference", name, "--reward-model", folder / "reward"]
    limits = ["--num-samples", 11, "--max-completion-length", 8, "--temperature", 0.9, "--save-samples", rows]
    typed = ["2 4", "/reset", "3 5", "6", "/quit"]
    evaluated, talked = io.StringIO(), io.StringIO()
    with redirect_stdout(evaluated):
        with_words(lambda: evaluate.evaluate(ranks), *model, *compared, *limits)
    with redirect_stdout(talked), mock.patch.object(talk_to_model, "read_line", side_effect=typed):
        with_words(lambda: talk_to_model.talk(ranks), *model, "--temp", 0.9, "--max-tokens", 12)
    return {"evaluated": evaluated.getvalue(), "talked": talked.getvalue()}


def share_sizes(folder: Path, ranks: MLXRanks) -> dict[str, list[int]]:
    """The numbers of weights that each rank holds of a divided model, by how it is divided."""

    def size(way: str) -> int:
        share = load_share(str(folder / FAMILIES[way]), None, way, ranks.group)
        return sum(array.size for _, array in tree_flatten(share.model.parameters()) if array is not None)

    return {way: ranks.gather([size(way)]) for way in FAMILIES}


def ppo_by_script(folder: Path, name: str, ranks: Ranks, *more: object) -> None:
    """ppo_training.py: the run FOLDER/NAME."""
    size = ("--batch-size", 8, "--mini-batch-size", 4, "--max-completion-length", 5, "--learning-rate", 1e-3)
    paths = ("--model", folder / "model", "--output-dir", folder / name, "--save-file", folder / f"{name}-adapter")
    kept = ("--ground-truth-reward", "--save-every", 2, "--lr-schedule", "constant", "--adap-kl-ctrl")
    words = ("--resume", folder / name) if (folder / name).exists() else (*paths, *size, *kept)
    with mock.patch.object(ppo_training, "plot_run", lambda folder: folder / "curves.png"):
        with_words(lambda: ppo_training.train(ranks), *words, *more)


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
        for name in (*SFT_RUNS, *PPO_RUNS):
            trained, found[name] = (train_by_sft if name in SFT_RUNS else train_by_ppo)(folder, name, ranks)
            weights |= {f"{name}/{key}": array for key, array in trained.items()}
        found["evaluation"] = evaluated(folder, ranks)
        found["rollouts"] = shared_rollouts(folder, ranks)
        found["divided"] = {way: divided(folder, way, ranks) for way in FAMILIES}
        found["share sizes"] = share_sizes(folder, ranks) if isinstance(ranks, MLXRanks) else {}
        ppo_by_script(folder, "begun by one", ranks, "--num-steps", 4)
        ppo_by_script(folder, "begun by two", ranks, "--num-steps", 2)
        found["refusal"] = ranks.gather([refusal(ranks)])
        if ranks.writes:
            mx.savez(str(folder / f"weights-{ranks.size}.npz"), **weights)
            (folder / f"found-{ranks.size}.json").write_text(json.dumps(found), encoding="utf-8")


def hang() -> None:
    """Stand still as a machine that hangs, or whose cable is out, for longer than the others wait."""
    subprocess.Popen(["sh", "-c", f"sleep {SILENCE + 6}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def cut() -> None:
    """Close mlx's own connections, which alone are not Python's."""
    ours = {each.fileno() for each in gc.get_objects() if type(each) is socket.socket}
    for entry in Path("/proc/self/fd").iterdir():
        if int(entry.name) not in ours and entry.is_socket():
            with suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as connection:
                connection.shutdown(socket.SHUT_RDWR)


LOSSES: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hanging": hang,
    "cut off": cut,
}


def lose(how: str, rank: str, step: int) -> None:
    """sft.py, of which `rank` is lost after `step` steps in one of LOSSES, the others at work on the next."""
    is_victim = os.environ["MLX_RANK"] == rank

    def steps(*arguments: Any) -> Iterator[Any]:
        for each in sft_steps(*arguments):
            yield each
            if is_victim and each.number == step:
                LOSSES[how]()

    with mock.patch.object(sft, "sft_steps", steps), mock.patch.object(watchdog, "SILENCE", SILENCE):
        run(sft.main)


def synthesize() -> None:
    """synth.run, of which rank 0 alone reads the run folder, as on several machines."""
    real, first = base_model.load_adapter, os.environ["MLX_RANK"] == "0"

    def loaded(model: Any, path: Path) -> Any:
        assert ("run-2" in Path(path).parts) == first, path
        return real(model, path)

    with mock.patch.object(base_model, "load_adapter", loaded):
        run(lambda: many.with_all(synth_run.main))


if __name__ == "__main__":
    if sys.argv[1] == "synth":
        del sys.argv[1]
        synthesize()
    elif sys.argv[1] == "train":
        main(Path(sys.argv[2]))
    else:
        _, _, how, rank, step, *sys.argv[1:] = sys.argv
        lose(how, rank, int(step))
