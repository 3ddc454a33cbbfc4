"""TRL's side of benchmarks/ppo_step.py: the same step by TRL 0.11.4's PPOTrainer, in a Python that has it.

    TRL_PYTHON benchmarks/trl_step.py '{"task": ..., "model": ..., "kind": "lora", "tokenizer": "tokenizer.json"}'

It talks as benchmarks/mlx_step.py does. Imports nothing of the toolkit, so that TRL's environment needs only TRL.
"""

import json
import resource
import sys
import time
import warnings
from typing import Any

import peft
import torch
import transformers
import trl

NO_EOS = -1  # an id that is never sampled: every completion is as long as it may be


class Stepper:
    """A random Llama in a PPOTrainer, and the prompts it is stepped on."""

    def __init__(self, task: dict[str, Any], model: dict[str, Any], kind: str, tokenizer: str):
        """task, model: as in `SETTINGS` and `MODELS` of benchmarks/ppo_step.py; tokenizer: a tokenizer.json."""
        torch.manual_seed(0)
        words = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer, pad_token="<pad>", eos_token="<eos>")
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(eos_token_id=None, bos_token_id=None, **model))
        adapter = None
        if kind == "lora":
            layers = list(range(model["num_hidden_layers"]))
            adapter = peft.LoraConfig(
                r=task["lora_rank"],
                target_modules=["q_proj", "v_proj"],
                task_type="CAUSAL_LM",
                layers_to_transform=layers if task["lora_layers"] < 0 else layers[-task["lora_layers"] :],
            )
        policy = trl.AutoModelForCausalLMWithValueHead.from_pretrained(llama, peft_config=adapter)
        # With an adapter the trainer takes the base with the adapter off for its reference.
        reference = None if adapter else trl.create_reference_model(policy)
        settings = trl.PPOConfig(
            batch_size=len(task["prompts"]),
            mini_batch_size=task["mini_batch_size"],
            ppo_epochs=task["ppo_epochs"],
            learning_rate=task["learning_rate"],
        )
        self.trainer = trl.PPOTrainer(settings, policy, reference, words)
        self.words, self.new_tokens = words, task["new_tokens"]
        self.prompts = task["prompts"]

    def step(self) -> dict[str, float]:
        """Generate in one batch, score, and PPOTrainer.step, timed."""
        started = time.perf_counter()
        prompts = [torch.tensor(self.words.encode(prompt)) for prompt in self.prompts]
        completions = self.trainer.generate(
            prompts,
            batch_size=len(prompts),
            return_prompt=False,
            max_new_tokens=self.new_tokens,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=self.words.pad_token_id,
            eos_token_id=NO_EOS,
        )
        texts = self.words.batch_decode(completions, skip_special_tokens=True)
        scores = [torch.tensor(len(set(text.split())) / len(text.split())) for text in texts]
        sampled = time.perf_counter()
        before = self.updates()
        stats = self.trainer.step(prompts, completions, scores)
        ended = time.perf_counter()
        return {
            "seconds": ended - started,
            "generate_seconds": sampled - started,
            "tokens": float(sum(len(completion) for completion in completions)),
            "updates": self.updates() - before,
            "score": float(stats["ppo/mean_scores"]),
            "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux: kB
        }

    def updates(self) -> int:
        """Optimizer steps so far, as Adam counts them."""
        state = self.trainer.optimizer.state.values()
        return int(next(iter(state))["step"]) if state else 0

    def trainable(self) -> int:
        return sum(weight.numel() for weight in self.trainer.model.parameters() if weight.requires_grad)


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints gets between the answers
    warnings.filterwarnings("ignore")
    stepper = Stepper(**json.loads(sys.argv[1]))
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)}
    device, threads = str(stepper.trainer.accelerator.device), torch.get_num_threads()
    ready = {"trainable": stepper.trainable(), **versions, "device": device, "threads": threads}
    print(json.dumps(ready), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(stepper.step()), file=answers, flush=True)


if __name__ == "__main__":
    main()
