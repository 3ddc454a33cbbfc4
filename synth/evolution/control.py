"""Whether a policy's choices were better than choosing evenly: the same instructions evolved a second time, compared.

The control chooses each of the operators equally often and never stops, so it has as many choices as a policy that
doesn't stop early. A run has one of each, whose chains share a pool, so the interval is over initial instructions, not
over seeds; `python benchmarks/evolve_controls.py --command` has the seeds.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from synth.evolution.operators import STOP
from synth.stages import StageRow, kept
from training.intervals import Interval, difference


class Verdict(NamedTuple):
    """kept, calls, reward: of the policy and of the control; gain: in reward per initial instruction, paired."""

    kept: tuple[int, int]
    calls: tuple[int, int]
    reward: tuple[float, float]
    gain: Interval

    def lines(self) -> list[str]:
        """What a run says at its end."""
        if self.gain.low > 0:
            said = "better than choosing evenly"
        elif self.gain.high < 0:
            said = "worse than choosing evenly; use --policy uniform"
        else:
            said = "not shown to differ from choosing evenly"
        own, even = (f"{kept} of {calls}" for kept, calls in zip(self.kept, self.calls, strict=True))
        return [
            f"rewritings kept: {own} by the policy, {even} by choosing evenly",
            f"verdict: the policy was {said} (reward per initial instruction, policy minus evenly: {self.gain})",
        ]


def verdict(policy: Sequence[StageRow], control: Sequence[StageRow]) -> Verdict:
    """Compare the choices of the policy with those of the control, from the same initial instructions."""
    both = (policy, control)
    sums = [rewards(rows) for rows in both]
    roots = sorted({root for each in sums for root in each})
    paired = [[each.get(root, 0.0) for root in roots] for each in sums]
    return Verdict(
        kept=(len(kept(policy)), len(kept(control))),
        calls=(_calls(policy), _calls(control)),
        reward=(sum(paired[0]), sum(paired[1])),
        gain=difference(paired[1], paired[0]).interval,
    )


def rewards(rows: Sequence[StageRow]) -> dict[str, float]:
    """The summed reward of each initial instruction's choices."""
    found: dict[str, Any] = defaultdict(float)
    for row in rows:
        found[row["root"]] += row["reward"]
    return dict(found)


def _calls(rows: Sequence[StageRow]) -> int:
    return sum(row["operator"] != STOP for row in rows)
