"""One step's experience, in the form that PPO trains on in both frameworks.

Framework-neutral: `pack` makes NumPy arrays; training.ppo_learner and its twin convert them and add the rest.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray, mlx.core.array or torch.Tensor


class Packed(NamedTuple):
    """Prompts and completions as arrays: each row is prompt, completion, pads on the right.

    The last token of the longest row is dropped: nothing is predicted from it.
    """

    tokens: Array  # (B, L - 1) ids
    positions: Array  # (B, C) index into L of the position that predicts completion token c
    completions: Array  # (B, C) ids, the pad at pads
    mask: Array  # (B, C) float, 1 at sampled tokens through the first EOS


class Rollout(NamedTuple):
    """Sampled completions with everything the update needs; every field has B rows.

    states, by models.frozen_layers, are little beside the activations of an update, which are several such arrays a
    trained layer, but of the whole rollout.
    """

    tokens: Array  # (B, L - 1) ids, as in Packed
    positions: Array  # (B, C)
    completions: Array  # (B, C) ids
    mask: Array  # (B, C) float
    old_logprobs: Array  # (B, C) nats, of the policy that sampled, recomputed by a whole forward pass
    ref_logprobs: Array  # (B, C) nats, of the reference policy
    kl: Array  # (B, C) nats per token, policy against reference
    old_values: Array  # (B, C) score units; zero without a value head
    scores: Array  # (B,) one per completion
    passes: Any = None  # MLX: what training.passes reads of the rows

    def rows(self, index: Array) -> "Rollout":
        """The rollout of the rows in `index`."""
        return Rollout(*(None if field is None else field[index] for field in self))


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    eos_token_ids: Sequence[int] | set[int],
    pad_token_id: int,
    multiple: int = 8,
    few_shapes: bool = False,
) -> Packed:
    """Put prompts and completions into right-padded arrays; a completion is cut after its first EOS.

    prompts: at least one id each; completions: may be empty. C is the longest completion, rounded up to `multiple`,
    long ones by an eighth at most. few_shapes: for a GPU, which compiles its kernels for every shape: C and L - 1 are
    both rounded up to 16 at least; on CPU the pads would take time. An empty completion becomes a row whose mask is all
    0.
    """
    completions = [through_eos(completion, eos_token_ids) for completion in completions]
    multiple = max(multiple, 16) if few_shapes else multiple
    width = rounded(max([1, *map(len, completions)]), multiple)
    longest = max(len(prompt) for prompt in prompts) + width
    if few_shapes:
        longest = 1 + rounded(longest - 1, multiple)
    tokens = np.full((len(prompts), longest), pad_token_id, dtype=np.int32)
    completion_ids = np.full((len(prompts), width), pad_token_id, dtype=np.int32)
    mask = np.zeros((len(prompts), width), dtype=np.float32)
    positions = np.zeros((len(prompts), width), dtype=np.int32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : end] = completion
        completion_ids[row, : len(completion)] = completion
        mask[row, : len(completion)] = 1
        positions[row] = len(prompt) - 1 + np.arange(width)
    return Packed(tokens[:, :-1], positions, completion_ids, mask)


def rounded(length: int, multiple: int) -> int:
    """The next multiple of `multiple`, or of an eighth to a sixteenth of the length where that is more."""
    step = max(multiple, 2 ** (length.bit_length() - 4))
    return -(-length // step) * step


def through_eos(completion: Sequence[int], eos_token_ids: Sequence[int] | set[int]) -> list[int]:
    """The completion up to its first EOS, which is included."""
    for index, token in enumerate(completion):
        if token in eos_token_ids:
            return list(completion[: index + 1])
    return list(completion)


def has_eos(completion: Sequence[int], eos_token_ids: Sequence[int] | set[int]) -> bool:
    """Whether a completion ended with an EOS, not at the length limit."""
    return any(token in eos_token_ids for token in completion)
