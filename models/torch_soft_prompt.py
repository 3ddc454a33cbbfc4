"""Soft prompts in PyTorch: learned embedding rows in front of the prompt, with ids past the end of the table.

The twin of models.soft_prompt, with the same names and files.
"""

from typing import Any

import torch
from torch import Tensor, nn


class SoftPromptEmbedding(nn.Module):
    """An embedding table in which ids past the last row select the rows of `soft_prompt` (num_tokens, H)."""

    def __init__(self, embedding: nn.Module, first_id: int, soft_prompt: Tensor):
        super().__init__()
        self.embedding = embedding
        self.first_id = first_id
        self.soft_prompt = nn.Parameter(soft_prompt)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: integer ids of any shape (...). Returns (..., H) in the dtype of the table."""
        soft = tokens >= self.first_id
        hard_rows = self.embedding(tokens.where(~soft, 0))
        soft_rows = self.soft_prompt[(tokens - self.first_id).where(soft, 0)]
        return torch.where(soft[..., None], soft_rows.to(hard_rows.dtype), hard_rows)


def add_soft_prompt(model: Any, num_tokens: int, seed: int = 0) -> list[int]:
    """Add a soft prompt of `num_tokens` rows to `model` and return its token ids.

    Rows are initialised with the embeddings of random tokens (arXiv:2104.08691, section 2.1), in float32.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, SoftPromptEmbedding):
        raise ValueError("the model already has a soft prompt")
    table = embedding.weight
    tokens = torch.randint(table.shape[0], (num_tokens,), generator=torch.Generator().manual_seed(seed))
    rows = embedding(tokens.to(table.device)).detach().float()
    model.set_input_embeddings(SoftPromptEmbedding(embedding, table.shape[0], rows))
    return soft_prompt_ids(model)


def soft_prompt_ids(model: Any) -> list[int]:
    """The token ids of the model's soft prompt, to be prepended to every prompt; [] if it has none."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, SoftPromptEmbedding):
        return []
    return list(range(embedding.first_id, embedding.first_id + embedding.soft_prompt.shape[0]))
