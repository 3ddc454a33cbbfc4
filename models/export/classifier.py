"""Reward models in transformers' format: an AutoModelForSequenceClassification folder with one label.

    python fuse.py --adapter-file reward_adapters --save-path ./classifier/ --sequence-classification

The folder contains the body, the value head as `score.weight`, and no output layer. transformers scores the last token
that is not a pad. Ours is the EOS, so the folder's tokenizer appends it to every text and pads with another token. Only
families whose weights have the same names in mlx-lm and transformers are supported.
"""

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from common.errors import UserError, opening
from data.batching import encode_text
from data.tokenizer import mlx_tokenizer, transformers_tokenizer
from models.loading import LoadedModel, resolve
from models.random_state import kept_random_state
from models.value_head import ValueHead

# Dense families whose tensors have the same names in mlx-lm and transformers (tests/test_classifier.py opens each in
# both). Scores agree to 1e-5, except for gemma and gemma3_text: mlx-lm's gemma uses the exact GELU and transformers' an
# approximation, and mlx-lm's gemma3 rounds the embedding scale to bfloat16.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3")
HEAD = "score.weight"
PROBES = ("12 -4", "2 4 6 8", "")


def classifier_class(config: dict[str, Any]) -> str:
    """The transformers class that opens weights of this configuration as a classifier.

    Raises UserError, naming the family, if there is none or its weights have other names.
    """
    family = str(config.get("model_type"))
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(family)
    if not isinstance(name, str):
        why = "transformers has no ForSequenceClassification for it"
    elif family not in FAMILIES:
        why = f"its weights are laid out differently from {name}"
    else:
        return name
    raise UserError(
        f"--sequence-classification does not support the family {family}: {why}; omit the flag, or train the reward "
        f"model on one of {', '.join(FAMILIES)}"
    )


def save_classifier(folder: Path, loaded: LoadedModel, head: ValueHead) -> bool:
    """Write the model of `loaded` without its output layer, the head and the tokenizer into `folder`.

    Returns whether the tokenizer appends the EOS by itself. Raises UserError for unsupported families, for quantized
    weights, and if no token can serve as the pad.
    """
    name = classifier_class(loaded.config)
    if {"quantization", "quantization_config"} & loaded.config.keys():
        raise UserError(f"{loaded.name} is quantized, which transformers cannot open; add --de-quantize")
    tokenizer = copy.deepcopy(loaded.tokenizer._tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(_pad_token_id(loaded))
    expected = [encode_text(tokenizer, probe).tokens for probe in PROBES]
    tokenizer = _with_eos(tokenizer, expected)
    config = {name: value for name, value in loaded.config.items() if name != "value_head"}
    config |= {"architectures": [name], "pad_token_id": tokenizer.pad_token_id}
    config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    classifier = nn.Module()
    classifier.model, classifier.score = loaded.model["model"], head
    mlx_lm.utils.save(folder, loaded.path, classifier, tokenizer, config, donate_model=False)
    return _encoded(transformers_tokenizer(folder)) == expected


def _pad_token_id(loaded: LoadedModel) -> int:
    """A pad other than the EOS, with which transformers would score the token before the EOS."""
    tokenizer = loaded.tokenizer
    special = sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    for index in (tokenizer.pad_token_id, tokenizer.unk_token_id, *special):
        if index is not None and index != tokenizer.eos_token_id and index < loaded.config["vocab_size"]:
            return index
    raise UserError(
        f"{loaded.name} has no special token except its EOS, so there is none to pad with; "
        "omit --sequence-classification"
    )


def _with_eos(tokenizer: Any, expected: list[list[int]]) -> Any:
    """The tokenizer, configured to append the EOS; unchanged if that is not needed or does not encode as expected."""
    ending = copy.deepcopy(tokenizer)
    for name, value in (("add_bos_token", expected[0][0] == tokenizer.bos_token_id), ("add_eos_token", True)):
        setattr(ending, name, value)
        ending.init_kwargs[name] = value  # which is saved
    return ending if _encoded(tokenizer) != expected == _encoded(ending) else tokenizer


def _encoded(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(probe).input_ids for probe in PROBES]


def load_classifier(name: str) -> tuple[LoadedModel, ValueHead]:
    """Open a transformers classifier with one label in MLX: the body as a language model without an output layer, and
    the head. Raises UserError if it has another head or cannot be opened."""
    path = resolve(name)
    score: dict[str, mx.array] = {}

    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        family: Any
        family, arguments = mlx_lm.utils._get_classes(config)

        class Classifier(family):
            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                score.update({key: weights.pop(key) for key in list(weights) if key.startswith("score.")})
                weights = super().sanitize(weights) if hasattr(family, "sanitize") else weights
                return _output_layer(self, weights) | weights

        return Classifier, arguments

    with opening(name):
        with kept_random_state():
            model, config = mlx_lm.utils.load_model(path, get_model_classes=classes, trust_remote_code=False)
        tokenizer = mlx_tokenizer(path, config.get("eos_token_id"))
    if list(score) != [HEAD] or score[HEAD].shape[0] != 1:
        raise UserError(f"{name} is not a classifier with one score and no bias; use a model with num_labels 1")
    with kept_random_state():
        head = ValueHead(score[HEAD].shape[1])
    head.weight = score[HEAD].astype(mx.float32)
    return LoadedModel(model, tokenizer, config, path, name), head


def _output_layer(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Zeros for the output layer, which mlx-lm's model requires and a classifier lacks: views that take no memory."""
    names = [(key, array) for key, array in tree_flatten(model.parameters()) if key.startswith("lm_head.")]
    return {key: mx.broadcast_to(mx.zeros((), array.dtype), array.shape) for key, array in names if key not in weights}
