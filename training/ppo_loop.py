"""PPO's loop and its run folder, for MLX and PyTorch: rollout, score, advantages, update, report, save.

What differs is a `Learner`: training.ppo_learner has MLX's, training.torch_ppo_learner PyTorch's.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from common.cli import Stopped, StopSignal
from common.schemas import Schema, conforming
from data.batching import encode_prompt
from data.decoding import completion_texts
from rewards.combined import Reward, Scored, score
from training import ppo
from training.advantages import advantages_and_returns
from training.best import Best, SavedBest
from training.checkpoint_folders import (
    DAMAGED,
    CheckpointState,
    drop_other_bests,
    may_save_stopped,
    open_for_all,
    restore_newest,
    stopped_words,
)
from training.console import PPO_COLUMNS
from training.flags import describe
from training.metrics import NoLog, RunLog, figures_at, provenance, read_metrics
from training.optimizer_groups import ppo_optimizer, step_kl
from training.plots import LivePicture
from training.ppo_step import (
    Prompts,
    group_figures,
    kl_unit,
    least_deviation,
    make_controller,
    make_step_size,
    own_rows,
    rate_share,
    rollout_figures,
    score_signal,
    shape_scores,
    value_figures,
)
from training.ranks import ALONE, Ranks
from training.rollout import Rollout, has_eos
from training.settings import PPOSettings
from training.signs import Signs

Array = Any  # mlx.core.array or torch.Tensor
EVALUATION = 1_000_002  # the seed of a step that no run reaches
SAMPLES_SHOWN = 8  # completions in a table of samples


class Learner(Protocol):
    """A policy that learns: what a step does in one of the frameworks."""

    settings: PPOSettings
    eos_token_ids: set[int]
    ranks: Ranks  # the processes that share the rows of what follows; each calls all of it, and gets the whole

    def seed(self, step: int) -> None:
        """Make what is drawn in `step` (from 0) depend on the run's seed and the step alone."""

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """One completion per prompt, as token ids."""

    def experience(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], scores: np.ndarray
    ) -> tuple[Rollout, Array]:
        """The rollout of completions with their scores (B,), and the entropy (B, C) of the policy in nats."""

    def update(
        self, step: int, rollout: Rollout, advantages: Array, returns: Array, kl_coef: float, lr_factor: float = 1.0
    ) -> dict[str, float]:
        """Update the policy on one rollout, at `lr_factor` times the schedule's rate. Returns the stats, averaged over
        the mini batches."""


class SavedMoments(Schema):
    """The fields of ppo.RunningMoments."""

    count: Annotated[int, Field(ge=0)]
    mean: float
    squares: Annotated[float, Field(ge=0)]


class PPOState(CheckpointState):
    """What PPO adds to a checkpoint's state."""

    kl_coef: Annotated[float, Field(ge=0)]
    lr_factor: Annotated[float, Field(gt=0)]
    moments: SavedMoments
    seconds: Annotated[float, Field(ge=0)]
    best: SavedBest = SavedBest(higher=True)


@dataclass
class Progress:
    """What a run carries from step to step besides weights and optimizer; a checkpoint holds all of it."""

    controller: ppo.AdaptiveKLController | ppo.FixedKLController
    step_size: ppo.StepSizeController
    moments: ppo.RunningMoments = field(default_factory=ppo.RunningMoments)
    step: int = 0
    seconds: float = 0.0
    best: Best = field(default_factory=lambda: Best(higher=True))  # held-out score

    def state(self) -> dict[str, Any]:
        """For a checkpoint, which adds the step."""
        controllers = {"kl_coef": self.controller.value, "lr_factor": self.step_size.value}
        seen = {"moments": vars(self.moments), "best": vars(self.best)}
        return {**controllers, **seen, "seconds": self.seconds}

    def restore(self, state: dict[str, Any], source: object) -> None:
        """Continue from the state of the checkpoint `source`. Raises UserError for one that is damaged."""
        saved = conforming(PPOState, state, source, DAMAGED)
        self.step, self.seconds = saved.step, saved.seconds
        self.controller.value, self.step_size.value = saved.kl_coef, saved.lr_factor
        self.moments = ppo.RunningMoments(saved.moments.count, saved.moments.mean, saved.moments.squares)
        self.best = Best(**vars(saved.best))


def size(policy: Any) -> tuple[str, int]:
    """What defaults depend on: the kind of a Trainee's adapter, and how many weights its model has in all."""
    return policy.adapter.fine_tune_type, policy.sizes()[1]


def first_progress(settings: PPOSettings, policy: Any) -> Progress:
    """The progress of a run before its first step. policy: a Trainee of either framework."""
    return Progress(make_controller(settings), make_step_size(settings, *size(policy)))


class Step(NamedTuple):
    """One finished step."""

    number: int  # from 1
    figures: dict[str, float]  # of a report line, in its order
    scored: Scored  # prompts, completions and scores, as the reward gave them
    rollout: Rollout  # its scores are those that training saw


def ppo_steps(
    learner: Learner, tokenizer: Any, prompts: Prompts, reward: Reward, progress: Progress,
    true_reward: Reward | None = None, held_out: Sequence[str] = (),
) -> Iterator[Step]:  # fmt: skip
    """PPO: takes the steps that are left, one each time it is asked for the next, and updates `progress`.

    true_reward: a second reward, reported as true_score and not trained on. held_out: prompts whose scores are reported
    as held_out_score where they are due, which decide on the best step and an early end.
    """
    settings = learner.settings
    while not finished(settings, progress):
        started, lr_factor = time.perf_counter(), progress.step_size.value
        waited = learner.ranks.waited
        learner.seed(progress.step)
        rollout, scored, figures = roll_out(learner, tokenizer, prompts.batch(progress.step), reward, progress.moments)
        sampled = time.perf_counter()
        kl_coef = progress.controller.value * kl_unit(settings, progress.moments)
        least = least_deviation(settings, progress.moments, figures["score_signal"])
        advantages, returns = advantages_and_returns(rollout, settings, kl_coef, least)
        stats = learner.update(progress.step, rollout, advantages, returns, kl_coef, lr_factor)
        progress.controller.update(figures["kl"], settings.batch_size)
        length, share = figures["completion_length"], figures["score_signal"] * rate_share(settings, progress.step)
        progress.step_size.update(stats.get("approx_kl", math.nan) * length, figures["entropy"] * length, share)
        ended = time.perf_counter()
        waiting = learner.ranks.waiting(waited, ended - started)
        progress.step += 1
        progress.seconds += ended - started
        if true_reward is not None:
            figures["true_score"] = float(np.mean(true_reward(scored.prompts, scored.completions)))
        figures |= {"kl_coef": kl_coef, "lr_factor": lr_factor, **value_figures(settings, rollout, returns), **stats}
        figures |= {"rollout_seconds": sampled - started, "update_seconds": ended - sampled, **waiting}
        tokens = figures["completion_length"] * settings.batch_size
        figures["tokens_per_second"] = tokens / (ended - started)  # sampled, scored and trained on
        if held_out and evaluation_is_due(settings, progress.step):
            figures["held_out_score"] = held_out_score(learner, tokenizer, held_out, reward)
            progress.best.see(progress.step, figures["held_out_score"])
        yield Step(progress.step, {**figures, "seconds": progress.seconds}, scored, rollout)


def finished(settings: PPOSettings, progress: Progress) -> bool:
    """Whether all steps are done, or enough held-out scores were no better than the best."""
    return progress.step >= settings.num_steps or progress.best.exhausted(settings.early_stopping)


def evaluation_is_due(settings: PPOSettings, step: int) -> bool:
    """Whether the held-out prompts are scored after `step` steps: every steps_per_eval, and at the end."""
    every = settings.steps_per_eval
    return every > 0 and (step % every == 0 or step == settings.num_steps)


def held_out_score(learner: Learner, tokenizer: Any, prompts: Sequence[str], reward: Reward) -> float:
    """Mean score of batch_size completions of `prompts`, drawn alike every time; nothing else is changed by it."""
    learner.seed(EVALUATION)
    asked = [prompts[i % len(prompts)] for i in range(learner.settings.batch_size)]
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in asked]
    texts = completion_texts(tokenizer, prompt_ids, learner.sample(prompt_ids))
    return float(np.mean(score_all(learner, reward, asked, texts).scores))


def roll_out(
    learner: Learner, tokenizer: Any, prompts: list[str], reward: Reward, moments: ppo.RunningMoments
) -> tuple[Rollout, Scored, dict[str, float]]:
    """Sample one completion per prompt, score it, and recompute the logprobs of policy and reference.

    Returns the rollout, the texts with their scores, and figures for the report. Updates `moments` with the scores.
    """
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    completions = learner.sample(prompt_ids)
    texts = completion_texts(tokenizer, prompt_ids, completions)
    ended = [has_eos(completion, learner.eos_token_ids) for completion in completions]
    # The prompts as they were given, by which a reward knows them; decoding may change a space.
    scored = score_all(learner, reward, prompts, texts)
    scores = shape_scores(np.asarray(scored.scores, dtype=np.float32), ended, learner.settings, moments)
    rollout, entropy = learner.experience(prompt_ids, completions, scores)
    figures = rollout_figures(scored, ended, rollout, entropy) | group_figures(learner.settings, scored.scores)
    figures["score_signal"] = score_signal(scored.scores, ended, learner.settings, moments)
    return rollout, scored, figures


def score_all(learner: Learner, reward: Reward, prompts: Sequence[str], texts: tuple[list[str], list[str]]) -> Scored:
    """`rewards.combined.score`, each rank for its share; the completions of a prompt are scored together."""
    ranks, own = learner.ranks, own_rows(learner.settings, learner.ranks, len(prompts))
    scored = score(reward, prompts[own], (texts[0][own], texts[1][own]))
    parts = {name: ranks.gather(scores) for name, scores in scored.parts.items()}
    return Scored(*texts, ranks.gather(scored.scores), parts)


class PPORun:
    """What a script's run leaves: its folder with report, samples, checkpoints and summary.

    checkpoint: the module training.checkpoint or training.torch_checkpoint; policy: its Trainee; blas: see
    `training.metrics.start_run_folder`.
    """

    def __init__(
        self,
        script: str,
        args: argparse.Namespace,
        settings: PPOSettings,
        policy: Any,
        optimizer: Any,
        checkpoint: Any,
        blas: str | None = None,
        peak_memory: Callable[[], float] | None = None,
        ranks: Ranks = ALONE,
        planned_memory: float | None = None,
    ):
        """Start a run by the flags `args`, or restore the one that --resume names. peak_memory, planned_memory: as
        RunLog has them."""
        self.script, self.args, self.settings, self.ranks = script, args, settings, ranks
        self.policy, self.optimizer, self.checkpoint = policy, optimizer, checkpoint
        self.progress = first_progress(settings, policy)
        self.figures: dict[str, float] = {}
        # config.json has them, so that a resumed run does not choose again.
        args.learning_rate, args.step_kl = self._optimizer()[1], step_kl(settings, *size(policy))
        run = open_for_all(self.ranks, args, script, "ppo", blas)
        self.folder, self.lock = run.path, run.lock
        if run.checkpoint:
            self.progress.restore(self.ranks.from_writer(self._restored), self.folder)
            checkpoint.share_checkpoint(self.ranks, policy, optimizer)
        self.log: RunLog | NoLog = NoLog()
        if not self.ranks.writes:
            return
        if run.checkpoint:
            # A run killed after its last step has none left to say how it ended.
            self.figures = figures_at(self.folder, self.progress.step)
            drop_other_bests(self.folder, self.progress.best.step)
        else:
            self.save()
        self.picture = LivePicture(self.folder)
        self.log = RunLog(
            self.folder,
            settings.num_steps,
            self.progress.step,
            args.log_with,
            "PPO",
            PPO_COLUMNS,
            args.verbose,
            peak_memory,
            planned_memory,
        )
        self.signs = Signs(settings, read_metrics(self.folder))

    def _restored(self) -> dict[str, Any]:
        """The state of the newest checkpoint that can be restored; weights and optimizer have theirs."""
        states: list[dict[str, Any]] = []

        def restore(folder: Path) -> None:
            states.append(self.checkpoint.restore_checkpoint(folder, self.policy, self.optimizer))
            self.progress.restore(states[-1], folder)

        restore_newest(self.folder, restore)
        return states[-1]

    def _optimizer(self) -> tuple[str, float]:
        return ppo_optimizer(self.settings, *size(self.policy))

    def describe(self, device: object) -> None:
        """Say what is trained, by which optimizer and rate, and where."""
        kind, given = self.policy.adapter.fine_tune_type, self.settings.learning_rate is not None
        self.log.say(describe(self.policy.sizes(), kind, self._optimizer(), device, rate_given=given))

    def save(self) -> None:
        """Write a checkpoint."""
        progress, keep = self.progress, self.args.keep_checkpoints
        self.checkpoint.save_checkpoint(
            self.folder, progress.step, self.policy, self.optimizer, progress.state(), keep
        )  # fmt: skip
        drop_other_bests(self.folder, progress.best.step)

    def record(self, step: Step, stop: StopSignal) -> bool:
        """Report a step, and write a checkpoint where one is due or the run is to stop; returns whether it is."""
        self.figures, stopping = step.figures, self.ranks.any(stop.requested)
        if self.ranks.writes:
            self._write(step, stopping)
        return stopping

    def _write(self, step: Step, stopping: bool) -> None:
        self.log.report(step.number, step.figures)
        self.log.samples(step.number, self._samples(step))
        self.log.advance()
        self.picture.draw_if_due()
        if step.figures["skipped_updates"]:
            skipped = f"step {step.number}: {step.figures['skipped_updates']} updates skipped"
            self.log.say(f"{skipped} (not finite, or ratio past its limit)")
        for line in self.signs.see(step.figures):
            self.log.say(f"step {step.number}: {line}")
        if self.args.save_best and self.progress.best.step == step.number:
            self.checkpoint.save_best(self.folder, step.number, self.policy)
        if step.number % self.args.save_every == 0 or stopping or finished(self.settings, self.progress):
            self.save()

    def _samples(self, step: Step) -> list[dict[str, Any]]:
        """The rows of the step's table of samples: a few, spread over its batch; none where no table is due."""
        every = self.args.steps_per_samples
        if not every or not (step.number % every == 0 or step.number in (1, self.settings.num_steps)):
            return []
        return sample_rows(step.scored)

    def leave(self, save_adapter: Callable[..., object], plot: Callable[[Path], object]) -> dict[str, Any]:
        """Save the adapter (by models.adapters.save_adapter or its twin), of a stopped run, too.

        plot: draws the curves in a folder, and returns where they are. Returns the summary, on rank 0 alone. Raises
        Stopped if steps are left.
        """
        done, planned, path = self.progress.step, self.settings.num_steps, self.args.save_file
        whole = finished(self.settings, self.progress)
        if not self.ranks.writes:
            if not whole:
                raise Stopped
            return {}
        picture = plot(self.folder)
        if whole:
            self._take_best()
        summary = self._summary(str(picture))
        saved = whole or may_save_stopped(path, self.args.resume_file)
        if saved:
            save_adapter(path, self.policy.model, self.policy.adapter)
        if not whole:
            self.log.close()
            raise Stopped(stopped_words(self.script, self.folder, done, planned, path if saved else "", str(picture)))
        return summary

    def _take_best(self) -> None:
        """With --save-best, give the policy the weights of the best held-out score; an early end is said, too."""
        best = self.progress.best
        if self.progress.step < self.settings.num_steps:
            behind = f"none of the last {best.stale} held-out scores was better than that of step {best.step}"
            self.log.say(f"stopped early: {behind}")
        if self.args.save_best and best.value is not None:
            self.checkpoint.restore_best(self.folder, best.step, self.policy)
            self.log.say(f"the adapter saved is that of step {best.step}, whose held-out score is the best")

    def _summary(self, picture: str) -> dict[str, Any]:
        """The figures of the run, which the adapter keeps as its provenance, too. picture: where the curves are."""
        summary: dict[str, Any] = {"steps": self.progress.step, "seconds": round(self.progress.seconds, 1)}
        for name in ("mean_score", "true_score", "kl", "kl_coef"):
            if name in self.figures:
                summary[name] = self.figures[name]
        if self.progress.best.value is not None:
            summary |= {"best_step": self.progress.best.step, "best_held_out_score": self.progress.best.value}
        summary |= {"adapter": self.args.save_file, "picture": picture}
        self.policy.adapter.provenance.append(provenance(self.script, vars(self.args), summary))
        return summary


def sample_rows(scored: Scored) -> list[dict[str, Any]]:
    """SAMPLES_SHOWN completions with their scores, spread over the batch."""
    count = min(SAMPLES_SHOWN, len(scored.scores))
    return [scored.row(index * len(scored.scores) // count) for index in range(count)]
