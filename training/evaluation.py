"""How good a model is: sampled completions, their scores, and how far it has moved from a reference; and which of two
models is better on the same prompts.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from common.progress import progress
from data.batching import encode_prompt, in_order
from data.decoding import completion_texts
from models.frozen_layers import lower_states, num_shared_layers
from models.generation import sample
from models.packing import packs
from models.row_keys import row_keys
from models.soft_prompt import soft_prompt_ids
from models.token_stats import LOGITS_BYTES, token_stats
from models.value_head import forward
from rewards.combined import Reward, Scored, score, top_of
from training import ppo
from training.intervals import Difference, Interval, difference, mean_interval
from training.optimizer import compiling_pays
from training.passes import PaddedRows, Pass, reading, rows_of
from training.ranks import ALONE, Ranks
from training.rollout import pack, through_eos

BATCH_SIZE = 64  # completions that are sampled, or scored, at once


class Evaluation(NamedTuple):
    """Figures over all completions, and the completions themselves."""

    mean_score: float
    standard_error: float  # of mean_score, over completions as if each had its own prompt
    perfect_share: float | None  # of completions with the reward's highest score; None where it declares none
    kl: float  # nats per completion to the reference; 0 without one
    completion_length: float  # tokens
    scores: list[float]
    texts: list[str]  # prompt + completion
    part_scores: dict[str, float]  # score_NAME → mean, of each reward of a weighted sum
    rows: list[dict[str, Any]]  # prompt, completion, tokens, score, and score_NAME of each reward of a sum


def evaluate_model(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    reward: Reward,
    max_tokens: int,
    temperature: float = 1.0,
    reference: nn.Module | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    known_prompts: Sequence[str] | None = None,
    logits_bytes: int = LOGITS_BYTES,
    ranks: Ranks = ALONE,
    together: Ranks = ALONE,
) -> Evaluation:
    """Sample one completion per prompt and score it. prompts: repeat one to sample it more often.

    reference: a model over the same vocabulary; its KL is estimated as the mean log ratio of the samples.
    known_prompts: the prompts as the reward knows them, if another tokenizer rendered them for it. logits_bytes: of all
    logits at once, where the KL is computed. ranks: each samples and scores its share of the prompts, at least one.
    together: those that the models are divided among (models.sharding): all sample all, and the first one scores.
    """
    mx.random.seed(seed)
    own, keys = ranks.share(len(prompts)), row_keys(len(prompts))
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts[own]]
    limits = (max_tokens, temperature, batch_size)
    most, shows = len(prompt_ids) * max_tokens, ranks.writes and together.writes
    with progress(most, "sampling, at most", "token", scale=True) if shows else nullcontext() as bar:
        told = None if bar is None else bar.update
        drawn_by = (told, keys[own], together.of_first)
        completions = sample(model, prompt_ids, tokenizer.eos_token_ids, *limits, *drawn_by)
    texts = completion_texts(tokenizer, prompt_ids, completions)
    known = (known_prompts or prompts)[own]
    scored = gathered(Scored(*together.from_writer(lambda: score(reward, known, texts))), ranks)
    scores, top = np.asarray(scored.scores, dtype=np.float64), top_of(reward)
    kl = 0.0
    if reference is not None:
        rows = (tokenizer, prompt_ids, completions, temperature, batch_size, logits_bytes, together.size > 1)
        with progress(len(prompt_ids), "KL", "completion") if shows else nullcontext() as bar:
            told = None if bar is None else bar.update
            policy, other = completion_logprobs((model, reference), *rows, told)
        kl = float(np.mean(ranks.gather((policy - other).tolist())))
    lengths = ranks.gather([len(completion) for completion in completions])
    return Evaluation(
        mean_score=float(scores.mean()),
        standard_error=float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else 0.0,
        perfect_share=None if top is None else float(np.mean(scores >= top)),
        kl=kl,
        completion_length=float(np.mean(lengths)),
        scores=scored.scores,
        texts=[prompt + completion for prompt, completion in zip(scored.prompts, scored.completions, strict=True)],
        part_scores=scored.part_means(),
        rows=[{"tokens": length, **scored.row(index)} for index, length in enumerate(lengths)],
    )


def gathered(scored: Scored, ranks: Ranks) -> Scored:
    """What all ranks have scored, in their order."""
    prompts, completions, scores, parts = scored
    of_all = {name: ranks.gather(values) for name, values in parts.items()}
    return Scored(ranks.gather(prompts), ranks.gather(completions), ranks.gather(scores), of_all)


def score_interval(prompts: Sequence[str], scores: Sequence[float]) -> Interval:
    """The 95 % interval of a model's mean score, over prompts (see `per_prompt`)."""
    return mean_interval(per_prompt(prompts, scores))


def score_difference(prompts: Sequence[str], first: Sequence[float], second: Sequence[float]) -> Difference:
    """How much better the second model is than the first, paired on the same prompts (see `per_prompt`)."""
    return difference(per_prompt(prompts, first), per_prompt(prompts, second))


def per_prompt(prompts: Sequence[str], scores: Sequence[float]) -> list[float]:
    """The mean score of each prompt, in order of first appearance: what an interval is over.

    Completions of one prompt are alike, so many completions of few prompts would make an interval too narrow. With a
    single prompt: the scores themselves, which are about that prompt alone.
    """
    by_prompt: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, scores, strict=True):
        by_prompt.setdefault(prompt, []).append(value)
    if len(by_prompt) == 1:
        return list(scores)
    return [sum(values) / len(values) for values in by_prompt.values()]


def completion_logprobs(
    models: Sequence[nn.Module],
    tokenizer,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float = 1.0,
    batch_size: int = BATCH_SIZE,
    logits_bytes: int = LOGITS_BYTES,
    divided: bool = False,
    told: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """Log probability in nats of each whole completion given its prompt, under each of the models (M, B).

    By forward passes over rows end to end where the models allow it; layers that all models share are run once. Not
    where they are divided among processes, which have to make the same passes in the same order. told: called with how
    many completions more all models have read.
    """
    sums = np.zeros((len(models), len(prompts)))
    shared = 0 if divided else num_shared_layers(models)
    may_pack = not divided and all(packs(model) for model in models)
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), list(prompts[row])))  # alike ones together
    for batch in in_order(len(order), batch_size):
        rows = order[batch.start : batch.stop]
        asked, said = [prompts[i] for i in rows], [completions[i] for i in rows]
        for number, model in enumerate(models):
            if number == 0 or not shared:  # models that share layers read the same
                part, mask = _read(model, tokenizer, asked, said, may_pack)
                if shared:
                    with reading(model, part, 0):
                        part = part._replace(states=lower_states(model, part.tokens, shared))
            with reading(model, part, shared):
                _, hidden = forward(model, part.tokens, part.positions)
            stats = token_stats(model, hidden, part.targets, temperature, logits_bytes=logits_bytes)
            sums[number, rows] = ppo.sum_per_completion(part.by_row(stats.logprobs), mask)
        if told:
            told(len(rows))
    return sums


def _read(
    model: nn.Module, tokenizer, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], may_pack: bool
) -> tuple[Pass, mx.array]:  # fmt: skip
    """What a forward pass of the model reads of these rows, and their mask (B, C)."""
    prefix, few_shapes = soft_prompt_ids(model), compiling_pays()
    asked = [prefix + list(prompt) for prompt in prompts]
    ended = [through_eos(completion, tokenizer.eos_token_ids) for completion in completions]
    arrays = pack(asked, ended, tokenizer.eos_token_ids, tokenizer.pad_token_id or 0, few_shapes=few_shapes)
    tokens, positions, ids, mask = map(mx.array, arrays)
    rows = rows_of(PaddedRows(tokens, positions, ids), asked, ended, None, may_pack, few_shapes)
    return rows[np.arange(len(asked))], mask
