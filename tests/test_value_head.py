"""Hidden states, logits at positions and the value head, for the families of mlx-lm."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from common.errors import UserError
from models.adapters import AdapterConfig, attach_adapter
from models.soft_prompt import add_soft_prompt
from models.token_stats import token_stats
from models.value_head import (
    HEAD_FILE,
    Policy,
    ScoringModel,
    ValueHead,
    forward,
    hidden_size,
    load_value_head,
    new_value_head,
    save_value_head,
)
from tests.architectures import ARCHITECTURES, VOCABULARY, build

TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17]])
POSITIONS = mx.array([[0, 6, 3], [5, 5, 1]])
LORA = AdapterConfig("lora", -1, {"rank": 4, "scale": 2.0, "dropout": 0.0})


def names(module):
    return [name for name, _ in tree_flatten(module.parameters())]


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=tolerance, atol=tolerance)


def output_of(name, model, hidden):
    """The family's own map from hidden states to logits."""
    if name == "granite-untied":
        return model.lm_head(hidden) / 8.0
    if "lm_head" in model:
        return model.lm_head(hidden)
    if name == "gpt_neox":
        return model.embed_out(hidden) if "embed_out" in model else model.model.embed_out(hidden)
    if name == "gpt2":
        return model.model.wte.as_linear(hidden)
    if name == "gpt_bigcode":
        return model.transformer.wte.as_linear(hidden)
    if name == "internlm2":
        return model.output(hidden)
    if name == "mamba":
        return model.backbone.embeddings.as_linear(hidden)
    if name == "qwen3_5":
        return model.language_model.lm_head(hidden)
    logits = model.model.embed_tokens.as_linear(hidden)
    if name == "gemma2":
        return 3.0 * mx.tanh(logits / 3.0)
    scale = {"granite": 1 / 8.0, "granitemoehybrid": 1 / 8.0, "cohere": 0.25}
    return logits * scale.get(name, 1.0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_pass_gives_logits_and_the_state_that_they_come_from(name):
    model = build(name)
    before = names(model)
    full = model(TOKENS)
    logits, hidden = forward(model, TOKENS)
    assert mx.array_equal(logits, full).item()
    assert hidden.shape == (2, 7, hidden_size(model))
    close(output_of(name, model, hidden), full)

    logits, states = forward(model, TOKENS, POSITIONS)
    assert logits.shape == (2, 3, VOCABULARY)
    close(logits, mx.take_along_axis(full, POSITIONS[..., None], axis=1))
    assert mx.array_equal(states, mx.take_along_axis(hidden, POSITIONS[..., None], axis=1)).item()
    # The tap is removed: the same parameters in the same order, the same output.
    assert names(model) == before
    assert mx.array_equal(model(TOKENS), full).item()


def test_the_output_layer_is_found_by_presence_not_by_what_the_arguments_say():
    """gemma3 ties its weights while loading if the file has no lm_head."""
    model = build("gemma3")
    model.sanitize({})
    assert "lm_head" not in model
    logits, hidden = forward(model, TOKENS)
    close(model.model.embed_tokens.as_linear(hidden), logits)


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("what", ["lora on the output layer", "quantized", "soft prompt"])
def test_an_adapted_output_layer_is_tapped_as_a_whole(name, what):
    model = build(name)
    if what == "quantized":
        nn.quantize(model, group_size=32, bits=4)
    elif what == "soft prompt":
        add_soft_prompt(model, 3)
    else:
        layer = "model.embed_tokens" if name == "llama-tied" else "lm_head"
        attach_adapter(model, AdapterConfig("lora", -1, {**LORA.lora_parameters, "keys": [layer]}))
        model.update(
            {"model": {"embed_tokens": {"lora_b": mx.ones((4, 32))}}}
            if name == "llama-tied"
            else {"lm_head": {"lora_b": mx.ones((4, VOCABULARY))}}
        )
    before, full = names(model), model(TOKENS)
    logits, hidden = forward(model, TOKENS)
    assert mx.array_equal(logits, full).item() and names(model) == before
    close(output_of(name, model, hidden), full)
    close(forward(model, TOKENS, POSITIONS)[0], mx.take_along_axis(full, POSITIONS[..., None], axis=1))


def test_the_output_layer_is_put_back_when_the_model_fails():
    model = build("llama-untied")
    before = names(model)
    with pytest.raises(ValueError):
        forward(model, mx.array([1, 2, 3])[None, None, None])
    assert names(model) == before and isinstance(model.lm_head, nn.Linear)


class Hidden(nn.Module):
    """A model that multiplies by its table without calling a layer."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 4)

    def __call__(self, tokens):
        return self.embed_tokens(tokens) @ self.embed_tokens.weight.T


def test_a_model_without_a_layer_to_tap_is_named():
    with pytest.raises(UserError, match="does not expose its output layer"):
        forward(Hidden(), mx.array([[1, 2]]))
    with pytest.raises(UserError, match="no token embedding"):
        forward(nn.Sequential(nn.Identity()), mx.array([[1, 2]]))


def scoring_model(name="llama-tied", **settings):
    model = build(name, **settings)
    mx.random.seed(1)
    return ScoringModel(model, new_value_head(model, std=None))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_score_is_read_at_the_last_real_token_whatever_follows(name):
    """Neither padding nor batch mates change a score."""
    scoring = scoring_model(name)
    texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [3, 2, 1, 0]]
    alone = [scoring(mx.array([text]), mx.array([len(text)])).item() for text in texts]
    assert len({round(score, 4) for score in alone}) == 4
    for pad in (0, 9, VOCABULARY - 1):
        for width in (7, 16):
            tokens = mx.array([text + [pad] * (width - len(text)) for text in texts])
            close(scoring(tokens, mx.array([len(text) for text in texts])), alone)


def test_the_score_is_the_head_on_the_last_hidden_state():
    scoring = scoring_model()
    hidden = scoring.model.model(TOKENS)  # (2, 7, H)
    expected = (hidden[mx.arange(2), mx.array([6, 2])] * scoring.value_head.weight[0]).sum(-1)
    close(scoring(TOKENS, mx.array([7, 3])), expected)
    assert scoring(TOKENS, mx.array([7, 3])).dtype == mx.float32


def test_a_policy_gives_states_and_values_at_positions():
    model = build("llama-tied")
    states, values = Policy(model)(TOKENS, POSITIONS)
    assert values is None
    head = new_value_head(model)
    assert mx.all(Policy(model, head)(TOKENS, POSITIONS)[1] == 0).item()  # a fresh critic knows nothing
    head.weight = mx.random.normal((1, 32))
    with_values, values = Policy(model, head)(TOKENS, POSITIONS)
    assert mx.array_equal(with_values, states).item()
    hidden = mx.take_along_axis(model.model(TOKENS), POSITIONS[..., None], axis=1)
    assert mx.array_equal(states, hidden).item()
    close(values, (hidden * head.weight[0]).sum(-1))


@pytest.mark.parametrize("quantized", [False, True])
def test_the_gradient_reaches_adapter_and_head_and_nothing_else(quantized):
    """It would be zero if the forward pass were outside value_and_grad."""
    model = build("llama-tied")
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
    attach_adapter(model, LORA)
    for name, array in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):  # at zero it would hold back the gradient of lora_a
            model.load_weights([(name, 0.1 * mx.random.normal(array.shape))], strict=False)
    scoring = ScoringModel(model, new_value_head(model, std=None))
    _, gradients = nn.value_and_grad(scoring, lambda: (scoring(TOKENS, mx.array([7, 4])) ** 2).sum())()
    found = dict(tree_flatten(gradients))
    assert set(found) == {f"model.{name}" for name, _ in tree_flatten(model.trainable_parameters())} | {
        "value_head.weight"
    }
    # All adapters of the last layer affect the last position.
    assert all(mx.abs(gradient).max().item() > 0 for gradient in found.values())


def test_the_head_and_adapter_learn_through_a_policy():
    model = build("llama-tied")
    attach_adapter(model, LORA)
    policy = Policy(model, new_value_head(model, std=None))

    def loss():
        hidden, values = policy(TOKENS, POSITIONS)
        assert values is not None
        return (values**2).sum() + token_stats(model, hidden, POSITIONS, training=True).logprobs.sum()

    _, gradients = nn.value_and_grad(policy, loss)()
    found = {name: mx.abs(gradient).max().item() for name, gradient in tree_flatten(gradients)}
    assert found["value_head.weight"] > 0
    assert all(size > 0 for name, size in found.items() if name.endswith("lora_b"))
    assert all(name == "value_head.weight" or "lora" in name for name in found)


def test_values_are_float32_in_a_half_precision_model():
    model = build("llama-tied")
    model.set_dtype(mx.bfloat16)
    scoring = ScoringModel(model, new_value_head(model, std=None))
    assert scoring(TOKENS, mx.array([7, 7])).dtype == mx.float32
    assert scoring.value_head.weight.dtype == mx.float32


def test_a_new_head_fits_and_starts_where_it_is_told():
    model = build("llama-tied")
    assert mx.all(new_value_head(model).weight == 0).item()
    mx.random.seed(0)
    weight = new_value_head(model, std=None).weight
    assert weight.shape == (1, 32)
    assert 0.5 < mx.std(weight).item() * 32**0.5 < 1.5
    assert names(new_value_head(model)) == ["weight"]  # no bias


def test_a_head_is_kept_in_a_file_of_its_own(tmp_path):
    head = ValueHead(32, std=1.0)
    assert save_value_head(tmp_path, head) == {"file": HEAD_FILE, "hidden_size": 32}
    loaded = load_value_head(tmp_path)
    assert loaded is not None and mx.array_equal(loaded.weight, head.weight).item()
    assert [path.name for path in tmp_path.iterdir()] == [HEAD_FILE]
    (tmp_path / "empty").mkdir()
    assert load_value_head(tmp_path / "empty") is None


def test_a_file_that_is_no_head_is_named(tmp_path):
    mx.save_safetensors(str(tmp_path / HEAD_FILE), {"weight": mx.zeros((1, 4)), "bias": mx.zeros(1)})
    with pytest.raises(UserError, match=r"holds \['bias', 'weight'\]"):
        load_value_head(tmp_path)
    (tmp_path / HEAD_FILE).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_value_head(tmp_path)
