"""SFT, reward modelling and DPO on MLX, without flags and files: what is trained, on which rows, step by step.

    loaded, settings = load("tiny-digits"), SFTSettings(iters=20)
    trainee = build_trainee(loaded, settings, AdapterConfig())
    history = train_sft(trainee, loaded.tokenizer, "rows_train.jsonl", "rows_valid.jsonl", settings)

Not here: the losses and batches (training.objectives, training.preference_tuning).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from pydantic import Field

from common.errors import UserError
from common.schemas import conforming
from data.sources import Source
from models.adapters import AdapterConfig, attach_adapter, load_adapter
from models.cpu.process import on_one_core
from models.grad_checkpoint import checkpoint_layers, is_checkpointed
from models.loading import LoadedModel
from models.packing import check_packing, packs
from models.soft_prompt import check_ids, soft_prompt_ids
from models.value_head import ScoringModel, hidden_size, load_value_head, new_value_head
from training.best import Best, SavedBest
from training.checkpoint import Trainee
from training.checkpoint_folders import DAMAGED, CheckpointState
from training.flags import step_seed
from training.mlx_ranks import sum_tree
from training.objectives import LanguageModelling, Objective, PackedLanguageModelling, RewardModelling, stacked
from training.optimizer import Optimizer, loss_and_gradients, make_optimizer, update
from training.optimizer_groups import sft_optimizer
from training.preference_tuning import PreferenceTuning, refer, start_reference
from training.ranks import ALONE, Ranks
from training.settings import SFTSettings
from training.sft_flags import check_settings

DROPOUT_STRIDE = 7919  # between the seeds of the ranks
MOVED = 1.01  # ratio of two losses that is worth a word


def build_trainee(
    loaded: LoadedModel,
    settings: SFTSettings,
    adapter: AdapterConfig | str | Path | None,
    reward_model: bool = False,
    grad_checkpoint: bool = False,
    new_head: bool = True,
) -> Trainee:
    """Put an adapter, and for a reward model a value head, on `loaded`; only they are trainable.

    adapter: a new one by its configuration, the path of one to continue from, or None. new_head: whether a reward model
    without a value head gets a random one; else it must have been trained: with the adapter, or with the model.
    """
    model, head, config = loaded.model, None, AdapterConfig("none")
    if isinstance(adapter, AdapterConfig):
        config = adapter
        attach_adapter(model, config, settings.seed)
    elif adapter is not None:
        saved = load_adapter(model, adapter)
        config, head = saved.config, saved.value_head
        config.model = loaded.name
        mx.random.seed(settings.seed)  # which a new value head draws from
    if grad_checkpoint:
        checkpoint_layers(model, config.lora_parameters["dropout"])
    new = isinstance(adapter, AdapterConfig)
    if not reward_model:
        return Trainee(model, config, model, new=new)
    if head is None:
        head = new_value_head(model, std=None) if new_head else load_value_head(loaded.path, hidden_size(model))
    if head is None:
        raise UserError(
            f"{adapter or loaded.name} has no value head, so there is no reward model to test; add --train, or name a "
            "trained one by --resume-adapter-file"
        )
    return Trainee(model, config, ScoringModel(model, head), head, new)


def make_objective(
    trainee: Trainee,
    tokenizer: Any,
    settings: SFTSettings,
    features: Mapping[str, str] | None = None,
    ranks: Ranks = ALONE,
) -> Objective:
    """What a trainee minimises, without rows as yet. features: what the rows call a key, where it has another name."""
    objective = _objective(trainee, tokenizer, settings, features)
    objective.ranks = ranks
    return objective


def _objective(
    trainee: Trainee, tokenizer: Any, settings: SFTSettings, features: Mapping[str, str] | None
) -> Objective:
    prefix = soft_prompt_ids(trainee.model)
    shared = (tokenizer, prefix, settings.batch_size, settings.max_length, settings.seed)
    if isinstance(trainee.module, ScoringModel):
        return RewardModelling(*shared, settings.center_coef, features)
    logits_bytes = settings.logits_memory * 10**6
    if settings.dpo:
        loss = (settings.loss, settings.beta, settings.label_smoothing)
        may_pack = not is_checkpointed(trainee.model) and packs(trainee.model)
        return PreferenceTuning(*shared, features, *loss, logits_bytes, may_pack)
    if settings.pack:
        check_packing(trainee.model)
    kind = PackedLanguageModelling if settings.pack else LanguageModelling
    return kind(*shared, features, settings.mask_prompt, logits_bytes)


def read_rows(objective: Objective, source: Source, model: nn.Module) -> int:
    """Read the rows of a split for the model; returns how many there are (of a reward model: how many pairs)."""
    count = objective.read(source)
    check_ids(model, (example.tokens for example in objective.examples))
    return count


def planned(settings: SFTSettings, training: Objective) -> SFTSettings:
    """The settings with `epochs` as the number of steps that they take on the rows read."""
    ranked = isinstance(training, RewardModelling) and training.rewards is not None
    if ranked and settings.gradient_accumulation_steps > 1:
        raise UserError(
            "--gradient-accumulation-steps does not serve rows with rewards, of which every two texts of a batch are "
            "ranked; leave it out, or write pairs of chosen and rejected"
        )
    if not settings.epochs:
        return settings
    return replace(settings, iters=math.ceil(settings.epochs * training.steps_per_epoch), epochs=0.0)


def make_sft_optimizer(trainee: Trainee, settings: SFTSettings) -> Optimizer:
    """The optimizer of a trainee with its schedule over the planned updates, ready to step."""
    name, rate = sft_optimizer(settings, trainee.adapter.fine_tune_type, trainee.sizes()[1])
    optimizer = make_optimizer(
        rate, settings.iters, settings.lr_schedule, settings.warmup_steps, settings.weight_decay, name
    )
    optimizer.init(trainee.module.trainable_parameters())
    return optimizer


class SFTState(CheckpointState):
    """What SFT adds to a checkpoint's state."""

    window: Annotated[list[float], Field(min_length=1)]
    skipped: Annotated[int, Field(ge=0)]
    interval: Annotated[list[float], Field(min_length=1, default_factory=lambda: [0.0])]
    train_loss: float | None = None
    best: SavedBest = SavedBest()
    warned: bool = False


@dataclass
class SFTProgress:
    """What a run carries from step to step besides weights and optimizer; a checkpoint holds all of it."""

    step: int = 0
    skipped: int = 0  # updates whose loss or gradient was not finite
    window: mx.array = field(default_factory=lambda: mx.zeros(1))  # sums of the figures since a report, or 0
    tokens: int = 0  # of the batches since then, pads not counted; not in a checkpoint, as the time is not, either
    interval: mx.array = field(default_factory=lambda: mx.zeros(1))  # and since a validation
    train_loss: float | None = None  # mean of the interval before the last validation
    best: Best = field(default_factory=Best)  # validation
    warned: bool = False  # that validation rises while training falls

    def state(self) -> dict[str, Any]:
        """For a checkpoint, which adds the step."""
        sums = {"window": self.window.tolist(), "interval": self.interval.tolist()}
        seen = {"train_loss": self.train_loss, "best": vars(self.best), "warned": self.warned}
        return {**sums, **seen, "skipped": self.skipped}

    def restore(self, state: dict[str, Any], source: object) -> None:
        """Continue from the state of the checkpoint `source`. Raises UserError for one that is damaged."""
        saved = conforming(SFTState, state, source, DAMAGED)
        self.step, self.skipped, self.window = saved.step, saved.skipped, mx.array(saved.window)
        self.interval, self.train_loss, self.warned = mx.array(saved.interval), saved.train_loss, saved.warned
        self.best = Best(**vars(saved.best))

    def overfits(self, valid_loss: float) -> str:
        """Take in a validation; returns a line on it, once a run, where it rises while the training loss falls."""
        loss, _, count, *_ = self.interval.tolist() if self.interval.size > 1 else (0.0, 0.0, 0.0)
        before, self.interval = self.train_loss, mx.zeros(1)
        if count:
            self.train_loss = loss / count
        falls = before is not None and self.train_loss is not None and self.train_loss * MOVED < before
        lowest = self.best.value
        if self.warned or not falls or lowest is None or valid_loss <= MOVED * lowest:
            return ""
        self.warned = True
        return (
            f"validation loss rises ({lowest:.4g} at step {self.best.step}, now {valid_loss:.4g}) while training loss "
            f"falls ({before:.4g}, now {self.train_loss:.4g}): the model learns the rows by heart; --save-best keeps "
            "the best adapter, --early-stopping N ends such a run"
        )


class SFTStep(NamedTuple):
    """One finished step."""

    number: int  # from 1
    skipped: bool  # its loss or gradient was not finite
    reports: list[dict[str, float]]  # figures where they are due: of training, of validation
    improved: bool = False  # its validation is the best so far
    last: bool = False  # no step comes after it
    note: str = ""  # what its validation shows, if it is worth a line


def sft_steps(
    module: nn.Module,
    optimizer: Optimizer,
    training: Objective,
    validation: Objective,
    settings: SFTSettings,
    progress: SFTProgress,
) -> Iterator[SFTStep]:
    """SFT: takes the steps that are left, one each time it is asked for the next, and updates `progress`."""
    gradients_of, ranks = loss_and_gradients(module, training.loss), training.ranks
    reported, last_report, waited = time.perf_counter(), progress.step, ranks.waited
    while not finished(settings, progress):
        # Dropout, if there is any, leaves out other features on every rank.
        mx.random.seed(step_seed(settings.seed, progress.step) + DROPOUT_STRIDE * ranks.rank)
        module.train()
        with on_one_core():
            loss, figures, gradients = accumulated(module, gradients_of, training, progress.step, settings)
            norm = update(module, optimizer, loss, gradients, settings.max_grad_norm, progress.step)
        progress.tokens += training.num_tokens(progress.step)
        del gradients  # or they would stay in memory beside those of the next step
        progress.step += 1
        skipped = norm != norm
        if skipped:
            progress.skipped += 1
        else:
            progress.window, progress.interval = progress.window + figures, progress.interval + figures
            mx.async_eval(progress.window, progress.interval)

        reports: list[dict[str, float]] = []
        now, validating, valid, improved, note = time.perf_counter(), 0.0, [], False, ""
        waiting, waits = ranks.waiting(waited, now - reported), ranks.waited
        if progress.step % settings.steps_per_eval == 0 or progress.step == settings.iters:
            valid = [validate(module, validation, settings)]
            note = progress.overfits(valid[0]["valid_loss"])
            improved = progress.best.see(progress.step, valid[0]["valid_loss"])
            validating = time.perf_counter() - now
        last = finished(settings, progress)
        if progress.step % settings.steps_per_report == 0 or last:
            reports.append(
                {
                    **means(training, progress.window, "train"),
                    "learning_rate": float(optimizer.learning_rate),
                    "grad_norm": norm,
                    "steps_per_second": (progress.step - last_report) / (now - reported),
                    "tokens_per_second": progress.tokens / (now - reported),
                    "skipped_updates": progress.skipped,
                    **waiting,
                }
            )
            progress.window, progress.tokens, reported, last_report = mx.zeros(1), 0, now, progress.step
            waited = waits
        reported, waited = reported + validating, waited + ranks.waited - waits  # no time of training's
        yield SFTStep(progress.step, skipped, reports + valid, improved, last, note)


def accumulated(
    module: nn.Module, gradients_of: Callable, training: Objective, step: int, settings: SFTSettings
) -> tuple[mx.array, mx.array, dict]:
    """Loss, sums of figures and gradients of a step, added up over the pieces of its batch: those of the whole."""
    count, ranks = settings.gradient_accumulation_steps, training.ranks
    batches = training.pieces(step, count) if count > 1 or ranks.size > 1 else [training.batch(step)]
    whole: Any = None
    for arrays in batches:
        (loss, figures), gradients = gradients_of(*arrays)
        piece = (loss, stacked(figures), gradients)
        whole = piece if whole is None else tree_map(mx.add, whole, piece)
        if count > 1:
            mx.eval(whole)  # so that the activations of one piece are gone before those of the next
    if whole is None:  # a batch of fewer rows than there are ranks
        whole = mx.array(0.0), mx.zeros(3 + len(training.more)), tree_map(mx.zeros_like, module.trainable_parameters())
    return sum_tree(ranks, whole)


def finished(settings: SFTSettings, progress: SFTProgress) -> bool:
    """Whether all steps are done, or enough validations were no better than the best."""
    return progress.step >= settings.iters or progress.best.exhausted(settings.early_stopping)


def means(objective: Objective, sums: mx.array, split: str) -> dict[str, float]:
    """Figures by their names in a report, such as train_loss, from an objective's sums; 0 where nothing was summed."""
    loss, correct, count, *more = sums.tolist() if sums.size > 1 else [0.0] * (3 + len(objective.more))
    named = {"loss": loss, "accuracy": correct, **dict(zip(objective.more, more, strict=True))}
    return {f"{split}_{name}": total / max(count, 1) for name, total in named.items()}


def validate(module: nn.Module, validation: Objective, settings: SFTSettings) -> dict[str, float]:
    """Loss and accuracy on the validation's rows: the same rows each time, so that a run's figures compare."""
    return evaluate(module, validation, settings.val_batches)


@on_one_core()
def evaluate(module: nn.Module, objective: Objective, num_batches: int = -1, split: str = "valid") -> dict[str, float]:
    """Mean loss, accuracy and the like over `num_batches` batches of rows of all lengths (-1: all), dropout off."""
    module.eval()
    totals = mx.zeros(3 + len(objective.more))
    for arrays in objective.batches(num_batches):
        _, sums = objective.loss(module, *arrays)
        totals += stacked(sums)
        mx.eval(totals)
    return means(objective, objective.ranks.sum([totals])[0], split)


def train_sft(
    trainee: Trainee,
    tokenizer: Any,
    training: Source,
    validation: Source,
    settings: SFTSettings,
    ranks: Ranks = ALONE,
) -> list[dict[str, float]]:
    """Train by SFT or DPO, or as a reward model; returns every report's figures, by the names of a run's metrics.jsonl.

    trainee: from `build_trainee`; its weights change in place. training, validation: .jsonl files, with the rows of
    docs/custom_data.md. ranks: of training.mlx_ranks.launched, where several processes call this. Nothing is printed or
    written; `models.adapters.save_adapter` saves the result. Raises UserError for settings and rows that do not fit.
    For one step at a time: `sft_steps`.
    """
    check_settings(settings)
    rows, valid_rows = (make_objective(trainee, tokenizer, settings, ranks=ranks) for _ in range(2))
    read_rows(rows, training, trainee.model)
    read_rows(valid_rows, validation, trainee.model)
    settings = planned(settings, rows)
    refer({"train": rows, "valid": valid_rows}, start_reference(trainee))
    optimizer = make_sft_optimizer(trainee, settings)
    progress, first = SFTProgress(), validate(trainee.module, valid_rows, settings)
    progress.best.see(0, first["valid_loss"])
    history = [{"step": 0, **first}]
    for step in sft_steps(trainee.module, optimizer, rows, valid_rows, settings, progress):
        history += [{"step": step.number, **report} for report in step.reports]
    return history
