"""TRL 0.11's `PPOTrainer` on MLX.

    from training import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

Its twin is training.torch_trainer; what both share, and how they are used: training.trl_trainer and docs/from_trl.md.
"""

import random
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from common.errors import UserError
from common.files import atomic_file, expanded
from models.adapter_config import check_fit
from models.adapters import save_adapter
from models.arrays import read_arrays
from models.export.fused import save_fused
from models.generation import sample
from models.loading import load, twin
from models.soft_prompt import find_embedding
from models.value_head import new_value_head
from training.ppo_learner import PPOLearner, build_policies, make_ppo_optimizer
from training.settings import PPOSettings
from training.trl_trainer import HEAD_FILE, Accelerator, Trainer, ValueHeadModel, create_reference_model

__all__ = ["AutoModelForCausalLMWithValueHead", "PPOTrainer", "create_reference_model", "set_seed"]


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and mlx's random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    mx.random.seed(seed)


class AutoModelForCausalLMWithValueHead(ValueHeadModel):
    """A language model of mlx-lm with a value head; `pretrained_model` is the model itself."""

    sample_function = sample

    @classmethod
    def opened(cls, name, saved, peft_config, head) -> "AutoModelForCausalLMWithValueHead":
        """The model `name` with a new or a saved adapter, and the head of the file `head`, if it exists."""
        model = cls(loaded := load(name), loaded.model)
        layers = [path for path, m in loaded.model.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)]
        adapter = model.adapter_for(saved, peft_config, layers)
        trainee, base = build_policies(loaded, PPOSettings(use_peft=True), adapter)
        trainee.value_head = trainee.module.value_head = new_value_head(loaded.model, bias=True)
        model.trainee = trainee
        model.base = None if trainee.adapter.fine_tune_type == "full" else base
        if head.is_file():
            weights = read_arrays(head, "save the model again")
            check_fit(trainee.value_head.parameters(), weights, head)
            trainee.value_head.update(weights)
        return model

    def reference(self, num_shared_layers: int | None = None) -> "AutoModelForCausalLMWithValueHead":
        """A frozen copy over the same arrays; its first layers and the embedding are frozen in the policy, too."""
        if num_shared_layers is not None:
            layers = getattr(self.pretrained_model, "layers", [])
            if not 0 < num_shared_layers < len(layers):
                raise UserError(f"num_shared_layers is {num_shared_layers}; it must be below the {len(layers)} layers")
            for module in (find_embedding(self.pretrained_model)[1], *layers[:num_shared_layers]):
                module.freeze()
        frozen = twin(self.pretrained_model)
        frozen.freeze()
        frozen.eval()
        return type(self)(self.loaded, frozen)

    @property
    def eos_token_ids(self) -> set[int]:
        """The tokenizer's EOS and those of the model's configuration."""
        return set(self.loaded.tokenizer.eos_token_ids)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the LoRA as mlx-lm's adapter folder, or else the model as mlx-lm's and transformers' folder.

        The value head has a file of its own beside them. Training can go on.
        """
        folder = expanded(save_directory)
        if self.is_peft_model:
            save_adapter(folder, self.pretrained_model, self.trainee.adapter)
        else:
            save_fused(replace(self.loaded, model=twin(self.pretrained_model)), folder)
        if self.v_head is not None:
            with atomic_file(folder / HEAD_FILE) as temporary:
                mx.save_safetensors(str(temporary), dict(self.v_head.parameters()))


class PPOTrainer(Trainer):
    """TRL 0.11's PPOTrainer on MLX."""

    set_seed = staticmethod(set_seed)

    def make_learner(self) -> PPOLearner:
        """The learner of `model` against `reference`, by `settings`."""
        self.reference.freeze()
        self.reference.eval()
        trainee, tokenizer = self.model.trainee, self.model.loaded.tokenizer
        optimizer = make_ppo_optimizer(trainee, self.settings)
        return PPOLearner(trainee.module, self.reference, tokenizer, optimizer, self.settings)

    @property
    def accelerator(self) -> Accelerator:
        """One process; torch tensors of the caller are on the CPU."""
        return Accelerator("cpu")
