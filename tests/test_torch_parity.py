"""PyTorch against MLX: the same weights and rollout give the same numbers, and each reads the other's files.

What is compared are the stages of both, training/ppo_learner.py against training/torch_ppo_learner.py, in float32.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

import pytorch_ppo_training as torch_script
from common.errors import UserError
from data.digits import DigitRule
from models import (
    adapters,
    generation,
    loading,
    soft_prompt,
    torch_adapters,
    torch_generation,
    torch_loading,
    torch_soft_prompt,
    torch_value_head,
    value_head,
)
from models.adapter_config import AdapterConfig
from rewards.digits import digit_reward
from rewards.reward_model import load_reward_model
from rewards.torch_reward_model import load_reward_model as load_torch_reward_model
from tests.torch_models import TOKENIZER, random_llama
from training import (
    optimizer,
    ppo,
    ppo_flags,
    ppo_learner,
    ppo_loop,
    schedules,
    torch_optimizer,
    torch_ppo_learner,
)
from training.advantages import advantages_and_returns
from training.flags import adapter_settings
from training.rollout import Rollout

TOLERANCE = 1e-5
CPU = torch.device("cpu")
KINDS = ["lora", "dora", "soft_prompt", "full"]
TEXTS = ["2", "14 20", "6 8 12", "-4", "190 3", "8 8", "100", "5"]
EOS = TOKENIZER.eos_token_id


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random Llama whose logits are far from flat, and the digits' tokenizer."""
    return random_llama(tmp_path_factory.mktemp("base"))


def adapter_config(kind, base, **settings):
    lora = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    return AdapterConfig(kind, num_layers=2, lora_parameters=lora, num_prompt_tokens=3, model=base, **settings)


def random_adapter(folder, kind, base, head=False):
    """An adapter, saved by MLX, with no weight at its beginning: lora_b is not 0. Returns its path."""
    model = loading.load(base).model
    adapters.attach_adapter(model, adapter_config(kind, base))
    mx.random.seed(1)
    weights = [(n, w + 0.1 * mx.random.normal(w.shape)) for n, w in tree_flatten(model.trainable_parameters())]
    model.update(tree_unflatten(weights))
    adapters.save_adapter(folder, model, adapter_config(kind, base), value_head.ValueHead(32, 0.3) if head else None)
    return str(folder)


def agree(actual, expected, tolerance=TOLERANCE):
    """Equal shapes, and equal numbers to within the tolerance, relative to the largest where that is above 1."""
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def agree_by_name(actual, expected):
    assert actual.keys() == expected.keys()
    assert len(expected) > 0
    for name, array in expected.items():
        agree(actual[name], array)


# --- both scripts, from the same start ---


def flags(base, *words):
    words = ("--model", base, "--ground-truth-reward", "--batch-size", "8", "--mini-batch-size", "4", *words)
    return ppo_flags.ppo_parser("").parse_args(words)


def policies_of(stages, args, loaded):
    adapter = args.resume_file or AdapterConfig(**adapter_settings(args))
    return stages.build_policies(loaded, ppo_flags.ppo_settings(args), adapter)


class Side:
    """One framework with its policy and reference, and the value head that both have."""

    def __init__(self, is_mlx, args, head_weight):
        self.is_mlx = is_mlx
        self.loaded = loading.load(args.model) if self.is_mlx else torch_loading.load(args.model, CPU)
        self.settings = ppo_flags.ppo_settings(args)
        self.stages = ppo_learner if self.is_mlx else torch_ppo_learner
        self.trainee, self.reference = policies_of(self.stages, args, self.loaded)
        if self.trainee.value_head is not None and self.is_mlx:
            self.trainee.value_head.weight = mx.array(head_weight)
        elif self.trainee.value_head is not None:
            self.trainee.value_head.load_state_dict({"weight": torch.tensor(head_weight)})
        settings = (1e-3, 100, "cosine", 2, 0.01, args.optimizer or "adam", args.value_head_learning_rate)
        self.optimizer: Any
        if self.is_mlx:
            self.optimizer = optimizer.make_optimizer(*settings)
            self.optimizer.init(self.trainee.module.trainable_parameters())
        else:
            self.optimizer = torch_optimizer.make_optimizer(self.trainee.module, *settings)
        source = self.loaded.tokenizer if self.is_mlx else self.loaded
        policy = self.trainee.module
        self.learner = self.stages.PPOLearner(policy, self.reference, source, self.optimizer, self.settings)

    def roll_out(self, monkeypatch, completions):
        monkeypatch.setattr(self.stages, "sample", lambda *_, **more: completions)
        reward = digit_reward(DigitRule())
        return ppo_loop.roll_out(self.learner, self.loaded.tokenizer, TEXTS, reward, ppo.RunningMoments())

    def gradients(self, rollout, advantages, returns, kl_coef):
        """Loss, stats, and gradients by name, of one mini batch in two pieces."""
        pieces = [np.array([5, 0]), np.array([3, 6])]
        coef = mx.array(kl_coef) if self.is_mlx else kl_coef
        gradients_of = self.learner.gradients_of
        loss, stats, found = self.stages.accumulate(gradients_of, rollout, advantages, returns, pieces, coef)
        if self.is_mlx:
            return loss, stats, dict(tree_flatten(found))
        names = [name for name, weight in self.trainee.module.named_parameters() if weight.requires_grad]
        named = zip(names, found, strict=True)
        to_mlx = torch_adapters.mlx_name, torch_adapters.mlx_layout
        return loss, stats, {to_mlx[0](name): to_mlx[1](name, gradient) for name, gradient in named}

    def optimise(self, rollout, advantages, returns, kl_coef):
        return self.learner.update(0, rollout, advantages, returns, kl_coef)

    def weights(self):
        module = adapters if self.is_mlx else torch_adapters
        return module.adapter_weights(self.trainee.model)


def completions_of(texts):
    """Completions of unequal length: with EOS, cut off, one of the EOS alone, one with text after the EOS."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(4, len(TOKENIZER), size).tolist() for size in rng.integers(1, 12, len(texts))]
    drawn[0] = [EOS]
    drawn[1] += [EOS]
    drawn[2] += [EOS, 7, 8]
    drawn[3] = [*TOKENIZER.encode(" 40 44 50 60 66", add_special_tokens=False), EOS]
    return drawn


CASES = {
    "lora": ["--temperature", "0.7", "--entropy-coef", "0.01"],
    "dora": [],
    "soft_prompt": ["--whiten-rewards"],
    "full": ["--kl-penalty", "k3"],
    "lora, group": ["--advantage", "group", "--num-generations", "4", "--kl-penalty", "k3"],
    "soft_prompt, rloo, base": ["--advantage", "rloo", "--num-generations", "2", "--use-peft"],
    "lora, base": ["--use-peft", "--kl-penalty", "full"],
    "soft_prompt, muon": ["--optimizer", "muon", "--value-head-learning-rate", "5e-4"],
    "lora, muon": ["--optimizer", "muon"],
    "full, rate of the head": ["--value-head-learning-rate", "5e-4"],
    "soft_prompt, rloo, muon": ["--advantage", "rloo", "--num-generations", "2", "--optimizer", "muon"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_whole_step(case, base, tmp_path, monkeypatch):
    """Rollout, advantages, loss, gradients, and the weights after every update of a step."""
    adapter = random_adapter(tmp_path / "adapter", case.split(",")[0], base)
    args = flags(base, "--resume-file", adapter, "--max-grad-norm", "0.5", *CASES[case])
    head = np.random.default_rng(1).normal(0, 0.2, (1, 32)).astype(np.float32)
    sides = [Side(is_mlx, args, head) for is_mlx in (True, False)]
    found = [side.roll_out(monkeypatch, completions_of(TEXTS)) for side in sides]
    (expected, texts, figures), (actual, torch_texts, torch_figures) = found
    assert torch_texts == texts
    assert any(score > 0 for score in expected.scores.tolist())
    real = np.array(expected.mask) > 0  # what stands at pads is nobody's business
    for name in expected._fields[:-1]:  # but for the passes, which are MLX's alone
        torch_array, mlx_array = np.array(getattr(actual, name)), np.array(getattr(expected, name))
        at = real if mlx_array.shape == real.shape else ...
        agree(torch_array[at], mlx_array[at])
    agree(list(torch_figures.values()), list(figures.values()))
    assert torch_figures.keys() == figures.keys()
    if "base" in case:
        assert abs(figures["kl"]) > 0.01

    kl_coef = 0.1
    estimates = [advantages_and_returns(rollout, sides[0].settings, kl_coef) for rollout, *_ in found]
    for torch_array, mlx_array in zip(estimates[1], estimates[0], strict=True):
        agree(torch_array, mlx_array)

    # The very same arrays go into the update, so that what differs there is the update.
    numbers = [np.array(array) for array in (*expected[:-1], *estimates[0])]
    same = Rollout(*(torch.from_numpy(array) for array in numbers[:-2]))
    same = same._replace(tokens=same.tokens.long(), positions=same.positions.long())
    inputs = [
        (expected, *estimates[0], kl_coef),
        (same, torch.from_numpy(numbers[-2]), torch.from_numpy(numbers[-1]), kl_coef),
    ]
    (loss, stats, gradients), torch_found = (side.gradients(*given) for side, given in zip(sides, inputs, strict=True))
    agree(torch_found[0], loss)
    agree_by_name(torch_found[1], stats)
    agree_by_name(torch_found[2], gradients)
    assert all(float(mx.abs(gradient).max()) > 0 for gradient in gradients.values())

    before = {name: np.array(weight) for name, weight in sides[0].weights().items()}
    stats, torch_stats = (side.optimise(*given) for side, given in zip(sides, inputs, strict=True))
    assert stats["updates"] == 4
    agree_by_name(torch_stats, stats)
    agree_by_name(sides[1].weights(), sides[0].weights())
    assert all(np.abs(before[name] - np.array(w)).max() > 1e-4 for name, w in sides[0].weights().items())
    if args.advantage == "gae":
        agree(sides[1].trainee.value_head.weight, sides[0].trainee.value_head.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_leaves_the_policy_its_reference(kind, base):
    words = ["--prompt-tuning"] if kind == "soft_prompt" else ["--fine-tune-type", kind]
    for extra in ([], ["--use-peft"]):
        if kind == "soft_prompt" and extra:
            continue
        args = flags(base, *words, *extra, "--lora-layers", "2")
        trainee, reference = policies_of(torch_ppo_learner, args, torch_loading.load(base, CPU))
        settings, states_of = ppo_flags.ppo_settings(args), torch_ppo_learner.reference_states
        prefix = torch_soft_prompt.soft_prompt_ids(trainee.model)
        tokens = torch.tensor([[*prefix, 1, 20, 21, 22]])
        positions = torch.arange(tokens.shape[1])[None]
        with torch.no_grad():
            states, values = trainee.module(tokens, positions)
            assert torch.equal(states_of(settings, reference, tokens, positions, []), states)
        assert torch.equal(values, torch.zeros_like(values))
        trainable = {name for name, weight in trainee.model.named_parameters() if weight.requires_grad}
        assert trainable and not any(weight.requires_grad for weight in reference.parameters())
        for weight in trainee.model.parameters():
            weight.data += 0.1 * weight.requires_grad
        with torch.no_grad():
            moved = states_of(settings, reference, tokens, positions, [])
        assert torch.equal(moved, states)


def test_the_reference_shares_the_frozen_weights(base):
    trainee, reference = policies_of(torch_ppo_learner, flags(base), torch_loading.load(base, CPU))
    own = {id(weight) for weight in trainee.model.parameters() if not weight.requires_grad}
    assert own and own <= {id(weight) for weight in reference.parameters()}


# --- the forward pass ---


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_hidden_states_where_they_are_asked_for(tied, tmp_path):
    folder = random_llama(tmp_path, tie_word_embeddings=tied)
    tokens = np.array([[1, 20, 25, 3, 3], [1, 30, 31, 32, 33]])
    positions = np.array([[0, 2], [3, 4]])
    logits, hidden = value_head.forward(loading.load(folder).model, mx.array(tokens), mx.array(positions))
    model = torch_loading.load(folder, CPU).model
    with torch.no_grad():
        torch_logits, torch_hidden = torch_value_head.forward(model, torch.tensor(tokens), torch.tensor(positions))
        whole = model(torch.tensor(tokens)).logits
    agree(torch_logits, logits)
    agree(torch_hidden, hidden)
    assert torch.allclose(whole[1, 3:], torch_logits[1], atol=1e-6)


def test_logits_that_a_family_changes_after_its_output_layer():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        vocab_size=50, head_dim=8, num_key_value_heads=2, final_logit_softcapping=3.0, initializer_range=0.3, **sizes
    )
    model = Gemma2ForCausalLM(config).eval()
    tokens, positions = torch.tensor([[1, 20, 25, 3]]), torch.tensor([[1, 3]])
    with torch.no_grad():
        logits, _ = torch_value_head.forward(model, tokens, positions)
        assert torch.allclose(logits, model(tokens).logits[:, [1, 3]], atol=1e-6)
    assert logits.abs().max() <= 3


# --- adapters that go from one to the other ---


def mlx_logits(model, tokens):
    return model(mx.array([[*soft_prompt.soft_prompt_ids(model), *tokens]]))


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([[*torch_soft_prompt.soft_prompt_ids(model), *tokens]])).logits


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".npz"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_go_both_ways(kind, suffix, base, tmp_path):
    """MLX saves, PyTorch loads and saves, MLX loads: the same logits, and the very same bits in the files."""
    path = random_adapter(tmp_path / f"first{suffix}", kind, base, head=True)
    there = torch_loading.load(base, CPU)
    saved = torch_adapters.load_adapter(there.model, path)
    torch_adapters.save_adapter(tmp_path / f"second{suffix}", there.model, saved.config, saved.value_head)
    back = loading.load(base)
    again = adapters.load_adapter(back.model, tmp_path / f"second{suffix}")

    expected = mlx_logits(back.model, [1, 20, 21, 22])
    agree(torch_logits(there.model, [1, 20, 21, 22]), expected)
    without = mlx_logits(loading.load(base).model, [1, 20, 21, 22])
    assert float(mx.abs(expected[:, -1] - without[:, -1]).max()) > 0.1
    first = adapters.read_adapter(path)
    assert first.config == again.config == saved.config
    assert first.weights.keys() == again.weights.keys()
    assert all(bool(mx.array_equal(first.weights[name], again.weights[name])) for name in first.weights)
    assert first.value_head is not None and again.value_head is not None
    assert bool(mx.array_equal(first.value_head.weight, again.value_head.weight))


def test_an_adapter_that_does_not_fit_lists_every_tensor(base, tmp_path):
    path = random_adapter(tmp_path / "adapter", "lora", base)
    other = torch_loading.load(random_llama(tmp_path / "other", intermediate_size=40), CPU)
    with pytest.raises(UserError) as error:
        torch_adapters.load_adapter(other.model, path)
    assert str(error.value).count("mlp.") == 6
    assert "model.layers.1.mlp.gate_proj.lora_b is (4, 48), the model has (4, 40)" in str(error.value)


def test_a_value_head_of_another_width_is_refused(base, tmp_path):
    model = torch_loading.load(base, CPU).model
    torch_adapters.save_adapter(tmp_path / "head", model, AdapterConfig("none"), torch_value_head.ValueHead(31))
    for load in (torch_adapters.load_adapter, adapters.load_adapter):
        opened = model if load is torch_adapters.load_adapter else loading.load(base).model
        with pytest.raises(UserError, match="a value head of width 31, the model has 32"):
            load(opened, tmp_path / "head")


@pytest.mark.parametrize(
    "keys", [["self_attn.q_proj", "self_attn.v_proj"], ["model.layers.0.mlp.up_proj"], ["nothing"]]
)
def test_lora_keys_and_layers_name_the_same_weights(keys, base):
    config = adapter_config("lora", base)
    config.lora_parameters["keys"] = keys
    sides = [(adapters, loading.load(base).model), (torch_adapters, torch_loading.load(base, CPU).model)]
    names = []
    for module, model in sides:
        if keys == ["nothing"]:
            with pytest.raises(UserError, match="no layer matches"):
                module.attach_adapter(model, config)
            continue
        module.attach_adapter(model, config)
        names.append({name: tuple(weight.shape) for name, weight in module.adapter_weights(model).items()})
    assert len(names) in (0, 2) and names[:1] == names[1:]


def test_a_lora_key_of_an_embedding_is_refused(base):
    config = adapter_config("lora", base)
    config.lora_parameters["keys"] = ["self_attn.q_proj", "model.embed_tokens"]
    with pytest.raises(UserError, match=r"model\.embed_tokens names a Embedding"):
        torch_adapters.attach_adapter(torch_loading.load(base, CPU).model, config)


# --- reward models ---


@pytest.mark.parametrize("kind", ["lora", "soft_prompt", "full", "none"])
def test_a_reward_model_scores_alike(kind, base, tmp_path):
    path = random_adapter(tmp_path / "adapter", kind, base, head=True)
    prompts, completions = ["8", "14 20", "", "6"], [" 20 22 30", "", " 5", " 7" * 12]
    loaded = torch_loading.load(base, CPU)
    ours = load_reward_model(path)
    theirs = load_torch_reward_model(path, CPU)
    shared = load_torch_reward_model(path, CPU, loaded)
    expected = ours.reward(prompts, completions)
    agree(theirs.reward(prompts, completions), expected)
    agree(shared.reward(prompts, completions), expected)
    alone = [theirs.reward([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    agree(alone, expected)
    assert np.std(expected) > 0.1
    if kind != "full":
        ids = {id(weight) for weight in loaded.model.parameters()}
        assert ids <= {id(weight) for weight in shared.scoring.parameters()}
    # Training a policy in full must not reach the reward model that stands on the same base.
    torch_adapters.attach_adapter(loaded.model, AdapterConfig("full"))
    for weight in loaded.model.parameters():
        weight.data += 1.0
    agree(shared.reward(prompts, completions), expected)


def test_a_fused_reward_model_and_a_classifier_score_alike(base, tmp_path):
    fused, classifier = tmp_path / "fused", tmp_path / "classifier"
    random_llama(fused)
    head = value_head.ValueHead(32, 0.3)
    value_head.save_value_head(fused, head)
    random_llama(classifier, LlamaForSequenceClassification, num_labels=1)
    model = LlamaForSequenceClassification.from_pretrained(classifier)
    model.model.load_state_dict(LlamaForCausalLM.from_pretrained(fused).model.state_dict())
    model.score.load_state_dict({"weight": torch.tensor(np.array(head.weight))})
    model.save_pretrained(classifier)

    prompts, completions = ["8", "14 20"], [" 20 22 30", ""]
    expected = load_reward_model(str(fused)).reward(prompts, completions)
    agree(load_torch_reward_model(str(fused), CPU).reward(prompts, completions), expected)
    agree(load_torch_reward_model(str(classifier), CPU).reward(prompts, completions), expected)
    with torch.no_grad():
        ids = torch.tensor([[*TOKENIZER.encode("8 20 22 30"), EOS]])
        agree(model(ids).logits[0], expected[:1])
    with pytest.raises(UserError, match="no value head"):
        load_torch_reward_model(base, CPU)
    random_llama(tmp_path / "two", LlamaForSequenceClassification, num_labels=2)
    with pytest.raises(UserError, match="num_labels 1"):
        load_torch_reward_model(str(tmp_path / "two"), CPU)


# --- sampling ---


@pytest.mark.parametrize("kind", ["lora", "soft_prompt"])
def test_greedy_completions_are_those_of_mlx_and_of_each_prompt_alone(kind, base, tmp_path):
    path = random_adapter(tmp_path / "adapter", kind, base)
    ours, theirs = loading.load(base).model, torch_loading.load(base, CPU).model
    adapters.load_adapter(ours, path)
    torch_adapters.load_adapter(theirs, path)
    prompts = [TOKENIZER.encode(text) for text in TEXTS]
    completions = torch_generation.sample(theirs, prompts, [EOS], 20, temperature=0)
    assert completions == generation.sample(ours, prompts, [EOS], 20, temperature=0)
    assert completions == [torch_generation.sample(theirs, [p], [EOS], 20, temperature=0)[0] for p in prompts]
    assert completions == torch_generation.sample(theirs, prompts, [EOS], 20, temperature=0, batch_size=3)
    assert len({tuple(completion) for completion in completions}) > 3


def test_draws_follow_the_tempered_softmax(base):
    """Ragged prompts, second tokens included: the cache and the padding have to be right."""
    model = torch_loading.load(base, CPU).model
    temperature, count = 1.5, 3000
    prompts = [TOKENIZER.encode(text) for text in ("2", "14 20 -3 5")]
    torch.manual_seed(0)
    drawn = torch_generation.sample(model, prompts * count, [], 2, temperature, batch_size=2000)
    for index, prompt in enumerate(prompts):
        firsts = np.array([completion[0] for completion in drawn[index::2]])
        _close_to_softmax(firsts, torch_logits(model, prompt)[0, -1] / temperature)
        common = int(np.bincount(firsts).argmax())
        seconds = np.array([completion[1] for completion in drawn[index::2] if completion[0] == common])
        assert len(seconds) > 80
        _close_to_softmax(seconds, torch_logits(model, [*prompt, common])[0, -1] / temperature)


def _close_to_softmax(tokens, logits):
    expected = torch.softmax(logits, dim=-1).numpy()
    shares = np.bincount(tokens, minlength=len(expected)) / len(tokens)
    error = np.sqrt(expected * (1 - expected) / len(tokens))
    assert (np.abs(shares - expected) <= 4.5 * error + 2 / len(tokens)).all()


def test_a_completion_ends_with_its_first_eos_or_at_the_limit(base):
    loaded = torch_loading.load(base, CPU)
    stops = {EOS, *range(10, 30)}
    counts: list[int] = []
    torch.manual_seed(0)
    completions = torch_generation.sample(
        loaded.model, [TOKENIZER.encode(text) for text in TEXTS] * 4, stops, 6, 1.0, 16, counts.append
    )
    assert sum(counts) == sum(map(len, completions))
    for completion in completions:
        assert 1 <= len(completion) <= 6
        assert not stops & set(completion[:-1])
        assert len(completion) == 6 or completion[-1] in stops
    assert {len(completion) == 6 for completion in completions} == {True, False}
    with pytest.raises(UserError, match="empty"):
        torch_generation.sample(loaded.model, [[1], []], [EOS], 3)
    assert loaded.eos_token_ids == loading.load(base).tokenizer.eos_token_ids == {EOS}


# --- the optimizer ---


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_learning_rates_of_the_first_20_updates(schedule, warmup):
    made = optimizer.make_optimizer(1e-3, 16, schedule, warmup)
    module = nn.Linear(1, 1)
    for update in range(20):
        made.update(module, {"weight": mx.ones((1, 1)), "bias": mx.ones(1)})
        rate = 1e-3 * schedules.schedule_share(update, 16, schedule, warmup)
        assert rate == pytest.approx(made.learning_rate.item(), rel=1e-5, abs=1e-9)


def test_a_bad_gradient_leaves_weights_and_optimizer_untouched():
    module = torch.nn.Linear(2, 1, bias=False)
    made = torch_optimizer.make_optimizer(module, 0.1, 10)
    good, one = [torch.ones(1, 2)], torch.tensor(1.0)
    assert torch_optimizer.update(made, one, good, 1.0) == pytest.approx(2**0.5)
    before = {name: array.clone() for name, array in made.arrays().items()}
    weight = module.weight.detach().clone()
    bad = [torch.tensor([[1.0, float("nan")]])]
    for loss, gradients in [(one, bad), (one, [good[0] * float("inf")]), (one * float("nan"), good)]:
        assert np.isnan(torch_optimizer.update(made, loss, gradients, 1.0))
    assert torch.equal(module.weight, weight)
    assert all(torch.equal(array, before[name]) for name, array in made.arrays().items())


def test_an_optimizer_state_of_another_model_is_refused():
    made = [torch_optimizer.make_optimizer(torch.nn.Linear(size, 1, bias=False), 0.1, 10) for size in (2, 2, 3)]
    torch_optimizer.update(made[0], torch.tensor(1.0), [torch.ones(1, 2)], None)
    arrays = made[0].arrays()
    made[1].restore(arrays)
    assert made[1].updates == 1
    for other, state in [(made[2], arrays), (made[1], {"updates": arrays["updates"]}), (made[1], {})]:
        with pytest.raises(UserError, match="does not fit"):
            other.restore(state)


class Judged(torch.nn.Module):
    """A matrix, a vector and a value head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.value_head = torch.nn.Linear(3, 4), torch.nn.Linear(3, 1, bias=False)


@pytest.mark.parametrize("settings", [{"kind": "muon"}, {"head_rate": 0.02}, {"kind": "muon", "weight_decay": 0.1}])
def test_what_follows_a_restore_is_bit_for_bit_what_would_have_followed(settings):
    modules = Judged(), Judged()
    first, second = (torch_optimizer.make_optimizer(module, 0.1, 10, "linear", **settings) for module in modules)
    gradients = [[seed + torch.randn_like(weight) for weight in first.weights] for seed in range(4)]
    for step in gradients[:2]:
        torch_optimizer.update(first, torch.tensor(1.0), step, 0.5)
    modules[1].load_state_dict(modules[0].state_dict())
    second.restore({name: array.clone() for name, array in first.arrays().items()})
    for step in gradients[2:]:
        for made in (first, second):
            torch_optimizer.update(made, torch.tensor(1.0), step, 0.5)
    for weight, other in zip(first.weights, second.weights, strict=True):
        assert torch.equal(weight, other)
    assert first.arrays().keys() == second.arrays().keys()
    assert all(torch.equal(array, second.arrays()[name]) for name, array in first.arrays().items())
    other = torch_optimizer.make_optimizer(Judged(), 0.1, 10, "linear")
    if settings.get("kind") == "muon":
        with pytest.raises(UserError, match="does not fit"):
            other.restore(first.arrays())


def test_flags_of_both_scripts_are_the_same_but_two():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pytorch_ppo_training.py", "--tokenizer", "t"])
        theirs = vars(torch_script.parse_args())
    ours = vars(ppo_flags.ppo_parser("").parse_args([]))
    assert theirs == {**ours, "tokenizer": "t", "device": "auto"}
