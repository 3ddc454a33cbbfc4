"""Fuse an adapter into its base: a model folder that stands alone and that mlx_lm and transformers open.

    python fuse.py --adapter-file adapters --save-path ./sft_fine_tune/
    python fuse.py --adapter-file adapters --save-path ./sft_fine_tune/ --upload-name USER/REPO
    python fuse.py --adapter-file adapters --export-peft ./peft_adapters/

A soft prompt becomes tokens that the tokenizer puts first (models.export.fused_soft_prompt). A reward model's value
head goes
along, so the folder serves as `ppo_training.py --reward_model`; so does the form that --sequence-classification writes,
which transformers' AutoModelForSequenceClassification opens as well.
"""

import argparse
import sys
from pathlib import Path

from models import cpu

cpu.enable()  # before mlx is imported

import mlx.core as mx
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_map_with_path

from common.cli import Stopped, run
from common.errors import UserError
from common.files import atomic_folder, check_replaceable
from common.parser import Parser
from models.adapters import SavedAdapter, fuse_adapter, load_adapter, read_adapter, write_adapter, write_peft
from models.export.classifier import save_classifier
from models.export.fused_soft_prompt import fuse_soft_prompt
from models.export.gguf_file import check_gguf, write_gguf
from models.export.model_card import provenance_of, write_card
from models.export.prompting_tokenizer import PromptingTokenizer
from models.export.upload import check_upload, upload, upload_command
from models.loading import LoadedModel, load, resolve
from models.tiny import TINY_NAMES
from models.value_head import ValueHead, hidden_size, save_value_head

MARKER = "config.json"


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="tiny-digits", help="the base that the adapter was trained on")
    parser.add_argument(
        "--adapter-file",
        "--adapter-path",
        default="adapters",
        help="adapter folder, ours or peft's, or .npz or .safetensors file",
    )
    parser.add_argument("--save-path", default="fused_model", help="folder to write")
    parser.add_argument(
        "-d", "--de-quantize", "--dequantize", action="store_true", help="write a quantized base in full precision"
    )
    parser.add_argument(
        "--sequence-classification",
        action="store_true",
        help="write a reward model as a transformers AutoModelForSequenceClassification",
    )
    parser.add_argument("--export-gguf", action="store_true", help="write a GGUF file in fp16 as well")
    parser.add_argument("--gguf-path", default="ggml-model-f16.gguf", help="its name, within --save-path")
    parser.add_argument("--export-peft", metavar="DIR", help="don't fuse; write the LoRA or DoRA in peft's format")
    parser.add_argument("--export-adapter", metavar="DIR", help="don't fuse; write the adapter as mlx-lm's folder")
    parser.add_argument("--upload-name", metavar="USER/REPO", help="upload the folder to the Hugging Face hub, private")
    parser.add_argument("--public", action="store_true", help="let everyone see what is uploaded")
    return parser.parse_args()


def export_adapter(args: argparse.Namespace) -> None:
    """Write the adapter in another format; the base is not needed."""
    saved = read_adapter(args.adapter_file)
    if args.export_peft:
        base = saved.config.model or args.model
        write_peft(args.export_peft, saved, str(resolve(base)) if base in TINY_NAMES else base)
        print(f"wrote {args.adapter_file} in peft's format: {args.export_peft}")
    if args.export_adapter:
        write_adapter(args.export_adapter, saved.weights, saved.config, saved.value_head)
        print(f"wrote {args.adapter_file} as mlx-lm's adapter folder: {args.export_adapter}")


def fuse(loaded: LoadedModel, adapter_file: str, de_quantize: bool) -> tuple[SavedAdapter, PromptingTokenizer | None]:
    """Put the adapter into `loaded`, in place; returns it, and for a soft prompt the tokenizer that puts it first."""
    dtypes = {name: array.dtype for name, array in tree_flatten(loaded.model.parameters())}
    saved = load_adapter(loaded.model, adapter_file)
    fuse_adapter(loaded.model, de_quantize)
    if saved.config.fine_tune_type == "full":  # trained in float32
        loaded.model.update(
            tree_map_with_path(lambda name, array: array.astype(dtypes[name]), loaded.model.parameters())
        )
    if de_quantize:
        mlx_lm.utils.dequantize_model(loaded.model)
        loaded.config.pop("quantization", None)
        loaded.config.pop("quantization_config", None)
    if saved.config.fine_tune_type != "soft_prompt":
        return saved, None
    tokenizer = PromptingTokenizer(loaded.tokenizer._tokenizer, saved.config.num_prompt_tokens)
    loaded.model, loaded.config = fuse_soft_prompt(loaded.model, loaded.config, tokenizer.ids)
    if (head := saved.value_head) is not None:
        added = hidden_size(loaded.model) - head.weight.shape[1]
        head.weight = mx.pad(head.weight, ((0, 0), (0, added)))  # it reads the constant nowhere
    return saved, tokenizer


def save(
    loaded: LoadedModel, saved: SavedAdapter, prompting: PromptingTokenizer | None, args: argparse.Namespace
) -> None:
    """Write model, tokenizer, value head, model card and what else is asked for as one folder, whole or not at all."""
    if args.export_gguf:
        check_gguf(loaded)
    name = args.upload_name or Path(args.save_path).name
    with atomic_folder(args.save_path, MARKER) as folder:
        if args.sequence_classification:
            save_for_transformers(folder, loaded, saved.value_head, args)
        else:
            save_model(folder, loaded, saved.value_head, prompting)
        runs = provenance_of(loaded.path, saved.config.provenance)
        write_card(folder, name, saved.config.model or args.model, runs, saved.value_head is not None)
        if args.export_gguf:
            write_gguf(folder / args.gguf_path, folder, loaded)


def save_model(folder: Path, loaded: LoadedModel, head: ValueHead | None, prompting: PromptingTokenizer | None) -> None:
    """Write model, tokenizer and value head as mlx_lm and transformers open them."""
    loaded.config.pop("value_head", None)
    if head is not None:
        loaded.config["value_head"] = save_value_head(folder, head)
    tokenizer = prompting or loaded.tokenizer
    mlx_lm.utils.save(folder, loaded.path, loaded.model, tokenizer, loaded.config, donate_model=False)


def save_for_transformers(folder: Path, loaded: LoadedModel, head: ValueHead | None, args: argparse.Namespace) -> None:
    """Write model, tokenizer and value head as a transformers classifier of one score."""
    if head is None:
        raise UserError(f"{args.adapter_file} has no value head, so it gives no score; use sft.py --reward-model")
    if not save_classifier(folder, loaded, head):
        print(f"the tokenizer does not end a text by itself: add {loaded.tokenizer.eos_token} to every text to score")


def send(args: argparse.Namespace) -> None:
    """Upload the folder that was written. Ctrl-C says how to go on, as a failure does."""
    try:
        print(f"uploaded: {upload(args.save_path, args.upload_name, args.public)}")
    except UserError:
        print(file=sys.stderr)  # ends the line of the hub's progress bar
        raise
    except KeyboardInterrupt:
        again = upload_command(args.save_path, args.upload_name, args.public)
        raise Stopped(f"{args.save_path} is whole; go on with: {again}") from None


def main() -> None:
    args = parse_args()
    if args.export_peft or args.export_adapter:
        export_adapter(args)
        return
    check_replaceable(args.save_path, MARKER)
    if args.upload_name:
        check_upload(args.upload_name)
    loaded = load(args.model)
    if Path(args.save_path).resolve() == loaded.path.resolve():
        raise UserError(f"--save-path {args.save_path} is the base model itself; name another folder")
    saved, prompting = fuse(loaded, args.adapter_file, args.de_quantize)
    if prompting and args.sequence_classification:
        raise UserError(
            f"{args.adapter_file} is a soft prompt; --sequence-classification takes a LoRA, DoRA or full one"
        )
    save(loaded, saved, prompting, args)
    kind = "reward model (value head included)" if saved.value_head is not None else "model"
    print(f"fused {args.adapter_file} into {args.model}: the {kind} is in {args.save_path}")
    if args.upload_name:
        send(args)


if __name__ == "__main__":
    run(main)
