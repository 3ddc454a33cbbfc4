"""The best of a run's evaluations so far, and for how long none has been better."""

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from common.schemas import Schema


class SavedBest(Schema):
    """The fields of `Best`."""

    higher: bool = False
    value: float | None = None
    step: Annotated[int, Field(ge=0)] = 0
    stale: Annotated[int, Field(ge=0)] = 0


@dataclass
class Best:
    """A loss (lower is better) or, with `higher`, a score; a checkpoint holds all of it."""

    higher: bool = False
    value: float | None = None
    step: int = 0
    stale: int = 0  # evaluations since

    def see(self, step: int, value: float) -> bool:
        """Take in an evaluation after `step` steps; returns whether it is the best so far. NaN never is."""
        better = math.isfinite(value) and (
            self.value is None or (value > self.value if self.higher else value < self.value)
        )
        if better:
            self.value, self.step, self.stale = value, step, 0
        else:
            self.stale += 1
        return better

    def exhausted(self, patience: int) -> bool:
        """Whether the last `patience` evaluations were no better (0: never)."""
        return 0 < patience <= self.stale
