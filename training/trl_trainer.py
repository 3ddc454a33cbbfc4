"""TRL 0.11's `PPOTrainer` and its model with a value head, over the library's own learners, for MLX and PyTorch.

    config = PPOConfig(batch_size=16, mini_batch_size=16, learning_rate=1e-4)
    model = AutoModelForCausalLMWithValueHead.from_pretrained("tiny-digits")
    trainer = PPOTrainer(config, model, create_reference_model(model), tokenizer)
    responses = trainer.generate(queries, return_prompt=False, do_sample=True, max_new_tokens=16)
    stats = trainer.step(queries, responses, scores)

Arrays may be mlx's, torch's, NumPy's or lists; what comes back is of the kind that was given. Nothing of the algorithm
is here: a step is `experience`, `advantages_and_returns` and `update`, as in training.ppo_loop. What is different from
TRL: docs/from_trl.md. The frameworks' sides are training.trainer and training.torch_trainer.
"""

import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.files import expanded
from models.adapter_config import CONFIG_FILE, AdapterConfig, find_adapter
from rewards.combined import Scored
from training import ppo_step
from training.advantages import advantages_and_returns
from training.flags import default_output_dir
from training.metrics import start_run_folder
from training.ppo import StepSizeController
from training.ppo_loop import Learner, Progress
from training.rollout import has_eos, through_eos
from training.trackers import check_tracker, open_tracker
from training.trl_config import PPOConfig, Sampling, lora_adapter, refuse, sampling
from training.trl_stats import as_numpy, deviation, length_stats, rollout_stats, update_stats

Array = Any
HEAD_FILE = "v_head.safetensors"  # TRL's name for it; a value_head.safetensors would make a reward model of the folder
LOADING_REMEDIES = {
    "v_head_init_strategy": "the value head starts at 0",
    "v_head_initializer_range": "the value head starts at 0",
    "summary_dropout_prob": "the value head has no dropout, as in TRL's PPO, which runs it in eval mode",
    "load_in_8bit": "name a quantized model, such as one of mlx-community's",
    "load_in_4bit": "name a quantized model, such as one of mlx-community's",
    "reward_adapter": "score completions by a function or a reward model of your own",
    "torch_dtype": "weights keep their saved precision, and trained ones are float32",
    "device_map": "the model is on this machine's device",
}
TRAINER_REMEDIES = {
    "optimizer": "Adam with config.learning_rate, TRL's default, is what trains",
    "lr_scheduler": "the rate is constant; ppo_training.py has --lr-schedule",
    "training_data_collator": "queries and responses are packed by training.rollout",
}


def token_ids(row: Array) -> list[int]:
    """One row of token ids as a list."""
    values = row.tolist() if hasattr(row, "tolist") else list(row)
    if not isinstance(values, list) or any(isinstance(value, list) for value in values):
        raise UserError("token ids must be rows of shape (length,); take .squeeze() or one row of a batch")
    return [int(value) for value in values]


def like(ids: list, given: Array) -> Array:
    """Token ids, a list or a list of rows, as an array of the kind of `given`."""
    if hasattr(given, "new_tensor"):  # of torch, which is not imported here
        return given.new_tensor(ids)
    if isinstance(given, list | tuple):
        return ids
    return np.array(ids) if isinstance(given, np.ndarray) else type(given)(ids)


class ValueHeadModel(ABC):
    """A language model to be trained by PPO, with its value head; or, without trainee, a frozen reference."""

    sample_function: Callable[..., list[list[int]]]  # models.generation.sample or its twin

    def __init__(self, loaded: Any, pretrained_model: Any, trainee: Any = None, base: Any = None):
        """trainee: the policy of `build_policies`, with its value head; base: a LoRA's, the adapter off."""
        self.loaded, self.pretrained_model, self.trainee, self.base = loaded, pretrained_model, trainee, base

    @classmethod
    def from_pretrained(
        cls, name: str, *, peft_config: Any = None, is_trainable: bool = True, **others: Any
    ) -> "ValueHeadModel":
        """Open a model as `models.loading.load` does, or what `save_pretrained` wrote, with a value head.

        peft_config: a LoraConfig, of which a new LoRA is made; else all weights are trained. Raises UserError for
        another option, and for a model that cannot be opened.
        """
        if not isinstance(name, str | Path):
            raise UserError(f"from_pretrained takes a model's name or folder, not a {type(name).__name__}")
        refuse("from_pretrained", others, LOADING_REMEDIES, (None, False))
        folder = expanded(name)
        saved = folder if (folder / CONFIG_FILE).is_file() else None
        if saved is None:
            return cls.opened(str(name), None, peft_config, folder / HEAD_FILE)
        if peft_config is not None:
            raise UserError(f"{name} is an adapter already, so peft_config would nest a second one; leave it out")
        base = find_adapter(saved).config.model
        if not base:
            raise UserError(f"{name} does not say which model it is an adapter of; train it again")
        return cls.opened(base, saved, None, folder / HEAD_FILE)

    @classmethod
    @abstractmethod
    def opened(cls, name: str, saved: Path | None, peft_config: Any, head: Path) -> "ValueHeadModel":
        """The model `name` with a new or a saved adapter, and the head of the file `head`, if it exists."""

    @abstractmethod
    def reference(self, num_shared_layers: int | None) -> "ValueHeadModel":
        """A frozen copy; its first layers and the embedding are frozen in the policy, too, where a number is given."""

    @abstractmethod
    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the LoRA as an adapter folder, or else the whole model, and the value head."""

    @property
    @abstractmethod
    def eos_token_ids(self) -> set[int]:
        """What ends a completion."""

    @property
    def is_peft_model(self) -> bool:
        """Whether a LoRA is trained, not all weights."""
        return self.base is not None

    @property
    def v_head(self) -> Any:
        """The value head; None in a reference."""
        return None if self.trainee is None else self.trainee.value_head

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's pad, or 0."""
        return self.loaded.tokenizer.pad_token_id or 0

    def adapter_for(self, saved: Path | None, peft_config: Any, layers: Iterable[str]) -> AdapterConfig | Path:
        """What `build_policies` takes for an adapter. layers: names of the linear layers of the model."""
        if saved is not None:
            return saved
        if peft_config is not None:
            return lora_adapter(peft_config, layers, self.loaded.name)
        return AdapterConfig("full", model=self.loaded.name)

    def generate(self, input_ids: Array, **generation_kwargs: Any) -> Array:
        """Continue rows (B, P) of token ids; returns them with their completions (B, L), padded on the right.

        Raises UserError for generation arguments that PPO cannot follow.
        """
        choices = sampling(generation_kwargs, self.eos_token_ids, self.pad_token_id)
        rows = [token_ids(row) for row in input_ids]
        completed = [row + more for row, more in zip(rows, self.complete(rows, choices, len(rows)), strict=True)]
        width = max(map(len, completed), default=0)
        return like([row + [choices.pad_token_id] * (width - len(row)) for row in completed], input_ids)

    def complete(self, rows: Sequence[list[int]], choices: Sampling, batch_size: int) -> list[list[int]]:
        """One completion per row, through its first EOS."""
        model, ends = self.pretrained_model, choices.eos_token_ids
        return type(self).sample_function(model, rows, ends, choices.max_tokens, choices.temperature, batch_size)


def create_reference_model(
    model: ValueHeadModel, num_shared_layers: int | None = None, pattern: None = None
) -> ValueHeadModel:
    """The model as it is now, frozen. num_shared_layers: so many first layers are not trained, as in TRL."""
    if pattern is not None:
        raise UserError("create_reference_model: pattern is not supported; the layers are found without one")
    return model.reference(num_shared_layers)


class Accelerator(NamedTuple):
    """What TRL's examples ask of accelerate: there is one process."""

    device: Any
    is_main_process: bool = True
    num_processes: int = 1


class Batches:
    """A data set in shuffled batches, in a new order at every pass; a short last batch is left out, as in TRL."""

    def __init__(self, dataset: Any, batch_size: int, collate: Callable[[list], Any] | None, seed: int):
        """dataset: anything with a length and rows by number. collate: rows → a batch (default: lists by column)."""
        if len(dataset) < batch_size:
            raise UserError(f"the data set has {len(dataset)} rows, fewer than batch_size {batch_size}; lower that")
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate or by_column
        self.seed, self.passes = seed, 0

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        order = np.random.default_rng((self.seed, self.passes)).permutation(len(self.dataset))
        self.passes += 1
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self.collate([self.dataset[int(row)] for row in order[start : start + self.batch_size]])


def by_column(rows: list[dict[str, Any]]) -> dict[str, list]:
    """Rows as one list per column."""
    return {name: [row[name] for row in rows] for name in rows[0]}


class Trainer(ABC):
    """TRL 0.11's PPOTrainer."""

    def __init__(
        self,
        config: PPOConfig,
        model: ValueHeadModel,
        ref_model: ValueHeadModel | None = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: None = None,
        data_collator: Callable[[list], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: None = None,
        training_data_collator: None = None,
    ):
        """config, model, ref_model, tokenizer, dataset, data_collator, num_shared_layers: as in TRL.

        ref_model: None makes one of the model as it is now. The reference of a LoRA is its base in any case, as in TRL.
        Raises UserError for other options, and for a log_with whose package is missing.
        """
        others = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
        others["training_data_collator"] = training_data_collator
        refuse("PPOTrainer", others, TRAINER_REMEDIES, (None,))
        if model.trainee is None:
            raise UserError("PPOTrainer: model is a reference, which is frozen; give one of from_pretrained")
        if ref_model is model:
            raise UserError("PPOTrainer: ref_model is the model itself; give create_reference_model(model), or None")
        check_tracker(config.log_with)
        self.set_seed(config.seed)
        self.config, self.model, self.tokenizer, self.dataset = config, model, tokenizer, dataset
        self.settings = config.settings(use_peft=model.is_peft_model)
        if ref_model is None and not model.is_peft_model:
            ref_model = model.reference(num_shared_layers)
        self.ref_model = ref_model
        self.reference = ref_model.pretrained_model if ref_model and not model.is_peft_model else model.base
        self.learner = self.make_learner()
        self.learner.eos_token_ids = set()  # a response is trained on as it is given
        self.progress = Progress(ppo_step.make_controller(self.settings), StepSizeController(0.0))
        self.dataloader = None
        if dataset is not None:
            self.dataloader = Batches(dataset, config.batch_size, data_collator, config.seed)
        self.tracker = self._open_tracker()

    @staticmethod
    @abstractmethod
    def set_seed(seed: int) -> None:
        """Seed Python's, NumPy's and the framework's random numbers."""

    @abstractmethod
    def make_learner(self) -> Learner:
        """The learner of `model` against `reference`, by `settings`."""

    @property
    @abstractmethod
    def accelerator(self) -> Accelerator:
        """The device of the arrays, and that this is the only process."""

    @property
    def kl_ctl(self) -> Any:
        """The controller of the KL coefficient; `kl_ctl.value` is the coefficient."""
        return self.progress.controller

    def _open_tracker(self) -> Any:
        if not self.config.log_with:
            return None
        folder = start_run_folder(default_output_dir("ppo_trainer"), asdict(self.config))
        tracker = open_tracker(self.config.log_with, folder)
        if tracker is not None:
            weakref.finalize(self, tracker.close)  # also at the end of the process
        return tracker

    def generate(
        self,
        query_tensor: Array,
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Array:
        """Sample responses: of one query (P,), as an array (1, L); of a list of queries, as a list of arrays.

        length_sampler: draws max_new_tokens, for each batch of a list; batch_size: queries in flight. With
        generate_ref_response those of the reference come as well. Raises UserError for generation arguments that PPO
        cannot follow (docs/from_trl.md).
        """
        single = not isinstance(query_tensor, list)
        queries = [query_tensor] if single else query_tensor
        rows = [token_ids(query) for query in queries]

        def responses(model: ValueHeadModel) -> Array:
            found = []
            for start in range(0, len(rows), batch_size):
                if length_sampler is not None:
                    generation_kwargs["max_new_tokens"] = length_sampler()
                choices = sampling(generation_kwargs, self.model.eos_token_ids, self.model.pad_token_id)
                found += model.complete(rows[start : start + batch_size], choices, batch_size)
            if not single:  # TRL cuts here after the tokenizer's EOS, whatever ended the sampling
                found = [through_eos(completion, self.model.eos_token_ids) for completion in found]
            whole = [row * return_prompt + completion for row, completion in zip(rows, found, strict=True)]
            return like(whole, query_tensor) if single else list(map(like, whole, queries))

        if not generate_ref_response:
            return responses(self.model)
        return responses(self.model), responses(self._reference_model())

    def _reference_model(self) -> ValueHeadModel:
        return type(self.model)(self.model.loaded, self.reference)

    def step(
        self,
        queries: list[Array],
        responses: list[Array],
        scores: list[Array],
        response_masks: None = None,
    ) -> dict[str, Any]:
        """One PPO step on `batch_size` queries (P,) and responses (C,), arrays of token ids, and a score of each.

        Returns the stats under TRL's names, and beside them those of a report line of ppo_training.py. Responses are
        trained on as they are given, also past an EOS. Raises UserError for input that does not fit.
        """
        if response_masks is not None:
            raise UserError("step: response_masks is not supported; cut the responses where training should end")
        started = time.perf_counter()
        rows, completions, given = self._checked(queries, responses, scores)
        shaped = ppo_step.shape_scores(given, [True] * len(given), self.settings, self.progress.moments)
        rollout, entropy = self.learner.experience(rows, completions, shaped)
        passed, kl_coef = time.perf_counter(), self.kl_ctl.value
        advantages, returns = advantages_and_returns(rollout, self.settings, kl_coef)
        computed = time.perf_counter()
        updates = self.learner.update(self.progress.step, rollout, advantages, returns, kl_coef)
        ended = time.perf_counter()
        self.progress.step += 1

        ends = [has_eos(completion, self.model.eos_token_ids) for completion in completions]
        figures = ppo_step.rollout_figures(Scored([], [], given.tolist(), {}), ends, rollout, entropy)
        stats: dict[str, Any] = {**figures, "kl_coef": kl_coef}
        stats |= {**ppo_step.value_figures(self.settings, rollout, returns), **updates}
        stats |= rollout_stats(rollout, advantages, returns, kl_coef) | length_stats(rows, completions)
        stats |= update_stats(updates, self.settings)
        stats |= {"ppo/policy/entropy": figures["entropy"], "ppo/learning_rate": self.config.learning_rate}
        stats |= {"time/ppo/forward_pass": passed - started, "time/ppo/compute_advantages": computed - passed}
        stats |= {"time/ppo/optimize_step": ended - computed, "time/ppo/total": ended - started}
        self.kl_ctl.update(stats["objective/kl"], self.config.batch_size)
        return stats

    def _checked(
        self, queries: list[Array], responses: list[Array], scores: list[Array]
    ) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
        """Token ids, and scores (B,). Raises UserError for numbers of them that differ, and for a row without ids."""
        size = self.config.batch_size
        for name, given in (("queries", queries), ("responses", responses), ("scores", scores)):
            if len(given) != size:
                raise UserError(f"step: {len(given)} {name} were given, batch_size is {size}; they must be equal")
        rows, completions = [token_ids(query) for query in queries], [token_ids(response) for response in responses]
        for name, lists in (("queries", rows), ("responses", completions)):
            if not all(lists):
                raise UserError(f"step: one of the {name} is empty; give each at least one token")
        values = [as_numpy(score).astype(np.float32).reshape(-1) for score in scores]
        if any(value.size != 1 or not np.isfinite(value[0]) for value in values):
            raise UserError("step: every score must be one finite number; check the reward")
        return rows, completions, np.concatenate(values)

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Sequence[Array],
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Give the tracker of `config.log_with` the numbers of `stats`, and a table of the batch with its rewards.

        Without a tracker nothing is recorded, as in TRL. Arrays are left out.
        """
        if self.tracker is None:
            return
        scores = [float(as_numpy(reward).reshape(-1)[0]) for reward in rewards]
        logs = {name: float(value) for name, value in stats.items() if np.ndim(value) == 0 and np.isfinite(value)}
        logs |= {"env/reward_mean": float(np.mean(scores)), "env/reward_std": deviation(scores)}
        self.tracker.figures(self.progress.step, {name: value for name, value in logs.items() if np.isfinite(value)})
        columns = [name for name in columns_to_log if name in batch]
        if columns:
            cells = zip(*(batch[name] for name in columns), scores, strict=True)
            table = [dict(zip((*columns, "reward"), row, strict=True)) for row in cells]
            self.tracker.table(self.progress.step, "game_log", table)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the model (a LoRA: its adapter) with its value head, and the tokenizer; as `model.save_pretrained`."""
        self.model.save_pretrained(save_directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(expanded(save_directory)))
