"""A model divided among the processes of mlx.launch, for sampling from one that is too large for one machine.

mlx-lm divides it, in the families for which it can: "tensor" leaves each process a part of every layer, "pipeline"
some of the layers. Weights are read one by one, so that a process never holds more than its share and one of them.
Not here: training, for which every process holds the whole model.
"""

import hashlib
from pathlib import Path
from typing import Any

import mlx.nn as nn

from common.errors import UserError
from common.parser import Parser
from models.adapters import fuse_adapter, load_adapter, read_adapter
from models.loading import LoadedModel, load

WAYS = ("tensor", "pipeline")
SAMPLES, SAMPLE = 256, 64  # places of a file that a digest reads, and bytes at each


def add_shard_flag(parser: Parser) -> None:
    """--shard, of the scripts that sample."""
    parser.add_argument(
        "--shard",
        choices=WAYS,
        help="divide a model that is too large for one Mac among the processes of mlx.launch: each layer, or by layers",
    )


def check_shard(way: str | None, size: int, script: str) -> None:
    """Raise UserError for --shard in a single process. way: what it says; size: the number of processes."""
    if way and size == 1:
        raise UserError(
            f"--shard divides a model among several processes; start them by: mlx.launch -n 2 -- python {script}"
        )


def load_share(name: str, adapter: str | None, way: str, group: Any) -> LoadedModel:
    """This process's share of the model `name` with an adapter, if any; way: one of WAYS; group: the processes.

    Every process calls the model with the same tokens, and has the same logits. For "tensor" a LoRA is fused into its
    base first. Raises UserError where mlx-lm cannot divide the model, or not among so many.
    """

    def divide(model: nn.Module) -> None:
        check_family(model, name, way, group.size())
        if adapter:
            _put_in(model, adapter, way)
        try:
            model.shard(group) if way == "tensor" else model.model.pipeline(group)
        except ValueError as error:
            raise UserError(f"{name} cannot be divided among {group.size()} processes ({error}); start fewer") from None

    return load(name, divide)


def check_family(model: nn.Module, name: str, way: str, size: int) -> None:
    can = {"tensor": hasattr(model, "shard"), "pipeline": hasattr(getattr(model, "model", None), "pipeline")}
    if not can[way]:
        other = next((f"use --shard {each}" for each in WAYS if can[each]), "use a model of another family")
        raise UserError(f"mlx-lm has no {way} sharding for {name} ({type(model).__module__}); {other}")
    heads = getattr(getattr(model, "args", None), "num_key_value_heads", None) or size
    if way == "tensor" and heads % size:
        raise UserError(
            f"{name} has {heads} key-value heads, which {size} processes cannot share equally; start another number"
        )


def _put_in(model: nn.Module, adapter: str, way: str) -> None:
    if read_adapter(adapter).value_head is not None:
        raise UserError(f"{adapter} is a reward model, which is not divided; name another adapter")
    load_adapter(model, adapter)
    if way == "pipeline":
        return
    if any(isinstance(getattr(module, "linear", None), nn.QuantizedLinear) for module in model.modules()):
        raise UserError(
            f"{adapter} is a LoRA on quantized weights, which --shard tensor would have to fuse; fuse it first by "
            "fuse.py --de-quantize"
        )
    fuse_adapter(model)


def files_digest(folder: Path) -> str:
    """A digest of a model's weights by samples of its files, for a model that no process holds."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for index in range(SAMPLES):
                file.seek(index * size // SAMPLES)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:12]
