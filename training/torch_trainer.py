"""TRL 0.11's `PPOTrainer` in PyTorch. Never imports mlx.

    from training.torch_trainer import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

The twin of training.trainer; what both share, and how they are used: training.trl_trainer and docs/from_trl.md.
"""

import os
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from common.errors import UserError
from common.files import atomic_file, expanded, writing
from models.adapter_config import check_fit
from models.torch_adapters import save_adapter
from models.torch_arrays import read_arrays
from models.torch_generation import sample
from models.torch_loading import choose_device, load, twin
from models.torch_value_head import new_value_head
from training.settings import PPOSettings
from training.torch_ppo_learner import PPOLearner, build_policies, make_ppo_optimizer
from training.trl_config import LengthSampler, PPOConfig
from training.trl_trainer import HEAD_FILE, Accelerator, Trainer, ValueHeadModel, create_reference_model

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "create_reference_model",
    "set_seed",
]


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class AutoModelForCausalLMWithValueHead(ValueHeadModel):
    """A language model of transformers with a value head; `pretrained_model` is the model itself."""

    sample_function = sample

    @classmethod
    def opened(cls, name, saved, peft_config, head) -> "AutoModelForCausalLMWithValueHead":
        """The model `name` with a new or a saved adapter, and the head of the file `head`, if it exists."""
        model = cls(loaded := load(name, choose_device("auto")), loaded.model)
        layers = [path for path, module in loaded.model.named_modules() if isinstance(module, nn.Linear)]
        adapter = model.adapter_for(saved, peft_config, layers)
        trainee, base = build_policies(loaded, PPOSettings(use_peft=True), adapter)
        trainee.value_head = trainee.module.value_head = new_value_head(loaded.model, bias=True)
        model.trainee = trainee
        model.base = None if trainee.adapter.fine_tune_type == "full" else base
        if head.is_file():
            weights = read_arrays(head, "save the model again")
            check_fit(trainee.value_head.state_dict(), weights, head)
            trainee.value_head.load_state_dict(weights)
        return model

    def reference(self, num_shared_layers: int | None = None) -> "AutoModelForCausalLMWithValueHead":
        """A frozen copy; its first layers and the embedding are frozen in the policy, too, and no copies."""
        if num_shared_layers is not None:
            layers = getattr(self.pretrained_model.base_model, "layers", [])
            if not 0 < num_shared_layers < len(layers):
                raise UserError(f"num_shared_layers is {num_shared_layers}; it must be below the {len(layers)} layers")
            for module in (self.pretrained_model.get_input_embeddings(), *layers[:num_shared_layers]):
                module.requires_grad_(False)
        return type(self)(self.loaded, twin(self.pretrained_model).eval())

    @property
    def eos_token_ids(self) -> set[int]:
        """The tokenizer's EOS and those of the model's configuration."""
        return self.loaded.eos_token_ids

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the LoRA as mlx-lm's adapter folder, or else the model as transformers' folder.

        The value head has a file of its own beside them. Training can go on.
        """
        folder = expanded(save_directory)
        if self.is_peft_model:
            save_adapter(folder, self.pretrained_model, self.trainee.adapter)
        else:
            self._save_model(folder)
        if self.v_head is not None:
            with atomic_file(folder / HEAD_FILE) as temporary:
                save_file(self.v_head.state_dict(), temporary)

    def _save_model(self, folder: Path) -> None:
        """Write the model and its tokenizer file by file, config.json last."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".model.") as temporary:
                self.pretrained_model.save_pretrained(temporary)
                self.loaded.tokenizer.save_pretrained(temporary)
                for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "config.json"):
                    os.replace(file, folder / file.name)


class PPOTrainer(Trainer):
    """TRL 0.11's PPOTrainer in PyTorch."""

    set_seed = staticmethod(set_seed)

    def make_learner(self) -> PPOLearner:
        """The learner of `model` against `reference`, by `settings`."""
        self.reference.requires_grad_(False).eval()
        trainee = self.model.trainee
        optimizer = make_ppo_optimizer(trainee, self.settings)
        return PPOLearner(trainee.module, self.reference, self.model.loaded, optimizer, self.settings)

    @property
    def accelerator(self) -> Accelerator:
        """One process, on the model's device."""
        return Accelerator(self.model.pretrained_model.device)
