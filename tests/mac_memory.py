"""Estimates of the memory of a training: the table of docs/which_mac.md.

tests/test_mac_memory.py holds them to models that are built, and to peaks that are measured (Linux CPU).

python -m tests.mac_memory        prints it
"""

from typing import NamedTuple

from models.token_stats import LOGITS_BYTES

BITS = {"bfloat16": 16.0, "8-bit": 8.5, "4-bit": 4.5}  # with the scale and bias of every group of 64 weights
TRAINED = 16  # bytes of a trained weight: itself, its gradient and Adam's two moments, each float32
MACS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)  # GB
SHARE = 2 / 3  # of a Mac's memory that is counted on; the rest is left to macOS
BATCH, LENGTH, RANK, LAYERS = 4, 512, 8, 16  # of the table: rows, tokens a row, and sft.py's LoRA defaults


class Shape(NamedTuple):
    """A Llama-like model, as its config.json describes it. width: of a head."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    width: int
    vocabulary: int
    tied: bool


SHAPES = {
    "Qwen3 0.6B": Shape(1024, 28, 3072, 16, 8, 128, 151_936, True),
    "TinyLlama 1.1B": Shape(2048, 22, 5632, 32, 4, 64, 32_000, False),
    "Llama 3.2 3B": Shape(3072, 28, 8192, 24, 8, 128, 128_256, True),
    "Mistral 7B v0.3": Shape(4096, 32, 14_336, 32, 8, 128, 32_768, False),
    "Llama 3.1 8B": Shape(4096, 32, 14_336, 32, 8, 128, 128_256, False),
    "Qwen2.5 14B": Shape(5120, 48, 13_824, 40, 8, 128, 152_064, False),
}


def linear_layers(shape: Shape) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one block: q, k, v, o, gate, up, down."""
    h, i = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.width, shape.kv_heads * shape.width
    return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]


def parameters(shape: Shape) -> int:
    """All weights; biases are not counted."""
    block = sum(inputs * outputs for inputs, outputs in linear_layers(shape)) + 2 * shape.hidden
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return embeddings + shape.layers * block + shape.hidden


def lora_parameters(shape: Shape, rank: int = RANK, layers: int = LAYERS) -> int:
    """Those of a LoRA on every linear layer of the last `layers` blocks."""
    return min(layers, shape.layers) * sum(rank * (inputs + outputs) for inputs, outputs in linear_layers(shape))


def kv_cache(shape: Shape, tokens: int, size: int = 2) -> int:
    """Bytes that sampling holds for so many tokens of all completions in flight; size: bytes of a number."""
    return 2 * shape.layers * shape.kv_heads * shape.width * tokens * size


def activations(shape: Shape, batch: int, length: int, size: int = 2, grad_checkpoint: bool = False) -> int:
    """Bytes that a forward pass keeps for the gradient: intermediate results, and attention scores in float32."""
    tokens, inner = batch * length, 6 * shape.hidden + 2 * shape.kv_heads * shape.width + 4 * shape.intermediate
    block = tokens * inner * size + 2 * tokens * shape.heads * length * 4
    return block + shape.layers * tokens * shape.hidden * size if grad_checkpoint else shape.layers * block


def logits(shape: Shape, batch: int, length: int) -> int:
    """Bytes of the logits, their softmax and the gradients of both, in float32, as far as --logits-memory allows."""
    return min(4 * batch * length * shape.vocabulary * 4, LOGITS_BYTES)


def training(shape: Shape, kind: str, grad_checkpoint: bool, batch: int = BATCH, length: int = LENGTH) -> float:
    """Bytes of a training step. kind: a precision of the base (BITS), which a LoRA stands on; or "full"."""
    size = 4 if kind == "full" else 2
    # Below the lowest layer that is trained no gradient passes, and nothing is kept.
    passed = shape if kind == "full" else shape._replace(layers=min(LAYERS, shape.layers))
    held = activations(passed, batch, length, size, grad_checkpoint) + logits(shape, batch, length)
    if kind == "full":
        return parameters(shape) * TRAINED + held
    return parameters(shape) * BITS[kind] / 8 + lora_parameters(shape) * TRAINED + held


def cell(size: float) -> str:
    """Gigabytes, and the smallest Mac that has them to spare."""
    mac = next((memory for memory in MACS if size / 1e9 <= SHARE * memory), None)
    return f"{size / 1e9:.1f} → {f'{mac} GB' if mac else 'none'}"


def table() -> str:
    """The table in Markdown."""
    columns = ["model", "parameters", *(f"weights, {name}" for name in BITS), "KV cache per 1000 tokens",
               "LoRA on 4-bit, `--grad-checkpoint`", "LoRA on 4-bit", "LoRA on bfloat16", "full"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, shape in SHAPES.items():
        weights = [f"{parameters(shape) * bits / 8e9:.1f}" for bits in BITS.values()]
        runs = [("4-bit", True), ("4-bit", False), ("bfloat16", False), ("full", False)]
        sizes = [cell(training(shape, *run)) for run in runs]
        row = [name, f"{parameters(shape) / 1e9:.2f} billion", *weights, f"{kv_cache(shape, 1000) / 1e9:.2f}", *sizes]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
