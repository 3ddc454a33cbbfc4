"""Our side of benchmarks/ppo_step.py: a process that takes one PPO step whenever it is asked for one.

    python benchmarks/mlx_step.py '{"task": ..., "model": ..., "kind": "lora", "tokenizer": "tokenizer.json"}'

It runs the functions of ppo_training.py, on a random model that is built here. Its first line says what it is; then
every line on stdin is answered by one: the seconds of a step, and what shows that the whole of it was done.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import cpu

cpu.enable()  # before mlx is imported

import mlx.core as mx
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

import ppo_training
from models.loading import LoadedModel
from training import ppo_flags, ppo_step
from training.flags import step_seed
from training.optimizer import loss_and_gradients, make_optimizer

LORA = ["--lora-rank", "16", "--lora-layers", "-1", "--lora-keys", "self_attn.q_proj", "self_attn.v_proj"]


def flags(task: dict[str, Any], kind: str) -> list[str]:
    """The command line of ppo_training.py that says `task`. kind: "lora" or "full"."""
    return [
        *("--ground-truth-reward", "--batch-size", str(len(task["prompts"])), "--lr-schedule", "constant"),
        *("--mini-batch-size", str(task["mini_batch_size"]), "--ppo-epochs", str(task["ppo_epochs"])),
        *("--max-completion-length", str(task["new_tokens"]), "--learning-rate", str(task["learning_rate"])),
        *("--fine-tune-type", kind, *(LORA if kind == "lora" else [])),
    ]


def distinct_words(prompts: list[str], completions: list[str]) -> list[float]:
    """The reward on both sides: the share of a completion's words that are no repetition."""
    return [len(set(text.split())) / len(text.split()) for text in completions]


class Stepper:
    """A random Llama with its adapter, value head and optimizer, and the prompts it is stepped on."""

    def __init__(self, task: dict[str, Any], model: dict[str, Any], kind: str, tokenizer: str):
        """task, model: as `TASK` and `MODELS` of benchmarks/ppo_step.py; tokenizer: a tokenizer.json."""
        self.args = ppo_flags.ppo_parser(None).parse_args(flags(task, kind))
        ppo_flags.check(self.args)
        mx.random.seed(0)
        llama = Model(ModelArgs.from_dict({"model_type": "llama", "rms_norm_eps": 1e-6, **model}))
        llama.eval()
        # No EOS: every completion is as long as it may be.
        words = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_file=tokenizer), eos_token_ids=set())
        self.loaded = LoadedModel(llama, words, {}, Path(), "random")
        self.trainee, self.reference = ppo_training.build_policies(self.args, self.loaded)
        self.optimizer = make_optimizer(self.args.learning_rate, ppo_step.total_updates(self.args))
        self.optimizer.init(self.trainee.module.trainable_parameters())
        self.gradients_of = loss_and_gradients(self.trainee.module, ppo_training.make_loss(self.args))
        self.progress = ppo_step.Progress(ppo_step.make_controller(self.args))
        self.prompts = task["prompts"]
        mx.eval(self.trainee.module.parameters(), self.reference.parameters(), self.optimizer.state)

    def step(self) -> dict[str, float]:
        """Rollout, score, advantages, update: what the loop of ppo_training.py does, timed."""
        args, progress = self.args, self.progress
        started, kl_coef = time.perf_counter(), progress.controller.value
        mx.random.seed(step_seed(args.seed, progress.step))
        rollout, _, figures = ppo_training.roll_out(
            args, self.trainee, self.reference, self.loaded.tokenizer, self.prompts, distinct_words, progress.moments
        )
        sampled = time.perf_counter()
        advantages, returns = ppo_step.advantages_and_returns(args, rollout, kl_coef)
        stats = ppo_training.optimise(
            args, progress.step, self.trainee.module, self.optimizer, self.gradients_of,
            rollout, advantages, returns, kl_coef,
        )  # fmt: skip
        progress.controller.update(figures["kl"], args.batch_size)
        ended = time.perf_counter()
        progress.step += 1
        return {
            "seconds": ended - started,
            "rollout_seconds": sampled - started,
            "tokens": float(rollout.mask.sum()),
            "updates": stats["updates"],
            "score": figures["mean_score"],
        }


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints gets between the answers
    stepper = Stepper(**json.loads(sys.argv[1]))
    trainable, _ = stepper.trainee.sizes()
    versions = {"mlx": mx.__version__, "device": str(mx.default_device()), "blas": str(cpu.BLAS)}
    print(json.dumps({"trainable": trainable, **versions}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(stepper.step()), file=answers, flush=True)


if __name__ == "__main__":
    main()
