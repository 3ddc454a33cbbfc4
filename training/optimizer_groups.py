"""Which optimizer a weight is trained by, and at which rate: the same in both frameworks."""

from collections.abc import Mapping

from common.errors import UserError
from training.settings import Settings, SFTSettings

OPTIMIZERS = ("adam", "muon")
HEAD_RATE = 1e-3  # of a value head beside an adapter, at most: a linear layer does not need a soft prompt's rates

# The optimizer and its learning rate that train each kind of adapter; chosen on the embedded model (docs/sft.md).
SFT_OPTIMIZERS = {
    "lora": ("adam", 5e-4),
    "dora": ("adam", 5e-4),
    "full": ("adam", 3e-4),
    "soft_prompt": ("adam", 3e-2),
    "none": ("adam", 1e-3),
}
DPO_SHARE = 0.2  # of those rates, for DPO and IPO: at the whole, the digits' texts fell apart (KL of 124 nats)
PPO_OPTIMIZERS = {"lora": ("adam", 5e-4), "dora": ("adam", 5e-4), "full": ("adam", 3e-4), "soft_prompt": ("muon", 0.4)}


def optimizer_and_rate(settings: Settings, defaults: Mapping[str, tuple[str, float]], kind: str) -> tuple[str, float]:
    """The optimizer and its rate: those of the settings, or else the default for the kind of adapter.

    Raises UserError for an optimizer without a rate: a rate for one says nothing about the other.
    """
    name, rate = defaults[kind]
    if settings.learning_rate is None and settings.optimizer not in (None, name):
        raise UserError(f"--optimizer {settings.optimizer} has no default rate here; give --learning-rate")
    return settings.optimizer or name, settings.learning_rate or rate


def sft_optimizer(settings: SFTSettings, kind: str) -> tuple[str, float]:
    """`optimizer_and_rate` of SFT, reward models and preference tuning."""
    share = DPO_SHARE if settings.dpo and settings.loss != "orpo" else 1
    defaults = {key: (name, share * rate) for key, (name, rate) in SFT_OPTIMIZERS.items()}
    return optimizer_and_rate(settings, defaults, kind)


def ppo_optimizer(settings: Settings, kind: str) -> tuple[str, float]:
    """`optimizer_and_rate` of PPO. Raises UserError for an adapter that has nothing to train, too."""
    if kind not in PPO_OPTIMIZERS:
        remedy = "give it as --reward-model, or leave it out"
        raise UserError(f"the adapter to start from is a value head alone, with no weight for PPO; {remedy}")
    return optimizer_and_rate(settings, PPO_OPTIMIZERS, kind)


def groups(kind: str, rate: float, head_rate: float | None = None) -> list[tuple[str, float]]:
    """The optimizers, each with its rate, that a run needs: one or two.

    head_rate: of a value head and of all that is not a matrix, which Muon leaves to Adam (default: the rate; beside
    Muon, `HEAD_RATE` at most). Raises UserError for another kind.
    """
    if kind not in OPTIMIZERS:
        raise UserError(f"--optimizer is {kind!r}; use one of {', '.join(OPTIMIZERS)}")
    if head_rate is None:
        head_rate = min(rate, HEAD_RATE) if kind == "muon" else rate
    return list(dict.fromkeys([(kind, rate), ("adam", head_rate)]))


def belongs_to_first(name: str, ndim: int, kind: str) -> bool:
    """Whether the first of `groups` trains a weight; name: its path in the module that is trained."""
    return not name.startswith("value_head.") and (kind == "adam" or ndim >= 2)
