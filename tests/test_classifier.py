"""Reward models as transformers classifiers: the same score in every framework."""

import json
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace
from typing import cast

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fuse
import ppo_training
import pytorch_ppo_training
from common.errors import UserError
from models import torch_loading
from models.adapters import AdapterConfig, adapter_weights, attach_adapter, save_adapter
from models.export import classifier
from models.export.classifier import FAMILIES, classifier_class
from models.loading import LoadedModel, load
from models.tiny import RECIPES, build_tokenizer
from models.value_head import new_value_head
from rewards.build import build_reward
from rewards.reward_model import load_reward_model
from rewards.torch_reward_model import load_reward_model as load_in_torch
from tests import architectures
from tests.scripts import ROOT, call, fails, with_words
from tests.torch_models import random_llama

CPU = torch.device("cpu")
PROMPTS = ["2 4", "2 4", "10", "-6 30 7", ""]
COMPLETIONS = [" 6 8 10", "", " 12 14 16 18 20 22 24 26 28", " 5", " 7"]
TEXTS = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
# Those of tests/architectures.py, and more families that are Llamas under other names.
BUILT = {name: name for name in ("llama-tied", "llama-untied", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")}
BUILT |= {"gemma": "gemma2", "mistral": "llama-untied", "olmo2": "llama-untied", "smollm3": "llama-tied"}

OTHER_BODIES = ("gemma", "gemma3")  # models/export/classifier.py says why


def model_folder(folder, name, tokenizer):
    """A folder with a random model of a family, for mlx-lm."""
    family, own = architectures.ARCHITECTURES[BUILT[name]]
    if BUILT[name] != name:
        family = name
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = {**architectures.COMMON, **own, **ids, "model_type": family, "vocab_size": len(tokenizer)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model_class, arguments = mlx_lm.utils._get_classes(config)
    mx.random.seed(1)
    model = model_class(arguments.from_dict(config))
    # Moved away from norms of 1 and biases of 0, so that omitting one is noticed.
    weights = {key: array + 0.1 * mx.random.normal(array.shape) for key, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def save_trained(path, folder, with_head=True):
    """A LoRA on the model in `folder`, with weights and head as if trained."""
    config = AdapterConfig("lora", -1, {"rank": 4, "scale": 2.0, "dropout": 0.1}, model=str(folder))
    model = load(str(folder)).model
    attach_adapter(model, config)
    mx.random.seed(5)
    moved = [(name, w + 0.1 * mx.random.normal(w.shape)) for name, w in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    save_adapter(path, model, config, new_value_head(model, std=None) if with_head else None)
    return path


def flags(folder, adapter, target):
    return ("--model", folder, "--adapter-file", adapter, "--save-path", target, "--sequence-classification")


def write(folder, tmp_path):
    """Fuse a trained adapter of the model in `folder`. Returns the adapter's scores and the classifier's folder."""
    adapter, target = save_trained(tmp_path / "reward", folder), tmp_path / "classifier"
    call(fuse.main, *flags(folder, adapter, target))
    return load_reward_model(str(adapter)).reward(PROMPTS, COMPLETIONS), target


def by_transformers(folder, texts):
    """Scores of one batch as a user of transformers computes them."""
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (len(texts), 1)
    return logits[:, 0].tolist()


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(RECIPES["tiny-digits"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("name", BUILT)
def test_one_score_whoever_opens_it(name, tokenizer, tmp_path):
    expected, folder = write(model_folder(tmp_path / "base", name, tokenizer), tmp_path)
    assert len({round(score, 2) for score in expected}) == len(TEXTS)
    close(load_reward_model(str(folder)).reward(PROMPTS, COMPLETIONS), expected)
    in_torch = by_transformers(folder, TEXTS)
    close(in_torch, expected, 1e-3 if name in OTHER_BODIES else 1e-5)
    close(load_in_torch(str(folder), CPU).reward(PROMPTS, COMPLETIONS), in_torch)
    close(by_transformers(folder, TEXTS[2:3]), in_torch[2:3])


def test_every_family_is_tried():
    tried = {architectures.ARCHITECTURES[of][0] if of == name else name for name, of in BUILT.items()}
    assert tried == set(FAMILIES)


def test_what_is_in_the_folder(llama, tmp_path):
    _, folder = write(llama, tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForSequenceClassification"] and "value_head" not in config
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == 1
    assert model.config.pad_token_id not in (None, model.config.eos_token_id)
    assert not [key for key in mx.load(str(folder / "model.safetensors")) if key.startswith("lm_head")]


def test_both_scripts_take_the_folder_as_their_reward_model(llama, tmp_path):
    expected, folder = write(llama, tmp_path)
    args = with_words(ppo_training.parse_args, "--reward-model", folder)
    close(build_reward(args, load(llama))(PROMPTS, COMPLETIONS), expected)
    base = torch_loading.load(llama, CPU)
    close(pytorch_ppo_training.build_reward(args, base)(PROMPTS, COMPLETIONS), expected)


def test_it_is_written_without_torch(llama, tmp_path):
    adapter, target = save_trained(tmp_path / "reward", llama), tmp_path / "out"
    program = (
        "import importlib.util, runpy, sys\n"
        "find, sys.modules['torch'] = importlib.util.find_spec, None\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
        "runpy.run_path('fuse.py', run_name='__main__')\n"
    )
    words = [str(word) for word in flags(llama, adapter, target)]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    close(by_transformers(target, TEXTS), load_reward_model(str(adapter)).reward(PROMPTS, COMPLETIONS))


# --- tokenizers ---


def without_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def padded_by_the_eos(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token


def without_a_pad(tokenizer):
    tokenizer.pad_token = None


def ended_by_the_eos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )


def padded_left(tokenizer):
    tokenizer.padding_side = "left"


@pytest.mark.parametrize("change", [without_bos, padded_by_the_eos, without_a_pad, ended_by_the_eos, padded_left])
def test_whatever_the_tokenizer_does_the_score_is_that_of_the_eos(change, tmp_path):
    tokenizer = build_tokenizer(RECIPES["tiny-digits"])
    change(tokenizer)
    expected, folder = write(model_folder(tmp_path / "base", "llama-tied", tokenizer), tmp_path)
    close(by_transformers(folder, TEXTS), expected)
    close(load_reward_model(str(folder)).reward(PROMPTS, COMPLETIONS), expected)
    close(load_in_torch(str(folder), CPU).reward(PROMPTS, COMPLETIONS), expected)
    before = AutoTokenizer.from_pretrained(tmp_path / "base")("12 -4").input_ids
    after = AutoTokenizer.from_pretrained(folder)("12 -4").input_ids
    assert after == [*(id for id in before if id != tokenizer.eos_token_id), tokenizer.eos_token_id]


def test_a_tokenizer_that_cannot_end_a_text_by_itself_is_told(tmp_path, capsys):
    tokenizer = build_tokenizer(RECIPES["tiny-digits"])
    twice = [("<s>", tokenizer.bos_token_id)]  # no BOS and EOS give such a beginning
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=twice
    )
    expected, folder = write(model_folder(tmp_path / "base", "llama-tied", tokenizer), tmp_path)
    assert "add </s> to every text to be scored" in capsys.readouterr().out
    close(by_transformers(folder, [text + "</s>" for text in TEXTS]), expected)


# --- what cannot be written or read ---


def test_a_family_that_does_not_serve_is_named(llama, tmp_path, capsys):
    with pytest.raises(UserError, match="family granite: transformers has no ForSequenceClassification for it"):
        classifier_class({"model_type": "granite"})
    with pytest.raises(UserError, match="family mixtral: its weights are laid out differently from Mixtral"):
        classifier_class({"model_type": "mixtral"})
    gpt2 = tmp_path / "gpt2"
    model = architectures.build("gpt2", vocab_size=98)
    family, own = architectures.ARCHITECTURES["gpt2"]
    mlx_lm.utils.save(
        gpt2, llama, model, load(llama).tokenizer,
        {**architectures.COMMON, **own, "model_type": family, "vocab_size": 98, "eos_token_id": 2},
    )  # fmt: skip
    adapter, target = save_trained(tmp_path / "reward", gpt2), tmp_path / "out"
    message = fails(capsys, fuse.main, *flags(gpt2, adapter, target))
    assert "family gpt2" in message and not target.exists()


def test_what_cannot_be_written_is_one_line(llama, tmp_path, capsys):
    target = tmp_path / "out"
    policy = save_trained(tmp_path / "policy", llama, with_head=False)
    assert f"{policy} has no value head" in fails(capsys, fuse.main, *flags(llama, policy, target))
    loaded = load(llama)
    model, config = mlx_lm.utils.quantize_model(loaded.model, loaded.config, group_size=32, bits=4)
    mlx_lm.utils.save(tmp_path / "small", llama, model, loaded.tokenizer, config)
    reward = save_trained(tmp_path / "reward", tmp_path / "small")
    words = flags(tmp_path / "small", reward, target)
    assert "add --de-quantize" in fails(capsys, fuse.main, *words)
    assert not target.exists()
    call(fuse.main, *words, "--de-quantize")
    expected = load_reward_model(str(reward)).reward(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(by_transformers(target, TEXTS), expected, atol=1e-3)


def test_without_a_token_to_pad_with_it_is_one_line():
    only_eos = SimpleNamespace(pad_token_id=2, unk_token_id=None, eos_token_id=2, added_tokens_decoder={})
    loaded = Namespace(tokenizer=only_eos, config={"vocab_size": 98}, name="lonely")
    with pytest.raises(UserError, match="lonely has no special token except its EOS"):
        classifier._pad_token_id(cast(LoadedModel, loaded))


@pytest.mark.parametrize("labels", [2, 0])
def test_a_classifier_of_another_head_is_refused(labels, llama, tmp_path):
    _, folder = write(llama, tmp_path)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    del weights["score.weight"]
    if labels:
        weights["score.weight"] = mx.zeros((labels, 32))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not a classifier with one score and no bias"):
        load_reward_model(str(folder))
    with pytest.raises(UserError, match="not a classifier with one score" if labels else "lacks 1 of the model's"):
        load_in_torch(str(folder), CPU)
