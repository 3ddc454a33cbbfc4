"""Best of n, as code for TRL 0.11: the best of several samples of the reference against one sample of a tuned model.

    python tests/trl_examples/best_of_n.py MODEL

After the shape of TRL 0.11's notebook "best_of_n", on digits: a LoRA is tuned by a few steps of PPO, with the queries
in one list, and then plain sampling, the tuned model and the best of four samples are scored by the same function.
tests/test_trl_examples.py runs it under TRL and, with other imports, under the toolkit.
"""

import sys

import numpy as np
import torch
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import LengthSampler

N_BEST_OF = 4
config = PPOConfig(
    model_name=sys.argv[1],
    learning_rate=5e-3,
    batch_size=16,
    mini_batch_size=16,
    ppo_epochs=4,
    init_kl_coef=0.02,
    adap_kl_ctrl=False,
)
lora_config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM",
                         target_modules=["q_proj", "v_proj", "down_proj"])  # fmt: skip
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name, peft_config=lora_config)
ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token
ppo_trainer = PPOTrainer(config, model, None, tokenizer)
query_tensors = [torch.tensor(tokenizer.encode(f"{n} {n + 3}")) for n in range(2, 18)]


def reward(text):
    """The share of even numbers."""
    numbers = [int(word) for word in text.split() if word.lstrip("-").isdigit()]
    return sum(1.0 for number in numbers if number % 2 == 0) / max(len(numbers), 1)


gen_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
}
output_length_sampler = LengthSampler(4, 8)
history = []
for _ in range(12):
    responses, ref_responses = ppo_trainer.generate(
        query_tensors,
        batch_size=16,
        return_prompt=False,
        generate_ref_response=True,
        length_sampler=output_length_sampler,
        **gen_kwargs,
    )
    scores = [torch.tensor(reward(text)) for text in tokenizer.batch_decode(responses)]
    history.append(ppo_trainer.step(query_tensors, responses, scores))

scores_ref, scores_tuned, scores_best_of = [], [], []
for query in query_tensors:
    gen_len = output_length_sampler()
    output = ref_model.generate(query.unsqueeze(dim=0), max_new_tokens=gen_len, **gen_kwargs).squeeze()
    scores_ref.append(reward(tokenizer.decode(output[len(query) :])))
    output = model.generate(query.unsqueeze(dim=0), max_new_tokens=gen_len, **gen_kwargs).squeeze()
    scores_tuned.append(reward(tokenizer.decode(output[len(query) :])))
    queries = query.repeat((N_BEST_OF, 1))
    output = ref_model.generate(queries, max_new_tokens=gen_len, **gen_kwargs)
    scores_best_of.append(max(reward(text) for text in tokenizer.batch_decode(output[:, len(query) :])))
means = {"ref": np.mean(scores_ref), "tuned": np.mean(scores_tuned), "best_of": np.mean(scores_best_of)}
