"""GGUF: read by transformers, the file gives the same output as the folder; unsupported models are rejected."""

import importlib
import json
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fuse
from common.errors import UserError
from models.adapters import AdapterConfig, adapter_weights, attach_adapter, save_adapter
from models.export.gguf_file import check_gguf
from models.loading import load
from tests import architectures
from tests.scripts import call, fails

gguf = pytest.importorskip("gguf")
FILE = "ggml-model-f16.gguf"
MERGES = [("a", "b"), ("▁", "ab"), ("b", "a"), ("▁", "ba"), ("▁ab", "ba")]


def sentence_pieces():
    """A vocabulary like Llama 2's: bytes, then characters and merges of them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh0123456789"]
    pieces += ["".join(pair) for pair in MERGES]
    ids = {piece: index for index, piece in enumerate(pieces)}
    inner = Tokenizer(BPE(vocab=ids, merges=MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return sentence_pieces()


def model_folder(folder, family, tokenizer, **settings):
    config = {**architectures.COMMON, "model_type": family, "vocab_size": len(tokenizer), "rope_theta": 500.0}
    config |= {"architectures": [f"{family.title()}ForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, **settings}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    module = importlib.import_module(f"mlx_lm.models.{'mixtral' if family == 'mixtral' else 'llama'}")
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = {key: array + 0.1 * mx.random.normal(array.shape) for key, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def fused(folder, tmp_path, *flags):
    """Fuse a LoRA and export; returns the logits of the adapter on its base, and the folder."""
    config = AdapterConfig("lora", -1, {"rank": 4, "scale": 2.0, "dropout": 0.0}, model=str(folder))
    model = load(str(folder)).model
    attach_adapter(model, config)
    mx.random.seed(5)
    moved = [(name, w + 0.1 * mx.random.normal(w.shape)) for name, w in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    save_adapter(tmp_path / "adapters", model, config)
    words = ("--model", folder, "--adapter-file", tmp_path / "adapters", "--save-path", tmp_path / "out")
    call(fuse.main, *words, "--export-gguf", *flags)
    return np.array(model(mx.array([[1, 5, 262, 270, 281]]))), tmp_path / "out"


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False}),
     ("llama", {"tie_word_embeddings": False, "rope_theta": None, "rope_parameters": {"rope_theta": 500.0}}),
     ("mistral", {"tie_word_embeddings": False})],
)  # fmt: skip
def test_transformers_reads_the_same_model_and_tokens_from_it(tokenizer, tmp_path, family, settings):
    settings = {name: value for name, value in settings.items() if value is not None}
    expected, out = fused(model_folder(tmp_path / "base", family, tokenizer, **settings), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file=FILE)
    assert type(model).__name__ == "LlamaForCausalLM"
    rope = model.config.rope_parameters
    assert rope["rope_theta"] == 500.0 and model.config.vocab_size == len(tokenizer)
    with torch.no_grad():
        got = model(torch.tensor([[1, 5, 262, 270, 281]])).logits.numpy()
    np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(expected).max(), rtol=0)  # fp16
    from_gguf = AutoTokenizer.from_pretrained(out, gguf_file=FILE)
    for text in ("abba abba", "baab 12", "bab", "babab ab"):
        assert from_gguf.encode(text) == tokenizer.encode(text)


def test_every_tensor_has_a_name_and_a_type_that_llama_cpp_knows(tokenizer, tmp_path):
    """Including experts of a mixture, to which mlx-lm's exporter gives unknown names."""
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    folder = model_folder(tmp_path / "base", "mixtral", tokenizer, **settings)
    # A LoRA on the experts is fused as well.
    _, out = fused(folder, tmp_path, "--gguf-path", "digits.gguf")
    reader = gguf.GGUFReader(out / "digits.gguf")
    kinds = [gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.LLAMA]]
    known = {f"{kind.format(bid=block)}.weight" for kind in kinds for block in range(2)}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert (
        tensors.keys() <= known and "blk.1.ffn_gate_exps.weight" in tensors and "blk.0.ffn_gate_inp.weight" in tensors
    )
    assert tuple(tensors["blk.0.ffn_down_exps.weight"].shape) == (64, 32, 4)  # the innermost first
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert types["blk.0.attn_norm.weight"] == types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert types["token_embd.weight"] == types["blk.0.ffn_up_exps.weight"] == "F16"
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.expert_count"] == 4 and fields["llama.expert_used_count"] == 2
    # With these scores llama.cpp tokenises like the tokenizer: the best merge first.
    assert fields["tokenizer.ggml.scores"][-len(MERGES) :] == [-1, -2, -3, -4, -5]
    assert fields["tokenizer.ggml.tokens"][-1] == "▁abba" and fields["tokenizer.ggml.eos_token_id"] == 2


def test_rows_past_the_vocabulary_are_left_out(tokenizer, tmp_path):
    """llama.cpp does not open files with more rows than tokens."""
    settings = {"vocab_size": len(tokenizer) + 6, "tie_word_embeddings": False}
    _, out = fused(model_folder(tmp_path / "base", "llama", tokenizer, **settings), tmp_path)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in gguf.GGUFReader(out / FILE).tensors}
    assert shapes["token_embd.weight"] == shapes["output.weight"] == (32, len(tokenizer))


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"model_type": "qwen2"}, "its family qwen2 is not one of llama, mistral, mixtral"),
     ({"quantization": {"bits": 4}}, "its weights are quantized"),
     ({"head_dim": 16}, "its heads together do not have the width"),
     ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "its rope is of the type llama3"),
     ({"vocab_size": 9}, "its tokenizer has more tokens than the model")],
)  # fmt: skip
def test_what_would_be_wrong_is_refused_with_the_reason(tokenizer, changes, why):
    config = {**architectures.COMMON, "model_type": "llama", "vocab_size": len(tokenizer), **changes}
    wrapper = SimpleNamespace(_tokenizer=tokenizer, get_vocab=tokenizer.get_vocab)
    loaded: Any = SimpleNamespace(config=config, tokenizer=wrapper, model=architectures.build("llama-tied"), name="m")
    with pytest.raises(UserError, match=f"m cannot be written as GGUF: {why}"):
        check_gguf(loaded)


def test_biases_are_refused(tokenizer):
    wrapper = SimpleNamespace(_tokenizer=tokenizer, get_vocab=tokenizer.get_vocab)
    model = architectures.build("llama-tied", attention_bias=True)
    config = {**architectures.COMMON, "model_type": "llama", "vocab_size": len(tokenizer)}
    loaded: Any = SimpleNamespace(config=config, tokenizer=wrapper, model=model, name="m")
    with pytest.raises(UserError, match="it has biases"):
        check_gguf(loaded)


def test_the_embedded_model_is_refused_for_its_vocabulary(tiny_folder, tmp_path, capsys):
    config = AdapterConfig("lora", -1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    model = load(str(tiny_folder)).model
    attach_adapter(model, config)
    save_adapter(tmp_path / "adapters", model, config)
    words = ("--model", tiny_folder, "--adapter-file", tmp_path / "adapters", "--save-path", tmp_path / "out")
    assert "its vocabulary is neither SentencePiece's" in fails(capsys, fuse.main, *words, "--export-gguf")
    assert not (tmp_path / "out").exists()


def test_weights_that_fp16_cannot_hold_are_refused(tokenizer, tmp_path, capsys):
    folder = model_folder(tmp_path / "base", "llama", tokenizer)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.weight"] *= 1e6
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    config = AdapterConfig("none")
    save_adapter(tmp_path / "none", attached(folder, config), config)
    words = ("--model", folder, "--adapter-file", tmp_path / "none", "--save-path", tmp_path / "out", "--export-gguf")
    assert "model.layers.0.mlp.up_proj.weight has values above 65504" in fails(capsys, fuse.main, *words)
    assert not (tmp_path / "out").exists()


def attached(folder, config):
    model = load(str(folder)).model
    attach_adapter(model, config)
    return model
