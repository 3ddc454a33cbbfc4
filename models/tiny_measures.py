"""Scores of the embedded models on held-out prompts, as printed by `python -m models.tiny`.

python -m pytest tests/test_tiny.py -k measure
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np

from data.decoding import completion_texts
from data.digits import DigitRule, held_out_starts
from models.generation import sample
from models.tiny_texts import HELD_OUT_STARTS, INCREASING, OPERAND_SIZES, is_held_out_sum, operand

MAX_TOKENS = 64


class Continuer:
    """Continues texts with an embedded model."""

    def __init__(self, folder: str | Path):
        untrusting = {"trust_remote_code": False}
        self.model, self.tokenizer = mlx_lm.load(str(folder), tokenizer_config=untrusting, **untrusting)[:2]

    def __call__(self, texts: Sequence[str], temperature: float) -> tuple[list[str], list[bool]]:
        """The texts with their completions, and whether each ended with EOS."""
        prompts = [self.tokenizer.encode(text) for text in texts]
        eos = self.tokenizer.eos_token_ids
        completions = sample(self.model, prompts, eos, max_tokens=MAX_TOKENS, temperature=temperature)
        pairs = zip(*completion_texts(self.tokenizer, prompts, completions), strict=True)
        return [prompt + rest for prompt, rest in pairs], [tokens[-1] in eos for tokens in completions]


def measure_digits(folder: str | Path, samples: int = 20) -> dict[str, float]:
    """Scores with every held-out start as a one-number prompt, at most 64 new tokens.

    samples: completions per start at temperature 1 (the "sampled" figures). Lengths are in numbers.
    """
    continued = Continuer(folder)
    evens = DigitRule(increasing=True, multiple_of=2)

    def mean_score(rule: DigitRule, chosen: list[str]) -> float:
        return float(np.mean([rule.score(text) for text in chosen]))

    mx.random.seed(0)
    greedy, _ = continued([str(start) for start in HELD_OUT_STARTS], 0.0)
    even, _ = continued([str(start) for start in held_out_starts(evens)], 0.0)
    sampled, ended = continued([str(start) for start in HELD_OUT_STARTS for _ in range(samples)], 1.0)
    return {
        "greedy, increasing": mean_score(INCREASING, greedy),
        "greedy, increasing multiples of 2": mean_score(evens, even),
        "sampled, increasing": mean_score(INCREASING, sampled),
        "sampled, ended by EOS": float(np.mean(ended)),
        "sampled, of 5 to 15 numbers": float(np.mean([5 <= len(text.split()) <= 15 for text in sampled])),
    }


def measure_sums(folder: str | Path, samples: int = 100) -> dict[str, float]:
    """Accuracy by the digits of the operands: `samples` held-out sums for each pair of sizes."""
    continued = Continuer(folder)
    rng = np.random.default_rng(0)
    sizes = range(1, len(OPERAND_SIZES) + 1)
    found = {}
    mx.random.seed(0)
    for first, second in ((a, b) for a in sizes for b in sizes if a >= b):
        pairs: list[tuple[int, int]] = []
        while len(pairs) < samples:
            pair = operand(rng, first), operand(rng, second)
            pairs += [pair] * is_held_out_sum(*pair)
        right = [f"{a} + {b} = {a + b}" for a, b in pairs]
        for title, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            texts, _ = continued([f"{a} + {b} =" for a, b in pairs], temperature)
            found[f"{title}, {first} and {second} digits"] = float(
                np.mean([a == b for a, b in zip(texts, right, strict=True)])
            )
    return found


MEASURES: dict[str, Callable[[str | Path], dict[str, float]]] = {
    "increasing_digits": measure_digits,
    "sums": measure_sums,
}
