"""Fuse an adapter into its base: a standalone model folder that mlx_lm and transformers open.

    python fuse.py --adapter-file adapters --save-path ./sft_fine_tune/
    python fuse.py --adapter-file adapters --save-path ./sft_fine_tune/ --upload-name USER/REPO
    python fuse.py --adapter-file adapters --export-peft ./peft_adapters/

A soft prompt becomes tokens that the tokenizer prepends (models.export.fused_soft_prompt). A reward model keeps its
value head, so the folder can be used as `ppo_training.py --reward_model`; so can what --sequence-classification writes,
which transformers' AutoModelForSequenceClassification opens as well.

The fused model is compared with the adapter on a few rows, and layers of a quantized base get more bits where the KL is
above --max-fuse-kl (models.export.fusing).
"""

from models import cpu

cpu.enable()  # before mlx is imported

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from common.cli import Stopped, run
from common.errors import UserError
from common.files import atomic_folder, check_replaceable, expanded, say_replaced
from common.parser import Parser
from common.ranges import Numbers
from models.adapter_base import base_of
from models.adapters import SavedAdapter, load_adapter, read_adapter, write_adapter, write_peft
from models.export.classifier import save_classifier
from models.export.fused import write_model
from models.export.fused_soft_prompt import fuse_soft_prompt
from models.export.fusing import MAX_KL, FuseReport, fuse, fuse_measured
from models.export.gguf_file import check_gguf, write_gguf
from models.export.measuring_rows import measuring_rows
from models.export.model_card import FUSED, fuse_run, provenance_of, write_card
from models.export.prompting_tokenizer import PromptingTokenizer
from models.export.upload import check_upload, upload, upload_command
from models.loading import LoadedModel, is_made_here, load, resolve
from models.value_head import hidden_size


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", help="the base to fuse into (default: the one that the adapter was trained on)")
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
        "--max-fuse-kl",
        metavar="NATS",
        type=Numbers(least=0, most=math.inf),
        default=MAX_KL,
        help="KL to the adapter, in nats a token, above which layers of a quantized model get more bits; inf: any",
    )
    parser.add_argument(
        "--sequence-classification",
        action="store_true",
        help="write a reward model as a transformers AutoModelForSequenceClassification",
    )
    parser.add_argument("--export-gguf", action="store_true", help="also write a GGUF file in fp16")
    parser.add_argument("--gguf-path", default="ggml-model-f16.gguf", help="its name within --save-path")
    parser.add_argument(
        "--export-peft", metavar="DIR", help="instead of fusing, write the LoRA or DoRA in peft's format"
    )
    parser.add_argument(
        "--export-adapter", metavar="DIR", help="instead of fusing, write the adapter as an mlx-lm folder"
    )
    parser.add_argument(
        "--upload-name", metavar="USER/REPO", help="upload the folder to the Hugging Face hub, as private"
    )
    parser.add_argument("--public", action="store_true", help="make the upload public")
    args = parser.parse_args()
    if not args.max_fuse_kl >= 0:
        raise UserError(f"--max-fuse-kl is {args.max_fuse_kl:g}; give nats a token from 0, or inf for no limit")
    return args


def export_adapter(adapter_file: str, model: str | None, peft_folder: str | None, mlx_folder: str | None) -> None:
    """Write the adapter in other formats, without loading the base. model: the base that was named, if any."""
    for folder in filter(None, (peft_folder, mlx_folder)):
        say_replaced(folder)
    saved = read_adapter(adapter_file)
    if peft_folder:
        base = base_of(model, adapter_file, resolve)
        write_peft(peft_folder, saved, str(resolve(base)) if is_made_here(base) else base)
        print(f"wrote {adapter_file} in peft's format: {peft_folder}")
    if mlx_folder:
        write_adapter(mlx_folder, saved.weights, saved.config, saved.value_head)
        print(f"wrote {adapter_file} as mlx-lm's adapter folder: {mlx_folder}")


@dataclass(frozen=True)
class Fused:
    """What is left of an adapter once it is fused. prompting: of a soft prompt, the tokenizer that prepends it.

    report: how far the model is from the adapter; None where fusing changes nothing, or checks itself (a soft prompt).
    """

    saved: SavedAdapter
    prompting: PromptingTokenizer | None = None
    report: FuseReport | None = None


def put_in(loaded: LoadedModel, adapter_file: str, de_quantize: bool, max_kl: float) -> Fused:
    """Fuse the adapter into `loaded`, in place. max_kl: see models.export.fusing."""
    saved = load_adapter(loaded.model, adapter_file)
    kind = saved.config.fine_tune_type
    if kind not in ("soft_prompt", "none"):
        rows = measuring_rows(loaded.model, loaded.tokenizer, saved.config.provenance)
        report = fuse_measured(loaded, rows, max_kl, de_quantize)
        print("\n".join(report.lines()))
        return Fused(saved, report=report)
    fuse(loaded, de_quantize)
    if kind == "none":
        return Fused(saved)
    tokenizer = PromptingTokenizer(loaded.tokenizer._tokenizer, saved.config.num_prompt_tokens)
    loaded.model, loaded.config = fuse_soft_prompt(loaded.model, loaded.config, tokenizer.ids)
    if (head := saved.value_head) is not None:
        added = hidden_size(loaded.model) - head.weight.shape[1]
        head.weight = mx.pad(head.weight, ((0, 0), (0, added)))  # zeros for the channel that fusing adds
    return Fused(saved, tokenizer)


@dataclass(frozen=True)
class Output:
    """What to write. name, base: of the model and its base, for the model card; gguf: name of a GGUF file to add.

    flags: of this run, for the model's provenance.
    """

    folder: str
    name: str
    base: str
    classifier: bool = False
    gguf: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)


def save(loaded: LoadedModel, fused: Fused, output: Output) -> None:
    """Write model, tokenizer, value head and model card as one folder, atomically."""
    saved = fused.saved
    if output.gguf:
        check_gguf(loaded)
    with atomic_folder(output.folder, FUSED) as folder:
        if output.classifier:
            save_for_transformers(folder, loaded, saved)
        else:
            write_model(folder, loaded, saved.value_head, fused.prompting)
        runs = provenance_of(loaded.path, saved.config.provenance)
        if fused.report:
            runs.append(fuse_run(output.flags, fused.report.figures(), fused.report.layers()))
        write_card(folder, output.name, output.base, runs, saved.value_head is not None)
        if output.gguf:
            write_gguf(folder / output.gguf, folder, loaded)


def save_for_transformers(folder: Path, loaded: LoadedModel, saved: SavedAdapter) -> None:
    """Write model, tokenizer and value head as a transformers classifier of one score."""
    if saved.value_head is None:
        raise UserError(f"{saved.path} has no value head and cannot score; train it by sft.py --reward-model")
    if not save_classifier(folder, loaded, saved.value_head):
        print(f"the tokenizer does not append its EOS: add {loaded.tokenizer.eos_token} to every text to be scored")


def send(folder: str, name: str, public: bool) -> None:
    """Upload `folder` as the repository `name`. A failure and Ctrl-C both say how to continue."""
    try:
        print(f"uploaded: {upload(folder, name, public)}")
    except UserError:
        print(file=sys.stderr)  # ends the line of the progress bar
        raise
    except KeyboardInterrupt:
        raise Stopped(f"{folder} is complete; continue with: {upload_command(folder, name, public)}") from None


def main() -> None:
    args = parse_args()
    if args.export_peft or args.export_adapter:
        export_adapter(args.adapter_file, args.model, args.export_peft, args.export_adapter)
        return
    check_replaceable(args.save_path, FUSED)
    say_replaced(args.save_path)
    if Path(args.gguf_path).name != args.gguf_path or Path(args.gguf_path).suffix != ".gguf":
        raise UserError(f"--gguf-path is {args.gguf_path}; give a name within --save-path that ends in .gguf")
    if args.upload_name:
        check_upload(args.upload_name)
    args.model = base_of(args.model, args.adapter_file, resolve)
    loaded = load(args.model)
    if expanded(args.save_path).resolve() == loaded.path.resolve():
        raise UserError(f"--save-path {args.save_path} is the base model itself; name another folder")
    fused = put_in(loaded, args.adapter_file, args.de_quantize, args.max_fuse_kl)
    saved = fused.saved
    if fused.prompting and args.sequence_classification:
        raise UserError(
            f"{args.adapter_file} is a soft prompt; --sequence-classification takes a LoRA, DoRA or full fine-tune"
        )
    output = Output(
        folder=args.save_path,
        name=args.upload_name or Path(args.save_path).name,
        base=args.model,
        classifier=args.sequence_classification,
        gguf=args.gguf_path if args.export_gguf else None,
        flags={name: getattr(args, name) for name in ("model", "adapter_file", "de_quantize", "max_fuse_kl")},
    )
    save(loaded, fused, output)
    kind = "reward model (value head included)" if saved.value_head is not None else "model"
    print(f"fused {args.adapter_file} into {args.model}: the {kind} is in {args.save_path}")
    if args.upload_name:
        send(str(expanded(args.save_path)), args.upload_name, args.public)


if __name__ == "__main__":
    run(main)
