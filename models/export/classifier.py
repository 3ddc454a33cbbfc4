"""A reward model as transformers keeps one: an AutoModelForSequenceClassification folder of one label.

    python fuse.py --adapter-file reward_adapters --save-path ./classifier/ --sequence-classification

The folder holds the body, the value head as `score.weight` and no output layer. Transformers scores the last token
that is no pad; ours is the EOS, so the folder's tokenizer ends every text with it and pads with another token. Leaves
out families whose weights mlx-lm names otherwise than transformers, and PyTorch's side (rewards.torch_reward_model).
"""

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from common.errors import OPENING_ERRORS, UserError, reason
from data.batching import encode_text
from models.loading import LoadedModel, resolve
from models.random_state import kept_random_state
from models.value_head import ValueHead

# Dense families whose tensors mlx-lm and transformers call alike (tests/test_classifier.py opens each in both). Scores
# agree to 1e-5, but for gemma and gemma3_text: mlx-lm's gemma takes the exact GELU where transformers' approximates it,
# and its gemma3 rounds the scale of the embeddings to bfloat16.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3")
HEAD = "score.weight"
PROBES = ("12 -4", "2 4 6 8", "")


def classifier_class(config: dict[str, Any]) -> str:
    """The transformers class that opens the weights of this configuration as a classifier.

    Raises UserError, naming the family, where there is none or its weights have other names there.
    """
    family = str(config.get("model_type"))
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(family)
    if not isinstance(name, str):
        why = "transformers has no ForSequenceClassification of it"
    elif family not in FAMILIES:
        why = f"its weights are not laid out as {name} has them"
    else:
        return name
    raise UserError(
        f"--sequence-classification does not serve the family {family}: {why}; leave the flag out, or train the reward "
        f"model on one of {', '.join(FAMILIES)}"
    )


def save_classifier(folder: Path, loaded: LoadedModel, head: ValueHead) -> bool:
    """Fill `folder` with the model of `loaded`, less its output layer, the head and the tokenizer.

    Returns whether the tokenizer ends a text with the EOS by itself. Raises UserError for a family that transformers
    has no classifier of, for quantized weights, and where no token can serve as the pad.
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
    return _encoded(AutoTokenizer.from_pretrained(folder)) == expected


def _pad_token_id(loaded: LoadedModel) -> int:
    """A token that never ends a text: with the EOS as pad, transformers would score the token before the EOS."""
    tokenizer = loaded.tokenizer
    special = sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    for index in (tokenizer.pad_token_id, tokenizer.unk_token_id, *special):
        if index is not None and index != tokenizer.eos_token_id and index < loaded.config["vocab_size"]:
            return index
    raise UserError(
        f"{loaded.name} has no special token but its EOS, so transformers has none to pad with; "
        "leave --sequence-classification out"
    )


def _with_eos(tokenizer: Any, expected: list[list[int]]) -> Any:
    """The tokenizer, made to encode the probes as expected, with the EOS at their ends; as it is where that fails."""
    ending = copy.deepcopy(tokenizer)
    for name, value in (("add_bos_token", expected[0][0] == tokenizer.bos_token_id), ("add_eos_token", True)):
        setattr(ending, name, value)
        ending.init_kwargs[name] = value  # what is saved
    return ending if _encoded(tokenizer) != expected == _encoded(ending) else tokenizer


def _encoded(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(probe).input_ids for probe in PROBES]


def load_classifier(name: str) -> tuple[LoadedModel, ValueHead]:
    """Open a transformers classifier of one label in MLX: the body as a language model without output layer, and the
    head. Raises UserError where it has another head or cannot be opened."""
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

    try:
        with kept_random_state():
            model, config = mlx_lm.utils.load_model(path, get_model_classes=classes)
        tokenizer = mlx_lm.utils.load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except OPENING_ERRORS as error:
        raise UserError(f"{name} cannot be opened by mlx-lm ({reason(error)}); check that it is whole") from None
    if list(score) != [HEAD] or score[HEAD].shape[0] != 1:
        raise UserError(f"{name} is a classifier, but not with one score and no bias; use a model with num_labels 1")
    with kept_random_state():
        head = ValueHead(score[HEAD].shape[1])
    head.weight = score[HEAD].astype(mx.float32)
    return LoadedModel(model, tokenizer, config, path, name), head


def _output_layer(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Zeros for the output layer, which mlx-lm's model wants and a classifier has not: views that take no memory."""
    names = [(key, array) for key, array in tree_flatten(model.parameters()) if key.startswith("lm_head.")]
    return {key: mx.broadcast_to(mx.zeros((), array.dtype), array.shape) for key, array in names if key not in weights}
