"""Training by several processes: what they tell each other, for MLX and PyTorch.

Every process, a rank, holds the whole model, the plan of the whole run and the whole rollout of a step. It samples,
scores and differentiates its share of the rows; what the others made comes to it by one operation, the sum over the
ranks, so that all go on with the same bits and take the same decisions. Rank 0 alone writes.

`Ranks` is a single process; training.mlx_ranks has those of mlx.launch, training.torch_ranks those that torchrun and
accelerate start.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from common.errors import UserError

Array = Any  # mlx.core.array or torch.Tensor
T = TypeVar("T")


class Ranks:
    """The processes of a run: this one alone."""

    rank = 0  # of this process, from 0
    size = 1  # the number of processes
    waited = 0.0  # seconds spent in sums so far: until the others arrived, and for what was sent
    sums = summed_bytes = 0  # made so far, and the size of what this rank gave to them

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder, the bar and the trackers."""
        return self.rank == 0

    def sum(self, arrays: Sequence[Array]) -> list[Array]:
        """Each array summed over the ranks, with the same bits on every rank. All give as many, of the same shapes."""
        return list(arrays)

    def sum_host(self, array: np.ndarray) -> np.ndarray:
        """The same for one array of the host."""
        return array

    def share(self, count: int, unit: int = 1) -> slice:
        """This rank's part of `count` rows, as equal as may be; every `unit` rows stay together."""
        begin, end = (count // unit * rank // self.size * unit for rank in (self.rank, self.rank + 1))
        return slice(begin, end)

    def waiting(self, before: float, seconds: float) -> dict[str, float]:
        """What a report says of several processes: the share of `seconds` that this one waited for others, and for what
        was sent. before: `waited` when they began."""
        return {} if self.size == 1 else {"waiting_share": (self.waited - before) / seconds}

    def placed(self, values: Array, places: Array, count: int) -> Array:
        """The (count,) values of all ranks, each at its place, with a gradient for those of this rank."""
        raise NotImplementedError

    def continued_by(self, words: str) -> None:
        """The script and the flags that go on where this run ends, to be said should a rank be lost."""

    def gather(self, rows: Sequence[Any]) -> list[Any]:
        """The rows of all ranks, in their order. rows: what JSON can hold; numbers arrive as they are."""
        if self.size == 1:
            return list(rows)
        data = np.frombuffer(json.dumps(list(rows)).encode(), dtype=np.uint8)
        lengths = np.zeros(self.size, dtype=np.int32)
        lengths[self.rank] = len(data)
        ends = np.cumsum(self.sum_host(lengths))
        whole = np.zeros(ends[-1], dtype=np.uint8)
        whole[ends[self.rank] - len(data) : ends[self.rank]] = data
        texts = np.split(self.sum_host(whole), ends[:-1])
        return [row for text in texts for row in json.loads(text.tobytes())]

    def from_writer(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, of what JSON can hold. The other ranks do not call it.

        An error of the user's that it raises, or --help, ends the others, too, without a word of theirs.
        """
        if self.size == 1:
            return make()
        found: list[T] = []
        error: UserError | SystemExit | None = None
        if self.writes:
            try:
                found = [make()]
            except (UserError, SystemExit) as raised:
                error = raised
        found = self.gather(found)
        if error is not None:
            raise error
        if not found:
            raise SystemExit(2)
        return found[0]

    def of_first(self, tokens: Array) -> Array:
        """Rank 0's tokens, as part of what is yet to be evaluated. tokens: of the same shape on all ranks."""
        return tokens

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum_host(np.array([flag], dtype=np.int32))[0])

    def check_same(self, **fingerprints: str) -> None:
        """Raise UserError on all ranks where one of them has another fingerprint than rank 0 of what a name names."""
        found = self.gather([fingerprints])
        for name, first in found[0].items():
            others = [rank for rank, one in enumerate(found) if one[name] != first]
            if others:
                raise UserError(
                    f"rank {others[0]} has another {name.replace('_', ' ')} than rank 0 ({found[others[0]][name]}, "
                    f"{first}); start every process with the same flags and the same files"
                )


ALONE = Ranks()


def digest_of(rows: Iterable[Any]) -> str:
    """A digest of rows in their order, of what JSON can hold."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:12]
