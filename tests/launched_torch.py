"""What tests/test_torchrun.py runs by torchrun, and by itself in one process: short runs of PPO in PyTorch.

torchrun --nproc-per-node 2 -m tests.launched_torch FOLDER ...

writes FOLDER/weights-2.safetensors and FOLDER/found-2.json; then goes on with the run FOLDER/half by the script, and
begins another run by the flags "...", until rank 1 kills itself in its third step.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

import pytorch_ppo_training as script
from common.errors import UserError
from models.adapter_config import AdapterConfig
from models.torch_loading import load
from training import ppo_step, torch_ppo_learner
from training.ppo_loop import first_progress, ppo_steps
from training.ranks import ALONE, Ranks
from training.settings import PPOSettings
from training.torch_ranks import launched

UPDATE = torch_ppo_learner.PPOLearner.update
SHORT = {"num_steps": 3, "batch_size": 8, "mini_batch_size": 4, "max_completion_length": 5, "learning_rate": 3e-3}
GROUPS = {"num_generations": 4, "init_kl_coef": 0.1}
LORA, SOFT_PROMPT, FULL = AdapterConfig(), AdapterConfig("soft_prompt", num_prompt_tokens=4), AdapterConfig("full")
# Adapter, settings. Of a mini batch of 3 rows one of two ranks has 1, the other 2.
RUNS: dict[str, tuple[AdapterConfig, dict[str, Any]]] = {
    "gae": (
        LORA,
        {"adap_kl_ctrl": True, "horizon": 40, "step_kl": 0.01, "gradient_accumulation_steps": 2, "steps_per_eval": 2},
    ),
    "group": (SOFT_PROMPT, {**GROUPS, "advantage": "group", "batch_size": 12, "mini_batch_size": 3}),
    "rloo": (FULL, {**GROUPS, "advantage": "rloo", "entropy_coef": 0.01, "max_grad_norm": 0.1}),
    "stopped by its KL": (LORA, {"target_kl": 1e-3, "ppo_epochs": 4, "scale_scores": True}),
    "a gradient that is not finite": (LORA, {}),
}
EPS = 1e-3  # of Adam, which with its own makes whole steps of gradients that are rounding


def reward(prompts: list[str], completions: list[str]) -> list[float]:
    """A score that differs by prompt and completion."""
    return [len(set(text)) / 5 + len(prompt) / 10 for prompt, text in zip(prompts, completions, strict=True)]


@contextmanager
def not_finite(ranks: Ranks) -> Iterator[None]:
    """In the second mini batch of the run the loss of the last rank's rows is NaN."""
    calls, policy_loss = itertools.count(1), ppo_step.policy_loss

    def sometimes_nan(*arguments: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, stats = policy_loss(*arguments)
        return loss * torch.nan if next(calls) == 2 and ranks.rank == ranks.size - 1 else loss, stats

    with mock.patch.object(ppo_step, "policy_loss", sometimes_nan):
        yield


def train(folder: Path, name: str, ranks: Ranks = ALONE) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """One of RUNS on the model in `folder`: the trained weights by name, and the figures of every step."""
    adapter, changes = RUNS[name]
    settings = PPOSettings(**{**SHORT, **changes})
    ppo_step.check_settings(settings)
    loaded = load(str(folder / "model"), torch.device("cpu"))
    policy, reference = torch_ppo_learner.build_policies(loaded, settings, adapter)
    optimizer = torch_ppo_learner.make_ppo_optimizer(policy, settings)
    for part, _, _ in optimizer.parts:
        for group in part.param_groups:
            group["eps"] = EPS
    learner = torch_ppo_learner.PPOLearner(policy.module, reference, loaded, optimizer, settings, ranks)
    progress = first_progress(settings, policy)
    prompts = ppo_step.Prompts(["2", "4 6", "8", "10 12", "3", "1 2 3"], settings)
    with not_finite(ranks) if "finite" in name else nullcontext():
        steps = ppo_steps(learner, loaded.tokenizer, prompts, reward, progress, held_out=["5", "7 8", "6"])
        history = [step.figures for step in steps]
    return {key: weight.detach().clone() for key, weight in optimizer.named.items()}, history


def refusals(ranks: Ranks) -> list[str]:
    """What is said where a rank has another data, and where a rank would have nothing to do."""
    said = []
    for wrong in (
        lambda: ranks.check_same(data="ab" if ranks.rank else "cd", base_model="ef"),
        lambda: ppo_step.check_ranks(PPOSettings(batch_size=4, mini_batch_size=1), ranks),
        lambda: ppo_step.check_ranks(PPOSettings(batch_size=4, num_generations=4, advantage="rloo"), ranks),
    ):
        try:
            wrong()
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


def run_script(ranks: Ranks, *words: str) -> None:
    """The script by these ranks, without a picture."""
    with mock.patch.object(sys, "argv", ["pytorch_ppo_training.py", *words]), mock.patch.object(
        script, "plot_run", lambda folder: folder / "curves.png"
    ):
        script.train(ranks)


def dying(learner: torch_ppo_learner.PPOLearner, step: int, *arguments: Any) -> dict[str, float]:
    """`PPOLearner.update`, of which rank 1 ends in its third step as by `kill -9`, the other at work on it."""
    if step == 2 and learner.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return UPDATE(learner, step, *arguments)


def main(folder: Path, *words: str) -> None:
    weights: dict[str, torch.Tensor] = {}
    found: dict[str, Any] = {}
    torch.set_num_threads(1)
    with launched() as ranks:
        for name in RUNS:
            trained, found[name] = train(folder, name, ranks)
            weights |= {f"{name}/{key}": weight for key, weight in trained.items()}
        found["refusals"] = ranks.gather([refusals(ranks)])
        if ranks.writes:
            save_file(weights, folder / f"weights-{ranks.size}.safetensors")
            (folder / f"found-{ranks.size}.json").write_text(json.dumps(found), encoding="utf-8")
        run_script(ranks, "--resume", str(folder / "half"), "--num-steps", "4")
        with mock.patch.object(torch_ppo_learner.PPOLearner, "update", dying):
            run_script(ranks, *words)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
