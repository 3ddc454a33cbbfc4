"""Soft prompts: learned embedding rows in front of the prompt (prompt tuning, arXiv:2104.08691).

The rows have token ids of their own, from the size of the embedding table upwards, so a soft prompt is a list of ids
that is prepended to the prompt. It works wherever ids do: in training, in mlx-lm's batch sampler, with any architecture
that has an embedding table. These ids are never sampled and never decoded.
"""

from collections.abc import Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.dora import DoRAEmbedding
from mlx_lm.tuner.lora import LoRAEmbedding

from common.errors import UserError
from models.modules import outer_modules


@mx.custom_function
def _rows_of(table: mx.array, index: mx.array) -> mx.array:
    """table (N, H), index of any shape (...). Returns table[index] (..., H)."""
    return table[index]


@_rows_of.vjp
def _rows_of_vjp(primals, cotangent, output):
    """A product with the one-hot rows: mlx's own gradient adds up the rows in varying order on a GPU."""
    table, index = primals
    one_hot = mx.arange(len(table))[:, None] == index.reshape(-1)
    return one_hot.astype(cotangent.dtype) @ cotangent.reshape(-1, cotangent.shape[-1]), mx.zeros_like(index)


class SoftPromptEmbedding(nn.Module):
    """An embedding table in which ids past the last row select the rows of `soft_prompt` (num_tokens, H)."""

    def __init__(self, embedding: nn.Module, soft_prompt: mx.array):
        super().__init__()
        self.embedding = embedding
        self.soft_prompt = soft_prompt

    def __call__(self, tokens: mx.array) -> mx.array:
        """tokens: integer ids of any shape (...). Returns (..., H) in the dtype of the table."""
        first_id = num_embeddings(self.embedding)
        soft = tokens >= first_id
        hard_rows = self.embedding(mx.where(soft, 0, tokens))
        soft_rows = _rows_of(self.soft_prompt, mx.where(soft, tokens - first_id, 0))
        return mx.where(soft[..., None], soft_rows.astype(hard_rows.dtype), hard_rows)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The tied output layer: logits of the vocabulary only, not of the soft prompt."""
        return self.embedding.as_linear(hidden)

    @property
    def weight(self) -> mx.array:
        """The table (V, H), for families that multiply by it directly, such as a tied seed_oss."""
        return self.embedding.weight


POSITION_TABLE = "wpe"  # GPT-2's: it may have more rows than the vocabulary
TABLES = (nn.Embedding, nn.QuantizedEmbedding, LoRAEmbedding, DoRAEmbedding, SoftPromptEmbedding)


def num_embeddings(embedding: nn.Module) -> int:
    """Rows of an embedding table, seen through the adapters and soft prompts that wrap it."""
    while "embedding" in embedding:
        embedding = embedding["embedding"]
    return embedding["weight"].shape[0]


def find_embedding(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the token embedding: the largest table outside the layers, with its outermost wrapper.

    Raises UserError for a model without one.
    """
    tables = {name: module for name, module in outer_modules(model) if isinstance(module, TABLES)}
    outermost = [
        name
        for name in tables
        if not (name.endswith(".embedding") and name.removesuffix(".embedding") in tables)
        and POSITION_TABLE not in name.split(".")
    ]
    if not outermost:
        raise UserError(f"{type(model).__module__} has no token embedding, which a soft prompt needs; use LoRA")
    name = max(outermost, key=lambda name: num_embeddings(tables[name]))
    return name, tables[name]


def add_soft_prompt(model: nn.Module, num_tokens: int, seed: int = 0) -> list[int]:
    """Add a soft prompt of `num_tokens` rows to `model` and return its token ids.

    Rows are initialised with the embeddings of random tokens (arXiv:2104.08691, section 2.1), in float32.
    """
    name, embedding = find_embedding(model)
    if isinstance(embedding, SoftPromptEmbedding):
        raise ValueError("the model already has a soft prompt")
    tokens = mx.random.randint(0, num_embeddings(embedding), (num_tokens,), key=mx.random.key(seed))
    wrapped = SoftPromptEmbedding(embedding, embedding(tokens).astype(mx.float32))
    model.update_modules(tree_unflatten([(name, wrapped)]))
    return soft_prompt_ids(model)


def soft_prompt_ids(model: nn.Module) -> list[int]:
    """The token ids of the model's soft prompt, to be prepended to every prompt; [] if it has none."""
    for _, module in model.named_modules():
        if isinstance(module, SoftPromptEmbedding):
            first_id = num_embeddings(module.embedding)
            return list(range(first_id, first_id + module.soft_prompt.shape[0]))
    return []


def check_ids(model: nn.Module, sequences: Iterable[Sequence[int]]) -> None:
    """Raise UserError for a token id without a row in the model's table.

    mlx does not check this: on CPU (0.32) it reads out of bounds.
    """
    highest = max((max(tokens, default=0) for tokens in sequences), default=0)
    rows = num_embeddings(find_embedding(model)[1])
    if highest >= rows + len(soft_prompt_ids(model)):
        raise UserError(
            f"the tokenizer gives the token {highest}, but the model's table has {rows} rows; "
            "use the model's own tokenizer, or resize the table to it"
        )
