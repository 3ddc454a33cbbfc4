"""Learned rewards: the value that a trained head gives a text at its last token.

sft.py --reward-model writes it as an adapter; fuse.py turns it into a standalone folder, ours or a transformers
AutoModelForSequenceClassification with one label.
"""

from collections.abc import Sequence

import mlx.core as mx

from common.errors import UserError
from common.files import expanded
from data.batching import collate, encode_text, in_order, in_passes
from models.adapters import CONFIG_FILE, SINGLE_FILE_SUFFIXES, load_adapter, read_adapter
from models.export.classifier import load_classifier
from models.folders import is_classifier
from models.loading import LoadedModel, load, resolve, twin
from models.soft_prompt import soft_prompt_ids
from models.value_head import ScoringModel, ValueHead, hidden_size, load_value_head


class RewardModel:
    """Scores prompt + completion as text, encoded by the reward model's own tokenizer and ended by EOS, as in
    training."""

    def __init__(self, scoring: ScoringModel, tokenizer, batch_size: int = 64):
        self.scoring, self.tokenizer, self.batch_size = scoring, tokenizer, batch_size
        self.prefix = soft_prompt_ids(scoring.model)
        scoring.eval()
        scoring.freeze()

    def reward(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """One score per completion."""
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        examples = [encode_text(self.tokenizer, text, self.prefix) for text in texts]
        scores: list[float] = []
        for indices in in_order(len(examples), self.batch_size):
            batch = collate([examples[i] for i in indices], self.tokenizer.pad_token_id or 0)
            for rows in in_passes(*batch.tokens.shape):
                piece = slice(rows.start, rows.stop)
                scores += self.scoring(mx.array(batch.tokens[piece]), mx.array(batch.lengths[piece])).tolist()
        return scores


def load_reward_model(path: str, base: LoadedModel | None = None) -> RewardModel:
    """Open a reward model: an adapter with a value head, a model folder with one, or a transformers classifier.

    base: an open model without an adapter. A reward adapter trained on the same model shares its weights, so that the
    base is held only once. Raises UserError if there is no value head.
    """
    folder = expanded(path)
    head: ValueHead | None
    if folder.suffix in SINGLE_FILE_SUFFIXES or (folder / CONFIG_FILE).is_file():
        saved = read_adapter(folder)
        name = saved.config.model
        shared = base is not None and resolve(name).resolve() == base.path.resolve()
        loaded = base if shared and base is not None else load(name)
        model = twin(loaded.model) if shared else loaded.model
        head = load_adapter(model, folder).value_head
    elif is_classifier(resolve(path)):
        loaded, head = load_classifier(path)
        model = loaded.model
    else:
        loaded = load(path)
        model, head = loaded.model, load_value_head(loaded.path, hidden_size(loaded.model))
    if head is None:
        raise UserError(f"{path} has no value head, so it is not a reward model; train one by sft.py --reward-model")
    return RewardModel(ScoringModel(model, head), loaded.tokenizer)
