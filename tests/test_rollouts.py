"""Rollouts: each is its prompt's own, drawn once, whatever the batch; a prompt that is read once gives the same."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ChunkedKVCache, make_prompt_cache

from common.errors import UserError
from models.adapters import AdapterConfig, attach_adapter, save_adapter
from models.generation import sample
from models.row_keys import Keys
from synth.pipeline.base_model import BaseModel, fingerprint, own_key, sample_shared
from synth.pipeline.rollouts import Draw, draw
from synth.teacher.cache import Cache
from tests.architectures import build
from tests.chat_tokenizers import CHATML, byte_tokenizer

NO_KEYS = np.zeros((12, 2), dtype=np.uint32)  # for temperature 0
PROMPTS = [[1], [2, 3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16]]


class Counting:
    """A sampler without a model, which may be killed after some rollouts."""

    def __init__(self, identity="a", most=10**6):
        self.identity, self.most = identity, most
        self.drawn: Counter[Draw] = Counter()

    def sample(self, wanted, done):
        for index, rollout in enumerate(wanted):
            if self.drawn.total() == self.most:
                raise KeyboardInterrupt
            self.drawn[rollout] += 1
            done(index, f"{self.identity} {rollout.prompt} {rollout.number}")


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gemma3", "gpt_neox", "mamba", "qwen3_next"])
def test_a_shared_cache_gives_what_each_prompt_gives_alone(name):
    model = build(name)
    model.eval()
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    found: dict = {}
    sample_shared(model, prompts, NO_KEYS[: len(prompts)], 0, [], 20, 5, found.__setitem__)
    alone = [sample(model, [prompt], [], 20, temperature=0)[0] for prompt in PROMPTS]
    assert [found[n] for n in range(len(prompts))] == [tokens for tokens in alone for _ in range(3)]
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)


def test_a_cache_that_cannot_be_copied_is_refused():
    model = build("llama-tied")
    model.make_cache = lambda: [ChunkedKVCache(64) for _ in model.layers]  # llama4's
    with pytest.raises(UserError, match="cannot copy"):
        sample_shared(model, [[1, 2]], NO_KEYS[:1], 0, [], 5, 5, lambda index, tokens: None)
    # By itself such a model is sampled all the same: prompts of one length at a time.
    assert sample(model, PROMPTS, [], 5, temperature=0) == sample(build("llama-tied"), PROMPTS, [], 5, temperature=0)


def test_an_eos_ends_a_rollout_and_is_kept():
    model = build("llama-tied")
    model.eval()
    whole: dict = {}
    ended: dict = {}
    sample_shared(model, PROMPTS, NO_KEYS[:4], 0, [], 12, 4, whole.__setitem__)
    eos = whole[1][4]
    sample_shared(model, PROMPTS, NO_KEYS[:4], 0, [eos], 12, 4, ended.__setitem__)
    assert ended[1] == whole[1][: whole[1].index(eos) + 1]


def test_an_empty_prompt_is_a_users_error():
    with pytest.raises(UserError, match="prompt is empty"):
        sample_shared(build("llama-tied"), [[1], []], NO_KEYS[:2], 0, [], 4, 4, lambda *_: None)


def completions(model, wanted):
    found: dict = {}
    model.sample(wanted, found.__setitem__)
    return [found[index] for index in range(len(wanted))]


def test_a_rollout_depends_on_seed_prompt_and_number_only(tiny_folder):
    wanted = [Draw(prompt, number) for prompt in ("2 4 6", "10 11 15 19", "7") for number in range(5)]
    model = BaseModel(str(tiny_folder), max_tokens=8, temperature=4.0, batch_size=15)
    found = completions(model, wanted)
    assert len(set(found)) == len(wanted)
    model.batch_size = 2
    assert completions(model, wanted[::-1]) == found[::-1]
    assert completions(model, wanted[7:8]) == found[7:8]
    other = BaseModel(str(tiny_folder), max_tokens=8, temperature=4.0, seed=1)
    assert not set(completions(other, wanted)) & set(found)


def test_a_chat_model_is_given_a_prompt_as_a_turn(tiny_folder):
    """tiny models go on from their last message, so they are given the same ids either way."""
    model = BaseModel(str(tiny_folder), chat=True)
    assert model.encoded("2 4 6") == model.tokenizer.encode("2 4 6") == BaseModel(str(tiny_folder)).encoded("2 4 6")
    model.tokenizer = byte_tokenizer(CHATML)
    turn = [{"role": "user", "content": "2 4 6"}]
    rendered = model.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert model.encoded("2 4 6") == rendered
    model.chat = False
    assert model.encoded("2 4 6") == model.tokenizer.encode("2 4 6")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_token_is_drawn_by_its_row_s_own_key(temperature):
    """As if each rollout were drawn alone, by mx.random.categorical; the counter of a key wraps round."""
    model = build("llama-tied")
    model.eval()
    prompts = [prompt for prompt in PROMPTS[1:] for _ in range(2)]
    keys = np.array([[n, 2**32 - 3 if n == 2 else 7 * n] for n in range(6)], dtype=np.uint32)
    found: dict = {}
    sample_shared(model, prompts, keys, temperature, [3, 8], 8, 4, found.__setitem__)
    assert len({len(tokens) for tokens in found.values()}) > 1  # rows leave at different times
    for index, tokens in found.items():
        cache, ids = make_prompt_cache(model), prompts[index]
        for place, token in enumerate(tokens, 1):
            logits = model(mx.array([ids]), cache=cache)[:, -1]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            high, low = keys[index].tolist()
            key = mx.array([high, (low + place) % 2**32], dtype=mx.uint32)
            assert mx.random.categorical(logprobs / temperature, key=key).item() == token
            ids = [token]


def test_keys_go_where_their_rows_go():
    keys = Keys(np.array([[1, 10]], np.uint32)).merge([Keys(np.array([[n, 10 * n]], np.uint32)) for n in (1, 2, 3)])
    assert keys.next().tolist() == [[1, 11], [2, 21], [3, 31]]
    keys.filter([0, 2])
    keys.extend(Keys(np.array([[9, 2**32 - 1]], np.uint32)))
    assert keys.next().tolist() == [[1, 12], [3, 32], [9, 0]]
    assert keys.extract(1).next().tolist() == [[3, 33]]
    assert keys.next().dtype == np.uint32


def test_rollouts_are_drawn_from_the_models_own_distribution(tiny_folder):
    """Own keys must not be alike: 400 first tokens spread as softmax(logits) says, within 5 standard errors."""
    model = BaseModel(str(tiny_folder), max_tokens=1, batch_size=128, temperature=0.7)
    tokens = []
    prompt = model.tokenizer.encode("3 5")
    keys = np.array([own_key(0, Draw("3 5", n)) for n in range(400)], dtype=np.uint32)
    sample_shared(model.model, [prompt] * 400, keys, 0.7, [], 1, 128, lambda _, ids: tokens.extend(ids))
    expected = mx.softmax(model.model(mx.array([prompt]))[0, -1] / 0.7).tolist()
    counts = Counter(tokens)
    assert len(counts) > 3
    for token, share in enumerate(expected):
        assert abs(counts[token] / 400 - share) < 5 * (share * (1 - share) / 400) ** 0.5 + 1e-3


def test_each_is_drawn_once_and_a_kill_loses_only_what_was_not_drawn(tmp_path):
    wanted = [Draw(prompt, number) for prompt in "ab" for number in range(4)]
    with Cache(tmp_path / "store") as store:
        killed = Counting(most=5)
        with pytest.raises(KeyboardInterrupt):
            draw(wanted, killed, store)
        after = Counting()
        found = draw(wanted, after, store)
        assert found == [f"a {prompt} {number}" for prompt, number in wanted]
        assert killed.drawn + after.drawn == Counter(wanted)
        assert draw([wanted[3], wanted[3], wanted[0]], Counting(most=0), store) == ["a a 3", "a a 3", "a a 0"]


def test_another_model_never_gets_old_rollouts(tmp_path):
    with Cache(tmp_path / "store") as store:
        draw([Draw("a", 0)], Counting("one"), store)
        assert draw([Draw("a", 0)], Counting("two"), store) == ["two a 0"]


def test_the_identity_names_all_that_decides_a_rollout(tiny_folder, tmp_path):
    plain = BaseModel(str(tiny_folder))
    adapter = tmp_path / "adapter"
    settings = AdapterConfig(fine_tune_type="lora", num_layers=1, model=str(tiny_folder))
    attach_adapter(plain.model, settings)
    save_adapter(adapter, plain.model, settings)
    others = [{"adapter": adapter}, {"max_tokens": 9}, {"temperature": 0.5}, {"seed": 3}, {"chat": True}]
    identities = {BaseModel(str(tiny_folder), **changes).identity for changes in others} | {plain.identity}
    assert len(identities) == 6
    assert BaseModel(str(tiny_folder), batch_size=3).identity == plain.identity


def test_the_fingerprint_follows_the_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"others!!")
    assert fingerprint(tmp_path) != before
