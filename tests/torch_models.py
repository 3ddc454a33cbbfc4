"""Small random Llamas in folders that transformers and mlx-lm both open, with the digits' tokenizer.

folder = random_llama(tmp_path)
"""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.tiny import RECIPES, build_tokenizer
from tests.chat_tokenizers import CHATML, byte_tokenizer

TOKENIZER = build_tokenizer(RECIPES["tiny-digits"])


def random_llama(folder: Path, model_class: type = LlamaForCausalLM, **settings) -> str:
    """Write a Llama with three layers and far from uniform logits. settings: changes to its configuration."""
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(TOKENIZER, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    sizes |= {"vocab_size": len(TOKENIZER), "tie_word_embeddings": True}
    config = LlamaConfig(**{**ids, **sizes, **settings})
    model_class(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def random_chat_llama(folder: Path) -> Path:
    """Write a random Llama of nine layers with a chat template and a token per byte, whose replies end soon."""
    tokenizer = byte_tokenizer(CHATML)
    ends = [tokenizer.eos_token_id, *range(10, 80)]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends, "pad_token_id": 1}
    random_llama(folder, vocab_size=len(tokenizer), num_hidden_layers=9, max_position_embeddings=1024, **ids)
    tokenizer.save_pretrained(folder)
    return folder
