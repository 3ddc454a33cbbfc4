"""Learned rewards: what they read, at which position, and that they share the policy's base."""

import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import data.batching
import rewards.reward_model
from common.errors import UserError
from models.adapters import AdapterConfig, adapter_weights, attach_adapter, save_adapter
from models.loading import load
from models.soft_prompt import soft_prompt_ids
from models.value_head import forward, new_value_head
from rewards.reward_model import RewardModel, load_reward_model

PROMPTS = ["2 4", "2 4", "10", "-6 30 7", "2 4"]
COMPLETIONS = [" 6 8 10", "", " 12 14 16 18 20 22 24", " 5", " 7"]


@pytest.fixture(scope="module")
def base(tiny_folder):
    return load(str(tiny_folder))


def save_reward_model(path, folder, kind="lora", with_head=True):
    """An adapter with a head, as `sft.py --reward-model` writes it; returns the model and the head."""
    config = AdapterConfig(kind, -1, {"rank": 4, "scale": 2.0, "dropout": 0.0}, 3, model=str(folder))
    model = load(str(folder)).model
    attach_adapter(model, config)
    mx.random.seed(5)
    moved = [(name, w + 0.3 * mx.random.normal(w.shape)) for name, w in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    head = new_value_head(model, std=None) if with_head else None
    save_adapter(path, model, config, head)
    return model, head


def by_hand(model, head, tokenizer, text):
    """The score of one text without padding: the head applied to the state at the EOS."""
    ids = [*soft_prompt_ids(model), *tokenizer.encode(text), tokenizer.eos_token_id]
    _, hidden = forward(model, mx.array([ids]))
    return (hidden[0, -1] @ head.weight[0]).item()


def error_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", ["reward", "reward.npz", "reward.safetensors"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full", "soft_prompt", "none"])
def test_the_score_is_the_value_at_the_end_of_prompt_and_completion(base, tiny_folder, tmp_path, kind, form):
    """It reads the prompt, too, and not the last padded position."""
    model, head = save_reward_model(tmp_path / form, tiny_folder, kind)
    got = load_reward_model(str(tmp_path / form), base).reward(PROMPTS, COMPLETIONS)
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert got == pytest.approx([by_hand(model, head, base.tokenizer, text) for text in texts], abs=1e-5)
    assert len({round(score, 4) for score in got}) == len(got) and all(type(score) is float for score in got)


@pytest.fixture(scope="module")
def reward_model(base, tiny_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "adapters"
    save_reward_model(path, tiny_folder)
    return load_reward_model(str(path), base)


def test_where_the_prompt_ends_is_nothing_to_it(reward_model):
    splits = [("2 4 6 8", ""), ("2 4 6", " 8"), ("2", " 4 6 8"), ("", "2 4 6 8")]
    scores = reward_model.reward(*zip(*splits, strict=True))
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-5)
    assert reward_model.reward(["3 4 6"], [" 8"])[0] != pytest.approx(scores[0], abs=1e-3)


def test_a_pass_reads_no_more_tokens_than_memory_is_counted_for(reward_model, monkeypatch):
    """Texts of up to 24 places in passes of 50 tokens: two at a time; a longer one goes alone."""
    expected, shapes = reward_model.reward(PROMPTS, COMPLETIONS), []
    scoring = reward_model.scoring

    def noted(tokens, lengths):
        shapes.append(tokens.shape)
        return scoring(tokens, lengths)

    for limit, rows in ((50, [2, 2, 1]), (8, [1] * 5), (data.batching.TOKENS_A_PASS, [5])):
        monkeypatch.setattr(data.batching, "TOKENS_A_PASS", limit)
        monkeypatch.setattr(reward_model, "scoring", noted)
        assert reward_model.reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
        assert [count for count, _ in shapes] == rows
        shapes.clear()


def test_an_empty_completion_has_a_score_of_its_own(reward_model):
    """It does not turn a batch's rewards into one scalar."""
    scores = reward_model.reward(["2 4", "2 4"], ["", " 6"])
    assert len(scores) == 2 and scores[0] != pytest.approx(scores[1], abs=1e-3)
    assert len(reward_model.reward(["2 4"], [""])) == 1
    assert len(reward_model.reward([""], [""])) == 1
    assert reward_model.reward([], []) == []


def test_order_batch_and_batch_mates_change_nothing(reward_model):
    expected = reward_model.reward(PROMPTS, COMPLETIONS)
    order = [3, 0, 4, 2, 1]
    shuffled = reward_model.reward([PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order])
    assert shuffled == pytest.approx([expected[i] for i in order], abs=1e-5)
    for batch_size in (1, 2, 3):
        smaller = RewardModel(reward_model.scoring, reward_model.tokenizer, batch_size)
        assert smaller.reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


def test_a_completion_without_its_prompt_is_an_error(reward_model):
    with pytest.raises(ValueError):
        reward_model.reward(["1", "2"], ["3"])


def test_scoring_trains_nothing_and_drops_nothing_out(base, tiny_folder, tmp_path):
    save_reward_model(tmp_path / "reward", tiny_folder)
    config = (tmp_path / "reward" / "adapter_config.json").read_text().replace('"dropout": 0.0', '"dropout": 0.5')
    (tmp_path / "reward" / "adapter_config.json").write_text(config)
    model = load_reward_model(str(tmp_path / "reward"), base)
    assert not tree_flatten(model.scoring.trainable_parameters())
    expected = model.reward(PROMPTS, COMPLETIONS)
    assert model.reward(PROMPTS, COMPLETIONS) == expected
    model.scoring.train()
    assert model.reward(PROMPTS, COMPLETIONS) != expected
    assert RewardModel(model.scoring, base.tokenizer).reward(PROMPTS, COMPLETIONS) == expected


@pytest.mark.parametrize("kind", ["lora", "soft_prompt", "none"])
def test_an_adapter_on_the_policys_base_holds_no_second_copy(base, tiny_folder, tmp_path, kind, monkeypatch):
    save_reward_model(tmp_path / "reward", tiny_folder, kind)
    monkeypatch.setattr(rewards.reward_model, "load", lambda name: pytest.fail("the base was opened again"))
    before = dict(tree_flatten(base.model.parameters()))
    logits = base.model(mx.array([[1, 2, 3]]))
    scoring = load_reward_model(str(tmp_path / "reward"), base).scoring
    held = {id(array) for _, array in tree_flatten(scoring.model.parameters())}
    assert all(id(array) in held for array in before.values())
    # and the policy does not change: its arrays, its output, its trainable weights
    after = dict(tree_flatten(base.model.parameters()))
    assert list(after) == list(before) and all(after[name] is array for name, array in before.items())
    assert mx.array_equal(base.model(mx.array([[1, 2, 3]])), logits).item()
    assert list(adapter_weights(base.model)) == list(before)


def test_the_same_base_by_another_name_is_the_same(base, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    save_reward_model(tmp_path / "reward", f"./{tiny_folder.name}/")
    monkeypatch.setattr(rewards.reward_model, "load", lambda name: pytest.fail("the base was opened again"))
    load_reward_model(str(tmp_path / "reward"), base)


def test_an_adapter_on_another_base_brings_it_along(base, tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    weights = {name: 1.5 * array for name, array in weights.items()}
    mx.save_safetensors(str(other / "model.safetensors"), weights, metadata={"format": "pt"})
    model, head = save_reward_model(tmp_path / "reward", other)
    got = load_reward_model(str(tmp_path / "reward"), base).reward(["2 4"], [" 6"])
    assert got == pytest.approx([by_hand(model, head, base.tokenizer, "2 4 6")], abs=1e-5)
    assert got == load_reward_model(str(tmp_path / "reward")).reward(["2 4"], [" 6"])


def test_what_is_no_reward_model_is_named(base, tiny_folder, tmp_path):
    save_reward_model(tmp_path / "policy", tiny_folder, with_head=False)
    save_reward_model(tmp_path / "policy.npz", tiny_folder, with_head=False)
    for path in (tmp_path / "policy", tmp_path / "policy.npz", tiny_folder):
        assert f"{path} has no value head" in error_of(load_reward_model, str(path), base)
    assert "is not a model folder" in error_of(load_reward_model, str(tmp_path / "missing"), base)
    assert "does not exist" in error_of(load_reward_model, str(tmp_path / "missing.npz"), base)


def test_an_adapter_whose_base_is_gone_says_which(base, tiny_folder, tmp_path):
    gone = shutil.copytree(tiny_folder, tmp_path / "gone")
    save_reward_model(tmp_path / "reward", gone)
    shutil.rmtree(gone)
    assert str(gone) in error_of(load_reward_model, str(tmp_path / "reward"), base)


def test_a_head_of_another_width_is_refused(base, tiny_folder, tmp_path):
    save_reward_model(tmp_path / "reward", tiny_folder)
    mx.save_safetensors(str(tmp_path / "reward" / "value_head.safetensors"), {"weight": mx.zeros((1, 7))})
    message = error_of(load_reward_model, str(tmp_path / "reward"), base)
    assert "has a value head of width 7, the model has 64" in message
