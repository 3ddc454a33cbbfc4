"""ppo_training.py on a tiny random model: the properties that a right PPO has, and that a stop loses nothing."""

import itertools
import json
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

import ppo_training
from common.cli import Stopped
from common.cli import run as run_script
from common.errors import UserError
from data.digits import DigitRule, digit_prompts
from models.adapters import AdapterConfig, attach_adapter, load_adapter, read_adapter, save_adapter
from models.grad_checkpoint import checkpoint_layers
from models.loading import load
from models.output_layer import OutputLayer
from models.soft_prompt import soft_prompt_ids
from models.token_stats import TokenStats, token_stats
from models.value_head import Policy, ValueHead, forward, new_value_head
from rewards.combined import Scored
from rewards.digits import digit_reward
from rewards.reward_model import load_reward_model
from tests import numpy_ppo
from tests.scripts import call, fails, read_samples
from training import optimizer as training_optimizer
from training import optimizer_groups, ppo, ppo_flags, ppo_learner, ppo_loop, ppo_step
from training.advantages import advantages_and_returns
from training.checkpoint_folders import last_checkpoint
from training.flags import adapter_settings
from training.metrics import read_metrics
from training.optimizer import gradient_norm, loss_and_gradients, make_optimizer, optimizer_arrays, update
from training.passes import PackedRows, PaddedRows
from training.ppo_learner import (
    PPOLearner,
    accumulate,
    build_policies,
    make_loss,
    reference_states,
    train_ppo,
)
from training.rollout import Rollout, pack
from training.settings import PPOSettings

KINDS: dict[str, list[Any]] = {
    "lora": [],
    "dora": ["--fine-tune-type", "dora"],
    "soft prompt": ["--prompt-tuning", "--num-prompt-tokens", 3],
    "full": ["--fine-tune-type", "full"],
}
PROPERTIES = ["lora", "soft prompt", "full"]
# Without the discount and the value there is nothing in an advantage but the score (and the KL).
SCORE_ALONE = ["--gamma", 1, "--gae-lambda", 1]


def parse(*words):
    return ppo_flags.ppo_parser("PPO.").parse_args([str(word) for word in words])


def settings_of(*words):
    return ppo_flags.ppo_settings(parse("--ground-truth-reward", *words))


def policies_of(args, loaded):
    """What main builds: the policy and the reference."""
    adapter = args.resume_file or AdapterConfig(**adapter_settings(args))
    return build_policies(loaded, ppo_flags.ppo_settings(args), adapter)


def mixed_scores(prompts, completions):
    """A score in 0..1 that differs from completion to completion."""
    return [
        sum(map(ord, prompt + completion)) % 97 / 97 for prompt, completion in zip(prompts, completions, strict=True)
    ]


class Setting:
    """What main builds, for one set of flags."""

    def __init__(self, folder, *words):
        small = ["--batch-size", 16, "--mini-batch-size", 8, "--max-completion-length", 12, "--num-generations", 4]
        self.args = parse("--ground-truth-reward", "--model", folder, *small, *words)
        self.settings = ppo_flags.ppo_settings(self.args)
        self.loaded = load(str(folder))
        self.tokenizer = self.loaded.tokenizer
        self.trainee, self.reference = policies_of(self.args, self.loaded)
        self.policy = self.trainee.module
        self.prompts = ppo_step.Prompts(ppo_flags.choose_prompts(self.args, None), self.settings)
        self.moments = ppo.RunningMoments()

    def displace(self, size=0.3, seed=5):
        """Move the policy away from the reference, as some training would."""
        mx.random.seed(seed)
        moved = [(n, w + size * w.std() * mx.random.normal(w.shape)) for n, w in tree_flatten(self.trained())]
        moved = [(n, 0.02 * mx.random.normal(w.shape) if n.endswith("lora_b") else w) for n, w in moved]
        self.trainee.model.load_weights(moved, strict=False)

    def trained(self):
        return self.trainee.model.trainable_parameters()

    def roll_out(self, reward=mixed_scores, seed=0, step=0):
        mx.random.seed(seed)
        prompts = self.prompts.batch(step)
        rollout, self.scored, self.figures = ppo_loop.roll_out(
            self.learner(), self.tokenizer, prompts, reward, self.moments
        )
        return rollout

    def learner(self, optimizer=None, gradients_of=None):
        learner = PPOLearner(self.policy, self.reference, self.tokenizer, optimizer, self.settings)
        learner.gradients_of = gradients_of or learner.gradients_of
        return learner

    def gradient(self, rollout, rows=None, kl_coef=0.0, scores=None):
        """Loss, stats and gradients of one mini batch of all rows, or of the pieces in `rows`."""
        if scores is not None:
            rollout = rollout._replace(scores=mx.array(scores, mx.float32))
        advantages, returns = advantages_and_returns(rollout, self.settings, kl_coef)
        pieces = [np.arange(rollout.tokens.shape[0])] if rows is None else rows
        gradients_of = self.learner().gradients_of
        loss, stats, gradients = accumulate(gradients_of, rollout, advantages, returns, pieces, mx.array(kl_coef))
        return loss.item(), stats, flat(gradients)

    def optimise(self, rollout, kl_coef=0.0, optimizer=None, gradients_of=None, step=0):
        advantages, returns = advantages_and_returns(rollout, self.settings, kl_coef)
        if optimizer is None:
            optimizer = make_optimizer(self.settings.learning_rate or 1e-3, 100)
            optimizer.init(self.policy.trainable_parameters())
        self.optimizer = optimizer
        return self.learner(optimizer, gradients_of).update(step, rollout, advantages, returns, kl_coef)

    def bytes(self):
        return {name: np.array(array).tobytes() for name, array in tree_flatten(self.policy.trainable_parameters())}


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A random model whose completions are as varied as they are long: its output layer is not its embedding."""
    loaded = load(str(tiny_folder))
    mx.random.seed(3)
    vocabulary, hidden = loaded.model.model.embed_tokens.weight.shape
    weights = dict(tree_flatten(loaded.model.parameters()))
    weights["lm_head.weight"] = 0.15 * mx.random.normal((vocabulary, hidden))
    weights["model.embed_tokens.weight"] = mx.random.normal((vocabulary, hidden))
    path = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(tiny_folder, path)
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    config = {**loaded.config, "tie_word_embeddings": False, "eos_token_id": [2, *range(40, 52)]}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "generation_config.json").unlink()  # its EOS would go before those
    return path


@pytest.fixture
def setting(folder):
    return lambda *words: Setting(folder, *words)


@pytest.fixture(scope="module")
def trained_adapter(folder, tmp_path_factory):
    """A LoRA that moves the model, saved with a dropout in its configuration."""
    model = load(str(folder)).model
    config = AdapterConfig(lora_parameters={"rank": 4, "scale": 10.0, "dropout": 0.4}, model=str(folder))
    attach_adapter(model, config)
    mx.random.seed(1)
    moved = [(n, w + 0.03 * mx.random.normal(w.shape)) for n, w in tree_flatten(model.trainable_parameters())]
    model.load_weights(moved, strict=False)
    path = tmp_path_factory.mktemp("adapter") / "trained"
    save_adapter(path, model, config)
    return path


def policy_gradient(gradients):
    """Without the value head's own; the head is 0, so it sends nothing into the model."""
    return {name: array for name, array in gradients.items() if "value_head" not in name}


def largest(gradients):
    return max(np.abs(array).max() for array in gradients.values())


def flat(gradients):
    return {name: np.array(array) for name, array in tree_flatten(gradients)}


def cosine(gradients, others):
    """How far two gradients point the same way: 1 wholly, −1 the other way."""
    a, b = (np.concatenate([tree[name].ravel() for name in sorted(tree)]) for tree in (gradients, others))
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def assert_close(gradients, expected, tolerance=1e-5):
    scale = max(largest(expected), 1e-30)
    assert gradients.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(gradients[name] / scale, array / scale, rtol=0, atol=tolerance, err_msg=name)


def test_the_rollouts_of_these_tests_have_unequal_lengths(setting):
    lengths = np.array(setting().roll_out().mask).sum(axis=1)
    assert len(set(lengths)) > 2 and lengths.max() == 12
    assert setting().roll_out().mask.sum().item() > 0


# --- the first mini batch ---


@pytest.mark.parametrize("advantage", ["gae", "group", "rloo"])
@pytest.mark.parametrize("kind", [*KINDS, "resumed"])
def test_at_the_first_mini_batch_the_ratio_is_1_and_approx_kl_0(setting, trained_adapter, kind, advantage):
    words = ["--resume-file", trained_adapter] if kind == "resumed" else KINDS[kind]
    run = setting("--advantage", advantage, *words)
    if kind != "resumed":
        run.displace()
    rollout = run.roll_out()
    for _, pieces in list(ppo_step.mini_batches(run.settings, 0))[:2]:
        _, stats, _ = run.gradient(rollout, pieces)
        assert stats["ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert stats["ratio_max"] == pytest.approx(1, abs=1e-4)
        assert 0 <= stats["approx_kl"] < 1e-9
        assert stats["clip_fraction"] == 0


@pytest.fixture
def kernels_of_metal(monkeypatch):
    """As on Metal, attention outside a gradient is another than within one: it has noise in it. Returns its calls."""
    inside, calls = [], []
    value_and_grad, attention = mx.value_and_grad, llama.scaled_dot_product_attention

    def counted(*args, **kwargs):
        function = value_and_grad(*args, **kwargs)

        def differentiate(*args, **kwargs):
            inside.append(True)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()

        return differentiate

    def noisy(*args, **kwargs):
        calls.append(bool(inside))
        exact = attention(*args, **kwargs)
        return exact if inside else exact + 0.1 * mx.random.normal(exact.shape)

    monkeypatch.setattr(mx, "value_and_grad", counted)
    monkeypatch.setattr(llama, "scaled_dot_product_attention", noisy)
    return calls


@pytest.mark.parametrize("layers", [-1, 1], ids=["all layers", "frozen ones below"])
@pytest.mark.parametrize("words", [[], ["--kl-penalty", "full"], ["--advantage", "group"]], ids=str)
def test_policy_and_reference_are_scored_by_the_kernels_of_the_loss(
    setting, kernels_of_metal, monkeypatch, layers, words
):
    run = setting("--lora-layers", layers, *words)
    # It is found by comparing two passes, whose noise would differ.
    monkeypatch.setattr(ppo_learner, "num_frozen_layers", lambda model: 0 if layers == -1 else 1)
    rollout = run.roll_out()
    assert set(kernels_of_metal) == {False, True}  # of sampling, and of scoring
    _, stats, _ = run.gradient(rollout)
    assert stats["ratio_mean"] == pytest.approx(1, abs=1e-5) and stats["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert run.figures["kl"] == pytest.approx(0, abs=1e-4)  # the reference is the policy still
    assert mx.abs(rollout.kl).max().item() < 1e-4


def test_the_noise_of_that_test_would_move_the_ratio(setting, kernels_of_metal, monkeypatch):
    monkeypatch.setattr(ppo_learner, "as_in_a_gradient", lambda compute: compute())
    run = setting()
    _, stats, _ = run.gradient(run.roll_out())
    assert stats["ratio_max"] > 1.001


def test_after_an_update_the_ratio_is_not_1(setting):
    run = setting()
    rollout = run.roll_out()
    run.optimise(rollout)
    assert run.gradient(rollout)[1]["approx_kl"] > 1e-7


# --- what the score does ---


@pytest.mark.parametrize("kind", PROPERTIES)
@pytest.mark.parametrize("advantage", ["gae", "group", "rloo"])
def test_flipping_every_score_flips_the_policy_gradient(setting, kind, advantage):
    run = setting("--advantage", advantage, *SCORE_ALONE, *KINDS[kind])
    rollout = run.roll_out()
    scores = np.array(rollout.scores)
    _, _, plain = run.gradient(rollout)
    _, _, flipped = run.gradient(rollout, scores=-scores)
    assert largest(policy_gradient(plain)) > 1e-4
    assert_close(policy_gradient(flipped), {n: -g for n, g in policy_gradient(plain).items()}, 1e-4)
    # Labels given to the wrong completions are another gradient.
    _, _, shuffled = run.gradient(rollout, scores=np.roll(scores, 1))
    with pytest.raises(AssertionError):
        assert_close(policy_gradient(shuffled), policy_gradient(plain), 0.1)


@pytest.mark.parametrize("score", [0.0, 1.0, 0.7, -3.3])
@pytest.mark.parametrize("advantage", ["gae", "group", "rloo"])
def test_a_constant_score_gives_no_policy_gradient(setting, advantage, score):
    run = setting("--advantage", advantage, *SCORE_ALONE)
    rollout = run.roll_out()
    _, _, varied = run.gradient(rollout)
    _, _, constant = run.gradient(rollout, scores=np.full(16, score))
    assert largest(policy_gradient(constant)) < 1e-6 * largest(policy_gradient(varied))


@pytest.mark.parametrize("advantage", ["gae", "group", "rloo"])
def test_training_raises_a_score_that_can_be_raised(setting, advantage):
    def digits(prompts, completions):
        return [sum(c.isdigit() for c in completion) / 12 for completion in completions]

    run = setting("--advantage", advantage, "--batch-size", 32, "--mini-batch-size", 32, "--learning-rate", 5e-3)
    optimizer = make_optimizer(5e-3, 100)
    optimizer.init(run.policy.trainable_parameters())
    scores = []
    for step in range(12):
        rollout = run.roll_out(digits, seed=step, step=step)
        scores.append(run.figures["mean_score"])
        run.optimise(rollout, optimizer=optimizer, step=step)
    assert np.mean(scores[-3:]) > 1.3 * np.mean(scores[:3])


def test_an_update_makes_the_better_completions_likelier(setting):
    run = setting(*SCORE_ALONE, "--ppo-epochs", 1, "--mini-batch-size", 16)
    rollout = run.roll_out()
    run.optimise(rollout)
    logits, _ = forward(run.policy.model, rollout.tokens, rollout.positions)
    gain = ppo.sum_per_completion(
        ppo.logprobs_from_logits(logits, rollout.completions) - rollout.old_logprobs, rollout.mask
    )
    scores = np.array(rollout.scores)
    assert np.corrcoef(np.array(gain), scores)[0, 1] > 0.3


# --- KL ---


@pytest.mark.parametrize("penalty", ["k1", "k3", "abs", "mse", "full"])
@pytest.mark.parametrize("words", [[], ["--use-peft"], ["--prompt-tuning"], ["--fine-tune-type", "full"]])
def test_the_kl_to_itself_is_0(setting, words, penalty):
    run = setting("--kl-penalty", penalty, *words)
    rollout = run.roll_out()
    assert np.abs(np.array(rollout.kl)).max() == 0
    assert run.figures["kl"] == 0
    run.displace()
    assert np.abs(np.array(run.roll_out().kl)).max() > 1e-4


@pytest.mark.parametrize("advantage", ["gae", "group", "rloo"])
def test_the_kl_penalty_pulls_towards_the_reference(setting, advantage):
    words = ["--advantage", advantage, "--batch-size", 512, "--mini-batch-size", 512]
    run = setting(*words, *SCORE_ALONE)
    run.displace()
    rollout = run.roll_out(lambda prompts, completions: [0.0] * len(completions))
    _, _, pull = run.gradient(rollout, kl_coef=1.0)
    ref_logits, _ = forward(run.reference, rollout.tokens, rollout.positions)

    def kl(policy):
        logits, _ = forward(policy.model, rollout.tokens, rollout.positions)
        return ppo.masked_mean(ppo.full_kl(logits, ref_logits), rollout.mask)

    value, gradients = nn.value_and_grad(run.policy, kl)(run.policy)
    assert value.item() > 0.05
    assert cosine(policy_gradient(pull), policy_gradient(flat(gradients))) > 0.3


def test_without_a_penalty_and_with_zero_scores_nothing_pulls(setting):
    run = setting(*SCORE_ALONE)
    run.displace()
    _, _, gradients = run.gradient(run.roll_out(lambda p, c: [0.0] * len(c)), kl_coef=0.0)
    assert largest(gradients) == 0


def test_the_kl_reported_is_that_of_whole_completions(setting):
    run = setting()
    run.displace()
    rollout = run.roll_out()
    per_token = np.array((rollout.old_logprobs - rollout.ref_logprobs) * rollout.mask)
    assert run.figures["kl"] == pytest.approx(per_token.sum(axis=1).mean(), rel=1e-5)


@pytest.mark.parametrize("penalty", ["k3", "abs", "mse", "full"])
def test_the_kl_reported_and_controlled_is_in_nats_whatever_the_penalty(setting, penalty):
    figures = []
    for words in ([], ["--kl-penalty", penalty]):
        run = setting(*words)
        run.displace()
        rollout = run.roll_out()
        figures.append(run.figures["kl"])
    assert figures[0] == figures[1] != 0
    assert abs(ppo.sum_per_completion(rollout.kl, rollout.mask).mean().item() - figures[0]) > 1e-3


@pytest.mark.parametrize("advantage", ["group", "rloo"])
def test_the_kl_in_the_loss_obeys_the_penalty(setting, advantage):
    gradients = []
    for words in ([], ["--kl-penalty", "k3"], ["--kl-penalty", "mse"]):
        run = setting("--advantage", advantage, *words)
        run.displace()
        rollout = run.roll_out(lambda prompts, completions: [0.0] * len(completions))
        gradients.append(run.gradient(rollout, kl_coef=1.0)[2])
    assert_close(gradients[1], gradients[0], 1e-6)
    with pytest.raises(AssertionError):
        assert_close(gradients[2], gradients[0], 0.01)


# --- padding, order, batch mates ---


def logprobs_of(run, prompts, completions, multiple=8):
    packed = pack(prompts, completions, run.tokenizer.eos_token_ids, run.tokenizer.pad_token_id, multiple)
    tokens, positions, ids, mask = (mx.array(field) for field in packed)
    logits, _ = forward(run.policy.model, tokens, positions)
    logprobs = ppo.logprobs_from_logits(logits, ids, run.args.temperature)
    return [np.array(logprobs[row])[: int(n)] for row, n in enumerate(np.array(mask).sum(axis=1))]


def sampled(run, rollout):
    """Prompts (soft prompt included) and completions of a rollout as lists of ids."""
    tokens, mask, positions = (np.array(field) for field in (rollout.tokens, rollout.mask, rollout.positions))
    starts, counts = positions[:, 0] + 1, mask.sum(axis=1).astype(int)
    prompts = [row[:start].tolist() for row, start in zip(tokens, starts, strict=True)]
    return prompts, [row[s : s + n].tolist() for row, s, n in zip(tokens, starts, counts, strict=True)]


@pytest.mark.parametrize("kind", PROPERTIES)
def test_padding_width_and_batch_mates_leave_logprobs_alone(setting, kind):
    run = setting(*KINDS[kind])
    run.displace()
    prompts, completions = sampled(run, run.roll_out())
    together = logprobs_of(run, prompts, completions)
    wide = logprobs_of(run, prompts, completions, multiple=40)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        (alone,) = logprobs_of(run, [prompt], [completion], multiple=1)
        np.testing.assert_allclose(alone, together[row], atol=1e-5)
        np.testing.assert_allclose(wide[row], together[row], atol=1e-5)


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_the_order_of_the_batch_changes_nothing(setting, advantage):
    run = setting("--advantage", advantage, "--num-generations", 4)
    run.displace()
    rollout = run.roll_out()
    groups = np.random.default_rng(0).permutation(4)
    # The completions of a prompt stay side by side.
    order = np.concatenate([4 * group + np.random.default_rng(group).permutation(4) for group in groups])
    loss, stats, gradients = run.gradient(rollout, kl_coef=0.1)
    reordered = rollout._replace(passes=None).rows(mx.array(order))
    other_loss, other_stats, other = run.gradient(reordered, kl_coef=0.1)
    assert other_loss == pytest.approx(loss, abs=1e-6)
    assert other_stats == pytest.approx(stats, abs=1e-5)
    assert_close(other, gradients)


def wider(rollout, by, pad):
    """The same rollout with more pads on the right, full of what must not matter."""
    rows = rollout.tokens.shape[0]

    def widened(field, value):
        return mx.concatenate([field, mx.full((rows, by), value, field.dtype)], axis=1)

    fillings = dict.fromkeys(Rollout._fields[:-2], 9.0) | {"tokens": pad, "completions": pad, "positions": 0, "mask": 0}
    fields = {name: widened(getattr(rollout, name), value) for name, value in fillings.items()}
    return rollout._replace(**fields, passes=None)


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_the_padding_width_changes_neither_loss_nor_gradient(setting, advantage):
    run = setting("--advantage", advantage)
    run.displace()
    rollout = run.roll_out()
    loss, _, gradients = run.gradient(rollout, kl_coef=0.1)
    wide_loss, _, wide = run.gradient(wider(rollout, 8, run.tokenizer.pad_token_id), kl_coef=0.1)
    assert wide_loss == pytest.approx(loss, abs=1e-6)
    assert_close(wide, gradients)


def test_accumulated_pieces_equal_the_whole(setting):
    run = setting()
    run.displace()
    rollout = run.roll_out()
    loss, stats, gradients = run.gradient(rollout, kl_coef=0.1)
    for pieces in (np.split(np.arange(16), 4), [np.arange(1), np.arange(1, 16)]):
        piece_loss, piece_stats, pieced = run.gradient(rollout, pieces, kl_coef=0.1)
        assert piece_loss == pytest.approx(loss, abs=1e-6)
        assert piece_stats == pytest.approx(stats, abs=1e-5)
        assert_close(pieced, gradients)


@pytest.mark.parametrize("kind", PROPERTIES)
def test_gradient_accumulation_equals_the_large_batch(setting, kind):
    after = []
    for pieces in (1, 4):
        run = setting("--gradient-accumulation-steps", pieces, "--learning-rate", 3e-5, "--ppo-epochs", 1, *KINDS[kind])
        run.displace()
        run.optimise(run.roll_out(), kl_coef=0.1)
        after.append({name: np.array(array) for name, array in tree_flatten(run.trained())})
    for name, array in after[0].items():
        np.testing.assert_allclose(after[1][name], array, rtol=0, atol=3e-6, err_msg=name)


# --- the end of a completion ---


def with_completions(monkeypatch, completions):
    monkeypatch.setattr(ppo_learner, "sample", lambda *args, **keys: completions)


def test_tokens_after_eos_are_neither_scored_nor_trained(setting, monkeypatch):
    run = setting("--batch-size", 2, "--mini-batch-size", 2)
    eos, (a, b, c) = run.tokenizer.eos_token_id, run.tokenizer.encode(" 1 2 3")[1:4]
    gradients, masks = [], []
    for tail in ([], [a, b], [c, eos, c]):
        with_completions(monkeypatch, [[a, b, eos, *tail], [b, b, c, c]])
        rollout = run.roll_out(lambda p, c: [0.2, 0.9])
        gradients.append(run.gradient(rollout)[2])
        masks.append([row[:6] for row in rollout.mask.tolist()])
    assert masks == [[[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]] * 3
    for others in gradients[1:]:
        assert_close(others, gradients[0], 1e-6)


def test_states_after_eos_get_no_gradient_and_tokens_there_no_say(setting):
    run = setting("--advantage", "gae", "--entropy-coef", 0.01)
    run.displace()
    rollout = run.roll_out()
    advantages, returns = advantages_and_returns(rollout, run.settings, 0.1)
    hidden, values = run.policy(rollout.tokens, rollout.positions)
    denominator = rollout.mask.sum()

    def loss(hidden, values):
        which = {"entropy": True, "training": True}
        stats = ppo_learner.stats_of(run.settings, run.policy.model, hidden, rollout.completions, **which)
        return ppo_step.policy_loss(
            run.settings, stats, values, rollout, advantages, returns, denominator, mx.array(0.1)
        )[0]  # fmt: skip

    by_states, by_values = (np.array(array) for array in mx.grad(loss, argnums=(0, 1))(hidden, values))
    pads = np.array(rollout.mask) == 0
    assert pads.any()
    assert not by_states[pads].any() and not by_values[pads].any()
    assert by_states[~pads].any(axis=-1).all() and by_values[~pads].all()

    end = np.array(rollout.positions)[:, :1] + 1 + np.array(rollout.mask).sum(axis=1, keepdims=True)
    behind = mx.array(np.arange(rollout.tokens.shape[1])[None] >= end)
    noise = mx.random.randint(0, 40, rollout.tokens.shape)
    noisy = rollout._replace(tokens=mx.where(behind, noise, rollout.tokens), passes=None)
    assert_close(run.gradient(noisy, kl_coef=0.1)[2], run.gradient(rollout, kl_coef=0.1)[2], 1e-6)


def estimates(scores, lengths, values=0.0, *words):
    """Advantages and returns of completions of these lengths under KL 0, as lists."""
    mask = mx.array(np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(mx.float32)
    nothing = mx.zeros(mask.shape)
    ids = {"tokens": nothing, "positions": nothing, "completions": nothing, "mask": mask}
    logprobs = {"old_logprobs": nothing, "ref_logprobs": nothing, "kl": nothing}
    rollout = Rollout(**ids, **logprobs, old_values=nothing + values, scores=mx.array(scores))
    found = advantages_and_returns(rollout, settings_of(*words), 0.1)
    return [array.tolist() for array in found]


def test_the_value_head_is_to_learn_what_a_score_has_beyond_the_mean_of_its_batch():
    advantages, returns = estimates([1.0, 0.0], [2, 1])
    assert returns == [[0.5, 0.5], [-0.5, 0.0]]
    third = 1 / 3  # whitened: over three tokens the mean of ½, ½, −½ is 1/6, the variance (Bessel's) 1/3
    np.testing.assert_allclose(advantages, [[third * 3**0.5] * 2, [-2 * third * 3**0.5, 0.0]], atol=1e-6)


@pytest.mark.parametrize("values", [0.0, mx.array([[0.3, -0.2], [0.1, 0.0], [0.0, 0.4]])], ids=["none", "some"])
def test_a_score_that_all_have_more_of_changes_nothing(values):
    one, other = (estimates([1.0 + more, more, 0.25 + more], [2, 1, 2], values) for more in (0.0, 4.0))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_step_of_equal_scores_counts_its_advantages_beside_the_scores_before(setting):
    """What then differs is the KL: at 0.02 deviations a nat it is little, and says nothing of the rate."""
    run = setting("--num-steps", 2)
    run.displace()
    learner, passed = run.learner(), []

    def update(step, rollout, advantages, returns, *_):
        passed.append(np.array(advantages)[np.array(rollout.mask) > 0])
        return {"approx_kl": 1e-6}

    learner.update = update
    step_size = ppo_step.make_step_size(run.settings, "lora", weights=1)
    progress = ppo_loop.Progress(ppo_step.make_controller(run.settings), step_size)
    scores = iter([[0.0, 3.0] * 8, [3.0] * 16])
    steps = ppo_loop.ppo_steps(learner, run.tokenizer, run.prompts, lambda *texts: next(scores), progress)
    factors = [progress.step_size.value for _ in steps]
    differing, equal = (advantages.std(ddof=1) for advantages in passed)
    assert differing == pytest.approx(1, abs=1e-5) and 0 < equal < 0.1
    assert factors == [1.5, 1.5]


def test_under_a_discount_the_mean_is_discounted_from_the_last_token():
    """γ ½, λ 1: one token before the last, score 1 is worth ½ and the mean of ½ is worth ¼; at the last, 1 and ½."""
    _, returns = estimates([1.0, 0.0], [2, 1], 0.0, "--gamma", "0.5")
    np.testing.assert_allclose(returns, [[0.5 - 0.25, 1 - 0.5], [0 - 0.5, 0.0]], atol=1e-7)


def test_under_a_discount_equal_scores_give_no_advantage_that_grows_towards_the_end():
    """With equal scores the mean predicts every return, whatever the number of tokens left."""
    _, returns = estimates([1.0, 1.0, 1.0], [4, 2, 3], 0.0, "--gamma", "0.9")
    np.testing.assert_allclose(returns, np.zeros((3, 4)), atol=1e-6)


@pytest.mark.parametrize("gae_lambda", [1.0, 0.9])
def test_without_centring_values_are_the_head_s_alone_as_in_trl(gae_lambda):
    scores, lengths, gamma = [1.0, 0.25], [3, 2], 0.95
    values = np.array([[0.3, -0.2, 0.1], [0.2, 0.4, 0.0]])
    words = ["--no-center-values", "--gamma", gamma, "--gae-lambda", gae_lambda]
    advantages, returns = estimates(scores, lengths, mx.array(values), *words)
    mask, rewards = np.array([[1, 1, 1], [1, 1, 0]]), np.array([[0, 0, 1.0], [0, 0.25, 0]])
    plain, expected = numpy_ppo.gae(rewards, values * mask, mask, gamma, gae_lambda)
    np.testing.assert_allclose(returns, expected, atol=1e-6)
    np.testing.assert_allclose(advantages, numpy_ppo.whiten(plain, mask, center=True), atol=1e-5)


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_an_empty_completion_is_one_score_of_its_own(setting, monkeypatch, advantage):
    run = setting("--batch-size", 4, "--mini-batch-size", 4, "--advantage", advantage, *SCORE_ALONE)
    eos, other = run.tokenizer.eos_token_id, run.tokenizer.encode(" 1")[1]
    with_completions(monkeypatch, [[eos], [other, eos], [eos], [other, other]])
    given = []

    def reward(prompts, completions):
        given.extend(completions)
        return [0.25, 0.5, 0.75, 1.0]

    rollout = run.roll_out(reward)
    assert given[0] == given[2] == "" != given[1]
    assert rollout.scores.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert rollout.mask.sum(axis=1).tolist() == [1, 2, 1, 2]
    advantages, _ = advantages_and_returns(rollout, run.settings, 0.0)
    # The lowest score is at the EOS that ended a completion at once, and its advantage is the lowest.
    assert np.argmin(np.array(advantages[:, 0])) == 0 and advantages[0, 0].item() < -0.5
    assert largest(policy_gradient(run.gradient(rollout)[2])) > 0


def test_a_completion_without_an_eos_pays_its_penalty(setting, monkeypatch):
    run = setting("--batch-size", 2, "--mini-batch-size", 2, "--missing-eos-penalty", 0.4)
    eos, other = run.tokenizer.eos_token_id, run.tokenizer.encode(" 1")[1]
    with_completions(monkeypatch, [[other, eos], [other, other]])
    rollout = run.roll_out(lambda p, c: [0.5, 0.5])
    np.testing.assert_allclose(rollout.scores.tolist(), [0.5, 0.1], atol=1e-6)
    assert run.figures["mean_score"] == 0.5 and run.figures["eos_share"] == 0.5


# --- the reference ---


def logits_of(model, rollout, prefix=0):
    return np.array(forward(model, rollout.tokens[:, prefix:], rollout.positions - prefix)[0])


def reference_of(run, rollout):
    prefix = soft_prompt_ids(run.trainee.model)
    states = reference_states(run.settings, run.reference, rollout.tokens, rollout.positions, prefix)
    return np.array(OutputLayer(run.reference)(states.reshape(-1, states.shape[-1])).reshape(*states.shape[:2], -1))


@pytest.mark.parametrize("words", [[], ["--use-peft"]], ids=["own adapter", "adapter off"])
def test_the_reference_of_a_fresh_adapter_is_the_base_bit_for_bit(setting, folder, words):
    run = setting(*words)
    rollout = run.roll_out()
    run.optimise(rollout)  # training must not move it
    base = logits_of(load(str(folder)).model, rollout)
    assert np.array_equal(reference_of(run, rollout), base)
    assert not np.array_equal(logits_of(run.trainee.model, rollout), base)


def test_with_use_peft_the_reference_of_a_resumed_adapter_is_the_base_bit_for_bit(setting, folder, trained_adapter):
    run = setting("--use-peft", "--resume-file", trained_adapter)
    rollout = run.roll_out()
    assert run.figures["kl"] != 0
    run.optimise(rollout)
    assert np.array_equal(reference_of(run, rollout), logits_of(load(str(folder)).model, rollout))


def test_without_use_peft_the_reference_of_a_resumed_adapter_is_that_adapter(setting, folder, trained_adapter):
    run = setting("--resume-file", trained_adapter)
    rollout = run.roll_out()
    assert run.figures["kl"] == 0
    run.optimise(rollout)
    model = load(str(folder)).model
    base = logits_of(model, rollout)
    load_adapter(model, trained_adapter)
    model.eval()
    assert np.array_equal(reference_of(run, rollout), logits_of(model, rollout))
    assert not np.allclose(reference_of(run, rollout), base)


def test_with_use_peft_the_reference_never_sees_the_soft_prompt(setting, folder):
    run = setting("--prompt-tuning", "--num-prompt-tokens", 3, "--use-peft")
    rollout = run.roll_out()
    assert run.figures["kl"] != 0
    assert np.array_equal(reference_of(run, rollout), logits_of(load(str(folder)).model, rollout, prefix=3))


def test_the_reference_of_a_full_fine_tuning_stays_where_it_was(setting, folder):
    run = setting("--fine-tune-type", "full")
    rollout = run.roll_out()
    run.optimise(rollout)
    assert np.array_equal(reference_of(run, rollout), logits_of(load(str(folder)).model, rollout))


def address(array):
    """Where its numbers lie: mx.compile leaves other array objects over the same memory."""
    return np.asarray(memoryview(array)).ctypes.data


@pytest.mark.parametrize("words", [[], ["--use-peft"], ["--prompt-tuning"], ["--fine-tune-type", "dora"]])
def test_the_base_is_held_once(setting, words):
    run = setting(*words)
    run.optimise(run.roll_out())
    trained = {address(array) for _, array in tree_flatten(run.trained())}
    base = {address(array) for _, array in tree_flatten(run.trainee.model.parameters())} - trained
    reference = [array for _, array in tree_flatten(run.reference.parameters())]
    own = [array for array in reference if address(array) not in base]
    assert base <= {address(array) for array in reference}
    # Its own are the adapter's weights as they were.
    assert sum(array.size for array in own) == (0 if "--use-peft" in words else run.trainee.sizes()[0] - 64)


def test_a_reward_model_that_is_an_adapter_shares_the_base(setting, folder, tmp_path):
    loaded = load(str(folder))
    config = AdapterConfig(model=str(folder))
    attach_adapter(loaded.model, config)
    save_adapter(tmp_path / "reward", loaded.model, config, new_value_head(loaded.model, std=None))
    loaded = load(str(folder))
    base = {id(array) for _, array in tree_flatten(loaded.model.parameters())}
    args = parse("--reward-model", tmp_path / "reward", "--model", folder)
    reward_model = load_reward_model(args.reward_model[0], loaded)
    assert base <= {id(array) for _, array in tree_flatten(reward_model.scoring.model.parameters())}
    trainee, _ = policies_of(args, loaded)
    assert base <= {id(array) for _, array in tree_flatten(trainee.model.parameters())}
    before = reward_model.reward(["2"], [" 4"])
    trainee.model.load_weights(
        [(n, w + 1) for n, w in tree_flatten(trainee.model.trainable_parameters())], strict=False
    )
    assert reward_model.reward(["2"], [" 4"]) == before


# --- temperature and token ids ---


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_enters_every_logprob_alike(setting, monkeypatch, temperature):
    run = setting("--temperature", temperature)
    run.displace()
    seen = []
    real = ppo_learner.sample

    def recorded(*args, **keys):
        seen.append(args[4])
        return real(*args, **keys)

    monkeypatch.setattr(ppo_learner, "sample", recorded)
    rollout = run.roll_out()
    assert seen == [temperature]
    ids = rollout.completions[..., None]
    for model, logprobs in ((run.trainee.model, rollout.old_logprobs), (run.reference, rollout.ref_logprobs)):
        logits = mx.array(logits_of(model, rollout)) / temperature
        expected = mx.take_along_axis(logits - mx.logsumexp(logits, axis=-1, keepdims=True), ids, axis=-1)[..., 0]
        np.testing.assert_allclose(np.array(logprobs * rollout.mask), np.array(expected * rollout.mask), atol=1e-5)
    # And that of the policy in the loss: else the ratio would not be 1.
    assert run.gradient(rollout)[1]["approx_kl"] < 1e-9


def test_the_temperature_is_that_of_sampling(setting):
    cold, warm = setting("--temperature", 1e-3), setting()
    for run in (cold, warm):
        run.displace(1.0)
    first, second = (sampled(cold, cold.roll_out(seed=seed))[1] for seed in (0, 1))
    assert first == second
    assert sampled(warm, warm.roll_out(seed=0))[1] != sampled(warm, warm.roll_out(seed=1))[1]


@pytest.mark.parametrize("kind", PROPERTIES)
def test_logprobs_and_values_are_those_of_a_plain_forward_pass(setting, kind):
    run = setting(*KINDS[kind])
    run.displace()
    run.trainee.value_head.weight = mx.random.normal(run.trainee.value_head.weight.shape)
    rollout = run.roll_out()
    for row, (prompt, completion) in enumerate(zip(*sampled(run, rollout), strict=True)):
        logits, hidden = forward(run.trainee.model, mx.array([prompt + completion]))
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for index, token in enumerate(completion):
            before = len(prompt) + index - 1
            assert rollout.old_logprobs[row, index].item() == pytest.approx(logits[0, before, token].item(), abs=1e-4)
            value = (run.trainee.value_head.weight @ hidden[0, before]).item()
            assert rollout.old_values[row, index].item() == pytest.approx(value, abs=1e-4)


WHOLE_LOGITS: dict[str, list[Any]] = {
    "lora": ["--temperature", 0.7, "--entropy-coef", 0.01, "--kl-penalty", "full"],
    "dora": ["--advantage", "rloo", "--fine-tune-type", "dora"],
    "soft prompt": ["--prompt-tuning", "--num-prompt-tokens", 3, "--use-peft", "--kl-penalty", "full"],
    "full": ["--fine-tune-type", "full", "--entropy-coef", 0.01],
}


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("case", WHOLE_LOGITS)
def test_scores_loss_and_gradients_are_those_of_whole_logits(setting, monkeypatch, case, pieces):
    run = setting(*WHOLE_LOGITS[case])
    settings, prefix = run.settings, soft_prompt_ids(run.trainee.model)
    if pieces:
        limit = {"logits_bytes": 16 * 4 * 64 * 20}  # 20 positions of the digits' vocabulary at a time
        monkeypatch.setattr(ppo_learner, "token_stats", lambda *a, **k: token_stats(*a, **{**k, **limit}))
    run.displace()
    if run.trainee.value_head is not None:
        run.trainee.value_head.weight = mx.random.normal(run.trainee.value_head.weight.shape)
    rollout = run.roll_out()
    where = rollout.tokens, rollout.positions
    cut = len(prefix) if settings.use_peft else 0
    logits, _ = forward(run.trainee.model, *where)
    ref_logits = forward(run.reference, rollout.tokens[:, cut:], rollout.positions - cut)[0]
    plain = [ppo.logprobs_from_logits(each, rollout.completions, settings.temperature) for each in (logits, ref_logits)]
    full = ppo.full_kl(logits, ref_logits, settings.temperature)
    kind = ppo_step.kl_kind(settings)
    kl = full if kind == "full" else ppo.kl_penalty(plain[0], plain[1], kind)
    found = rollout.old_logprobs, rollout.ref_logprobs, rollout.kl
    real = np.array(rollout.mask) > 0
    for array, expected in zip(found, (*plain, kl), strict=True):
        np.testing.assert_allclose(np.array(array)[real], np.array(expected)[real], rtol=0, atol=1e-5)
    entropy = ppo.masked_mean(ppo.entropy_from_logits(logits, settings.temperature), rollout.mask)
    assert run.figures["entropy"] == pytest.approx(entropy.item(), abs=1e-5)

    advantages, returns = advantages_and_returns(rollout, settings, 0.1)
    rollout = rollout._replace(old_logprobs=rollout.old_logprobs + 0.3)  # so that some ratios are clipped

    def plainly(policy):
        logits, hidden = forward(policy.model, *where)
        stats = TokenStats(
            ppo.logprobs_from_logits(logits, rollout.completions, settings.temperature),
            entropy=ppo.entropy_from_logits(logits, settings.temperature),
        )
        values = policy.value_head(hidden) if "value_head" in policy else None
        numbers = (advantages, returns, rollout.mask.sum(), mx.array(0.1))
        return ppo_step.policy_loss(settings, stats, values, rollout, *numbers)

    (loss, stats), expected = nn.value_and_grad(run.policy, plainly)(run.policy)
    rows = [np.arange(16)]
    got = accumulate(run.learner().gradients_of, rollout, advantages, returns, rows, mx.array(0.1))
    assert got[0].item() == pytest.approx(loss.item(), abs=1e-5)
    norm = gradient_norm(expected)
    numbers = {**{name: value.item() for name, value in stats.items()}, "grad_norm": float(norm)}
    assert got[1] == pytest.approx(numbers, abs=1e-5)
    assert_close(flat(got[2]), flat(expected))
    assert largest(flat(expected)) > 1e-3


def test_few_shapes_change_no_score_and_no_gradient(setting, monkeypatch):
    """A GPU's rollouts have more pads."""
    run = setting("--entropy-coef", 0.01)
    run.displace()
    found = []
    for few in (False, True):
        monkeypatch.setattr(ppo_learner, "compiling_pays", lambda few=few: few)
        rollout = run.roll_out()
        width = rollout.mask.shape[1]
        assert (width % 16 == 0 and rollout.tokens.shape[1] % 16 == 0) == few
        real = np.array(rollout.mask) > 0
        scores = [np.array(getattr(rollout, name))[real] for name in ("old_logprobs", "ref_logprobs", "kl")]
        found.append((scores, *run.gradient(rollout, kl_coef=0.1)))
    (scores, loss, stats, gradients), (other_scores, other_loss, other_stats, others) = found
    np.testing.assert_allclose(other_scores, scores, atol=1e-5)
    assert other_loss == pytest.approx(loss, abs=1e-6) and other_stats == pytest.approx(stats, abs=1e-5)
    assert_close(others, gradients)


# --- layers below the first trained one ---


FROZEN: dict[str, list[Any]] = {
    "lora": [],
    "dora, base": ["--fine-tune-type", "dora", "--use-peft", "--kl-penalty", "full"],
    "lora, rloo": ["--advantage", "rloo", "--entropy-coef", 0.01],
}


def trained_last_layer(setting, case, monkeypatch, kept=True, checkpointed=False):
    run = setting("--lora-layers", 1, *FROZEN[case])
    run.displace()
    if checkpointed:
        checkpoint_layers(run.trainee.model)
    if not kept:
        monkeypatch.setattr(ppo_learner, "num_frozen_layers", lambda model: 0)
    return run


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("case", FROZEN)
def test_kept_states_change_neither_scores_nor_gradients(setting, monkeypatch, case, checkpointed):
    run = trained_last_layer(setting, case, monkeypatch, checkpointed=checkpointed)
    rollout = run.roll_out()
    layers = run.trainee.model.layers
    assert run.learner().frozen_layers == len(layers) - 1 > 0
    assert isinstance(rollout.passes, PaddedRows if checkpointed else PackedRows)
    assert rollout.passes.states is not None and rollout.passes.states.shape[-1] == 64
    plain = trained_last_layer(setting, case, monkeypatch, kept=False)
    expected = plain.roll_out()
    assert expected.passes.states is None
    real = np.array(rollout.mask) > 0  # at pads nothing was sampled, so no state is known
    for name in Rollout._fields[:-1]:
        found, plainly = (np.array(getattr(each, name)) for each in (rollout, expected))
        at = real if found.shape == real.shape else ...
        np.testing.assert_allclose(found[at], plainly[at], atol=1e-5, err_msg=name)
    assert np.abs(np.array(rollout.kl)[real]).max() > 1e-3
    loss, stats, gradients = run.gradient(rollout, kl_coef=0.1, rows=[np.arange(8, 16), np.arange(8)])
    other_loss, other_stats, others = plain.gradient(expected, kl_coef=0.1, rows=[np.arange(8, 16), np.arange(8)])
    assert loss == pytest.approx(other_loss, abs=1e-5) and stats == pytest.approx(other_stats, abs=1e-5)
    assert_close(gradients, others)


@pytest.mark.parametrize("sampled", [True, False])
def test_the_layers_below_are_not_run_again_on_what_was_sampled(setting, monkeypatch, sampled):
    """Completions that are not those of the last sampling, here with another token, are run."""
    run, prompts = trained_last_layer(setting, "lora", monkeypatch), [[1, 5]] * 12 + [[4], [4, 4, 6], [4], [2]]
    learner = run.learner()
    mx.random.seed(3)
    completions = learner.sample(prompts)
    assert len({len(completion) for completion in completions}) > 2
    if not sampled:
        completions[0] = [7]
    runs: list[mx.array] = []
    real = ppo_learner.lower_states

    def counted(*given):
        runs.append(real(*given))
        return runs[-1]

    monkeypatch.setattr(ppo_learner, "lower_states", counted)
    rollout, _ = learner.experience(prompts, completions, np.ones(16, np.float32))
    assert bool(runs) is not sampled
    expected = np.array(real(run.trainee.model, rollout.tokens, learner.frozen_layers))
    rows, places = rollout.passes.rows_and_places()
    np.testing.assert_allclose(np.array(rollout.passes.states), expected[rows, places], atol=1e-5)


@pytest.mark.parametrize(("kept", "times"), [(True, 2), (False, 2 * 2 + 2 * 2)])
def test_layers_below_the_first_trained_one_are_run_once_a_rollout(setting, monkeypatch, kept, times):
    """In two passes over 8 completions each; else both policies are scored and 2 epochs of 2 mini batches follow."""
    run = trained_last_layer(setting, "lora", monkeypatch, kept)
    optimizer = make_optimizer(1e-3, 100)
    optimizer.init(run.policy.trainable_parameters())
    learner = run.learner(optimizer)
    prompts, completions = [[1, 5]] * 16, [[7, 8, 9]] * 16
    calls: list[int] = []
    kind = type(run.trainee.model.layers[0])
    plain = kind.__call__
    lowest = {id(run.trainee.model.layers[0]), id(run.reference.layers[0])}

    def counted(self, *args, **arguments):
        calls.append(id(self) in lowest)
        return plain(self, *args, **arguments)

    monkeypatch.setattr(kind, "__call__", counted)
    rollout, _ = learner.experience(prompts, completions, np.ones(16, np.float32))
    advantages, returns = advantages_and_returns(rollout, run.settings, 0.1)
    learner.update(0, rollout, advantages, returns, 0.1)
    assert sum(calls) == times


def test_a_reference_of_other_weights_is_scored_by_its_own_layers(setting, folder):
    run = setting("--lora-layers", 1)
    run.reference = load(str(folder)).model
    run.reference.layers[0].mlp.up_proj.weight *= 1.5
    rollout = run.roll_out()
    expected = ppo.logprobs_from_logits(
        forward(run.reference, rollout.tokens, rollout.positions)[0], rollout.completions
    )
    real = np.array(rollout.mask) > 0
    np.testing.assert_allclose(np.array(rollout.ref_logprobs)[real], np.array(expected)[real], atol=1e-5)
    assert np.abs(np.array(rollout.kl)).max() > 1e-3


@pytest.mark.parametrize("kind", ["lora", "soft prompt"])
def test_what_was_sampled_is_what_is_trained_on(setting, monkeypatch, kind):
    run = setting(*KINDS[kind])
    real, ids, encoded = ppo_learner.sample, [], []

    def recorded(*args, **keys):
        ids.extend(real(*args, **keys))
        return ids

    class Tokenizer:
        """The tokenizer, with a record of what it encodes."""

        def __getattr__(self, name):
            return getattr(run.loaded.tokenizer, name)

        def encode(self, text):
            encoded.append(text)
            return run.loaded.tokenizer.encode(text)

    monkeypatch.setattr(ppo_learner, "sample", recorded)
    run.tokenizer = Tokenizer()
    prompts, completions = sampled(run, run.roll_out())
    assert completions == ids
    assert encoded == run.prompts.batch(0)
    prefix = soft_prompt_ids(run.trainee.model)
    assert prompts == [prefix + run.loaded.tokenizer.encode(text) for text in encoded]
    # Encoding the text anew would have given other ids.
    again = [
        run.loaded.tokenizer.encode(p + c) for p, c in zip(run.scored.prompts, run.scored.completions, strict=True)
    ]
    assert again != [p[len(prefix) :] + c for p, c in zip(prompts, completions, strict=True)]


def test_dropout_is_off_though_the_resumed_adapter_has_one(setting, trained_adapter):
    run = setting("--resume-file", trained_adapter)
    rollout = run.roll_out()
    first, second = (run.policy(rollout.tokens, rollout.positions)[0] for _ in range(2))
    assert mx.array_equal(first, second)
    assert run.policy.training  # in which mode a dropout would act
    assert run.trainee.adapter.lora_parameters["dropout"] == 0


# --- updates that are not made ---


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_touches_nothing(setting, what):
    run = setting("--ppo-epochs", 2)  # 4 updates
    rollout = run.roll_out()
    real = run.learner().gradients_of
    history = []

    def spoiled(*arrays):
        history.append((run.bytes(), {n: np.array(a).tobytes() for n, a in optimizer_arrays(optimizer).items()}))
        (loss, stats), gradients = real(*arrays)
        if len(history) == 2 and what == "loss":
            loss = loss * float("nan")
        if len(history) == 2 and what == "gradient":
            gradients["value_head"]["weight"] = gradients["value_head"]["weight"] * float("inf")
        return (loss, stats), gradients

    optimizer = make_optimizer(1e-3, 100)
    optimizer.init(run.policy.trainable_parameters())
    stats = run.optimise(rollout, optimizer=optimizer, gradients_of=spoiled)
    assert (stats["updates"], stats["skipped_updates"]) == (3, 1)
    assert history[0] != history[1] == history[2] != history[3]
    assert all(np.isfinite(value) for value in stats.values())


def test_nan_in_the_policy_skips_every_update(setting):
    run = setting()
    rollout = run.roll_out()
    spoiled = rollout._replace(old_logprobs=rollout.old_logprobs * float("nan"))
    before = run.bytes()
    stats = run.optimise(spoiled)
    assert (stats["updates"], stats["skipped_updates"]) == (0, 4)
    assert run.bytes() == before


def test_past_the_target_kl_a_step_s_updates_end(setting):
    run = setting("--target-kl", 1e-9, "--ppo-epochs", 3)
    rollout = run.roll_out()
    stats = run.optimise(rollout)
    assert (stats["updates"], stats["skipped_updates"]) == (1, 0)
    generous = setting("--target-kl", 1e3, "--ppo-epochs", 3)
    assert generous.optimise(rollout)["updates"] == 6


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_updates_that_are_not_made_do_not_delay_the_learning_rate(flags, monkeypatch, how):
    """Every second update is rejected: either the rest of its step's are not made, or it alone is not."""
    seen, real, calls = [], ppo_learner.take_step, itertools.count()

    def recorded(policy, optimizer, gradients, norm, limit, planned, lr_factor):
        real(policy, optimizer, gradients, norm, limit, planned, lr_factor)
        seen.append((planned, optimizer.learning_rate.item()))

    monkeypatch.setattr(ppo_learner, "take_step", recorded)
    monkeypatch.setattr(ppo_step, "rejected", lambda settings, stats: how if next(calls) % 2 else "")
    call(ppo_training.main, *flags("--lr-schedule", "linear", "--learning-rate", 1e-3, "--step-kl", 0))
    planned = {"stop": [0, 4, 8, 12], "skip": list(range(0, 16, 2))}[how]  # 4 steps of 4 updates
    assert [number for number, _ in seen] == planned
    assert [rate for _, rate in seen] == pytest.approx([1e-3 * (1 - number / 16) for number in planned])


def test_a_scoring_pass_takes_what_an_update_pass_takes(monkeypatch, setting):
    run = setting("--gradient-accumulation-steps", 2)
    rows: list[int] = []
    plain = PPOLearner._estimates

    def recorded(self, part, prefix):
        found = plain(self, part, prefix)
        rows.append(len(found[0]))
        return found

    monkeypatch.setattr(PPOLearner, "_estimates", recorded)
    run.roll_out()
    assert rows == [4] * 4  # half of a mini batch of 8, of 16


def test_the_entropy_reported_is_the_rollout_s_with_a_bonus_too(flags):
    for name, coef in (("plain", 0.0), ("bonus", 1e-9)):
        call(ppo_training.main, *flags("--entropy-coef", coef, "--num-steps", 1, run=name))
    plain, bonus = (read_metrics(name)[0] for name in ("plain", "bonus"))
    assert bonus["entropy"] == plain["entropy"]
    assert list(bonus) == list(plain)


def test_past_the_ratio_threshold_an_update_is_skipped(setting):
    run = setting("--ratio-threshold", 0.99)
    before = run.bytes()
    stats = run.optimise(run.roll_out())
    assert (stats["updates"], stats["skipped_updates"]) == (0, 4)
    assert run.bytes() == before


def test_the_gradient_is_clipped(setting):
    norms = [setting("--max-grad-norm", limit) for limit in (0.01, 0)]
    moved = []
    for run in norms:
        rollout = run.roll_out()
        stats = run.optimise(rollout)
        moved.append(stats["grad_norm"])
    assert moved[0] > 0.01  # what is reported is the norm before clipping


# --- compiled ---


class Toy(nn.Module):
    """The least that is a language model: every kernel costs a second of the C++ compiler."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 4)
        self.lm_head = nn.Linear(4, 20)

    def __call__(self, tokens):
        return self.lm_head(mx.tanh(self.embed_tokens(tokens)))


@pytest.mark.parametrize("end_to_end", [False, True])
def test_the_compiled_path_gives_the_same_gradients_and_follows_the_weights(monkeypatch, compiling, end_to_end):
    mx.random.seed(0)
    policy = Policy(Toy(), ValueHead(4, std=1.0))
    texts = [[1, 2], [1, 2], [3], [5, 6, 7]], [[8, 9], [10], [11, 12, 13], [14]]
    tokens, positions, ids, mask = map(mx.array, pack(*texts, {15}, 0))
    logprobs = ppo.logprobs_from_logits(forward(policy.model, tokens, positions)[0], ids)
    values = policy(tokens, positions)[1]
    kl = mx.zeros_like(mask)
    scores = mx.array([0.1, 0.5, 0.9, 0.3])
    rows = PackedRows(*texts, ids.shape[1], few_shapes=True) if end_to_end else None
    rollout = Rollout(tokens, positions, ids, mask, logprobs, logprobs, kl, values, scores, rows)
    settings = settings_of("--batch-size", 4, "--mini-batch-size", 4)
    advantages, returns = advantages_and_returns(rollout, settings, 0.0)
    monkeypatch.setattr(training_optimizer, "compiling_pays", lambda: False)
    plain = loss_and_gradients(policy, make_loss(settings))
    monkeypatch.setattr(training_optimizer, "compiling_pays", lambda: True)
    compiled = loss_and_gradients(policy, make_loss(settings))
    optimizer = make_optimizer(0.1, 10)
    optimizer.init(policy.trainable_parameters())
    for kl_coef in (0.0, 0.5):
        pieces = np.split(np.arange(4), 2)
        results = [
            accumulate(function, rollout, advantages, returns, pieces, mx.array(kl_coef))
            for function in (plain, compiled)
        ]
        (loss, stats, gradients), (other_loss, other_stats, others) = results
        assert other_loss.item() == pytest.approx(loss.item(), abs=1e-6)
        assert other_stats == pytest.approx(stats, abs=1e-5)
        assert_close(flat(others), flat(gradients))
        update(policy, optimizer, loss, gradients, None)
    assert stats["approx_kl"] > 1e-3  # the second time round the weights had moved


# --- from Python ---


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_a_reward_in_another_unit_makes_the_same_policy(folder, advantage):
    """By default nothing depends on the unit of the scores but the value head, which does not learn here."""
    ends = []
    for unit in (1.0, 100.0):
        settings = PPOSettings(
            num_steps=3, batch_size=16, mini_batch_size=8, max_completion_length=6, advantage=advantage, vf_coef=0.0
        )
        loaded = load(str(folder))
        policy, reference = build_policies(loaded, settings, AdapterConfig())

        def reward(prompts, completions, unit=unit):
            return [unit * (len(text) % 5) for text in completions]

        history = train_ppo(policy, reference, loaded.tokenizer, ["2 4", "6"], reward, settings)
        ends.append([history[-1]["mean_score"] / unit, history[-1]["kl"], history[-1]["policy_loss"]])
    assert ends[0] == pytest.approx(ends[1], rel=1e-3) and ends[0][1] > 0


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_train_ppo_is_the_script_without_files(flags, folder, advantage):
    call(ppo_training.main, *flags("--advantage", advantage))
    loaded = load(str(folder))
    settings = PPOSettings(
        num_steps=4, batch_size=8, mini_batch_size=4, num_generations=4, max_completion_length=6, advantage=advantage
    )
    policy, reference = build_policies(loaded, settings, AdapterConfig())
    rule = DigitRule()
    history = train_ppo(policy, reference, loaded.tokenizer, digit_prompts(rule), digit_reward(rule), settings)
    rows = [{name: value for name, value in row.items() if name not in (*TIMES, "step")} for row in rows_of("run")]
    assert [{name: value for name, value in row.items() if name not in TIMES} for row in history] == rows
    saved = read_adapter("run_adapter").weights
    assert all(mx.array_equal(saved[name], array) for name, array in tree_flatten(policy.model.trainable_parameters()))


def test_train_ppo_refuses_settings_that_do_not_fit(setting):
    run = setting()
    settings = PPOSettings(batch_size=30)
    with pytest.raises(UserError, match="--batch-size 30 is not divisible by --mini-batch-size 64"):
        train_ppo(run.trainee, run.reference, run.tokenizer, ["2"], mixed_scores, settings)


# --- whole runs ---

TIMES = ("seconds", "rollout_seconds", "update_seconds", "tokens_per_second", "peak_memory_gb")


@pytest.fixture
def flags(folder, tmp_path, monkeypatch):
    """The flags of a short run in a folder of its own, whose picture is not drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_training, "plot_run", lambda folder: None)

    def build(*more, run="run", reward=("--ground-truth-reward",), **named):
        settings = {
            "model": folder, "num-steps": 4, "batch-size": 8, "mini-batch-size": 4, "num-generations": 4,
            "max-completion-length": 6, "save-every": 2, "save-file": f"{run}_adapter", "output-dir": run, **named,
        }  # fmt: skip
        return [*reward, *(word for name, value in settings.items() for word in (f"--{name}", value)), *more]

    return build


def rows_of(run):
    """The metrics of a run without the times."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run)]


def state_of(run):
    """Everything in the last checkpoint of a run, but the times."""
    folder = last_checkpoint(run)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state.pop("seconds")
    arrays = {
        (path.name, name): np.array(array).tobytes()
        for path in folder.rglob("*.safetensors")
        for name, array in mx.load(str(path)).items()
    }
    return folder.name, state, arrays


def test_a_run_leaves_metrics_checkpoints_summary_and_adapter(flags):
    call(ppo_training.main, *flags())
    rows = read_metrics("run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    named = ["step", "mean_score", "score_std", "kl", "entropy", "completion_length", "eos_share"]
    assert list(rows[0])[:7] == named
    assert {"policy_loss", "value_loss", "approx_kl", "clip_fraction", "grad_norm", "kl_coef", "seconds"} <= rows[
        0
    ].keys()
    assert all(row["updates"] == 4 and row["skipped_updates"] == 0 for row in rows)
    assert {path.name for path in Path("run/checkpoints").iterdir()} == {"000002", "000004"}
    assert json.loads(Path("run/summary.json").read_text(encoding="utf-8"))["adapter"] == "run_adapter"
    saved = read_adapter("run_adapter")
    assert saved.value_head is None  # the critic serves its run only
    assert all(name.endswith(("lora_a", "lora_b")) for name in saved.weights)
    assert any(array.any().item() for name, array in saved.weights.items() if name.endswith("lora_b"))


def test_the_kl_coefficient_adapts_from_step_to_step(flags):
    call(ppo_training.main, *flags("--init-kl-coef", 0.2, "--target", 6, "--horizon", 100))
    rows = read_metrics("run")
    assert rows[0]["kl_coef"] == 0.2 and rows[0]["kl"] == 0
    for before, after in pairwise(rows):
        error = np.clip(before["kl"] / 6 - 1, -0.2, 0.2)
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 8 / 100))


def test_a_fixed_kl_coefficient_stays(flags):
    call(ppo_training.main, *flags("--adap_kl_ctrl", "False", "--init-kl-coef", 0.2))
    assert {row["kl_coef"] for row in read_metrics("run")} == {0.2}


def test_skipped_updates_are_said(flags, monkeypatch, capsys):
    real, steps = PPOLearner.update, []

    def spoiled(learner, step, *rest):
        gradients_of = learner.gradients_of

        def poisoned(*arrays):
            (loss, stats), gradients = gradients_of(*arrays)
            return (loss * float("nan") if step == 1 else loss, stats), gradients

        learner.gradients_of = poisoned
        stats = real(learner, step, *rest)
        learner.gradients_of = gradients_of
        weights = tree_flatten(learner.policy.trainable_parameters())
        steps.append([np.array(array).tobytes() for _, array in weights])
        return stats

    monkeypatch.setattr(PPOLearner, "update", spoiled)
    call(ppo_training.main, *flags())
    assert steps[0] == steps[1] != steps[2]
    assert "step 2: 4 updates skipped (not finite" in capsys.readouterr().out
    assert [row["skipped_updates"] for row in read_metrics("run")] == [0, 4, 0, 0]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU...)", "is out of memory"),
        ("[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:...)", "stopped a computation"),
    ],
)
def test_a_failure_of_the_device_is_one_line_and_the_last_checkpoint_stands(flags, monkeypatch, capsys, message, says):
    """Raised amid the third step's update; the run is whole again when it has been resumed."""
    call(ppo_training.main, *flags(run="whole"))
    real, calls = ppo_learner.take_step, itertools.count()

    def failing(*args):
        if next(calls) == 10:
            raise RuntimeError(message)
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ppo_learner, "take_step", failing)
        patch.setattr(sys, "argv", ["ppo_training.py", *map(str, flags())])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_script(ppo_training.main)
    *_, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and last.startswith("error: the device ") and says in last and "--resume" in last
    assert last_checkpoint("run").name == "000002"
    call(ppo_training.main, "--resume", "run")
    assert read_adapter("run_adapter").weights.keys() == read_adapter("whole_adapter").weights.keys()
    for name, array in read_adapter("whole_adapter").weights.items():
        assert mx.array_equal(read_adapter("run_adapter").weights[name], array)


REWARD = """
def score(prompts, completions):
    with open("calls.txt", "a") as file:
        file.writelines(f"{prompt}\\n" for prompt in prompts)
    return [len(completion) / 10 for completion in completions]
"""


def test_a_user_s_reward_function_and_prompts_of_a_file(flags, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2 4"}\n{"prompt": "100"}\n{"prompt": "7"}\n', encoding="utf-8")
    reward = ("--reward-function", "mine.py:score")
    call(ppo_training.main, *flags("--prompts", "prompts.jsonl", reward=reward))
    prompts = (tmp_path / "calls.txt").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == 2 + 4 * 8 and set(prompts) == {"2 4", "100", "7"}
    rows = read_metrics("run")
    assert all(row["mean_score"] > 0 for row in rows)
    # The digit rule says nothing about prompts of another kind.
    assert "true_score" not in rows[0]


def test_with_another_reward_the_digit_rule_s_score_is_reported_too(flags, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    call(ppo_training.main, *flags(reward=("--reward-function", "mine.py:score")))
    assert all(0 <= row["true_score"] <= 1 for row in read_metrics("run"))
    call(ppo_training.main, *flags(run="second"))
    assert "true_score" not in read_metrics("second")[0]


def test_the_rewards_of_a_sum_are_reported_each_under_its_name(flags, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    reward = ("--ground-truth-reward", "--reward-function", "mine.py:score", "--reward-weights", "digit_rule=2")
    call(ppo_training.main, *flags("--verbose", reward=(*reward, "score=-0.5")))
    for row in read_metrics("run"):
        assert row["mean_score"] == pytest.approx(2 * row["score_digit_rule"] - 0.5 * row["score_score"])
        assert row["score_score"] > 0
    assert capsys.readouterr().out.count("score_digit_rule ") == 4


def test_samples_of_the_first_step_of_the_last_and_of_some_between(flags):
    call(ppo_training.main, *flags("--steps-per-samples", 3, "--num-steps", 5))
    rows = read_samples("run")
    assert [row["step"] for row in rows] == [step for step in (1, 3, 5) for _ in range(8)]
    assert list(rows[0]) == ["step", "score", "prompt", "completion"]
    rule = DigitRule()
    assert [row["score"] for row in rows] == [rule.score(row["prompt"] + row["completion"]) for row in rows]
    # A whole batch of eight is shown, so their mean is the report's.
    means = [np.mean([row["score"] for row in rows if row["step"] == step]) for step in (1, 3, 5)]
    assert means == pytest.approx([read_metrics("run")[step - 1]["mean_score"] for step in (1, 3, 5)])
    call(ppo_training.main, *flags("--steps-per-samples", 0, run="none"))
    assert not Path("none/samples.jsonl").exists()


def test_samples_are_spread_over_the_batch():
    numbers = list(range(128))
    texts = list(map(str, numbers))
    scored = Scored(texts, texts, list(map(float, numbers)), {})
    assert [row["score"] for row in ppo_loop.sample_rows(scored)] == list(range(0, 128, 16))


def test_a_failing_reward_function_is_one_line(flags, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def score(prompts, completions):\n    return [1.0]\n", encoding="utf-8")
    call_words = flags(reward=("--reward-function", "mine.py:score"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(lambda: ppo_training.run(ppo_training.main), *call_words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "returned 1 scores for 2 completions" in error and "Traceback" not in error


def test_an_adapter_with_nothing_to_train_is_refused(flags, folder, tmp_path, capsys):
    loaded = load(str(folder))
    config = AdapterConfig("none", model=str(folder))
    attach_adapter(loaded.model, config)
    save_adapter(tmp_path / "head", loaded.model, config, new_value_head(loaded.model))
    assert "is a value head alone" in fails(capsys, ppo_training.main, *flags("--resume-file", "head"))
    assert not Path("run").exists()


def test_another_optimizer_than_the_default_wants_a_rate(flags, capsys):
    words = flags("--prompt-tuning", "--optimizer", "adam")
    assert "--optimizer adam has no default rate here" in fails(capsys, ppo_training.main, *words)
    assert not Path("run").exists()


def test_a_reward_model_of_another_folder_runs(flags, folder, tmp_path):
    loaded = load(str(folder))
    config = AdapterConfig(model=str(folder))
    attach_adapter(loaded.model, config)
    save_adapter(tmp_path / "reward", loaded.model, config, new_value_head(loaded.model, std=None))
    call(ppo_training.main, *flags(reward=("--reward_model", "reward")))
    assert {"mean_score", "true_score"} <= read_metrics("run")[0].keys()


@pytest.mark.parametrize("name", ["weights.npz", "weights.safetensors"])
def test_the_adapter_may_be_one_file_and_be_gone_on_with(flags, tmp_path, name):
    call(ppo_training.main, *flags("--save-file", name))
    assert (tmp_path / name).is_file() and (tmp_path / "weights.json").is_file()
    call(ppo_training.main, *flags("--resume_file", name, run="second"))
    first = read_metrics("second")[0]
    assert first["kl"] == 0  # the reference is what it started from
    call(ppo_training.main, *flags("--resume_file", name, "--use_peft", run="third"))
    assert read_metrics("third")[0]["kl"] != 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_every_kind_of_adapter_trains(flags, kind, advantage):
    call(ppo_training.main, *flags(*KINDS[kind], "--advantage", advantage, "--num-steps", 1))
    assert read_adapter("run_adapter").config.fine_tune_type == kind.replace(" ", "_")
    assert ("value_loss" in read_metrics("run")[0]) is (advantage == "gae")


# --- a stop is never a loss ---

RESUMABLE: dict[str, list[Any]] = {
    "lora": ["--lr-schedule", "cosine", "--warmup-steps", 3],
    "soft prompt": [*KINDS["soft prompt"], "--normalize-scores", "--score-clip", 2],
    "group": ["--advantage", "group", "--gradient-accumulation-steps", 2],
}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def during_step(monkeypatch, step, action):
    """Do something in the rollout of a step, from 1."""
    real, rollouts = ppo_loop.roll_out, []

    def interrupted(*args):
        rollouts.append(args)
        if len(rollouts) == step:
            action()
        return real(*args)

    monkeypatch.setattr(ppo_loop, "roll_out", interrupted)


def die():
    raise Killed


@pytest.mark.parametrize("kind", RESUMABLE)
@pytest.mark.parametrize("step", [1, 4])  # checkpoints are at 0, 2, 4
def test_a_killed_and_resumed_run_equals_one_never_stopped(flags, monkeypatch, kind, step):
    words = [*RESUMABLE[kind], "--horizon", 50, "--init-kl-coef", 0.1, "--steps-per-samples", 1]
    call(ppo_training.main, *flags(*words, run="whole"))
    with monkeypatch.context() as patch:
        during_step(patch, step, die)
        with pytest.raises(Killed):
            call(ppo_training.main, *flags(*words, run="cut"))
    mx.random.seed(99)
    call(ppo_training.main, "--resume", "cut")
    assert rows_of("cut") == rows_of("whole")
    assert read_samples("cut") == read_samples("whole") and len(read_samples("cut")) == 4 * 8
    assert state_of("cut") == state_of("whole")
    cut, whole = read_adapter("cut_adapter").weights, read_adapter("whole_adapter").weights
    assert all(mx.array_equal(cut[name], whole[name]) for name in whole)
    assert len({row["kl_coef"] for row in rows_of("whole")}) == 4


@pytest.fixture
def hangs_up():
    """SIGHUP as a terminal sends it: under nohup it comes in ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("kind", ["lora", "soft prompt"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(flags, monkeypatch, kind, number, hangs_up):
    call(ppo_training.main, *flags(*RESUMABLE[kind], run="whole"))
    with monkeypatch.context() as patch:
        during_step(patch, 3, lambda: signal.raise_signal(number))
        with pytest.raises(Stopped, match=r"3 of 4 steps are done.*--resume cut"):
            call(ppo_training.main, *flags(*RESUMABLE[kind], run="cut"))
    assert last_checkpoint("cut").name == "000003"
    assert read_adapter("cut_adapter").config.provenance[-1]["figures"]["steps"] == 3
    call(ppo_training.main, "--resume", "cut")
    assert rows_of("cut") == rows_of("whole")
    assert state_of("cut") == state_of("whole")


def test_the_reference_of_a_resumed_run_is_where_the_run_began(flags, monkeypatch, trained_adapter):
    words = ["--resume-file", trained_adapter, "--learning-rate", 1e-2]
    call(ppo_training.main, *flags(*words, run="whole"))
    with monkeypatch.context() as patch:
        during_step(patch, 3, die)
        with pytest.raises(Killed):
            call(ppo_training.main, *flags(*words, run="cut"))
    call(ppo_training.main, "--resume", "cut")
    assert rows_of("cut") == rows_of("whole")
    assert rows_of("whole")[-1]["kl"] != 0


def test_a_resumed_run_is_extended_by_more_steps(flags, capsys):
    words = ["--lr-schedule", "constant", "--steps-per-samples", 0]
    call(ppo_training.main, *flags(*words, run="whole"))
    call(ppo_training.main, *flags(*words, "--num-steps", 2, run="short"))
    call(ppo_training.main, "--resume", "short", "--num-steps", 4)
    assert "short is extended from 2 to 4 steps" in capsys.readouterr().out
    assert rows_of("short") == rows_of("whole") and state_of("short") == state_of("whole")
    assert json.loads(Path("short/config.json").read_text(encoding="utf-8"))["num_steps"] == 4
    line = fails(capsys, ppo_training.main, "--resume", "short", "--num-steps", 3)
    assert line == "--num-steps 3 is less than the 4 of short; a resumed run can only be extended"


def test_the_rate_that_a_model_s_size_chose_is_kept_by_a_resume(flags, monkeypatch, capsys):
    monkeypatch.setattr(optimizer_groups, "LARGE", 1000)
    call(ppo_training.main, *flags("--num-steps", 1))
    assert "by Adam, learning rate 5e-05 (chosen by the model's size; " in capsys.readouterr().out
    config = json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    assert (config["learning_rate"], config["step_kl"]) == (5e-5, 0.02)
    monkeypatch.setattr(optimizer_groups, "LARGE", 10**9)
    rates: list[float] = []
    real = ppo_learner.make_optimizer

    def recorded(rate, *more):
        rates.append(rate)
        return real(rate, *more)

    monkeypatch.setattr(ppo_learner, "make_optimizer", recorded)
    call(ppo_training.main, "--resume", "run", "--num-steps", 2)
    assert rates == [5e-5] and "by Adam, learning rate 5e-05\n" in capsys.readouterr().out


def test_resuming_a_finished_run_changes_nothing(flags):
    call(ppo_training.main, *flags())
    rows, state = rows_of("run"), state_of("run")
    call(ppo_training.main, "--resume", "run")
    assert rows_of("run") == rows and state_of("run") == state


# --- mistakes ---


def test_without_a_reward_the_error_names_the_three_flags(flags, capsys):
    line = fails(capsys, ppo_training.main, *flags(reward=()))
    assert all(flag in line for flag in ("--ground-truth-reward", "--reward-model", "--reward-function"))


@pytest.mark.parametrize(
    ("reward", "words", "named"),
    [
        (["--ground-truth-reward", "--reward-model", "x"], [], "--reward-weights digit_rule=1 x=1"),
        (["--reward-function", "nothing.py:f"], [], "nothing.py"),
        (["--reward-function", "no_colon"], [], "file.py:name"),
        (["--reward-model", "missing_folder/"], [], "missing_folder/"),
        (None, ["--model", "./missing"], "./missing"),
        (None, ["--resume-file", "missing"], "missing"),
        (None, ["--save-file", "foreign"], "foreign"),
        (None, ["--output-dir", "used"], "--resume used"),
        (None, ["--prompts", "missing.jsonl"], "missing.jsonl"),
        (None, ["--prompts", "bad.jsonl"], "bad.jsonl:1"),
        (None, ["--mini-batch-size", 3], "try 2 or 4"),
        (None, ["--lora-keys", "self_attn.nothing"], "self_attn.nothing"),
        (None, ["--resume", "foreign"], "foreign"),
        (None, ["--log-with", "paper"], "--log-with"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(flags, tmp_path, capsys, reward, words, named):
    for name in ("foreign/notes.txt", "used/config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"text": "2"}\n', encoding="utf-8")
    before = sorted(map(str, tmp_path.rglob("*")))
    words = flags(*words) if reward is None else flags(*words, reward=reward)
    assert named in fails(capsys, ppo_training.main, *words)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_reward_model_without_a_head_is_told_so(flags, folder, capsys):
    assert "no value head" in fails(capsys, ppo_training.main, *flags(reward=("--reward-model", folder)))
