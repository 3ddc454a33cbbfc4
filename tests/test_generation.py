"""Sampling: a completion does not depend on its batch, and is drawn from softmax(logits / temperature)."""

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.utils import load_tokenizer

import models.generation
from common.errors import UserError
from data.decoding import completion_texts
from models.adapters import AdapterConfig, attach_adapter
from models.generation import sample, temperature_sampler
from models.row_keys import row_keys
from models.value_head import forward
from tests.architectures import VOCABULARY, build
from training.rollout import pack

PROMPTS = [[1], [2, 3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16], [17], [18, 19, 20]]
FAMILIES = ["llama-tied", "qwen3", "gemma2", "gemma3", "gpt_neox", "jamba"]


@pytest.fixture(scope="module")
def model():
    return build("llama-tied")


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return load_tokenizer(tiny_folder)


def greedy_by_mlx_lm(model, prompt, count):
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


def greedy_by_hand(model, prompt, count):
    """The most likely tokens by full forward passes, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(mx.argmax(model(mx.array([ids]))[0, -1]).item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
def test_ragged_prompts_together_are_as_each_alone(name):
    """Neither batch mates nor pads change greedy tokens."""
    model = build(name)
    together = sample(model, PROMPTS, [], 20, temperature=0)  # longer than gemma3's window of 16
    assert together == [greedy_by_hand(model, prompt, 20) for prompt in PROMPTS]
    assert together == [greedy_by_mlx_lm(model, prompt, 20) for prompt in PROMPTS]
    assert together == [sample(model, [prompt], [], 20, temperature=0)[0] for prompt in PROMPTS]
    assert sample(model, PROMPTS[::-1], [], 20, temperature=0) == together[::-1]
    assert len({tuple(completion) for completion in together}) == len(PROMPTS)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_more_prompts_than_fit_in_flight_keep_their_order(model, batch_size):
    expected = sample(model, PROMPTS, [], 6, temperature=0)
    eos = expected[3][2]  # so that rows leave at different times
    expected = [cut(completion, {eos}) for completion in expected]
    assert sample(model, PROMPTS, {eos}, 6, temperature=0, batch_size=batch_size) == expected


def cut(completion, eos_token_ids):
    ends = [index for index, token in enumerate(completion) if token in eos_token_ids]
    return completion[: ends[0] + 1] if ends else completion


@pytest.mark.parametrize("count", [1, 2])
def test_a_completion_ends_with_its_first_eos(model, count):
    """Tokens after EOS would be trained and scored."""
    free = sample(model, PROMPTS, [], 12, temperature=0)
    eos = {token for token, _ in Counter(token for c in free for token in set(c)).most_common(count)}
    got = sample(model, PROMPTS, eos, 12, temperature=0)
    assert got == [cut(completion, eos) for completion in free]
    ended = [completion for completion in got if completion[-1] in eos]
    assert ended and any(len(completion) < 12 for completion in ended)
    assert all(sum(token in eos for token in completion) <= 1 for completion in got)


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_a_completion_without_eos_is_cut(model, max_tokens):
    full = sample(model, PROMPTS, [], 12, temperature=0)
    assert sample(model, PROMPTS, [], max_tokens, temperature=0) == [completion[:max_tokens] for completion in full]


def chi_square(tokens, probabilities):
    """Pearson's statistic, which has V − 1 degrees of freedom and is near V − 1 if tokens follow the distribution."""
    observed = np.bincount(tokens, minlength=len(probabilities))
    expected = probabilities * len(tokens)
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_the_first_token_is_drawn_from_the_tempered_softmax(model, temperature):
    """Greedy sampling in training would not explore."""
    mx.random.seed(0)
    prompt = [5, 6, 7]
    first = [c[0] for c in sample(model, [prompt] * 2000, [], 1, temperature, batch_size=2000)]
    logits = model(mx.array([prompt]))[0, -1]
    limit = VOCABULARY - 1 + 5 * (2 * (VOCABULARY - 1)) ** 0.5
    assert chi_square(first, np.array(mx.softmax(logits / temperature))) < limit
    # The test is sensitive: another temperature is rejected.
    assert chi_square(first, np.array(mx.softmax(logits / (temperature * 1.5)))) > limit


def test_later_tokens_are_drawn_given_the_earlier_ones(model):
    mx.random.seed(0)
    completions = sample(model, [[5, 6, 7], [8]] * 1000, [], 2, 1.0, batch_size=2000)
    for prompt, start in (([5, 6, 7], 0), ([8], 1)):
        own = completions[start::2]
        first = Counter(c[0] for c in own).most_common(1)[0][0]
        second = [c[1] for c in own if c[0] == first]
        probabilities = np.array(mx.softmax(model(mx.array([[*prompt, first]]))[0, -1]))
        top = int(probabilities.argmax())
        deviation = (probabilities[top] * (1 - probabilities[top]) / len(second)) ** 0.5
        assert len(second) > 50
        assert abs(np.mean(np.array(second) == top) - probabilities[top]) < 4 * deviation


def test_the_seed_decides(model):
    def draw(seed):
        mx.random.seed(seed)
        return sample(model, PROMPTS, [], 8)

    assert draw(1) == draw(1) != draw(2)


def test_temperature_zero_takes_the_most_likely_token():
    logprobs = mx.array([[0.0, 3.0, 2.9], [-1.0, -2.0, -0.5]])
    assert temperature_sampler(0)(logprobs).tolist() == [1, 2]


def with_dropout():
    """A model with an effective LoRA and a dropout that would change every token."""
    model = build("llama-tied")
    attach_adapter(model, AdapterConfig("lora", -1, {"rank": 4, "scale": 10.0, "dropout": 0.5}))
    mx.random.seed(0)
    weights = [(name, mx.random.normal(array.shape)) for name, array in tree_flatten(model.trainable_parameters())]
    model.load_weights(weights, strict=False)
    return model


def test_dropout_is_off_while_sampling_and_the_mode_is_left_as_it_was():
    """With dropout, PPO's first ratio would not be 1."""
    model = with_dropout()
    model.eval()
    expected = sample(model, PROMPTS, [], 12, temperature=0)
    assert not any(module.training for _, module in model.named_modules())
    model.train()
    assert not mx.array_equal(model(mx.array([[1, 2, 3]])), model(mx.array([[1, 2, 3]]))).item()
    assert sample(model, PROMPTS, [], 12, temperature=0) == expected
    assert all(module.training for _, module in model.named_modules())


def test_the_mode_comes_back_if_sampling_is_interrupted():
    model = with_dropout()
    model.train()

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, PROMPTS, [], 12, on_token=stop)
    assert all(module.training for _, module in model.named_modules())


def test_progress_counts_every_token(model):
    counts: list[int] = []
    free = sample(model, PROMPTS, [], 5, temperature=0, batch_size=2, on_token=counts.append)
    assert sum(counts) == sum(map(len, free)) == 30


def test_nothing_to_do_and_nothing_to_begin_with(model):
    assert sample(model, [], [], 5) == []
    with pytest.raises(UserError, match="prompt is empty"):
        sample(model, [[1], []], [], 5)


def whole_pass(model, completions, eos_token_ids):
    """Logprobs (B, C) of the completions by a forward pass over right-padded rows, and the mask."""
    tokens, positions, ids, mask = (mx.array(field) for field in pack(PROMPTS, completions, eos_token_ids, 0))
    logprobs = nn.log_softmax(forward(model, tokens, positions)[0], axis=-1)
    return np.array(mx.take_along_axis(logprobs, ids[..., None], axis=-1).squeeze(-1)), np.array(mask)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next"])
def test_logprobs_of_a_whole_pass_are_those_of_mlx_lm_s_sampling(name, monkeypatch):
    """In float32 the sampler's own logprobs equal a teacher-forced pass over right-padded rows."""
    model = build(name)
    responses = []

    class Recording(BatchGenerator):
        def next_generated(self):
            latest = super().next_generated()
            responses.extend(latest)
            return latest

    monkeypatch.setattr(models.generation, "BatchGenerator", Recording)
    mx.random.seed(0)
    completions = sample(model, PROMPTS, [7], 9, temperature=1.0)
    whole, mask = whole_pass(model, completions, [7])
    step = Counter[int]()
    for response in responses:
        row = response.uid
        one_by_one = response.logprobs[response.token].item()
        assert completions[row][step[row]] == response.token
        assert whole[row, step[row]] == pytest.approx(one_by_one, abs=1e-5)
        step[row] += 1
    assert [step[row] for row in range(len(PROMPTS))] == mask.sum(axis=1).tolist()


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gpt_neox"])
def test_logprobs_of_a_whole_pass_are_those_of_our_own_sampling(name, monkeypatch):
    """The same for our own decoding, in which finished rows leave the batch."""
    model = build(name)
    passes: list[tuple[mx.array, mx.array]] = []

    def recording(temperature):
        def draw(logits):
            passes.append((nn.log_softmax(logits, axis=-1), temperature_sampler(temperature)(logits)))
            return passes[-1][1]

        return draw

    monkeypatch.setattr(models.generation, "temperature_sampler", recording)
    mx.random.seed(0)
    eos = list(range(0, VOCABULARY, 4))  # so that many rows end early
    completions = sample(model, PROMPTS, eos, 12, temperature=1.0)
    whole, mask = whole_pass(model, completions, eos)
    lengths = mask.sum(axis=1).astype(int)
    assert len(set(lengths)) > 2 and len(passes[-1][1]) < len(PROMPTS)
    for count, (logprobs, drawn) in enumerate(passes[: lengths.max()]):
        found = mx.take_along_axis(logprobs, drawn[:, None], axis=-1).squeeze(-1).tolist()
        seen = dict(zip(drawn.tolist(), found, strict=True))
        rows = np.flatnonzero(lengths > count)
        assert {completions[row][count] for row in rows} <= seen.keys()
        if len(seen) == len(drawn):  # no token is drawn twice, so each tells its row
            for row in rows:
                assert whole[row, count] == pytest.approx(seen[completions[row][count]], abs=1e-5)
    assert any(len(set(drawn.tolist())) == len(drawn) for _, drawn in passes[1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_with_a_key_is_drawn_as_it_is_alone(name):
    """Whatever is beside it, in which order and in how large batches, in each of the three ways of decoding."""
    model, eos = build(name), list(range(0, VOCABULARY, 8))
    mx.random.seed(3)
    keys, others = row_keys(len(PROMPTS)), row_keys(len(PROMPTS))
    together = sample(model, PROMPTS, eos, 12, 0.8, keys=keys)
    assert len({len(completion) for completion in together}) > 1
    rows = zip(PROMPTS, keys, strict=True)
    alone = [sample(model, [prompt], eos, 12, 0.8, keys=key[None])[0] for prompt, key in rows]
    assert together == alone
    assert sample(model, PROMPTS[::-1], eos, 12, 0.8, batch_size=2, keys=keys[::-1]) == together[::-1]
    assert sample(model, PROMPTS, eos, 12, 0.8, keys=others) != together


@pytest.mark.parametrize("lengths", [(3, 3, 3, 3, 3, 3), (1, 8, 2, 5, 1, 3)])
def test_rows_that_end_leave_the_others_as_they_were(model, lengths):
    prompts = [[1 + (7 * row + i) % 49 for i in range(length)] for row, length in enumerate(lengths)]
    free = sample(model, prompts, [], 12, temperature=0)
    assert free == [greedy_by_mlx_lm(model, prompt, 12) for prompt in prompts]
    for eos in {completion[at] for completion in free for at in (0, 7)}:
        assert sample(model, prompts, {eos}, 12, temperature=0) == [cut(completion, {eos}) for completion in free]


@pytest.mark.parametrize("prompts", [[[1, 2], [3, 4]], [[1], [3, 4, 5]]])
def test_caches_grow_with_what_they_hold(model, prompts, monkeypatch):
    expected = sample(model, prompts, [], 40, temperature=0)
    monkeypatch.setattr(models.generation, "CACHE_STEP", 16)
    assert sample(model, prompts, [], 40, temperature=0) == expected
    monkeypatch.setattr(models.generation, "PREFILL", 1)
    assert sample(model, prompts, [], 40, temperature=0) == expected


def noted_shapes(model, monkeypatch):
    """The shapes (rows, tokens) of the model's passes from now on."""
    shapes, forward = [], type(model).__call__

    def noted(net, tokens, **kwargs):
        shapes.append(tokens.shape)
        return forward(net, tokens, **kwargs)

    monkeypatch.setattr(type(model), "__call__", noted)
    return shapes


def rows_read(model, prompts, decode, monkeypatch):
    """The shapes (rows, tokens) of the passes that read `prompts`, by one of both ways, and the completions."""
    shapes = noted_shapes(model, monkeypatch)
    completions = decode(model, prompts, set(), 3, temperature_sampler(0), len(prompts), None)
    return [shape for shape in shapes if shape[1] > 1], completions


@pytest.mark.parametrize("decode", [models.generation._decode, models.generation._decode_by_mlx_lm])
@pytest.mark.parametrize("lengths", [(12,) * 6, (9, 12, 3, 10, 7, 11)])
def test_a_pass_reads_no_more_tokens_than_memory_is_counted_for(model, decode, lengths, monkeypatch):
    """Six prompts of up to 12 tokens in passes of at most 24, so 4 of each; by default all in one."""
    prompts = [[1 + (7 * row + i) % 49 for i in range(length)] for row, length in enumerate(lengths)]
    expected = sample(model, prompts, [], 3, temperature=0)
    shapes, completions = rows_read(model, prompts, decode, monkeypatch)
    assert completions == expected and (6, 11) in shapes
    monkeypatch.setattr(models.generation, "TOKENS_A_PASS", 24)
    shapes, completions = rows_read(model, prompts, decode, monkeypatch)
    assert completions == expected
    assert shapes[0] == (6, 4) and all(rows * tokens <= 24 for rows, tokens in shapes)


def test_the_tokens_of_a_pass():
    lengths = [models.generation.prefill_length(rows) for rows in (1, 4, 5, 128, 10_000)]
    assert lengths == [2048, 2048, 1638, 64, 1]


@pytest.mark.parametrize("prompts", [[[5, 6, 7], [8, 9, 10], [11]], [[5, 6, 7], [8, 9, 10]], [[5], [6]]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_prompt_of_several_rows_is_read_once(model, prompts, temperature, monkeypatch):
    """The completions are those of rows that are read each for itself."""
    repeated = [prompt for prompt in prompts for _ in range(4)]

    def completions():
        mx.random.seed(0)
        return sample(model, repeated, [7], 12, temperature)

    shapes = noted_shapes(model, monkeypatch)
    shared = completions()
    assert [shape for shape in shapes if shape[1] > 1] == ([(len(prompts), 2)] if len(prompts[0]) > 1 else [])
    assert shapes[-1][1] == 1 and (len(repeated), 1) in shapes
    monkeypatch.setattr(models.generation, "_distinct", lambda prompts: [tuple(prompt) for prompt in prompts])
    assert completions() == shared


@pytest.mark.parametrize("ends", [[[5], [6]], [[5], [5, 6, 7], [8, 9], [5, 6, 7]], [[5, 6], [7, 8], [7, 8]]], ids=str)
@pytest.mark.parametrize("most", [128, 2])
def test_what_all_prompts_begin_with_is_read_once(model, ends, most, monkeypatch):
    """By one row, whatever follows in each; the completions are those of rows that are read each for itself."""
    prompts = [[*range(10, 22), *end] for end in ends]
    keys = row_keys(len(prompts))
    expected = [sample(model, [p], [7], 12, keys=keys[i : i + 1])[0] for i, p in enumerate(prompts)]
    shapes = noted_shapes(model, monkeypatch)
    assert sample(model, prompts, [7], 12, keys=keys, batch_size=most) == expected
    distinct = len({tuple(prompt) for prompt in prompts})
    read = [shape for shape in shapes if shape[1] > 1]
    assert read[0] == (1, 12) and len(shapes) > 12
    if most > len(prompts):
        longest = max(map(len, prompts)) - 13
        assert [shape for shape in shapes if shape[0] == 1][:1] == [(1, 12)]
        assert shapes[1] == ((distinct, longest) if longest else (len(prompts), 1))


@pytest.mark.parametrize("kept", [[0], [1, 3], [2], [0, 1, 2, 3]])
def test_rows_are_dropped_as_mlx_lm_drops_them(model, kept):
    """The padding that remains is 0 for row 1, 2 for row 0, and so on."""
    prompts = [[1, 2], [1, 2, 3, 4], [5], [6, 7, 8]]
    (ours, padding), (theirs, _) = (models.generation._read_prompts(model, prompts, 4) for _ in range(2))
    assert padding.tolist() == [2, 0, 3, 1]
    padding = models.generation._keep_rows(ours, np.array(kept), padding)
    for cache, other in zip(ours, theirs, strict=True):
        other.filter(mx.array(kept))
        assert padding.tolist() == other.left_padding.tolist()
        for state, expected in zip(cache.state, other.state, strict=True):
            np.testing.assert_array_equal(np.array(state), np.array(expected))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
def test_prompts_that_wait_enter_as_others_end(model, batch_size, monkeypatch):
    """Never more rows than allowed, each prompt of neighbours read once, and the completions are those of one batch."""
    prompts = [[1 + (5 * row + i) % 49 for i in range(1 + row % 4)] for row in range(6)] * 3
    mx.random.seed(5)
    keys, eos = row_keys(len(prompts)), list(range(0, VOCABULARY, 6))
    expected = sample(model, prompts, eos, 12, keys=keys)
    assert len({len(completion) for completion in expected}) > 3
    told: list[int] = []
    shapes = noted_shapes(model, monkeypatch)
    limits = {"batch_size": batch_size, "keys": keys, "on_token": told.append}
    assert sample(model, prompts, eos, 12, **limits) == expected
    assert max(rows for rows, _ in shapes) == batch_size == max(told)
    assert sum(told) == sum(map(len, expected))
    half = -(-batch_size // 2)  # at least so many rows are in flight until none waits
    assert sum(tokens == 1 for _, tokens in shapes) <= (sum(told) + len(prompts)) / half + 12
    assert sum(rows for rows, tokens in shapes if tokens > 1) < 4 * 3 + (0 if batch_size > 2 else 6)


def test_temperature_1_draws_what_division_by_1_draws():
    logits = mx.random.normal((50, 20), key=mx.random.key(3))
    mx.random.seed(0)
    drawn = temperature_sampler(1.0)(logits)
    mx.random.seed(0)
    assert mx.array_equal(drawn, mx.random.categorical(logits / 1.0))


def test_prompt_and_completion_texts_make_up_the_whole(tokenizer):
    """A completion decoded by itself would lose its leading space."""
    prompts = [tokenizer.encode(text) for text in ("8 20", "8 20", "2", "2", "5 -3", "7")]
    wholes = [tokenizer.encode(text) for text in ("8 20 30 4", "8 20 0", "2 5", "2 -5 6", "5 -3 1", "7")]
    completions = [[*whole[len(p) :], tokenizer.eos_token_id] for whole, p in zip(wholes, prompts, strict=True)]
    prompt_texts, completion = completion_texts(tokenizer, prompts, completions)
    assert prompt_texts == ["8 20", "8 20", "2", "2", "5 -3", "7"]
    assert completion == [" 30 4", " 0", " 5", " -5 6", " 1", ""]


def test_an_empty_completion_is_an_entry_of_its_own(tokenizer):
    """It does not turn a batch's texts into one."""
    prompts = [tokenizer.encode("1 2"), tokenizer.encode("3 4"), tokenizer.encode("5")]
    completions = [[], [tokenizer.eos_token_id], tokenizer.encode("6")[1:]]
    assert completion_texts(tokenizer, prompts, completions) == (["1 2", "3 4", "5"], ["", "", " 6"])
    assert completion_texts(tokenizer, [], []) == ([], [])


def test_any_ids_add_up_to_the_whole_text(tokenizer):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(tokenizer.vocab), (200, 12)).tolist()
    cuts = rng.integers(0, 12, 200)
    prompts = [row[:at] for row, at in zip(rows, cuts, strict=True)]
    completions = [row[at:] for row, at in zip(rows, cuts, strict=True)]
    texts = completion_texts(tokenizer, prompts, completions)
    for prompt, completion, row in zip(*texts, rows, strict=True):
        assert prompt + completion == tokenizer.decode(row, skip_special_tokens=True)


def test_a_completion_without_its_prompt_is_an_error(tokenizer):
    with pytest.raises(ValueError):
        completion_texts(tokenizer, [[1], [2]], [[3]])
