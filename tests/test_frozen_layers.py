"""States below the first trained layer, kept: the same logits and gradients in every family, and when it is off."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from models.adapters import AdapterConfig, adapter_weights, attach_adapter
from models.frozen_layers import SampledStates, from_states, lower_states, num_frozen_layers, num_shared_layers
from models.generation import sample
from models.loading import twin
from tests.architectures import ARCHITECTURES, build

TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17, 18]])
DEEP = ("llama-tied", "llama-untied", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "gpt_neox")


def adapted(name, kind="lora", num_layers=1, **settings):
    """A model with an adapter on its last layers, whose weights are as if trained."""
    model = build(name, **settings)
    lora = {"rank": 2, "scale": 2.0, "dropout": 0.0}
    attach_adapter(model, AdapterConfig(kind, num_layers, lora, num_prompt_tokens=3), 0)
    mx.random.seed(7)
    moved = [(key, w + 0.1 * mx.random.normal(w.shape)) for key, w in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    model.train()  # some families have a gradient in this mode only
    return model


def loss(model, tokens):
    return nn.losses.cross_entropy(model(tokens)[:, :-1], tokens[:, 1:]).mean()


def results(model):
    value, gradients = nn.value_and_grad(model, loss)(model, TOKENS)
    return value.item(), {name: np.array(gradient) for name, gradient in tree_flatten(gradients)}


def hold_to_the_plain_pass(model, count):
    value, gradients = results(model)
    states = lower_states(model, TOKENS, count)
    with from_states(model, states, count):
        kept_value, kept_gradients = results(model)
    assert kept_value == pytest.approx(value, abs=1e-5)
    assert gradients.keys() == kept_gradients.keys() and gradients
    for name, gradient in gradients.items():
        np.testing.assert_allclose(kept_gradients[name], gradient, atol=1e-5, err_msg=name)
        assert np.abs(gradient).max() > 0, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_gives_the_same_loss_and_gradients(name):
    model = adapted(name)
    assert num_frozen_layers(model) == 1
    hold_to_the_plain_pass(model, 1)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", DEEP)
def test_with_two_layers_of_four_trained_the_first_two_are_kept(name, kind):
    model = adapted(name, kind, num_layers=2, num_hidden_layers=4)
    assert num_frozen_layers(model) == 2
    hold_to_the_plain_pass(model, 2)


def test_kept_states_serve_the_reference_too():
    """It shares the lower layers with the policy, so its logits follow from the policy's states."""
    base = build("llama-tied", num_hidden_layers=4)
    reference = twin(base)
    attach_adapter(base, AdapterConfig("lora", 1, {"rank": 2, "scale": 2.0, "dropout": 0.0}), 0)
    states = lower_states(base, TOKENS, num_frozen_layers(base))
    with from_states(reference, states, 3):
        np.testing.assert_array_equal(np.array(reference(TOKENS)), np.array(base(TOKENS)))


def sharing(base, *num_layers, kind="lora"):
    """Twins of a model, each with an adapter of its own on so many of the last layers."""
    models = [twin(base) for _ in num_layers]
    for seed, (model, count) in enumerate(zip(models, num_layers, strict=True)):
        config = AdapterConfig(kind, count, {"rank": 2, "scale": 2.0, "dropout": 0.0}, num_prompt_tokens=3)
        attach_adapter(model, config, seed)
    return models


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_on_one_base_share_what_no_adapter_of_theirs_has_changed(name):
    base = build(name)
    last = len(base.layers) - 1
    for models in ([base, *sharing(base, 1)], sharing(base, 1, 1), [base, twin(base)]):
        assert num_shared_layers(models) == last


def test_layers_are_shared_up_to_the_first_that_differs_anywhere():
    base = build("llama-tied", num_hidden_layers=4)
    assert num_shared_layers([base, *sharing(base, 1, 3)]) == 1
    assert num_shared_layers(sharing(base, 1, 2)) == 2
    for models in ([base], [base, *sharing(base, -1)], [base, *sharing(base, 1, kind="soft_prompt")]):
        assert num_shared_layers(models) == 0
    for other in (build("llama-tied", num_hidden_layers=4), build("llama-tied", num_hidden_layers=3)):
        assert num_shared_layers([base, other]) == 0
    norm = twin(base)
    norm.model.norm.weight = norm.model.norm.weight + 1  # behind the layers; not worth a rule of its own
    assert num_shared_layers([base, norm]) == 0


def test_the_lower_layers_are_run_once_and_the_upper_ones_not_at_all_for_their_states(monkeypatch):
    model = adapted("llama-tied", num_hidden_layers=4)
    run = []
    index = {id(layer): i for i, layer in enumerate(model.layers)}
    kind = type(model.layers[0])
    plain = kind.__call__

    def recorded(self, *args, **kwargs):
        run.append(index[id(self)])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", recorded)
    states = lower_states(model, TOKENS, 3)
    assert run == [0, 1, 2]
    for _ in range(2):
        run.clear()
        with from_states(model, states, 3):
            model(TOKENS)
        assert run == [3]
    run.clear()
    model(TOKENS)
    assert run == [0, 1, 2, 3]


SAMPLED = {
    "of one length": [[1, 2, 3], [4, 5, 6], [7, 8, 9], [4, 5, 7]],
    "of a token": [[1], [2], [3], [4]],
    "of many lengths": [[1, 2, 3, 4], [5], [6, 7], [9] * 7, [3, 3]],
    "of one beginning": [[*range(10, 20), *end] for end in ([3], [4, 5, 6], [4, 7], [4, 5, 6], [8])],
    "of one beginning and length": [[*range(10, 20), *end] for end in ([3, 4], [4, 5], [3, 4])],
    "several times": [[6, 7], [6, 7], [5], [5], [5], [1, 2, 3]],
}


@pytest.mark.parametrize("step", [2048, 2])
@pytest.mark.parametrize("name", SAMPLED)
def test_states_of_sampling_are_those_of_a_pass_over_whole_rows(name, step, monkeypatch):
    """Prompts are read whole or two tokens a pass, rows end at different tokens and are dropped, pads are 0."""
    monkeypatch.setattr("models.generation.PREFILL", step)
    model, states, prompts = adapted("llama-tied", num_hidden_layers=4), SampledStates(3), SAMPLED[name]
    mx.random.seed(1)
    completions = sample(model, prompts, set(range(0, 60, 5)), 12, 1.0, states=states)
    assert len(set(map(len, completions))) > 1
    rows = [(prompt + completion)[:-1] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows)) + 5
    found = np.array(states.of([len(row) for row in rows], width))
    expected = np.array(lower_states(model, mx.array([row + [0] * (width - len(row)) for row in rows]), 3))
    for row, (ours, plain) in enumerate(zip(found, expected, strict=True)):
        length = len(rows[row])
        np.testing.assert_allclose(ours[:length], plain[:length], atol=1e-5)
        assert not ours[length:].any()
    assert states.of([width] * len(rows), width) is None  # of tokens that nobody read


def test_prompts_that_are_not_all_in_flight_leave_no_states():
    states = SampledStates(1)
    sample(adapted("llama-tied"), [[1, 2], [3, 4], [5]], set(), 3, 1.0, batch_size=2, states=states)
    assert states.of([4, 4, 3], 4) is None


def test_no_gradient_goes_into_the_states():
    model = adapted("llama-tied")
    gradient = mx.grad(lambda table: lower_states(model, TOKENS, 1).sum() + table.sum())(mx.zeros(3))
    assert gradient.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "num_layers"), [("lora", -1), ("lora", 2), ("full", -1), ("soft_prompt", -1)])
def test_nothing_is_kept_where_the_first_layer_or_what_lies_before_it_is_trained(kind, num_layers):
    assert num_frozen_layers(adapted("llama-tied", kind, num_layers)) == 0


def test_nothing_is_kept_of_a_model_without_trained_weights_or_without_layers():
    model = build("llama-tied")
    model.freeze()
    assert num_frozen_layers(model) == 0
    assert num_frozen_layers(nn.Linear(2, 2)) == 0


class Carrying(nn.Module):
    """Hands its layers more than the states: what the layer before has carried over."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.layers = [CarryingLayer(), CarryingLayer()]

    def __call__(self, tokens):
        hidden, carried = self.table(tokens), 0.0
        for layer in self.layers:
            hidden, carried = layer(hidden, carried)
        return hidden


class CarryingLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def __call__(self, hidden, carried):
        return self.linear(hidden) + carried, hidden.mean()


class Tripling(Carrying):
    """Whose layers' outputs are used again after the last: the states of one layer don't say all."""

    def __call__(self, tokens):
        hidden = start = self.table(tokens)
        for layer in self.layers:
            hidden = layer.linear(hidden)
            hidden = layer(hidden, 0.0)[0]
        return hidden + 3 * start


@pytest.mark.parametrize("kind", [Carrying, Tripling])
def test_a_family_that_does_more_with_its_layers_is_left_as_it_is(kind):
    model = kind()
    model.freeze()
    model.layers[1].unfreeze()
    before = list(model.layers)
    assert num_frozen_layers(model) == 0
    assert all(one is other for one, other in zip(model.layers, before, strict=True))


def test_the_layers_are_put_back_after_a_failure():
    model = adapted("llama-tied")
    before = list(model.layers)
    with pytest.raises(Interrupted), from_states(model, mx.zeros((2, 8, 32)), 1):
        raise Interrupted
    assert all(one is other for one, other in zip(model.layers, before, strict=True))


class Interrupted(Exception):
    pass


def test_a_layer_that_is_not_there_is_an_error():
    model = adapted("llama-tied")
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"no layer {count}"):
            lower_states(model, TOKENS, count)
