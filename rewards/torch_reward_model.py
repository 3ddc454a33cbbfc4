"""Learned rewards in PyTorch: the value that a trained head gives a text at its last token.

The twin of rewards.reward_model. Opens what sft.py --reward-model and fuse.py write: an adapter or a model folder with
a value head, or a transformers AutoModelForSequenceClassification folder with one label.
"""

from collections.abc import Sequence
from typing import Any

import torch

from common.errors import UserError
from common.files import expanded
from data.batching import collate, encode_text, in_order, in_passes
from models.adapter_config import CONFIG_FILE, SINGLE_FILE_SUFFIXES, check_head_width
from models.folders import is_classifier
from models.torch_adapters import load_adapter, read_adapter
from models.torch_loading import LoadedModel, load, resolve, twin
from models.torch_soft_prompt import soft_prompt_ids
from models.torch_token_stats import largest_pass
from models.torch_value_head import ScoringModel, ValueHead, head_from, hidden_size, load_value_head


class RewardModel:
    """Scores prompt + completion as text, encoded by the reward model's own tokenizer and ended by EOS, as in
    training."""

    def __init__(self, scoring: ScoringModel, tokenizer, batch_size: int = 64):
        self.scoring, self.tokenizer, self.batch_size = scoring, tokenizer, batch_size
        self.prefix = soft_prompt_ids(scoring.model)
        scoring.eval().requires_grad_(False)

    @torch.no_grad()
    def reward(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """One score per completion."""
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        examples = [encode_text(self.tokenizer, text, self.prefix) for text in texts]
        device = self.scoring.value_head.weight.device
        scores: list[float] = []
        for indices in in_order(len(examples), self.batch_size):
            batch = collate([examples[i] for i in indices], self.tokenizer.pad_token_id or 0)
            tokens, lengths = (torch.tensor(array, device=device).long() for array in (batch.tokens, batch.lengths))
            count, length = batch.tokens.shape
            for rows in in_passes(count, length, largest_pass(self.scoring.model, length)):
                piece = slice(rows.start, rows.stop)
                scores += self.scoring(tokens[piece], lengths[piece]).tolist()
        return scores


def load_reward_model(path: str, device: torch.device, base: LoadedModel | None = None) -> RewardModel:
    """Open a reward model on `device`, in any of its three forms.

    base: an open model without an adapter. A reward adapter trained on the same model shares its weights, so that the
    base is held only once. Raises UserError if there is no value head.
    """
    folder = expanded(path)
    head: ValueHead | None
    if folder.suffix in SINGLE_FILE_SUFFIXES or (folder / CONFIG_FILE).is_file():
        name = read_adapter(folder).config.model
        shared = base is not None and resolve(name).resolve() == resolve(base.name).resolve()
        loaded = base if shared and base is not None else load(name, device)
        model = twin(loaded.model) if shared else loaded.model
        head = load_adapter(model, folder).value_head
    else:
        resolved = resolve(path)
        head = load_value_head(resolved)
        classifier = head is None and is_classifier(resolved)
        loaded = load(path, device, classifier=classifier)
        model = loaded.model
        if classifier:
            head = _classifier_head(path, model)
        elif head is not None:
            check_head_width(path, head.weight.shape[1], hidden_size(model))
    if head is None:
        raise UserError(f"{path} has no value head, so it is not a reward model; train one by sft.py --reward-model")
    return RewardModel(ScoringModel(model, head.to(device)), loaded.tokenizer)


def _classifier_head(path: str, model: Any) -> ValueHead:
    layer = getattr(model, "score", None)
    if layer is None or layer.weight.shape[0] != 1 or layer.bias is not None:
        raise UserError(f"{path} is not a classifier with one score and no bias; use a model with num_labels 1")
    return head_from(path, {"weight": layer.weight})
