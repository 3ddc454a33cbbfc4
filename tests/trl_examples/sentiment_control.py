"""Sentiment control, as code for TRL 0.11's PPOTrainer: the prompt's first token says which kind of text earns reward.

    python tests/trl_examples/sentiment_control.py MODEL

After the shape of TRL 0.11's notebook "gpt2-sentiment-control", on digits: the control token asks for even or for odd
numbers, and a function scores. tests/test_trl_examples.py runs it under TRL and, with other imports, under the toolkit.
"""

import random
import sys

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

CONTROLS = {"2": 0, "1": 1}  # control text → the remainder by 2 that is asked for
RESPONSE_LENGTH = 6

config = PPOConfig(
    model_name=sys.argv[1],
    steps=64,
    learning_rate=1e-3,
    batch_size=16,
    mini_batch_size=8,
    ppo_epochs=2,
    init_kl_coef=0.05,
    remove_unused_columns=False,
)
random.seed(1)
np.random.seed(1)

model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = create_reference_model(model)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token

dataset = Dataset.from_dict({"review": [f"{n} {n + 4} {n + 8}" for n in range(2, 50)]})
dataset = dataset.map(lambda row: {"input_ids": tokenizer.encode(row["review"], return_tensors="pt")[0, :3]})
dataset = dataset.map(lambda row: {"query": tokenizer.decode(row["input_ids"])})
dataset.set_format("pytorch")


def collator(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset, data_collator=collator)
device = ppo_trainer.accelerator.device
control_tokens = {text: tokenizer.encode(text, return_tensors="pt").squeeze().to(device) for text in CONTROLS}


def score(text, control):
    """How far the share of wanted numbers is above the share of others."""
    numbers = [int(word) for word in text.split() if word.lstrip("-").isdigit()]
    wanted = [1.0 if number % 2 == CONTROLS[control] else -1.0 for number in numbers]
    return torch.tensor(float(np.mean(wanted)) if wanted else -1.0)


generation_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
    "max_new_tokens": RESPONSE_LENGTH,
    "eos_token_id": -1,
}
history = []
for _ in range(2):
    for batch in ppo_trainer.dataloader:
        game_data = {}
        controls = random.choices(list(CONTROLS), k=config.batch_size)
        game_data["query"] = [control + " " + query for control, query in zip(controls, batch["query"], strict=True)]
        rows = zip(controls, batch["input_ids"], strict=True)
        query_tensors = [torch.cat((control_tokens[control], ids.to(device))) for control, ids in rows]
        response_tensors = []
        for query in query_tensors:
            response = ppo_trainer.generate(query, **generation_kwargs)
            response_tensors.append(response.squeeze()[-RESPONSE_LENGTH:])
        game_data["response"] = [tokenizer.decode(response.squeeze()) for response in response_tensors]
        rewards = list(map(score, game_data["response"], controls))
        stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
        for control in CONTROLS:
            own = [reward.cpu().numpy() for reward, given in zip(rewards, controls, strict=True) if given == control]
            stats["env/reward_" + control] = np.mean(own)
        ppo_trainer.log_stats(stats, game_data, rewards)
        history.append(stats)
