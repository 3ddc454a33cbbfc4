"""Fused soft prompts: the folder gives the same output as adapter and base, and never samples a token of the prompt."""

import importlib
import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fuse
from common.errors import UserError
from models.adapters import AdapterConfig, attach_adapter, load_adapter, save_adapter
from models.export.fused_soft_prompt import MOST_PROBABILITY, fuse_soft_prompt
from models.export.prompting_tokenizer import PromptingTokenizer
from models.loading import load
from models.soft_prompt import find_embedding, soft_prompt_ids
from models.tiny import RECIPES, build_tokenizer
from models.value_head import new_value_head
from rewards.reward_model import load_reward_model
from tests import architectures
from tests.scripts import call, fails
from tests.test_classifier import BUILT, model_folder

ROWS = 3
TEXTS = ["12 -4", "2 4 6 8 10 12 14 16 18 20 22 24 26 28", "a"]
# Where mlx-lm and transformers already differ on the base (see models/export/classifier.py).
OTHER_BODIES = ("gemma", "gemma3")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(RECIPES["tiny-digits"])


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def save_soft_prompt(path, folder, size=1.0, with_head=False):
    """The model in `folder` with a soft prompt unlike its own rows (size 0: made of such rows)."""
    config = AdapterConfig("soft_prompt", num_prompt_tokens=ROWS, model=str(folder))
    model = load(str(folder)).model
    attach_adapter(model, config)
    embedding = find_embedding(model)[1]
    if size:
        embedding.soft_prompt = size * mx.random.normal(embedding.soft_prompt.shape, key=mx.random.key(3))
    head = None
    if with_head:
        mx.random.seed(4)
        head = new_value_head(model, std=None)
    save_adapter(path, model, config, head)
    return model


def fused(folder, tmp_path, *flags):
    call(fuse.main, "--model", folder, "--adapter-file", tmp_path / "soft", "--save-path", tmp_path / "out", *flags)
    return tmp_path / "out"


def logits_with_adapter(model, ids):
    return np.array(model(mx.array([[*soft_prompt_ids(model), *ids]]))[0, ROWS:].astype(mx.float32))


def in_mlx(folder):
    model, tokenizer = mlx_lm.load(str(folder))
    return lambda text: np.array(model(mx.array([tokenizer.encode(text)]))[0, ROWS:].astype(mx.float32))


def in_transformers(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def logits(text):
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).logits[0, ROWS:].numpy()

    return logits


def close(got, expected, tolerance):
    """Old tokens keep their logits, and all new ones together have almost no probability."""
    words = expected.shape[-1]
    np.testing.assert_allclose(got[:, :words], expected, atol=tolerance * np.abs(expected).max(), rtol=0)
    new = np.exp(got - got.max(-1, keepdims=True))
    assert (new[:, words:].sum(-1) / new.sum(-1)).max() < MOST_PROBABILITY and got.shape[-1] == words + ROWS


@pytest.mark.parametrize("name", BUILT)
def test_it_says_what_adapter_and_base_say(name, tokenizer, tmp_path):
    folder = model_folder(tmp_path / "base", name, tokenizer)
    if name in ("gemma2", "gemma"):
        change_config(folder, final_logit_softcapping=30.0)
    model, base = save_soft_prompt(tmp_path / "soft", folder), load(str(folder))
    out = fused(folder, tmp_path)
    ours, theirs = in_mlx(out), in_transformers(out)
    for text in TEXTS:
        ids = base.tokenizer.encode(text)  # transformers makes a tokenizer of Qwen's kind of what lies under that name
        expected = logits_with_adapter(model, ids)
        assert np.abs(expected - np.array(base.model(mx.array([ids]))[0])).max() > 0.05 * np.abs(expected).max()
        close(ours(text), expected, 1e-4 if name == "olmo2" else 1e-5)
        close(theirs(text), expected, 5e-3 if name in OTHER_BODIES else 1e-4 if name == "olmo2" else 2e-5)


def test_what_follows_a_soft_prompt_alone_is_a_word(tokenizer, tmp_path):
    """Directly after it, before any text, if the output layer is not tied."""
    folder = model_folder(tmp_path / "base", "llama-untied", tokenizer)
    model = save_soft_prompt(tmp_path / "soft", folder)
    expected, words = np.array(model(mx.array([soft_prompt_ids(model)]))[0, -1:]), len(tokenizer)
    after, _ = mlx_lm.load(str(fused(folder, tmp_path)))
    close(np.array(after(mx.array([[words, words + 1, words + 2]]))[0, -1:]), expected, 1e-5)


def test_a_large_soft_prompt_and_states_far_from_the_probes(tokenizer, tmp_path):
    """Rows of fifty times the usual norm, far beyond the logits of words."""
    folder = model_folder(tmp_path / "base", "llama-tied", tokenizer)
    model = save_soft_prompt(tmp_path / "soft", folder, size=50.0)
    ours = in_mlx(fused(folder, tmp_path))
    for text in [*TEXTS, " ".join(map(str, range(0, 90, 3)))]:
        close(ours(text), logits_with_adapter(model, tokenizer.encode(text)), 1e-4)


def test_bfloat16_keeps_its_type(tokenizer, tmp_path):
    folder = model_folder(tmp_path / "base", "llama-untied", tokenizer)
    weights = mx.load(str(folder / "model.safetensors"))
    halves = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), halves, metadata={"format": "pt"})
    model = save_soft_prompt(tmp_path / "soft", folder)
    out = fused(folder, tmp_path)
    assert {array.dtype for array in mx.load(str(out / "model.safetensors")).values()} == {mx.bfloat16}
    close(in_mlx(out)("2 4 6"), logits_with_adapter(model, tokenizer.encode("2 4 6")), 0.05)


def test_a_bias_of_the_output_layer_does_it_alone():
    """Phi's layer norms could not carry a constant, but none is needed."""
    settings = {**architectures.COMMON, "model_type": "phi", "partial_rotary_factor": 0.5}
    module = importlib.import_module("mlx_lm.models.phi")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(settings))
    attach_adapter(model, AdapterConfig("soft_prompt", num_prompt_tokens=ROWS))
    model.eval()
    expected = logits_with_adapter(model, [1, 2, 3])
    after, config = fuse_soft_prompt(model, settings, [50, 51, 52])
    assert config["hidden_size"] == settings["hidden_size"] and config["vocab_size"] == 53
    close(np.array(after(mx.array([[50, 51, 52, 1, 2, 3]]))[0, ROWS:]), expected, 1e-6)


def test_rows_that_pad_the_table_are_taken_first(tokenizer, tmp_path):
    """A table with more rows than the tokenizer has tokens: new tokens take the spare rows, and more."""
    folder = model_folder(tmp_path / "base", "llama-untied", tokenizer)
    words, rows = len(tokenizer), len(tokenizer) + 2
    weights = mx.load(str(folder / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = mx.concatenate([weights[name], mx.ones((2, weights[name].shape[1]))])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    change_config(folder, vocab_size=rows)
    model = save_soft_prompt(tmp_path / "soft", folder)
    assert soft_prompt_ids(model)[0] == rows
    out = fused(folder, tmp_path)
    assert AutoTokenizer.from_pretrained(out).encode("2")[:ROWS] == [words, words + 1, words + 2]
    close(in_transformers(out)("2 4"), logits_with_adapter(model, tokenizer.encode("2 4"))[:, :words], 2e-5)


def test_a_quantized_base_needs_full_precision(tiny_folder, tmp_path, capsys):
    loaded = load(str(tiny_folder))
    model, config = mlx_lm.utils.quantize_model(loaded.model, loaded.config, group_size=32, bits=8)
    mlx_lm.utils.save(tmp_path / "base", tiny_folder, model, loaded.tokenizer, config)
    adapted = save_soft_prompt(tmp_path / "soft", tmp_path / "base")
    words = ("--model", tmp_path / "base", "--adapter-file", tmp_path / "soft", "--save-path", tmp_path / "out")
    assert "add --de-quantize" in fails(capsys, fuse.main, *words)
    assert not (tmp_path / "out").exists()
    out = fused(tmp_path / "base", tmp_path, "--de-quantize")
    close(in_transformers(out)("2 4"), logits_with_adapter(adapted, loaded.tokenizer.encode("2 4")), 1e-4)


def test_a_reward_model_of_a_soft_prompt_scores_the_same(tiny_folder, tmp_path):
    save_soft_prompt(tmp_path / "soft", tiny_folder, with_head=True)
    texts = (["2 4", "10"], [" 6 8", ""])
    expected = load_reward_model(str(tmp_path / "soft")).reward(*texts)
    assert load_reward_model(str(fused(tiny_folder, tmp_path))).reward(*texts) == pytest.approx(expected, abs=1e-5)
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)


def test_a_fused_model_takes_a_second_soft_prompt(tiny_folder, tmp_path):
    save_soft_prompt(tmp_path / "soft", tiny_folder)
    first = fused(tiny_folder, tmp_path).rename(tmp_path / "first")
    model = save_soft_prompt(tmp_path / "soft", first, size=0)
    ids = AutoTokenizer.from_pretrained(first).encode("2 4")
    # After the first soft prompt, whose own positions have no meaningful logits.
    close(in_mlx(fused(first, tmp_path))("2 4")[ROWS:], logits_with_adapter(model, ids)[ROWS:], 1e-5)


# --- unsupported models ---


@pytest.mark.parametrize(
    ("name", "why"),
    [("gemma2", "capped at 3.0"), ("cohere", "other than RMS norms"), ("gpt2", "other than RMS norms"),
     ("starcoder2", "RMS norms"), ("gpt_neox", "cannot be widened"), ("jamba", "mamba.in_proj.weight would be")],
)  # fmt: skip
def test_what_cannot_carry_it_is_refused_with_the_reason(name, why):
    model = architectures.build(name)
    family, own = architectures.ARCHITECTURES[name]
    attach_adapter(model, AdapterConfig("soft_prompt", num_prompt_tokens=ROWS))
    with pytest.raises(UserError, match="a soft prompt cannot be fused into this") as refused:
        fuse_soft_prompt(model, {**architectures.COMMON, **own, "model_type": family}, [50, 51, 52])
    assert why in str(refused.value) and "use it with --resume-file" in str(refused.value)


def test_a_norm_that_does_more_than_it_should_is_found_out(monkeypatch):
    """The result is compared with the original, for every family."""
    model = architectures.build("llama-untied")
    attach_adapter(model, AdapterConfig("soft_prompt", num_prompt_tokens=ROWS))
    config = {**architectures.COMMON, "model_type": "llama", "tie_word_embeddings": False}
    call_norm = nn.RMSNorm.__call__
    monkeypatch.setattr(nn.RMSNorm, "__call__", lambda self, x: call_norm(self, x) * (1 + 0.01 * x.shape[-1]))
    with pytest.raises(UserError, match="its logits would change by"):
        fuse_soft_prompt(model, config, [50, 51, 52])


# --- the tokenizer ---


def byte_level(post_processor):
    """A byte-level tokenizer, as of GPT-2, Qwen and Llama 3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


BOS = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 256)])


@pytest.mark.parametrize(
    "post_processor",
    [None, BOS, processors.ByteLevel(trim_offsets=False), processors.Sequence([processors.ByteLevel(), BOS]),
     processors.Sequence([processors.ByteLevel()])],
)  # fmt: skip
def test_every_post_processor_gets_the_tokens_before_all_else(post_processor, tmp_path):
    before = byte_level(post_processor) if post_processor else byte_level(processors.ByteLevel())
    if post_processor is None:
        before.backend_tokenizer.post_processor = None
    made = PromptingTokenizer(before, 2)
    assert made.ids == [258, 259] and made.names == ["<|soft_prompt_0_0|>", "<|soft_prompt_0_1|>"]
    made.save_pretrained(tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert after.encode(" a b") == [258, 259, *before.encode(" a b")]
    assert after("a", "b").input_ids == [258, 259, *before("a", "b").input_ids]
    assert after.encode("a", add_special_tokens=False) == before.encode("a", add_special_tokens=False)
    assert after.decode(after.encode("a b"), skip_special_tokens=True) == "a b"
    assert len(before) == 258  # is left as it was


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m['content'] }};{% endfor %}", None])
def test_a_conversation_begins_with_them_as_well(tiny_folder, tmp_path, template):
    before = AutoTokenizer.from_pretrained(tiny_folder)
    before.chat_template = template or {"default": "{{ bos_token }}{{ messages[0]['content'] }}", "tool_use": "x"}
    made = PromptingTokenizer(before, 2)
    made.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "2 4"}]
    _, tokenizer = mlx_lm.utils.load_model, mlx_lm.utils.load_tokenizer(tmp_path)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = made.ids + before.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tokenizer.encode(text, add_special_tokens=False) == whole
    assert tokenizer.apply_chat_template(messages, return_dict=False) == whole


def test_a_tokenizer_that_cuts_otherwise_behind_a_token_is_refused(tmp_path):
    before = byte_level(processors.ByteLevel())
    before.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement="a", prepend_scheme="first"), pre_tokenizers.ByteLevel(False)]
    )
    with pytest.raises(UserError, match="encodes '12 -4' differently after other tokens"):
        PromptingTokenizer(before, 1).save_pretrained(tmp_path)


def test_the_weights_are_all_new_names_of_none(tiny_folder, tmp_path):
    save_soft_prompt(tmp_path / "soft", tiny_folder)
    before = dict(tree_flatten(load(str(tiny_folder)).model.parameters()))
    assert set(mx.load(str(fused(tiny_folder, tmp_path) / "model.safetensors"))) == set(before)


def test_the_soft_prompt_still_loads_on_its_base(tiny_folder, tmp_path):
    model = save_soft_prompt(tmp_path / "soft", tiny_folder)
    fused(tiny_folder, tmp_path)
    again = load(str(tiny_folder)).model
    load_adapter(again, tmp_path / "soft")
    assert np.array_equal(logits_with_adapter(again, [1, 2]), logits_with_adapter(model, [1, 2]))
