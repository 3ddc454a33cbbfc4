"""Writing a fused model as a GGUF file in fp16, with mlx-lm's names and metadata.

    python fuse.py --adapter-file adapters --save-path ./fused/ --export-gguf

Supports what mlx-lm's exporter supports, and rejects what it would write incorrectly: families other than llama,
mistral and mixtral, quantized weights, biases, and rope other than plain or linear. In contrast to its
`convert_to_gguf`, float32 becomes fp16, the experts of a mixture get their names, tokens get the scores of their
merges, without which texts would be tokenised differently, and byte-level vocabularies with a known pre-tokenizer and
the chat template are written, too.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.gguf import HfVocab, permute_weights, prepare_metadata, translate_weight_names

from common.errors import UserError
from common.files import atomic_file
from models.gguf_tokenizer import CONTROL, NORMAL, USER_DEFINED, split_of
from models.loading import LoadedModel

FAMILIES = ("llama", "mistral", "mixtral")
EXPERTS = {f"block_sparse_moe.switch_mlp.{name}_proj": f"ffn_{name}_exps" for name in ("gate", "up", "down")}
LARGEST = 65504.0  # of fp16


class _Vocabulary(HfVocab):
    """mlx-lm's vocabulary, with scores by the rank of the merge that produces a token."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        merges = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        pairs = (merge if isinstance(merge, list) else merge.split(" ", 1) for merge in merges)
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(pairs):
            ranks.setdefault("".join(pair), rank)
        tokens = self.tokenizer.convert_ids_to_tokens(range(self.vocab_size_base))
        self.scores = [-float(ranks.get(token, -1)) - 1 for token in tokens]

    def get_token_score(self, token_id: int) -> float:
        return self.scores[token_id] if token_id < len(self.scores) else super().get_token_score(token_id)


def check_gguf(loaded: LoadedModel) -> None:
    """Raise UserError, with the reason, for a model that cannot be written as GGUF."""
    config = loaded.config
    family, heads = config.get("model_type"), config.get("num_attention_heads", 1)
    inner = loaded.tokenizer._tokenizer.backend_tokenizer
    model = json.loads(inner.to_str())["model"]
    why = None
    if family not in FAMILIES:
        why = f"its family {family} is not one of {', '.join(FAMILIES)}"
    elif {"quantization", "quantization_config"} & config.keys():
        why = "its weights are quantized (add --de-quantize)"
    elif (config.get("head_dim") or config["hidden_size"] // heads) * heads != config["hidden_size"]:
        why = "its heads together do not have the width of its hidden states"
    elif any(name.endswith(".bias") for name, _ in tree_flatten(loaded.model.parameters())):
        why = "it has biases"
    elif _rope(config)[0] not in ("default", "linear"):
        why = f"its rope is of the type {_rope(config)[0]}"
    elif model["type"] != "BPE" or not (model.get("byte_fallback") or split_of(inner)):
        why = "its vocabulary is neither SentencePiece's nor byte-level with a known pre-tokenizer"
    elif len(loaded.tokenizer.get_vocab()) > config["vocab_size"]:
        why = "its tokenizer has more tokens than the model"
    if why:
        raise UserError(f"{loaded.name} cannot be written as GGUF: {why}; omit --export-gguf")


def write_gguf(path: Path, folder: Path, loaded: LoadedModel) -> None:
    """Write the model of `loaded`, whose tokenizer is in `folder`, to the file `path`.

    Raises UserError for weights outside the range of fp16.
    """
    config = loaded.config
    kind, theta, factor = _rope(config)
    scaling = {"type": "linear", "factor": factor} if kind == "linear" else None
    vocabulary = _Vocabulary(folder)
    described = {**config, "rope_theta": theta, "rope_scaling": scaling, "_name_or_path": loaded.name.rstrip("/")}
    metadata = prepare_metadata(described, vocabulary) | _tokenizer_metadata(vocabulary.tokenizer)
    weights = {}
    for name, weight in tree_flatten(loaded.model.parameters()):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads"]
            weight = permute_weights(
                weight, heads, config.get("num_key_value_heads", heads) if "k_proj" in name else heads
            )
        elif weight.shape[0] == config["vocab_size"]:
            weight = weight[: vocabulary.vocab_size]  # rows beyond the tokenizer's are padding
        weights[_gguf_name(name)] = _stored(name, weight)
    with atomic_file(path) as temporary:
        mx.save_gguf(str(temporary), weights, metadata)


def _tokenizer_metadata(tokenizer: Any) -> dict[str, Any]:
    """What mlx-lm's metadata lacks or says of every vocabulary as if it were SentencePiece's."""
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    metadata: dict[str, Any] = {"tokenizer.ggml.add_bos_token": mx.array(adds_bos)}
    if tokenizer.pad_token_id is not None:
        metadata["tokenizer.ggml.padding_token_id"] = mx.array(tokenizer.pad_token_id, dtype=mx.uint32)
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    if (split := split_of(tokenizer.backend_tokenizer)) is None:
        return metadata
    added = tokenizer.added_tokens_decoder
    kinds = [
        (CONTROL if added[index].special else USER_DEFINED) if index in added else NORMAL
        for index in range(len(tokenizer))
    ]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return metadata | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokenizer.convert_ids_to_tokens(range(len(tokenizer))),
        "tokenizer.ggml.token_type": mx.array(kinds, dtype=mx.int32),
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }


def _rope(config: dict[str, Any]) -> tuple[str, float, float]:
    """Type, theta and factor of a model's rope, in either generation of transformers' configurations."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    theta = config.get("rope_theta") or settings.get("rope_theta") or 10000.0
    return kind, theta, settings.get("factor", 1.0)


def _gguf_name(name: str) -> str:
    for ours, theirs in EXPERTS.items():
        name = name.replace(ours, theirs)
    return translate_weight_names(name)


def _stored(name: str, weight: mx.array) -> mx.array:
    """Norms and expert routers in float32, everything else in fp16."""
    if weight.ndim == 1 or name.endswith("block_sparse_moe.gate.weight"):
        return weight.astype(mx.float32)
    if mx.max(mx.abs(weight)).item() > LARGEST:
        raise UserError(f"{name} has values above {LARGEST:g}, the largest of fp16; omit --export-gguf")
    return weight.astype(mx.float16)
