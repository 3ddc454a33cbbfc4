"""Which optimizer a weight is trained by, and at which rate: the same in both frameworks."""

from collections.abc import Mapping

from common.errors import UserError
from training.settings import PPOSettings, Settings, SFTSettings

OPTIMIZERS = ("adam", "muon")
HEAD_RATE = 1e-3  # of a value head beside an adapter, at most: a linear layer does not need a soft prompt's rates

# The optimizer and its learning rate that train each kind of adapter; chosen on the embedded models (docs/sft.md).
SFT_OPTIMIZERS = {
    "lora": ("adam", 5e-4),
    "dora": ("adam", 5e-4),
    "full": ("adam", 3e-4),
    "soft_prompt": ("adam", 3e-2),
    "none": ("adam", 1e-3),
}
DPO_SHARE = 0.2  # of those rates, for DPO and IPO: at the whole, the digits' texts fell apart (KL of 124 nats)
PPO_OPTIMIZERS = {"lora": ("adam", 5e-4), "dora": ("adam", 5e-4), "full": ("adam", 3e-4), "soft_prompt": ("muon", 0.4)}

# A model of more weights than this is trained at the literature's rates, which were not tuned here. (4-bit weights
# count as they are stored, eight in one; the embedded models have fewer than a million, real ones from 20 million.)
LARGE = 10_000_000
# LoRA: 1e-4 to 2e-4 (QLoRA, arXiv:2305.14314, table 9), of which the lower, as --lora-scale is larger here. All
# weights: 1e-5 to 2e-5 for SFT (Tülu, arXiv:2306.04751; Llama 2, arXiv:2307.09288), 1e-5 for Llama 2's reward model.
# A head alone: a readout's rate falls with the model's width (arXiv:2203.03466), some ten times that of those here.
# A soft prompt's 0.03 is what peft's examples for models of 0.5 billion weights take, too.
LARGE_SFT_OPTIMIZERS = SFT_OPTIMIZERS | {
    "lora": ("adam", 1e-4),
    "dora": ("adam", 1e-4),
    "full": ("adam", 1e-5),
    "none": ("adam", 1e-4),
}
LARGE_DPO_SHARE = 0.05  # 5e-7 for all weights (Zephyr, arXiv:2310.16944), 5e-6 for LoRA (its alignment-handbook)
# LoRA: above TRL's PPO, 1.4e-5; from this rate SmolLM2-135M learned, and forgot little (docs/real_model.md). All
# weights: Llama 2's. --step-kl adapts them from there, within a factor of 32.
LARGE_PPO_OPTIMIZERS = PPO_OPTIMIZERS | {"lora": ("adam", 5e-5), "dora": ("adam", 5e-5), "full": ("adam", 1e-6)}
# Nats per completion that a step of PPO should move the policy, to which the rate adapts. The embedded models have
# nothing to forget, and far to go; at 0.3 a large one forgot plain English over its task (docs/real_model.md).
STEP_KL, LARGE_STEP_KL = 0.3, 0.02


def optimizer_and_rate(settings: Settings, defaults: Mapping[str, tuple[str, float]], kind: str) -> tuple[str, float]:
    """The optimizer and its rate: those of the settings, or else the default for the kind of adapter.

    Raises UserError for an optimizer without a rate: a rate for one says nothing about the other.
    """
    name, rate = defaults[kind]
    if settings.learning_rate is None and settings.optimizer not in (None, name):
        raise UserError(f"--optimizer {settings.optimizer} has no default rate here; give --learning-rate")
    return settings.optimizer or name, settings.learning_rate or rate


def sft_optimizer(settings: SFTSettings, kind: str, weights: int) -> tuple[str, float]:
    """`optimizer_and_rate` of SFT, reward models and preference tuning. weights: number of all of the model's."""
    large = weights > LARGE
    share = (LARGE_DPO_SHARE if large else DPO_SHARE) if settings.dpo and settings.loss != "orpo" else 1
    rates = LARGE_SFT_OPTIMIZERS if large else SFT_OPTIMIZERS
    return optimizer_and_rate(settings, {key: (name, share * rate) for key, (name, rate) in rates.items()}, kind)


def ppo_optimizer(settings: Settings, kind: str, weights: int) -> tuple[str, float]:
    """`optimizer_and_rate` of PPO. weights: number of all of the model's.

    Raises UserError for an adapter that has nothing to train, too.
    """
    if kind not in PPO_OPTIMIZERS:
        remedy = "give it as --reward-model, or leave it out"
        raise UserError(f"the adapter to start from is a value head alone, with no weight for PPO; {remedy}")
    return optimizer_and_rate(settings, LARGE_PPO_OPTIMIZERS if weights > LARGE else PPO_OPTIMIZERS, kind)


def step_kl(settings: PPOSettings, kind: str, weights: int) -> float:
    """How far a step of PPO should move the policy, in nats per completion; 0: the rate is left alone.

    That of the settings, or else by the number of all of the model's weights and the kind of adapter.
    """
    if settings.step_kl is not None:
        return settings.step_kl
    return LARGE_STEP_KL if depends_on_size(kind, weights) else STEP_KL


def depends_on_size(kind: str, weights: int) -> bool:
    """Whether the default rate for a kind of adapter is one for models of more than `LARGE` weights."""
    return weights > LARGE and kind != "soft_prompt"


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
