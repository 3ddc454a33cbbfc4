"""What TRL 0.11's PPO code says, in our words: its `PPOConfig`, generation arguments and peft configuration.

Options that change nothing here, or that the library does otherwise, are refused by name with what to use instead
(docs/from_trl.md lists them). Needs neither mlx nor torch. Not here: the trainer (training.trl_trainer).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from models import peft_format
from models.adapter_config import AdapterConfig
from training import ppo_step
from training.settings import PPOSettings

REFUSED = {
    "forward_batch_size": "use mini_batch_size",
    "backward_batch_size": "it is mini_batch_size * gradient_accumulation_steps",
    "global_backward_batch_size": "one process trains; leave it out",
    "global_batch_size": "one process trains; leave it out",
    "world_size": "one process trains; leave it out",
    "optimize_cuda_cache": "memory is given back by itself; leave it out",
    "optimize_device_cache": "memory is given back by itself; leave it out",
    "gradient_checkpointing": "use ppo_training.py --grad-checkpoint",
    "accelerator_kwargs": "no accelerator is used; leave it out",
    "project_kwargs": "a run's folder is runs/ppo_trainer-TIME; leave it out",
    "tracker_kwargs": "set wandb's environment variables",
    "tracker_project_name": "runs are in the project mlx-tuning; leave it out",
    "push_to_hub_if_best_kwargs": "save_pretrained, then fuse.py --upload-name",
    "compare_steps": "it belongs to push_to_hub_if_best_kwargs; leave it out",
    "is_encoder_decoder": "only decoders are trained; leave it out",
    "is_peft_model": "give peft_config to from_pretrained",
    "dataset_num_proc": "a data set is used as it is; leave it out",
}


@dataclass
class PPOConfig:
    """TRL 0.11's configuration of PPO: its names, its defaults, the options that have a meaning here.

    Raises UserError for an option that is refused, if it differs from TRL's default, and for numbers that do not fit.
    """

    # Names of things, and the length of a loop that is the caller's. They change nothing, as in TRL.
    exp_name: str = ""
    task_name: str | None = None
    model_name: str = "gpt2"
    query_dataset: str = "stanfordnlp/imdb"
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    remove_unused_columns: bool = True
    steps: int = 20000

    seed: int = 0
    log_with: str | None = None  # wandb or tensorboard
    learning_rate: float = 1.41e-5
    batch_size: int = 128
    mini_batch_size: int = 128  # completions in one backward pass
    gradient_accumulation_steps: int = 1  # backward passes in one update
    ppo_epochs: int = 4
    max_grad_norm: float | None = None

    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    kl_penalty: str = "kl"
    target: float = 6.0
    horizon: float = 10000.0

    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    whiten_rewards: bool = False

    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None

    early_stopping: bool = False
    target_kl: float = 1.0
    ratio_threshold: float = 10.0

    # Refused: the names of REFUSED with TRL's defaults, so that code which states a default still runs.
    forward_batch_size: int | None = None
    backward_batch_size: int | None = None
    global_backward_batch_size: int | None = None
    global_batch_size: int | None = None
    world_size: int | None = None
    optimize_cuda_cache: bool | None = None
    optimize_device_cache: bool = False
    gradient_checkpointing: bool = False
    accelerator_kwargs: dict | None = None
    project_kwargs: dict | None = None
    tracker_kwargs: dict | None = None
    tracker_project_name: str = "trl"
    push_to_hub_if_best_kwargs: dict | None = None
    compare_steps: int = 1
    is_encoder_decoder: bool | None = None
    is_peft_model: bool | None = None
    dataset_num_proc: int | None = None

    def __post_init__(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name, remedy in REFUSED.items():
            given = getattr(self, name)
            if given != defaults[name] and given != {}:  # TRL's default of a dictionary is an empty one
                raise UserError(f"PPOConfig: {name} is {given!r}, which is not supported; {remedy}")
        if self.mini_batch_size < 1 or self.gradient_accumulation_steps < 1:
            raise UserError("PPOConfig: mini_batch_size and gradient_accumulation_steps must be at least 1")
        update = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % update:
            raise UserError(
                f"PPOConfig: batch_size {self.batch_size} is not a multiple of mini_batch_size * "
                f"gradient_accumulation_steps, {update}; try batch_size {math.ceil(self.batch_size / update) * update}"
            )
        ppo_step.check_settings(self.settings())

    def settings(self, use_peft: bool = False) -> PPOSettings:
        """The same in the library's words. use_peft: the reference is the base with the adapter off."""
        return PPOSettings(
            seed=self.seed,
            learning_rate=self.learning_rate,
            value_head_learning_rate=self.learning_rate,
            lr_schedule="constant",
            step_kl=0.0,
            max_grad_norm=self.max_grad_norm or 0.0,
            batch_size=self.batch_size,
            mini_batch_size=self.mini_batch_size * self.gradient_accumulation_steps,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            ppo_epochs=self.ppo_epochs,
            scale_scores=self.use_score_scaling,
            normalize_scores=self.use_score_scaling and self.use_score_norm,
            score_clip=self.score_clip or 0.0,
            gamma=self.gamma,
            gae_lambda=self.lam,
            whiten_rewards=self.whiten_rewards,
            center_values=False,
            clip_range=self.cliprange,
            value_clip_range=self.cliprange_value,
            vf_coef=self.vf_coef,
            target_kl=self.target_kl if self.early_stopping else 0.0,
            ratio_threshold=self.ratio_threshold,
            init_kl_coef=self.init_kl_coef,
            adap_kl_ctrl=self.adap_kl_ctrl,
            target=self.target,
            horizon=self.horizon,
            kl_penalty=self.kl_penalty,
            use_peft=use_peft,
        )


def refuse(what: str, given: Mapping[str, Any], remedies: Mapping[str, str], neutral: tuple[Any, ...]) -> None:
    """Raise UserError for the first option of `given` whose value is not a neutral one.

    remedies: what to use instead, by name.
    """
    for name, value in given.items():
        if not any(value is one or value == one for one in neutral):
            remedy = remedies.get(name, "leave it out")
            raise UserError(f"{what}: {name} is {value!r}, which is not supported; {remedy}")


class LengthSampler:
    """Draws a length of a completion, from min_value up to max_value - 1, as `trl.core.LengthSampler`."""

    def __init__(self, min_value: int, max_value: int):
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        """A length, by NumPy's global random numbers, which `set_seed` seeds."""
        return int(np.random.choice(self.values))


# --- generation ---

ONE_DISTRIBUTION = "training's logprobs are those of the whole distribution; leave it out"
GENERATION_REMEDIES = {
    "max_length": "use max_new_tokens",
    "top_k": ONE_DISTRIBUTION,
    "top_p": ONE_DISTRIBUTION,
    "min_length": ONE_DISTRIBUTION,
    "attention_mask": "give rows of one length, or a list to PPOTrainer.generate",
}
# Values with which these change nothing.
NEUTRAL_GENERATION = {
    "top_k": (0, None),
    "top_p": (1, None),
    "min_length": (-1, 0, None),
    "min_new_tokens": (-1, 0, None),
    "num_return_sequences": (1, None),
    "num_beams": (1, None),
    "repetition_penalty": (1, None),
    "use_cache": (True, None),
}


class Sampling(NamedTuple):
    """How completions are drawn."""

    max_tokens: int
    temperature: float  # 0: the most likely token
    eos_token_ids: set[int]
    pad_token_id: int


def sampling(given: Mapping[str, Any], eos_token_ids: set[int], pad_token_id: int) -> Sampling:
    """The generation arguments of transformers that PPO can follow.

    eos_token_ids, pad_token_id: the model's own. Raises UserError for another argument, by name.
    """
    rest = dict(given)
    max_tokens, temperature = rest.pop("max_new_tokens", None), rest.pop("temperature", None)
    do_sample, eos, pad = rest.pop("do_sample", False), rest.pop("eos_token_id", None), rest.pop("pad_token_id", None)
    for name, value in rest.items():
        refuse("generate", {name: value}, GENERATION_REMEDIES, NEUTRAL_GENERATION.get(name, (None,)))
    if max_tokens is None or max_tokens < 1:
        raise UserError(f"generate: max_new_tokens is {max_tokens}; give the length of a completion, at least 1")
    if eos is not None:
        eos_token_ids = {int(token) for token in (eos if isinstance(eos, list | tuple) else [eos])}
    if not do_sample:
        temperature = 0.0
    elif temperature is None:
        temperature = 1.0
    elif temperature <= 0:
        raise UserError(f"generate: temperature is {temperature}; it must be above 0, or leave out do_sample")
    ends = {token for token in eos_token_ids if token >= 0}  # TRL's examples turn the EOS off by -1
    return Sampling(int(max_tokens), float(temperature), ends, pad_token_id if pad is None else int(pad))


# --- peft ---

DEFAULT_TARGETS = ("q_proj", "v_proj")  # peft's of Llama, Mistral, Qwen2, Gemma and their like


def lora_adapter(peft_config: Any, linear_layers: Iterable[str], model: str) -> AdapterConfig:
    """A peft LoraConfig as our adapter: every targeted layer by its full name.

    peft_config: peft's object, or a dictionary of its fields; linear_layers: names of the model's. The dropout is off,
    as it is in TRL's PPO, whose forward passes all run in eval mode. Raises UserError for what has no counterpart.
    """
    fields = peft_config if isinstance(peft_config, Mapping) else peft_config.to_dict()
    description = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    unsupported = {name: description.get(name) for name in ("layers_to_transform", "layers_pattern", "exclude_modules")}
    refuse("peft_config", unsupported, {}, (None, [], ()))
    targets = description.get("target_modules") or DEFAULT_TARGETS
    if isinstance(targets, str):
        raise UserError(f"peft_config: target_modules is {targets!r}; give a list of the layers' names")
    names = [name for name in linear_layers if any(name == end or name.endswith(f".{end}") for end in targets)]
    if not names:
        raise UserError(f"peft_config: no layer of {model} ends in one of {', '.join(sorted(targets))}; name others")
    description |= {"peft_type": str(getattr(description.get("peft_type"), "value", description.get("peft_type")))}
    found = peft_format.our_settings(description, [f"{name}.lora_a" for name in names], "peft_config")
    found["lora_parameters"]["dropout"] = 0.0
    return AdapterConfig(**{**found, "model": model})
