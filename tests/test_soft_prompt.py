"""Soft prompts: rows with their own ids, which do not change the model, learn alone, and are never sampled."""

import io

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

import sft
from common.errors import UserError
from common.files import read_json, write_json
from models.adapters import AdapterConfig, attach_adapter
from models.generation import sample
from models.soft_prompt import (
    SoftPromptEmbedding,
    add_soft_prompt,
    check_ids,
    find_embedding,
    num_embeddings,
    soft_prompt_ids,
)
from models.value_head import forward
from tests.architectures import ARCHITECTURES, VOCABULARY, build
from tests.conftest import tiny_random_folder
from tests.scripts import fails

TOKENS = mx.array([[1, 2, 3, 0, VOCABULARY - 1], [5, 5, 5, 5, 5]])
SOFT_PROMPT = AdapterConfig("soft_prompt", num_prompt_tokens=4)
PREFIX = [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2, VOCABULARY + 3]


def prompted(name="llama-tied", quantized=False):
    """A model with a fresh soft prompt of four rows, which alone is trainable."""
    model = build(name)
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
    attach_adapter(model, SOFT_PROMPT, seed=3)
    return model


def soft_prompt_of(model):
    return find_embedding(model)[1].soft_prompt


def randomize(model, seed=0):
    """Rows unlike those of the table."""
    rows = mx.random.normal(soft_prompt_of(model).shape, key=mx.random.key(seed))
    find_embedding(model)[1].soft_prompt = rows


@pytest.mark.parametrize("quantized", [False, True])
def test_ids_past_the_table_are_the_learned_rows_and_the_others_what_they_were(quantized):
    table: nn.Module = nn.Embedding(VOCABULARY, 32)
    if quantized:
        table = nn.QuantizedEmbedding.from_embedding(table, group_size=32, bits=4)
    rows = mx.random.normal((3, 32))
    embedding = SoftPromptEmbedding(table, rows)
    assert num_embeddings(embedding) == VOCABULARY
    assert mx.array_equal(embedding(mx.arange(VOCABULARY)), table(mx.arange(VOCABULARY))).item()
    assert mx.array_equal(embedding(mx.array([VOCABULARY, VOCABULARY + 1, VOCABULARY + 2])), rows).item()
    mixed = embedding(mx.array([[VOCABULARY + 2, 7], [0, VOCABULARY]]))
    assert mixed.shape == (2, 2, 32)
    assert mx.array_equal(mixed[0, 0], rows[2]).item() and mx.array_equal(mixed[1, 1], rows[0]).item()
    assert mx.array_equal(mixed[0, 1], table(mx.array([7]))[0]).item()
    assert mx.array_equal(embedding.as_linear(rows), table.as_linear(rows)).item()


def test_rows_take_the_precision_of_the_table():
    model = build("llama-tied")
    model.set_dtype(mx.bfloat16)
    add_soft_prompt(model, 2)
    assert soft_prompt_of(model).dtype == mx.float32  # learned in full precision
    assert find_embedding(model)[1](mx.array([VOCABULARY, 1])).dtype == mx.bfloat16
    assert model(mx.array([[VOCABULARY, 1]])).dtype == mx.bfloat16


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_family_takes_one_and_is_unchanged_without_its_ids(name):
    model = build(name)
    before = model(TOKENS)
    prefix = add_soft_prompt(model, 4)
    randomize(model)
    assert prefix == PREFIX == soft_prompt_ids(model)
    assert mx.array_equal(model(TOKENS), before).item()
    soft = mx.concatenate([mx.broadcast_to(mx.array(PREFIX), (2, 4)), TOKENS], axis=1)
    logits, _ = forward(model, soft)
    # Only words have logits: soft-prompt rows are never sampled.
    assert logits.shape == (2, 9, VOCABULARY)
    # Every row is used: another first row changes the logits at all later positions.
    assert mx.abs(logits[:, 4:] - before).max().item() > 1e-4
    old = soft_prompt_of(model)
    find_embedding(model)[1].soft_prompt = mx.concatenate([-old[:1], old[1:]])
    assert mx.abs(forward(model, soft)[0] - logits)[:, -1].max().item() > 1e-6


def test_rows_start_as_those_of_words():
    model = prompted()
    table = model.model.embed_tokens.embedding.weight
    distances = mx.abs(soft_prompt_of(model)[:, None] - table[None]).max(-1).min(-1)
    assert mx.all(distances == 0).item()
    assert mx.array_equal(soft_prompt_of(prompted()), soft_prompt_of(model)).item()
    other = build("llama-tied")
    attach_adapter(other, SOFT_PROMPT, seed=4)
    assert not mx.array_equal(soft_prompt_of(other), soft_prompt_of(model)).item()


def test_a_soft_prompt_of_words_acts_as_these_words():
    model = build("llama-untied")
    words = mx.array([[7, 8, 9, 1, 2]])
    expected = model(words)
    add_soft_prompt(model, 3)
    find_embedding(model)[1].soft_prompt = model.model.embed_tokens.embedding(mx.array([7, 8, 9]))
    got = model(mx.array([[VOCABULARY, VOCABULARY + 1, VOCABULARY + 2, 1, 2]]))
    assert mx.array_equal(got, expected).item()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gemma2"])
def test_it_alone_learns(name, quantized):
    model = prompted(name, quantized)
    tokens = mx.array([[*PREFIX, 1, 2, 3]])

    def loss():
        return nn.losses.cross_entropy(forward(model, tokens)[0][:, -1], mx.array([4])).sum()

    value, gradients = nn.value_and_grad(model, loss)()
    found = tree_flatten(gradients)
    assert [name.rpartition(".")[2] for name, _ in found] == ["soft_prompt"]
    (_, gradient), *_ = found
    assert gradient.shape == (4, 32)
    assert mx.all(mx.abs(gradient).max(-1) > 0).item()
    step = [
        (name, array - 0.1 / mx.abs(gradient).max() * gradient)
        for (name, _), array in zip(found, [soft_prompt_of(model)], strict=True)
    ]
    model.update(tree_unflatten(step))
    assert loss().item() < value.item()


def scatters(*arrays):
    """The number of scatter operations that these arrays are computed by."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue().count('label ="Scatter')


def test_its_gradient_is_a_sum_over_the_rows_places_without_a_scatter():
    """A GPU's scatter adds with atomics, in varying order, so that two runs of one seed would part."""
    embedding = SoftPromptEmbedding(nn.Embedding(5, 2), mx.array([[1.0, 2.0], [3.0, 4.0]]))
    tokens = mx.array([[5, 6, 0], [6, 3, 6]])
    weights = mx.array([[[1.0, 10.0], [2.0, 20.0], [9.0, 9.0]], [[4.0, 40.0], [9.0, 9.0], [8.0, 80.0]]])

    def loss(rows):
        embedding.soft_prompt = rows
        return (weights * embedding(tokens)).sum()

    gradient = mx.grad(loss)(embedding.soft_prompt)
    assert scatters(gradient) == 0
    assert scatters(mx.grad(lambda table: table[tokens - 3].sum())(mx.ones((4, 2)))) == 1  # what it would be
    assert gradient.tolist() == [[1, 10], [14, 140]]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_ragged_prompts_are_sampled_together_as_alone(name, quantized):
    model = prompted(name, quantized)
    randomize(model)
    prompts = [[1], [2, 3, 4, 5, 6, 7], [8, 9], [1, 2, 3]]
    together = sample(model, prompts, [], 8, temperature=0)
    assert together == [sample(model, [prompt], [], 8, temperature=0)[0] for prompt in prompts]
    assert all(0 <= token < VOCABULARY for completion in together for token in completion)
    # By hand: after the soft prompt, each next token is the most likely one.
    ids = [*PREFIX, *prompts[3]]
    for token in together[3]:
        assert mx.argmax(model(mx.array([ids]))[0, -1]).item() == token
        ids.append(token)


def test_it_changes_what_is_sampled():
    model = prompted()
    base = sample(build("llama-tied"), [[1, 2, 3]], [], 8, temperature=0)
    randomize(model)
    assert sample(model, [[1, 2, 3]], [], 8, temperature=0) != base


def test_at_any_temperature_only_words_are_sampled():
    model = prompted()
    completions = sample(model, [[1]] * 64, [], 16, temperature=5.0)
    tokens = np.array(completions)
    assert tokens.max() < VOCABULARY and len(np.unique(tokens)) > VOCABULARY // 2


def test_a_second_one_and_a_model_without_a_table_are_refused():
    model = prompted()
    with pytest.raises(ValueError, match="already has a soft prompt"):
        add_soft_prompt(model, 2)
    with pytest.raises(UserError, match="no token embedding"):
        add_soft_prompt(nn.Sequential(nn.Linear(4, 4)), 2)


def test_a_model_without_one_has_no_ids():
    assert soft_prompt_ids(build("llama-tied")) == []


def test_a_token_without_a_row_is_refused_wherever_one_may_come_from(tmp_path, capsys):
    model = build("llama-tied", vocab_size=16)
    check_ids(model, [[3, 15], []])
    with pytest.raises(UserError, match="the token 16, but the model's table has 16 rows"):
        check_ids(model, [[3], [16, 2]])
    with pytest.raises(UserError, match="the token 16"):
        sample(model, [[1, 16]], {2}, max_tokens=1)
    rows = add_soft_prompt(model, 2)
    check_ids(model, [[*rows, 15]])
    with pytest.raises(UserError, match="the token 18, but the model's table has 16 rows"):
        check_ids(model, [[18]])
    base = tiny_random_folder(tmp_path / "base")
    table = {"model.embed_tokens.weight": lambda array: array[:20]}
    weights = {k: table.get(k, lambda a: a)(v) for k, v in mx.load(str(base / "model.safetensors")).items()}
    mx.save_safetensors(str(base / "model.safetensors"), weights, metadata={"format": "pt"})
    write_json(base / "config.json", {**read_json(base / "config.json"), "vocab_size": 20})
    message = fails(capsys, sft.main, "--train", "--model", base, "--iters", 1, "--output-dir", tmp_path / "run")
    assert "but the model's table has 20 rows" in message and not (tmp_path / "run").exists()
