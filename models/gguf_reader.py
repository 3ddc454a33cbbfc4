"""Reading a GGUF file of the llama architecture: its metadata as a config.json, its tensors as transformers names them.

Serves Llama, Mistral and SmolLM files of any quantization that the gguf package can undo (mlx's own reader gives every
other group of Q4_K wrong, as of 0.32.4). Other architectures, parts of split files and mixtures of experts are refused
in one line. Needs neither mlx nor torch. Not here: the tokenizer (models.gguf_tokenizer).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, reason

MAGIC = b"GGUF"
# What the reader raises for a file that is cut short or overwritten in part.
DAMAGE = (AttributeError, LookupError, MemoryError, OSError, OverflowError, TypeError, ValueError)
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
# Of every Llama 3.1 and later; a GGUF file holds only the factors that follow from them.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class GGUFFile:
    """An opened file: metadata by key, and the reader's tensors by name (data mapped from disk, not read)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    def refuse(self, why: str) -> UserError:
        return UserError(f"{self.path} cannot be opened: {why}; name a Llama or Mistral in one GGUF file")

    def setting(self, key: str, default: Any = None) -> Any:
        """The number `llama.KEY`. Raises UserError where it is missing without a default, or differs by layer."""
        value = self.metadata.get(f"llama.{key}", default)
        if value is None:
            raise self.refuse(f"its metadata lacks llama.{key}")
        if isinstance(value, list):
            raise self.refuse(f"llama.{key} differs by layer")
        return value

    @property
    def quantization(self) -> str:
        """The type of most of its numbers, such as Q4_1."""
        numbers: Counter[str] = Counter()
        for tensor in self.tensors.values():
            numbers[tensor.tensor_type.name] += int(tensor.n_elements)
        return numbers.most_common(1)[0][0]

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says, as transformers and mlx-lm read it. Raises UserError where they could not."""
        hidden, heads = self.setting("embedding_length"), self.setting("attention.head_count")
        head_dim = self.setting("attention.key_length", hidden // heads)
        theta = _shortest(self.setting("rope.freq_base", 10000.0))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.setting(key, head_dim) != head_dim:
                raise self.refuse(f"llama.{key} is {self.setting(key)}, its heads are {head_dim} wide")
        if self.setting("expert_count", 0):
            raise self.refuse("it is a mixture of experts")
        tokens = self.token_settings
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._shape("token_embd.weight")[0],
            "hidden_size": hidden,
            "intermediate_size": self.setting("feed_forward_length"),
            "num_hidden_layers": self.setting("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.setting("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.setting("context_length"),
            "rms_norm_eps": _shortest(self.setting("attention.layer_norm_rms_epsilon")),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(theta, head_dim),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            **tokens,
        }

    @property
    def token_settings(self) -> dict[str, Any]:
        """The ids that generation needs: every token that ends a text, the first one, the padding."""
        ids = {name: self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
        ends = list(dict.fromkeys(end for end in (ids["eos"], ids["eot"]) if end is not None))
        if not ends:
            raise self.refuse("its metadata names no token that ends a text")
        named = {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"]}
        return {"eos_token_id": ends if len(ends) > 1 else ends[0], **{k: v for k, v in named.items() if v is not None}}

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        kind = self.setting("rope.scaling.type", "none")
        factor = _shortest(self.setting("rope.scaling.factor", self.setting("rope.scale_linear", 1.0)))
        if ROPE_FACTORS in self.tensors:
            return self._llama3_rope(theta, head_dim)
        if kind not in ("none", "linear"):
            raise self.refuse(f"its rope is of the type {kind}")
        return {"type": "linear", "rope_type": "linear", "factor": factor} if factor not in (0.0, 1.0) else None

    def _llama3_rope(self, theta: float, head_dim: int) -> dict[str, Any]:
        """The settings that give the file's factors by transformers' formula for the rope type llama3."""
        factors = _numbers(self.tensors[ROPE_FACTORS])
        largest = float(factors.max())
        low, high, length = LLAMA3_ROPE.values()
        turns = length / (2 * np.pi) * theta ** -(np.arange(0, head_dim, 2) / head_dim)  # within the first context
        share = np.clip((turns - low) / (high - low), 0, 1)  # of the frequency as it was before
        if factors.shape != turns.shape or not np.allclose(factors, 1 / (share + (1 - share) / largest), rtol=1e-3):
            raise self.refuse("the factors of its rope are not those of a Llama 3")
        return {"rope_type": "llama3", "factor": round(largest, 3), **LLAMA3_ROPE}

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise self.refuse(f"it holds no tensor {name}")
        return tuple(map(int, reversed(self.tensors[name].shape)))  # the file puts the innermost first

    @cached_property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For every tensor by its own name, transformers' name and the shape. UserError unless the file has just these.

        Square matrices, norms and the rest are held to the configuration, so that a wrong file is found here.
        """
        config = self.config
        hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
        widths: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
        }
        widths |= {"attn_v": (keys, hidden), "attn_output": (hidden, queries), "ffn_gate": (inner, hidden)}
        widths |= {"ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden))
        }
        for layer in range(config["num_hidden_layers"]):
            for ours, theirs in LAYER_NAMES.items():
                expected[f"blk.{layer}.{ours}.weight"] = (f"model.layers.{layer}.{theirs}.weight", widths[ours])
        expected["output_norm.weight"] = ("model.norm.weight", (hidden,))
        if not config["tie_word_embeddings"]:
            expected["output.weight"] = ("lm_head.weight", (vocab, hidden))
        self._check_tensors(expected)
        return expected

    def _check_tensors(self, expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        if unknown := sorted(self.tensors.keys() - expected.keys() - {ROPE_FACTORS}):
            raise self.refuse(f"it holds {len(unknown)} tensors that no Llama has, such as {unknown[0]}")
        for name, (_, shape) in expected.items():
            if self._shape(name) != shape:
                raise self.refuse(f"{name} has the shape {self._shape(name)} in place of {shape}")

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every weight by transformers' name, in float32. Raises UserError for a type that gguf cannot undo.

        llama.cpp's rope turns neighbouring rows of q and k together, transformers' turns the two halves of each
        head: so their rows lie in another order in the file, which is undone here.
        """
        heads = {"attn_q": self.config["num_attention_heads"], "attn_k": self.config["num_key_value_heads"]}
        for name, (theirs, shape) in self.shapes.items():
            try:
                weight = _numbers(self.tensors[name])
            except NotImplementedError:
                kind = self.tensors[name].tensor_type.name
                raise self.refuse(f"the gguf package cannot undo the quantization {kind} of {name}") from None
            count = heads.get(name.split(".")[-2])
            yield theirs, halves_of_heads(weight, count) if count else weight.reshape(shape)


def read_gguf(path: Path) -> GGUFFile:
    """Open the file at `path`. Raises UserError where it is missing, damaged, no GGUF file or none that is served."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
    if magic != MAGIC:
        raise UserError(f"{path} is no GGUF file (it starts with {magic!r}); name another, or a model folder")
    reader = _reader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    file_ = GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
    if metadata.get("split.count", 1) > 1:
        raise file_.refuse(f"it is one of {metadata['split.count']} parts (join them by llama-gguf-split --merge)")
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise file_.refuse(f"its architecture is {architecture}, not llama")
    _ = file_.shapes
    return file_


def _reader(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path} cannot be opened without the gguf package; run: pip install gguf") from None
    try:
        return gguf.GGUFReader(path)
    except DAMAGE as error:
        raise UserError(f"{path} is damaged or cut short ({reason(error)}); fetch it anew") from None


def _numbers(tensor: Any) -> np.ndarray:
    """A tensor's numbers in float32."""
    import gguf

    return gguf.dequantize(tensor.data, tensor.tensor_type)


def halves_of_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads, half, 2) as (heads, 2, half): from llama.cpp's order to transformers'."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _shortest(number: float) -> float:
    """A float32 with as few digits as tell it from its neighbours: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))
