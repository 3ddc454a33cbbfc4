"""How good a model is: sampled completions, their scores, and how far it has moved from a reference."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import models.fast_blas  # noqa: F401  (before mlx)
from data.batching import encode_prompt
from data.decoding import completion_texts
from models.generation import sample
from models.soft_prompt import soft_prompt_ids
from models.value_head import Policy
from training import ppo
from training.rollout import pack

import mlx.core as mx
import mlx.nn as nn
import numpy as np


class Evaluation(NamedTuple):
    """Figures over all completions, and the completions themselves."""

    mean_score: float
    standard_error: float  # of mean_score
    perfect_share: float  # of completions with a score of 1
    kl: float  # nats per completion to the reference; 0 without one
    completion_length: float  # tokens
    scores: list[float]
    texts: list[str]  # prompt + completion


def evaluate_model(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    reward: Callable[[list[str], list[str]], Sequence[float]],
    max_tokens: int,
    temperature: float = 1.0,
    reference: nn.Module | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Evaluation:
    """Sample one completion per prompt and score it. prompts: repeat one to sample it more often.

    reference: a model over the same vocabulary; its KL is estimated as the mean log ratio of the samples.
    """
    mx.random.seed(seed)
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    completions = sample(model, prompt_ids, tokenizer.eos_token_ids, max_tokens, temperature, batch_size)
    texts = completion_texts(tokenizer, prompt_ids, completions)
    scores = np.asarray(reward(list(prompts), texts[1]), dtype=np.float64)
    kl = 0.0
    if reference is not None:
        own = completion_logprobs(model, tokenizer, prompt_ids, completions, temperature, batch_size)
        other = completion_logprobs(reference, tokenizer, prompt_ids, completions, temperature, batch_size)
        kl = float(np.mean(own - other))
    return Evaluation(
        mean_score=float(scores.mean()),
        standard_error=float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else 0.0,
        perfect_share=float(np.mean(scores >= 1)),
        kl=kl,
        completion_length=float(np.mean([len(completion) for completion in completions])),
        scores=scores.tolist(),
        texts=[prompt + completion for prompt, completion in zip(*texts, strict=True)],
    )


def completion_logprobs(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float = 1.0,
    batch_size: int = 64,
) -> np.ndarray:
    """Log probability in nats of each whole completion given its prompt (B,), by forward passes."""
    prefix = soft_prompt_ids(model)
    sums: list[float] = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        packed = pack(
            [prefix + list(prompt) for prompt in prompts[rows]],
            completions[rows],
            tokenizer.eos_token_ids,
            tokenizer.pad_token_id or 0,
        )
        tokens, positions, ids, mask = (mx.array(field) for field in packed)
        logits, _ = Policy(model)(tokens, positions)
        sums += ppo.sum_per_completion(ppo.logprobs_from_logits(logits, ids, temperature), mask).tolist()
    return np.asarray(sums)
