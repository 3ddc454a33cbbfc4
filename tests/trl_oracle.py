"""TRL's side of tests/trl_cases.py: runs cases through TRL 0.11.4's PPOTrainer, in a Python that has it.

    TRL_PYTHON tests/trl_oracle.py FOLDER

FOLDER holds task.json and given.safetensors; results.safetensors is written beside them. Imports nothing of the
toolkit, so that TRL's environment needs only TRL.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import tokenizers
import torch
import transformers
import trl
from safetensors.torch import load_file, save_file


def tokenizer_of(size: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of `size` words, of which TRL needs the pad alone."""
    words = {f"w{i}": i for i in range(size)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="w0", eos_token="w1")


def of_case(given: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in given.items() if name.startswith(prefix)}


def model_of(sizes: dict[str, Any], weights: dict[str, torch.Tensor], lora: dict[str, Any] | None = None) -> Any:
    """A Llama with these weights, and TRL's value head."""
    config = transformers.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)
    llama = transformers.LlamaForCausalLM(config)
    llama.load_state_dict(weights)
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", **lora) if lora else None
    return trl.AutoModelForCausalLMWithValueHead.from_pretrained(llama, peft_config=adapter)


def set_weights(model: Any, adapter: dict[str, torch.Tensor], head: dict[str, torch.Tensor], lora: bool) -> None:
    model.v_head.summary.load_state_dict(head)
    if lora:
        peft.set_peft_model_state_dict(model.pretrained_model, adapter)


def final_weights(model: Any, lora: bool) -> dict[str, torch.Tensor]:
    """What was trained, by transformers' or peft's names, and the head."""
    head = {f"head/{name}": weight.detach() for name, weight in model.v_head.summary.named_parameters()}
    if lora:
        return {**peft.get_peft_model_state_dict(model.pretrained_model), **head}
    return {**{name: weight.detach() for name, weight in model.pretrained_model.named_parameters()}, **head}


def repair(trainer: Any) -> None:
    """Undo two faults of TRL 0.11.4: clipping ends after the first gradient, and use_score_scaling raises."""
    trainer.model_params = list(trainer.model_params)  # an iterator, which the first clipping would use up
    running, update = trainer.running, trainer.running.update

    def update_to_tensors(scores: torch.Tensor) -> tuple[float, float]:
        found = update(scores)
        running.mean, running.std = torch.tensor(running.mean), torch.tensor(running.std)  # `step` calls their `to`
        return found

    running.update = update_to_tensors


def run(case: dict[str, Any], given: dict[str, torch.Tensor], task: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The results of one case by name: of each step the stats and the advantages, and the weights in the end."""
    lora = case["lora"] is not None
    model = model_of(task["sizes"], of_case(given, "policy/"), case["lora"])
    set_weights(model, of_case(given, "adapter/"), of_case(given, "head/"), lora)
    reference = None if lora else model_of(task["sizes"], of_case(given, "reference/"))
    trainer = trl.PPOTrainer(
        trl.PPOConfig(exp_name="oracle", **case["options"]), model, reference, tokenizer_of(task["sizes"]["vocab_size"])
    )
    repair(trainer)

    kept: list[torch.Tensor] = []
    compute = trainer.compute_advantages

    def compute_and_keep(values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor) -> Any:
        found = compute(values, rewards, mask)
        kept.append(found[1][mask.bool()])  # row by row, the tokens of the responses alone
        return found

    trainer.compute_advantages = compute_and_keep
    orders = iter(case["orders"])
    np.random.permutation = lambda n: np.array(next(orders))

    results: dict[str, torch.Tensor] = {}
    for number, step in enumerate(case["steps"]):
        queries, responses = ([torch.tensor(row) for row in step[name]] for name in ("queries", "responses"))
        stats = trainer.step(queries, responses, [torch.tensor(score) for score in step["scores"]])
        results[f"{number}/stats"] = torch.tensor([float(stats[name]) for name in task["stats"]])
        results[f"{number}/advantages"] = kept[-1]
    assert next(orders, None) is None
    return {**results, **{f"final/{name}": weight for name, weight in final_weights(trainer.model, lora).items()}}


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    given = load_file(folder / "given.safetensors")
    results: dict[str, torch.Tensor] = {}
    for case in task["cases"]:
        found = run(case, of_case(given, case["prefix"]), task)
        results |= {case["prefix"] + name: array.float().contiguous() for name, array in found.items()}
    save_file(results, folder / "results.safetensors")


if __name__ == "__main__":
    main()
