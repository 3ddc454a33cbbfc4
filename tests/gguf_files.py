"""GGUF files for tests: a small Llama with a tokenizer of either kind, in any quantization that gguf can write."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
# Byte-level BPE writes the printable bytes as themselves and the others from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = {byte: chr(byte) for byte in PRINTABLE}
ALPHABET |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in ALPHABET)}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Fields = dict[str, Any]


def byte_level(**changes: Any) -> Fields:
    """Metadata of a tokenizer as SmolLM has it: special tokens first, then bytes, then what four merges make."""
    merges = ["h e", "l l", "he ll", "Ġ w"]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    tokens = [*specials, *ALPHABET.values(), *(merge.replace(" ", "") for merge in merges)]
    kinds = [CONTROL, CONTROL, CONTROL, USER_DEFINED, *[NORMAL] * (len(tokens) - 4)]
    fields: Fields = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": kinds, "merges": merges}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 2}
    return {**fields, "add_bos_token": False, "chat_template": CHAT_TEMPLATE, **changes}


def sentence_pieces(**changes: Any) -> Fields:
    """Metadata of a tokenizer as Llama 2 has it: no merges but a score for every piece."""
    scored = {"▁a": -1.0, "ab": -2.0, "▁ab": -3.0, "ba": -4.0}
    singles = ["▁", *"abcdefgh0123456789"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *scored, *singles]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(scored) + len(singles))]
    scores = [0.0] * 259 + [*scored.values(), *(-100.0 - n for n in range(len(singles)))]
    fields: Fields = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores}
    return {**fields, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **changes}


def write_gguf_file(
    path: Path,
    tokenizer: Fields | None = None,
    kind: str = "F32",
    tied: bool = True,
    settings: Fields | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    architecture: str = "llama",
    blocks: Mapping[str, tuple[str, np.ndarray]] | None = None,
) -> Path:
    """A random Llama. settings: metadata beside the usual, or None to leave one out; tensors: likewise.

    blocks: tensors in the quantized form that they are written in, which gguf itself cannot make.
    """
    tokenizer = byte_level() if tokenizer is None else tokenizer
    writer = gguf.GGUFWriter(path, architecture)
    usual: Fields = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
    }
    usual |= {"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.freq_base": 5000.0}
    usual |= {"attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": HIDDEN // HEADS}
    named = {f"llama.{key}": value for key, value in usual.items()} | {"general.name": "random"} | (settings or {})
    for key, value in tokenizer.items():
        named["tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"] = value
    for key, value in named.items():
        add(writer, key, value)
    for name, array in (weights(len(tokenizer["tokens"]), tied) | dict(tensors or {})).items():
        if array is not None:
            add_tensor(writer, name, array, kind)
    for name, (block_kind, array) in (blocks or {}).items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[block_kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders: dict[type, Callable[[str, Any], None]] = {bool: writer.add_bool, int: writer.add_uint32}
    adders |= {float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    if value is not None:
        adders[type(value)](key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    if array.ndim == 1 or kind == "F32":
        writer.add_tensor(name, array)
    else:
        kind_ = gguf.GGMLQuantizationType[kind]
        stored = array.astype(np.float16) if kind == "F16" else gguf.quantize(array, kind_)
        writer.add_tensor(name, stored, raw_dtype=kind_)


def weights(vocab: int, tied: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    keys = HIDDEN // HEADS * KV_HEADS
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (keys, HIDDEN), "attn_v": (keys, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN)}
    shapes |= {"ffn_down": (HIDDEN, INNER)}
    named = {f"blk.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in shapes.items()}
    named["token_embd.weight"] = (vocab, HIDDEN)
    if not tied:
        named["output.weight"] = (vocab, HIDDEN)
    found = {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in named.items()}
    norms = [f"blk.{n}.{kind}_norm.weight" for n in range(LAYERS) for kind in ("attn", "ffn")]
    found |= {
        name: (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32) for name in [*norms, "output_norm.weight"]
    }
    return found
