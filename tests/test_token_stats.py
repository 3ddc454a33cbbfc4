"""Figures of tokens in pieces of the positions against the same from whole logits, gradients too, in every family."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from common.errors import UserError
from models.adapters import AdapterConfig, attach_adapter
from models.output_layer import OutputLayer
from models.soft_prompt import add_soft_prompt
from models.token_stats import ALIVE_ON_CPU, TokenStats, token_stats
from models.value_head import forward
from tests.architectures import ARCHITECTURES, VOCABULARY, build
from training import ppo
from training.optimizer import loss_and_gradients
from training.rollout import pack

TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17]])
POSITIONS = mx.array([[0, 6, 3], [5, 5, 1]])
TARGETS = mx.array([[4, 5, 6], [7, 8, 9]])
SLOPES = mx.array([[[0.5, -1.0, 0.3], [1.5, 0.0, -0.7]], [[0.2, 0.4, -0.1], [0.6, 1.0, 0.0]], [[1.0, 0.1, 0.5]] * 2])
TEMPERATURE = 0.7
TWO_ROWS = 2 * ALIVE_ON_CPU * 4 * VOCABULARY  # bytes: three pieces of the six positions


def close(got, expected, tolerance=1e-5):
    """To within the tolerance, relative to the largest where that is above 1."""
    got, expected = np.array(got.astype(mx.float32)), np.array(expected.astype(mx.float32))
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


def whole(logits, ref_logits, temperature=TEMPERATURE, targets=TARGETS):
    """The same from logits (B, C, V)."""
    return TokenStats(
        ppo.logprobs_from_logits(logits, targets, temperature),
        logits.argmax(axis=-1) == targets,
        ppo.entropy_from_logits(logits, temperature),
        ppo.logprobs_from_logits(ref_logits, targets, temperature),
        ppo.full_kl(logits, ref_logits, temperature),
    )


def in_pieces(model, reference, temperature=TEMPERATURE, tokens=TOKENS, training=False):
    _, hidden = forward(model, tokens, POSITIONS)
    _, ref_hidden = forward(reference, TOKENS, POSITIONS)
    settings: dict[str, Any] = {"correct": True, "entropy": True, "training": training, "logits_bytes": TWO_ROWS}
    return token_stats(model, hidden, TARGETS, temperature, reference=(reference, ref_hidden), **settings)


def loss_of(stats):
    return sum((slope * figure).sum() for slope, figure in zip(SLOPES, (stats[0], stats[2], stats[4]), strict=True))


def gradients(model, stats_of):
    """By name, of a loss that takes logprobs, entropy and KL at unequal weights."""
    return dict(tree_flatten(nn.value_and_grad(model, lambda model: loss_of(stats_of(model)))(model)[1]))


def check(model, reference, tokens=TOKENS):
    """Figures and gradients of everything trainable are those from whole logits."""

    def plainly(model):
        return whole(forward(model, tokens, POSITIONS)[0], forward(reference, TOKENS, POSITIONS)[0])

    expected = plainly(model)
    for training in (False, True):
        got = in_pieces(model, reference, tokens=tokens, training=training)
        for figure, other in zip(got, expected, strict=True):
            close(figure, other)
        expected_gradients = gradients(model, plainly)
        got_gradients = gradients(model, lambda m, t=training: in_pieces(m, reference, tokens=tokens, training=t))
        assert got_gradients.keys() == expected_gradients.keys() and got_gradients
        for name, gradient in expected_gradients.items():
            close(got_gradients[name], gradient)


def frozen_head(model, keys=None):
    """A LoRA on the last layer alone, with no weight at its beginning."""
    lora = {"rank": 4, "scale": 2.0, "dropout": 0.0, **({"keys": keys} if keys else {})}
    attach_adapter(model, AdapterConfig("lora", 1, lora))
    model.apply(lambda array: array + 0.1, lambda module, name, _: name == "lora_b")
    return model.train()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_figures_and_gradients_with_every_weight_trained(name):
    check(build(name).train(), build(name, seed=1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_figures_and_gradients_with_the_output_layer_frozen(name):
    model, reference = build(name), build(name, seed=1)
    head = OutputLayer(model)
    model.freeze()
    _, hidden = forward(model, TOKENS, POSITIONS)
    _, ref_hidden = forward(reference, TOKENS, POSITIONS)
    ref_logits = forward(reference, TOKENS, POSITIONS)[0]

    def of_hidden(training):
        settings: dict[str, Any] = {"entropy": True, "reference": (reference, ref_hidden), "logits_bytes": TWO_ROWS}
        return lambda hidden: loss_of(token_stats(model, hidden, TARGETS, TEMPERATURE, training=training, **settings))

    def plainly(hidden):
        return loss_of(whole(head(hidden.reshape(6, -1)).reshape(2, 3, -1), ref_logits))

    for training in (False, True):
        close(mx.grad(of_hidden(training))(hidden), mx.grad(plainly)(hidden))


@pytest.mark.parametrize("what", ["quantized", "lora", "lora on a quantized one", "soft prompt"])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gemma2"])
def test_an_adapted_output_layer(name, what):
    model, tokens = build(name), TOKENS
    if "quantized" in what:
        nn.quantize(model, group_size=32, bits=4)
    if what == "soft prompt":
        ids = add_soft_prompt(model.freeze(), 3)
        model.unfreeze(keys="soft_prompt")
        tokens = mx.concatenate([mx.array([ids] * 2), TOKENS[:, 3:]], axis=1)
    else:
        head = "lm_head" if "lm_head" in model else "model.embed_tokens"
        frozen_head(model, None if what == "quantized" else ["self_attn.q_proj", head])
        assert bool(OutputLayer(model).weights) == ("lora" in what)
    check(model.train(), build(name, seed=1), tokens=tokens)


def test_a_lora_with_dropout_on_the_output_layer_has_the_gradient_of_what_it_drew():
    model = build("llama-untied")
    attach_adapter(model, AdapterConfig("lora", -1, {"rank": 4, "scale": 2.0, "dropout": 0.5, "keys": ["lm_head"]}))
    model.lm_head.lora_b = mx.random.normal(model.lm_head.lora_b.shape, key=mx.random.key(1))
    model.train()
    settings: dict[str, Any] = {"logits_bytes": TWO_ROWS, "training": True}

    def loss(lora_a):
        mx.random.seed(3)
        model.lm_head.lora_a = lora_a
        return token_stats(model, forward(model, TOKENS, POSITIONS)[1], TARGETS, **settings).logprobs.sum()

    start = model.lm_head.lora_a
    step = mx.random.normal(start.shape, key=mx.random.key(2))
    along = (mx.grad(loss)(start) * step).sum()
    close(along, (loss(start + 2e-3 * step) - loss(start - 2e-3 * step)) / 4e-3, 1e-3)


class OneLayer(nn.Module):
    """A body that does nothing, an output layer that does nothing, and a bias on the logits."""

    def __init__(self, size, bias=0.0):
        super().__init__()
        self.embed_tokens = nn.Embedding(size, size)
        self.lm_head = nn.Linear(size, size, bias=False)
        self.lm_head.weight = mx.eye(size)
        self._bias = bias

    def __call__(self, tokens):
        return self.lm_head(self.embed_tokens(tokens)) + self._bias


def test_values_worked_by_hand():
    model = OneLayer(3)
    hidden = mx.log(mx.array([[0.5, 0.25, 0.25]]))
    uniform = (OneLayer(3), mx.zeros((1, 3)))
    stats = token_stats(model, hidden, mx.array([1]), correct=True, entropy=True, reference=uniform)
    close(stats.logprobs, mx.array([math.log(0.25)]))
    close(stats.ref_logprobs, mx.array([math.log(1 / 3)]))
    close(stats.entropy, mx.array([1.5 * math.log(2)]))
    close(stats.kl, mx.array([math.log(3) - 1.5 * math.log(2)]))
    assert stats.correct.tolist() == [False]
    slope = mx.grad(lambda hidden: token_stats(model, hidden, mx.array([1])).logprobs.sum())(hidden)
    close(slope, mx.array([[-0.5, 0.75, -0.25]]))
    hot = token_stats(model, hidden, mx.array([0]), 0.5, correct=True)
    close(hot.logprobs, mx.array([math.log(0.25 / 0.375)]))
    assert hot.correct.tolist() == [True] and hot.entropy is None and hot.kl is None


@pytest.mark.parametrize("training", [False, True])
def test_a_token_that_a_family_rules_out(training):
    """Its logit is −inf in policy and reference."""
    bias = mx.where(mx.arange(5) == 2, -math.inf, 0.0)
    model, reference = OneLayer(5, bias), OneLayer(5, bias)
    hidden, ref_hidden = mx.random.normal((2, 4, 5), key=mx.random.key(0))
    targets = mx.array([0, 1, 3, 4])

    def pieces(hidden):
        settings: dict[str, Any] = {
            "entropy": True,
            "reference": (reference, ref_hidden),
            "training": training,
            "logits_bytes": 1,
        }
        stats = token_stats(model, hidden, targets, TEMPERATURE, **settings)
        return stats.logprobs.sum() + 2 * stats.entropy.sum() + 3 * stats.kl.sum()

    def plainly(hidden):
        keep = mx.array([0, 1, 3, 4])
        logits, ref_logits, ids = hidden[:, keep], ref_hidden[:, keep], mx.array([0, 1, 2, 3])
        logprobs = ppo.logprobs_from_logits(logits, ids, TEMPERATURE).sum()
        kl = ppo.full_kl(logits, ref_logits, TEMPERATURE).sum()
        return logprobs + 2 * ppo.entropy_from_logits(logits, TEMPERATURE).sum() + 3 * kl

    model.freeze()
    (value, slope), (other, other_slope) = (mx.value_and_grad(each)(hidden) for each in (pieces, plainly))
    close(value, other)
    close(slope, other_slope)


@pytest.mark.parametrize("temperature", [1.0, 2, mx.array(0.3)], ids=str)
def test_temperature(temperature):
    model, reference = build("granite").train(), build("granite", seed=1)
    logits, ref_logits = forward(model, TOKENS, POSITIONS)[0], forward(reference, TOKENS, POSITIONS)[0]
    expected = whole(logits, ref_logits, temperature)
    for figure, other in zip(in_pieces(model, reference, temperature), expected, strict=True):
        close(figure, other)


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16(training):
    """Figures are float32 from bfloat16 logits; the gradient has the type of the states."""
    model, reference = build("llama-untied"), build("llama-untied", seed=1)
    for each in (model, reference):
        each.set_dtype(mx.bfloat16)
        each.freeze()
    logits, hidden = forward(model, TOKENS, POSITIONS)
    ref_logits, ref_hidden = forward(reference, TOKENS, POSITIONS)
    for figure, other in zip(in_pieces(model, reference), whole(logits, ref_logits), strict=True):
        assert figure.dtype in (mx.float32, mx.bool_)
        close(figure, other)
    settings: dict[str, Any] = {
        "entropy": True,
        "reference": (reference, ref_hidden),
        "training": training,
        "logits_bytes": TWO_ROWS,
    }
    slope = mx.grad(lambda hidden: loss_of(token_stats(model, hidden, TARGETS, TEMPERATURE, **settings)))(hidden)
    other = mx.grad(lambda hidden: loss_of(whole(model.lm_head(hidden), ref_logits)))(hidden)
    assert slope.dtype == mx.bfloat16
    close(slope, other, 1e-2)


def test_the_pieces_of_a_rollout():
    """Rows of unequal prompts and completions, as they are packed."""
    model, reference = build("qwen3-tied"), build("qwen3-tied", seed=1)
    packed = pack([[1, 2, 3], [4], [5, 6]], [[7, 8], [9, 10, 11, 12], []], {0}, 0)
    tokens, positions, ids, mask = (mx.array(field) for field in packed)
    logits, hidden = forward(model, tokens, positions)
    ref_logits, ref_hidden = forward(reference, tokens, positions)
    settings: dict[str, Any] = {"correct": True, "entropy": True, "reference": (reference, ref_hidden)}
    expected = whole(logits, ref_logits, TEMPERATURE, ids)
    for budget in (1, 5 * ALIVE_ON_CPU * 4 * VOCABULARY, 10**9):
        got = token_stats(model, hidden, ids, TEMPERATURE, logits_bytes=budget, **settings)
        for figure, other in zip(got, expected, strict=True):
            assert figure.shape == mask.shape
            close(figure, other)


@pytest.mark.parametrize("keys", [["self_attn.q_proj"], ["self_attn.q_proj", "lm_head"]], ids=["frozen", "trained"])
def test_as_the_training_loop_calls_it(keys):
    """Traced, and called again with other weights: what was traced first does not stay."""
    model, reference = frozen_head(build("llama-untied"), keys), build("llama-untied", seed=1)
    step = loss_and_gradients(model, lambda model: (loss_of(in_pieces(model, reference, training=True)), {}))
    for _ in range(2):
        mx.eval(model.parameters())
        (loss, _), got = step()
        close(loss, loss_of(in_pieces(model, reference)))
        expected = gradients(model, lambda model: in_pieces(model, reference))
        for name, gradient in tree_flatten(got):
            close(gradient, expected[name])
        model.apply(lambda array: array * 1.5, lambda _, name, __: name.startswith("lora"))


def peak_of(function):
    mx.synchronize()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function())
    return mx.get_peak_memory() - held


@pytest.mark.parametrize("trained", [False, True])
def test_peak_memory(trained):
    """The budget is a tenth of the logits of all positions; whole logits take more than two arrays of that size."""
    vocabulary, count, width = 20_000, 512, 4
    array, table = 4 * vocabulary * count, 4 * vocabulary * width
    model = OneLayer(width)
    model.lm_head = nn.Linear(width, vocabulary, bias=False)
    model.freeze()
    if trained:
        model.lm_head.unfreeze()
    hidden, ids = mx.random.normal((count, width)), mx.random.randint(0, vocabulary, (count,))
    reference = (model, mx.random.normal((count, width)))
    mx.eval(model.parameters(), hidden, ids, reference[1])

    def figures():
        return token_stats(model, hidden, ids, 0.7, entropy=True, reference=reference, logits_bytes=array // 10)

    def update(weights, hidden):
        model.update(weights)
        settings: dict[str, Any] = {"entropy": True, "training": True, "logits_bytes": array // 10}
        stats = token_stats(model, hidden, ids, 0.7, **settings)
        return stats.logprobs.sum() + stats.entropy.sum()

    weights = model.trainable_parameters()
    assert peak_of(figures) < 0.15 * array
    assert peak_of(lambda: mx.grad(update, argnums=(0, 1))(weights, hidden)) < 0.15 * array + 8 * table * trained
    model.update(weights)

    def plainly(hidden):
        return ppo.logprobs_from_logits(model.lm_head(hidden), ids, 0.7).sum()

    assert peak_of(lambda: mx.grad(plainly)(hidden)) > 2 * array


def test_the_output_layer_alone_is_called_for_logits():
    """The body of a Llama is left out; where it has the output layer in it, as gpt_neox has, it is not evaluated."""
    model = build("llama-tied")
    _, hidden = forward(model, TOKENS)
    head = OutputLayer(model)
    model.model.layers = None  # a call of the body would fail
    assert head(hidden[0]).shape == (7, VOCABULARY)


def test_the_model_is_as_before_when_its_output_layer_fails():
    model = build("llama-untied")
    names = [name for name, _ in tree_flatten(model.parameters())]
    with pytest.raises(ValueError):
        OutputLayer(model)(mx.zeros((2, 5)))
    assert isinstance(model.model, nn.Module) and isinstance(model.lm_head, nn.Linear)
    assert [name for name, _ in tree_flatten(model.parameters())] == names


def test_a_model_that_hides_its_output_layer():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(8, 4)

        def __call__(self, tokens):
            return self.embed_tokens(tokens) @ self.embed_tokens.weight.T

    with pytest.raises(UserError, match="hides its output layer"):
        token_stats(Hidden(), mx.zeros((2, 4)), mx.array([1, 2]))


def test_a_soft_prompt_is_no_weight_of_a_tied_output_layer():
    """Else the backward pass would apply the output layer once more, for a gradient of 0."""
    model = build("llama-tied")
    model.freeze()
    add_soft_prompt(model, 3)
    model.unfreeze(keys="soft_prompt")
    assert tree_flatten(model.trainable_parameters()) and OutputLayer(model).weights == {}
