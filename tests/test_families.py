"""The matrix: properties of every text family of mlx-lm, on small random models (tests/architectures.py).

That hidden states give the model's own logits, that pads and batch mates leave a score alone, and that a soft prompt
is read, stand in test_value_head.py and test_soft_prompt.py, over the same families.
"""

import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

import models.generation
from common.errors import UserError
from models.adapters import AdapterConfig, adapter_weights, attach_adapter, fuse_adapter
from models.generation import sample
from models.loading import LoadedModel
from models.soft_prompt import soft_prompt_ids
from models.token_stats import token_stats
from models.value_head import Policy, ScoringModel, new_value_head
from tests.architectures import ARCHITECTURES, COMMON, build, settings_of
from training import ppo, ppo_flags
from training.advantages import advantages_and_returns
from training.flags import adapter_settings
from training.losses import pairwise_reward_loss, sft_loss
from training.optimizer import loss_and_gradients, make_optimizer, update
from training.ppo_learner import PPOLearner, build_policies
from training.ppo_loop import roll_out

TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17, 18]])
PARAMETERS = {"rank": 2, "scale": 2.0, "dropout": 0.0}
PROMPTS = [[1], [2, 3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16], [17], [18, 19, 20], [21, 22]]
WITH_EXPERTS = ("mixtral", "qwen3_moe", "qwen3_next")  # mlx-lm has no DoRA for layers of experts
KINDS = ("lora", "dora", "full", "soft_prompt", "none")


def config_of(kind):
    return AdapterConfig(kind, -1, PARAMETERS, num_prompt_tokens=3)


def adapted(name, kind):
    """A model with an adapter whose weights are as if trained."""
    model = build(name)
    attach_adapter(model, config_of(kind))
    mx.random.seed(7)
    moved = [(key, w + 0.1 * mx.random.normal(w.shape)) for key, w in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    return model


def arrays(module):
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def close(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=0, atol=tolerance * np.abs(expected).max())


def test_the_families_of_the_issue_are_here():
    families = {family for family, _ in ARCHITECTURES.values()}
    asked = "llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 granite cohere olmo2 smollm3"
    assert families.issuperset(asked.split(" "))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_and_a_head_train_and_move_alone(name, kind):
    """Three steps on one batch: the loss falls, trained weights change, and nothing else does."""
    if kind == "dora" and name in WITH_EXPERTS:
        with pytest.raises(UserError, match="DoRA"):
            attach_adapter(build(name), config_of(kind))
        return
    model = build(name)
    attach_adapter(model, config_of(kind))
    policy = Policy(model, new_value_head(model, std=None))
    before, trained = arrays(policy), {key for key, _ in tree_flatten(policy.trainable_parameters())}
    prefix = mx.broadcast_to(mx.array(soft_prompt_ids(model), mx.int32), (2, len(soft_prompt_ids(model))))
    tokens = mx.concatenate([prefix, TOKENS], axis=1)
    positions = mx.broadcast_to(mx.arange(7) + prefix.shape[1], (2, 7))

    def loss(policy, tokens, positions):
        hidden, values = policy(tokens, positions)
        logprobs = token_stats(policy.model, hidden, TOKENS[:, 1:], training=True).logprobs
        return sft_loss(logprobs, mx.ones((2, 7)))[0] + ((values - 1.0) ** 2).mean()

    gradients_of = loss_and_gradients(policy, loss)
    optimizer, losses = make_optimizer(1e-4 if kind == "full" else 1e-3, 3), []
    for _ in range(3):
        value, gradients = gradients_of(tokens, positions)
        assert update(policy, optimizer, value, gradients, 1.0) > 0
        losses.append(value.item())
    assert losses[2] < losses[1] < losses[0]
    after = arrays(policy)
    moved = {key for key, array in after.items() if not np.array_equal(array, before[key])}
    assert moved <= trained and "value_head.weight" in moved
    # Experts without tokens, biases that softmax cancels, and layers without effect do not change.
    assert len(moved) > 0.8 * len(trained), sorted(trained - moved)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unequal_prompts_together_sample_what_each_samples_alone(name, monkeypatch):
    """Recurrent layers and unsuitable masks would let pads through.

    Each draw of the batch is from the distribution that a whole forward pass over that row alone gives.
    """
    model, drawn_from = build(name), []

    def recording(temperature):
        def draw(logits):
            drawn_from.append(nn.log_softmax(logits, axis=-1))
            return mx.random.categorical(logits / temperature)

        return draw

    monkeypatch.setattr(models.generation, "temperature_sampler", recording)
    mx.random.seed(1)
    together = sample(model, PROMPTS, [], 5)
    drawn = np.concatenate([np.array(logprobs) for logprobs in drawn_from])
    for prompt, completion in zip(PROMPTS, together, strict=True):
        whole = nn.log_softmax(model(mx.array([prompt + completion[:-1]]))[0, len(prompt) - 1 :], axis=-1)
        for expected in np.array(whole):
            assert np.abs(drawn - expected).max(axis=-1).min() < 1e-4
    monkeypatch.undo()
    greedy = sample(model, PROMPTS, [], 5, temperature=0)
    assert greedy[3:5] == [sample(model, [prompt], [], 5, temperature=0)[0] for prompt in PROMPTS[3:5]]
    ends = {greedy[1][2], greedy[4][1]}
    stopped = sample(model, PROMPTS, ends, 5, temperature=0, batch_size=3)
    assert stopped == [cut(completion, ends) for completion in greedy]


def cut(completion, ends):
    first = next((index for index, token in enumerate(completion) if token in ends), len(completion))
    return completion[: first + 1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "lora") for name in ARCHITECTURES),
        *((name, "dora") for name in ARCHITECTURES if name not in WITH_EXPERTS),
    ],
)
def test_the_fused_folder_says_what_the_adapter_said(name, kind, tmp_path):
    model = adapted(name, kind)
    expected = model(TOKENS)
    assert mx.abs(expected - build(name)(TOKENS)).max().item() > 1e-3
    fuse_adapter(model)
    close(model(TOKENS), expected)
    (tmp_path / "config.json").write_text(json.dumps(settings_of(name)), encoding="utf-8")
    mlx_lm.utils.save_model(tmp_path, model)
    opened, _ = mlx_lm.utils.load_model(tmp_path)
    close(opened(TOKENS), expected)


class Digits:
    """A minimal tokenizer for rollouts, in which tokens are numbers."""

    eos_token_ids, pad_token_id = frozenset({3, 4, 5, 6}), 0

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]


def scores_of(prompts, completions):
    return [len(completion) % 7 / 7 for completion in completions]


def policy_and_step(name):
    """A policy, the figures of its rollout, and a function for one update."""
    words = ["--ground-truth-reward", "--batch-size", "6", "--mini-batch-size", "6", "--max-completion-length", "5"]
    args = ppo_flags.ppo_parser("PPO.").parse_args([*words, "--lora-layers", "-1", "--ppo-epochs", "1"])
    loaded = LoadedModel(build(name), Digits(), {}, Path(), name)
    settings = ppo_flags.ppo_settings(args)
    trainee, reference = build_policies(loaded, settings, AdapterConfig(**adapter_settings(args)))
    mx.random.seed(0)
    prompts = [" ".join(map(str, prompt)) for prompt in PROMPTS[:6]]
    learner = PPOLearner(trainee.module, reference, loaded.tokenizer, make_optimizer(1e-3, 1), settings)
    rollout, _, figures = roll_out(learner, loaded.tokenizer, prompts, scores_of, ppo.RunningMoments())
    advantages, returns = advantages_and_returns(rollout, settings, 0.0)

    def step():
        return learner.update(0, rollout, advantages, returns, 0.0)

    return trainee, step, figures


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_ppo_step_runs(name):
    """The rollout's logprobs equal those in the first mini batch, so the ratio is 1; the update changes the policy."""
    trainee, step, figures = policy_and_step(name)
    assert figures["kl"] == pytest.approx(0, abs=1e-5) and figures["entropy"] > 0
    before = arrays(trainee.module)
    stats = step()
    assert stats["ratio_mean"] == pytest.approx(1, abs=1e-4) and stats["updates"] == 1
    moved = {key for key, array in arrays(trainee.module).items() if not np.array_equal(array, before[key])}
    assert "value_head.weight" in moved and any(key.endswith("lora_b") for key in moved)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_the_gradient_of_ppo_is_taken_in_training_mode(name, monkeypatch):
    """On Metal, linear attention uses a kernel without a gradient unless the layer is in training mode."""
    family = importlib.import_module(f"mlx_lm.models.{name}")
    with_kernel, update = [], family.gated_delta_update

    def recording(*args, use_kernel=True, **kwargs):
        with_kernel.append(use_kernel)
        return update(*args, use_kernel=use_kernel, **kwargs)

    monkeypatch.setattr(family, "gated_delta_update", recording)
    _, step, _ = policy_and_step(name)
    with_kernel.clear()
    step()
    assert with_kernel and not any(with_kernel)


def test_a_model_that_cannot_be_frozen_is_refused():
    config = {"model_type": "recurrent_gemma", "attention_bias": False, "conv1d_width": 4, "lru_width": 32}
    config |= {"attention_window_size": 8, "embeddings_scale_by_sqrt_dim": True, "logits_soft_cap": 30.0}
    config |= {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2, **COMMON}
    model_class, arguments = mlx_lm.utils._get_classes(config)
    with pytest.raises(UserError, match="recurrent_gemma cannot be trained"):
        attach_adapter(model_class(arguments.from_dict(config)), config_of("lora"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_reward_model_learns_to_rank(name):
    model = build(name)
    attach_adapter(model, config_of("lora"))
    scoring = ScoringModel(model, new_value_head(model, std=None))
    texts, lengths = mx.array([[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9], [9, 0, 0, 0]]), mx.array([3, 2, 4, 1])

    def loss(scoring, texts, lengths):
        scores = scoring(texts, lengths)
        return pairwise_reward_loss(scores[:2], scores[2:])[0]

    gradients_of, optimizer, losses = loss_and_gradients(scoring, loss), make_optimizer(1e-2, 4), []
    for _ in range(4):
        value, gradients = gradients_of(texts, lengths)
        update(scoring, optimizer, value, gradients, 1.0)
        losses.append(value.item())
    assert losses[3] < losses[0]
