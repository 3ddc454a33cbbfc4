"""TRL's side of benchmarks/trl_families.py: a run of TRL 0.11.4's PPOTrainer whose rewards come from stdin.

    TRL_PYTHON benchmarks/trl_run.py '{"model": "FOLDER", "seed": 0, "max_new_tokens": 48, "lora": {"r": 8},
                                       "settings": {"learning_rate": 1e-3, "batch_size": 128}}'

Its first line says what it is. Then for each step it reads one line with the prompts, answers with the completions,
reads one line with their scores, and answers with the step's figures. Imports nothing of the toolkit, so that TRL's
environment needs only TRL.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl


class Run:
    """A folder's model with a LoRA and a value head in a PPOTrainer."""

    def __init__(
        self, model: str, seed: int, max_new_tokens: int, lora: dict[str, Any], settings: dict[str, Any]
    ) -> None:  # fmt: skip
        """lora, settings: arguments of peft's LoraConfig and TRL's PPOConfig."""
        torch.manual_seed(seed)
        special = json.loads((Path(model) / "tokenizer_config.json").read_text())
        eos = special["eos_token"]
        self.words = transformers.PreTrainedTokenizerFast(
            tokenizer_file=f"{model}/tokenizer.json", eos_token=eos, pad_token=special.get("pad_token") or eos
        )
        adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora)
        policy = trl.AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=adapter)
        # With an adapter the trainer takes the base with the adapter off for its reference.
        self.trainer = trl.PPOTrainer(trl.PPOConfig(seed=seed, **settings), policy, None, self.words)
        self.max_new_tokens = max_new_tokens

    def sample(self, prompts: list[str]) -> list[str]:
        """Completions at temperature 1, without EOS."""
        self.prompts = [torch.tensor(self.words.encode(prompt)) for prompt in prompts]
        self.completions = self.trainer.generate(
            self.prompts,
            batch_size=len(prompts),
            return_prompt=False,
            max_new_tokens=self.max_new_tokens,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=self.words.pad_token_id,
            eos_token_id=self.words.eos_token_id,
        )
        # Decoded alone, a completion would lose the space it begins with.
        whole = [torch.cat(pair) for pair in zip(self.prompts, self.completions, strict=True)]
        texts = (self.words.batch_decode(rows, skip_special_tokens=True) for rows in (self.prompts, whole))
        return [text[len(prompt) :] for prompt, text in zip(*texts, strict=True)]

    def step(self, scores: list[float]) -> dict[str, float]:
        """PPOTrainer.step on the last sample."""
        stats = self.trainer.step(self.prompts, self.completions, [torch.tensor(score) for score in scores])
        return {"mean_score": float(stats["ppo/mean_scores"]), "kl": float(stats["objective/kl"]),
                "kl_coef": float(stats["objective/kl_coef"])}  # fmt: skip


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints gets between the answers
    warnings.filterwarnings("ignore")
    run = Run(**json.loads(sys.argv[1]))
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)}
    print(json.dumps(versions), file=answers, flush=True)
    for prompts in sys.stdin:
        print(json.dumps(run.sample(json.loads(prompts))), file=answers, flush=True)
        print(json.dumps(run.step(json.loads(sys.stdin.readline()))), file=answers, flush=True)


if __name__ == "__main__":
    main()
