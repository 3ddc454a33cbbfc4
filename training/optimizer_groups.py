"""Which optimizer a weight is trained by, and at which rate: the same in both frameworks."""

from common.errors import UserError

OPTIMIZERS = ("adam", "muon")
HEAD_RATE = 1e-3  # of a value head beside an adapter, at most: a linear layer does not need a soft prompt's rates


def groups(kind: str, rate: float, head_rate: float | None = None) -> list[tuple[str, float]]:
    """The optimizers, each with its rate, that a run needs: one or two.

    head_rate: of a value head and of what is no matrix, which Muon leaves to Adam (default: the rate; beside Muon,
    `HEAD_RATE` at most). Raises UserError for another kind.
    """
    if kind not in OPTIMIZERS:
        raise UserError(f"--optimizer is {kind!r}; use one of {', '.join(OPTIMIZERS)}")
    if head_rate is None:
        head_rate = min(rate, HEAD_RATE) if kind == "muon" else rate
    return list(dict.fromkeys([(kind, rate), ("adam", head_rate)]))


def belongs_to_first(name: str, ndim: int, kind: str) -> bool:
    """Whether the first of `groups` trains a weight; name: its path in the module that is trained."""
    return not name.startswith("value_head.") and (kind == "adam" or ndim >= 2)
