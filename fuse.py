"""Fuse an adapter into its base: a model folder that stands alone and that mlx_lm and transformers open.

    python fuse.py --adapter-file adapters --save-path ./sft_fine_tune/

A reward model's value head goes along, so the folder serves as `ppo_training.py --reward_model`; so does the form
that --sequence-classification writes, which transformers' AutoModelForSequenceClassification opens as well. Leaves out
soft prompts: they have no weight to go into; chat and train with them by --resume-file.
"""

import argparse
from pathlib import Path

import models.fast_blas  # noqa: F401  (before mlx)
from data.errors import UserError
from data.files import atomic_folder, check_replaceable
from models.adapters import fuse_adapter, load_adapter
from models.classifier import save_classifier
from models.loading import LoadedModel, load
from models.value_head import ValueHead, save_value_head
from training import config
from training.cli import run

import mlx_lm.utils
from mlx.utils import tree_flatten, tree_map_with_path

MARKER = "config.json"


def parse_args() -> argparse.Namespace:
    parser = config.Parser(__doc__)
    parser.add_argument("--model", default="tiny-digits", help="the base that the adapter was trained on")
    parser.add_argument("--adapter-file", default="adapters", help="adapter folder, or .npz or .safetensors file")
    parser.add_argument("--save-path", default="fused_model", help="folder to write")
    parser.add_argument("-d", "--de-quantize", action="store_true", help="write a quantized base in full precision")
    parser.add_argument(
        "--sequence-classification",
        action="store_true",
        help="write a reward model as a transformers AutoModelForSequenceClassification",
    )
    return parser.parse_args()


def fuse(loaded: LoadedModel, adapter_file: str, de_quantize: bool) -> ValueHead | None:
    """Put the adapter into the weights of `loaded`, in place; returns the adapter's value head, if it has one."""
    dtypes = {name: array.dtype for name, array in tree_flatten(loaded.model.parameters())}
    saved = load_adapter(loaded.model, adapter_file)
    if saved.config.fine_tune_type == "soft_prompt":
        raise UserError(f"{adapter_file} is a soft prompt, which has no weight to fuse into; use --resume-file instead")
    fuse_adapter(loaded.model, de_quantize)
    if saved.config.fine_tune_type == "full":  # trained in float32
        loaded.model.update(
            tree_map_with_path(lambda name, array: array.astype(dtypes[name]), loaded.model.parameters())
        )
    if de_quantize:
        mlx_lm.utils.dequantize_model(loaded.model)
        loaded.config.pop("quantization", None)
        loaded.config.pop("quantization_config", None)
    return saved.value_head


def save(loaded: LoadedModel, head: ValueHead | None, save_path: str) -> None:
    """Write model, tokenizer and value head as one folder, whole or not at all."""
    with atomic_folder(save_path, MARKER) as folder:
        loaded.config.pop("value_head", None)
        if head is not None:
            loaded.config["value_head"] = save_value_head(folder, head)
        mlx_lm.utils.save(folder, loaded.path, loaded.model, loaded.tokenizer, loaded.config, donate_model=False)


def save_for_transformers(loaded: LoadedModel, head: ValueHead | None, args: argparse.Namespace) -> None:
    """Write model, tokenizer and value head as a transformers classifier of one score, whole or not at all."""
    if head is None:
        raise UserError(f"{args.adapter_file} has no value head, so it gives no score; use sft.py --reward-model")
    with atomic_folder(args.save_path, MARKER) as folder:
        ends_texts = save_classifier(folder, loaded, head)
    if not ends_texts:
        print(f"the tokenizer does not end a text by itself: add {loaded.tokenizer.eos_token} to every text to score")


def main() -> None:
    args = parse_args()
    check_replaceable(args.save_path, MARKER)
    loaded = load(args.model)
    if Path(args.save_path).resolve() == loaded.path.resolve():
        raise UserError(f"--save-path {args.save_path} is the base model itself; name another folder")
    head = fuse(loaded, args.adapter_file, args.de_quantize)
    if args.sequence_classification:
        save_for_transformers(loaded, head, args)
    else:
        save(loaded, head, args.save_path)
    kind = "reward model (value head included)" if head is not None else "model"
    print(f"fused {args.adapter_file} into {args.model}: the {kind} is in {args.save_path}")


if __name__ == "__main__":
    run(main)
