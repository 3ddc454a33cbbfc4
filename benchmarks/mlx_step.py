"""Our side of benchmarks/ppo_step.py: a process that takes one PPO step whenever it is asked for one.

    python benchmarks/mlx_step.py '{"task": ..., "model": ..., "kind": "lora", "tokenizer": "tokenizer.json"}'

It runs the loop of ppo_training.py on a random model that is built here. Its first line says what it is; then
every line on stdin is answered by one: the seconds of a step, and what shows that the whole of it was done; of a
number, the seconds of a sum of so many numbers over all processes of the launch.
"""

import json
import resource
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

from models.adapter_config import AdapterConfig
from models.loading import LoadedModel
from training import ppo_flags, ppo_loop, ppo_step
from training.flags import adapter_settings
from training.mlx_ranks import launched
from training.optimizer import make_optimizer
from training.ppo_learner import PPOLearner, build_policies
from training.ranks import ALONE, Ranks


def flags(task: dict[str, Any], kind: str) -> list[str]:
    """The command line of ppo_training.py that says `task`. kind: "lora" or "full"."""
    lora = ["--lora-rank", str(task["lora_rank"]), "--lora-layers", str(task["lora_layers"])]
    keys = ["--lora-keys", "self_attn.q_proj", "self_attn.v_proj"]
    return [
        *("--ground-truth-reward", "--batch-size", str(len(task["prompts"])), "--lr-schedule", "constant"),
        *("--mini-batch-size", str(task["mini_batch_size"]), "--ppo-epochs", str(task["ppo_epochs"])),
        *("--max-completion-length", str(task["new_tokens"]), "--learning-rate", str(task["learning_rate"])),
        *("--num-steps", str(10**6)),  # as many as are asked for
        *("--fine-tune-type", kind, *([*lora, *keys] if kind == "lora" else [])),
    ]


def distinct_words(prompts: list[str], completions: list[str]) -> list[float]:
    """The reward on both sides: the share of a completion's words that are no repetition."""
    return [len(set(text.split())) / len(text.split()) for text in completions]


class Stepper:
    """A random Llama with its adapter, value head and optimizer, and the prompts it is stepped on."""

    def __init__(
        self, task: dict[str, Any], model: dict[str, Any], kind: str, tokenizer: str, ranks: Ranks = ALONE
    ):  # fmt: skip
        """task, model: as in `SETTINGS` and `MODELS` of benchmarks/ppo_step.py; tokenizer: a tokenizer.json."""
        args = ppo_flags.ppo_parser(None).parse_args(flags(task, kind))
        settings = ppo_flags.ppo_settings(args)
        mx.random.seed(0)
        llama = Model(ModelArgs.from_dict({"model_type": "llama", "rms_norm_eps": 1e-6, **model}))
        llama.eval()
        # No EOS: every completion is as long as it may be.
        words = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_file=tokenizer), eos_token_ids=set())
        loaded = LoadedModel(llama, words, {}, Path(), "random")
        self.policy, reference = build_policies(loaded, settings, AdapterConfig(**adapter_settings(args)))
        optimizer = make_optimizer(task["learning_rate"], ppo_step.total_updates(settings))
        optimizer.init(self.policy.module.trainable_parameters())
        learner = PPOLearner(self.policy.module, reference, words, optimizer, settings, ranks)
        progress = ppo_loop.first_progress(settings, self.policy)
        prompts = ppo_step.Prompts(task["prompts"], settings)
        self.steps = ppo_loop.ppo_steps(learner, words, prompts, distinct_words, progress)
        mx.eval(self.policy.module.parameters(), reference.parameters(), optimizer.state)

    def step(self) -> dict[str, float]:
        """Rollout, score, advantages, update: a step of the loop of ppo_training.py, timed."""
        step = next(self.steps)
        return {
            "seconds": step.figures["rollout_seconds"] + step.figures["update_seconds"],
            "rollout_seconds": step.figures["rollout_seconds"],
            "tokens": float(step.rollout.mask.sum()),
            "updates": step.figures["updates"],
            "score": step.figures["mean_score"],
            "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux: kB
        }


def timed_step(stepper: Stepper, ranks: Ranks) -> dict[str, float]:
    """A step's figures, with the number of its sums over all processes, their bytes, and the seconds in them."""
    before = ranks.sums, ranks.summed_bytes, ranks.waited
    figures = stepper.step()
    sums, size, waited = (
        now - then for now, then in zip((ranks.sums, ranks.summed_bytes, ranks.waited), before, strict=True)
    )
    figures["peak_memory"] = sum(ranks.gather([figures["peak_memory"]]))
    return {**figures, "sums": sums, "bytes": size, "waited": waited}


def timed_sum(count: int, ranks: Ranks) -> dict[str, float]:
    """The seconds of a sum of `count` numbers, the best of five, for which all have arrived."""
    array = mx.zeros(count)
    seconds = []
    for _ in range(5):
        ranks.any(False)
        started = time.perf_counter()
        ranks.sum([array])
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds)}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints gets between the answers
    with launched() as ranks:
        stepper = Stepper(**json.loads(sys.argv[1]), ranks=ranks)
        trainable, _ = stepper.policy.sizes()
        versions = {"mlx": mx.__version__, "device": str(mx.default_device()), "blas": str(cpu.BLAS)}
        print(json.dumps({"trainable": trainable, **versions}), file=answers, flush=True)
        for line in sys.stdin:
            asked = line.strip()
            answer = timed_sum(int(asked), ranks) if asked.isdecimal() else timed_step(stepper, ranks)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
