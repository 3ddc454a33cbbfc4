"""Detoxifying, as code for TRL 0.11's PPOTrainer: a function scores a text by how little of it is unwanted.

    python tests/trl_examples/detoxifying.py MODEL FOLDER

After the shape of TRL 0.11's script "gpt-j-6b-toxicity", on digits, where odd numbers stand for what is unwanted: the
reference shares its first layers with the model, lengths are drawn, and the model is saved as it learns.
tests/test_trl_examples.py runs it under TRL and, with other imports, under the toolkit.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
from trl.core import LengthSampler

config = PPOConfig(
    model_name=sys.argv[1],
    learning_rate=2e-3,
    ppo_epochs=4,
    mini_batch_size=4,
    batch_size=16,
    gradient_accumulation_steps=2,
    init_kl_coef=0.02,
    log_with=None,
)
model_save_path = sys.argv[2]
set_seed(config.seed)

model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = create_reference_model(model, num_shared_layers=1)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token


def build_dataset():
    prompt_length = LengthSampler(2, 4)

    def tokenize(row):
        row["input_ids"] = tokenizer.encode(row["prompt"])[: prompt_length()]
        row["query"] = tokenizer.decode(row["input_ids"])
        return row

    rows = Dataset.from_dict({"prompt": [f"{n} {n + 1} {n + 3}" for n in range(1, 81)]})
    rows = rows.map(tokenize, batched=False)
    rows.set_format(type="torch")
    return rows


def collator(data):
    return {key: [row[key] for row in data] for key in data[0]}


ppo_trainer = PPOTrainer(
    config, model, ref_model=ref_model, tokenizer=tokenizer, dataset=build_dataset(), data_collator=collator
)


def non_toxicity(text):
    numbers = [int(word) for word in text.split() if word.lstrip("-").isdigit()]
    return sum(1.0 for number in numbers if number % 2 == 0) / max(len(numbers), 1)


generation_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
}
output_length_sampler = LengthSampler(4, 8)
history = []
for _ in range(2):
    for epoch, batch in enumerate(ppo_trainer.dataloader):
        query_tensors = batch["input_ids"]
        response_tensors = []
        for query in query_tensors:
            gen_len = output_length_sampler()
            generation_kwargs["max_new_tokens"] = gen_len
            response = ppo_trainer.generate(query, **generation_kwargs)
            response_tensors.append(response.squeeze()[-gen_len:])
        batch["response"] = [tokenizer.decode(response.squeeze()) for response in response_tensors]
        rewards = [torch.tensor(non_toxicity(text)) for text in batch["response"]]
        stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
        ppo_trainer.log_stats(stats, batch, rewards)
        history.append(stats)
        if epoch % 4 == 0 and ppo_trainer.accelerator.is_main_process:
            ppo_trainer.save_pretrained(model_save_path)
