"""The flags of sft.py, and what can be checked before anything is loaded. Their defaults: training.settings."""

import argparse
from dataclasses import replace

from common.errors import UserError
from common.parser import Parser, positive
from common.ranges import COUNT, COUNT_OR_ALL, FINITE, NATURAL, NOT_NEGATIVE, POSITIVE
from data.flags import add_data_flags
from models.adapter_base import MODEL_HELP
from models.adapter_config import check_adapter_path
from training.flags import add_adapter_flags, add_logits_memory, add_optimizer_flags, add_run_flags, set_defaults
from training.losses import PREFERENCE_LOSSES as LOSSES
from training.optimizer_groups import LARGE_SFT_OPTIMIZERS, SFT_OPTIMIZERS
from training.settings import SFTSettings

MAIN_FLAGS = (
    *("--model", "--train", "--test", "--data", "--reward-model", "--dpo", "--iters", "--batch-size"),
    *("--learning-rate", "--lora-layers", "--save-file", "--resume"),
)


def sft_parser(description: str | None) -> Parser:
    """The parser of sft.py. Its page in docs/ says where a default is not the walkthrough's."""
    parser = Parser(description)
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument("--train", action="store_true", help="train on BASEtrain.jsonl, validate on BASEvalid.jsonl")
    parser.add_argument("--test", action="store_true", help="report the loss on BASEtest.jsonl, after any training")
    parser.add_argument("--reward-model", action="store_true", help="train a value head by the pairwise loss")
    parser.add_argument("--dpo", action="store_true", help="learn from preference pairs, without a reward model")
    add_data_flags(parser)
    parser.add_argument("--batch-size", type=COUNT, help="rows (with --reward-model and --dpo: pairs) a step")
    parser.add_argument(
        "--gradient-accumulation-steps", "--grad-accumulation-steps", type=COUNT, help="pieces a batch is cut into"
    )
    parser.add_argument("--pack", action="store_true", help="SFT: rows of a batch end to end, without pads")
    parser.add_argument("--iters", type=COUNT, help="training steps; with --resume: extends the run")
    parser.add_argument("--epochs", type=NOT_NEGATIVE, help="passes over the rows, in place of --iters")
    parser.add_argument("--val-batches", type=COUNT_OR_ALL, help="batches of a validation, the same each time; -1: all")
    parser.add_argument("--max-length", "--max-seq-length", type=COUNT, help="tokens a row is truncated to")
    add_logits_memory(parser)
    parser.add_argument("--center-coef", type=NOT_NEGATIVE, help="keeps a reward model's scores about 0")
    add_dpo_flags(parser)
    parser.add_argument("--steps-per-report", type=COUNT, help="steps between report lines")
    parser.add_argument("--steps-per-eval", type=COUNT, help="steps between validations")
    parser.add_argument("--early-stopping", type=NATURAL, help="end after so many validations without a lower loss")
    parser.add_argument("--save-best", action="store_true", help="save the adapter of the lowest validation loss")
    parser.add_argument("--save-every", type=COUNT, default=100, help="steps between checkpoints")
    parser.add_argument(
        "--save-file",
        "--adapter-path",
        default="adapters",
        help="folder for the adapter, or .npz or .safetensors file",
    )
    parser.add_argument("--resume-adapter-file", help="start from this adapter")
    add_adapter_flags(parser, dropout=0.0)
    add_optimizer_flags(parser, SFT_OPTIMIZERS, LARGE_SFT_OPTIMIZERS)
    add_run_flags(parser)
    set_defaults(parser, SFTSettings)
    parser.show_first(*MAIN_FLAGS)
    return parser


def add_dpo_flags(parser: Parser) -> None:
    """How --dpo learns from a pair."""
    group = parser.add_argument_group("DPO")
    group.add_argument("--loss", choices=LOSSES, help="DPO's own, IPO's, or ORPO's, which needs no reference policy")
    group.add_argument("--beta", type=POSITIVE, help="reward units a nat of log ratio; ipo: its τ, orpo: its λ")
    group.add_argument("--label-smoothing", type=FINITE, help="sigmoid: share of pairs whose labels may be wrong")


def check(args: argparse.Namespace, files: bool = True) -> None:
    """Raise UserError for flags that cannot work, and `files` that cannot be written, before anything is loaded."""
    if not (args.train or args.test):
        raise UserError("neither --train nor --test is given, so there is nothing to do; add one or both")
    check_settings(SFTSettings.from_flags(args))
    positive("save-every", args.save_every)
    if args.dpo and args.reward_model:
        raise UserError("--dpo and --reward-model are both given; DPO needs no reward model: leave one out")
    if args.pack and (args.reward_model or args.grad_checkpoint):
        other = "--reward-model" if args.reward_model else "--grad-checkpoint"
        raise UserError(f"--pack does not work with {other}; leave one out")
    if args.train and files:
        check_adapter_path(args.save_file)


def check_settings(settings: SFTSettings) -> None:
    """Raise UserError for settings that cannot work."""
    for name in ("iters", "batch_size", "gradient_accumulation_steps", "steps_per_report", "steps_per_eval",
                 "max_length", "logits_memory"):  # fmt: skip
        positive(name.replace("_", "-"), getattr(settings, name))
    for name in ("epochs", "early_stopping"):
        positive(name.replace("_", "-"), getattr(settings, name), zero=True)
    if settings.val_batches == 0 or settings.val_batches < -1:
        raise UserError(f"--val-batches is {settings.val_batches}; give a number of batches, or -1 for all")
    if settings.learning_rate is not None:
        positive("learning-rate", settings.learning_rate)
    pieces = settings.gradient_accumulation_steps
    if pieces > settings.batch_size:
        raise UserError(f"--gradient-accumulation-steps {pieces} is more than --batch-size {settings.batch_size}")
    if settings.pack and settings.dpo:
        raise UserError("--pack is for SFT; leave it out, or --dpo")
    _check_dpo(settings)


def _check_dpo(settings: SFTSettings) -> None:
    for name in ("loss", "beta", "label_smoothing"):
        given = getattr(settings, name)
        if not settings.dpo and given != SFTSettings.defaults()[name]:
            raise UserError(f"--{name.replace('_', '-')} {given} is a setting of --dpo; add that, or leave it out")
    if settings.loss not in LOSSES:
        raise UserError(f"--loss is {settings.loss!r}; use one of {', '.join(LOSSES)}")
    positive("beta", settings.beta)
    if not 0 <= settings.label_smoothing < 0.5:
        raise UserError(f"--label-smoothing is {settings.label_smoothing}; it has to be at least 0 and below 0.5")
    if settings.label_smoothing and settings.loss != "sigmoid":
        raise UserError(f"--label-smoothing does not serve --loss {settings.loss}; leave it out")


def sft_settings(args: argparse.Namespace, files: bool = True) -> SFTSettings:
    """The settings that the flags say. Raises UserError as `check` does."""
    check(args, files)
    settings = SFTSettings.from_flags(args)
    return replace(settings, epochs=0.0) if args.resume else settings  # the run knows its --iters, perhaps extended
