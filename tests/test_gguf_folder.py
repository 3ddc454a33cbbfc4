"""A GGUF file as a model: the same logits and tokens as transformers' own loader reads from it, or one line."""

import json
import shutil
import subprocess
import sys
import threading
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import AutoModelForCausalLM, AutoTokenizer

import fuse
import talk_to_model
from common.errors import UserError
from models import gguf_folder
from models.adapters import AdapterConfig, attach_adapter, save_adapter
from models.four_bit import four_bit_folder
from models.gguf_folder import convert, is_gguf
from models.gguf_reader import read_gguf
from models.gguf_tokenizer import SPLITS, tokenizer_of
from models.loading import is_made_here, load, resolve
from models.torch_loading import resolve as torch_resolve
from tests.gguf_files import byte_level, sentence_pieces, write_gguf_file
from tests.scripts import ROOT, call, fails
from tests.test_gguf_export import fused, model_folder
from tests.test_gguf_export import sentence_pieces as llama2_tokenizer

TOKENS = [1, 5, 90, 17, 201, 44]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf-models"


def ours(path):
    return np.array(load(str(path)).model(mx.array([TOKENS])).astype(mx.float32))


def theirs(path):
    """What transformers' own loader makes of the file, whose permutation and dequantization are others than ours."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits.numpy()


# weights


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_logits_equal_transformers_in_every_quantization(tmp_path, kind):
    path = write_gguf_file(tmp_path / "model.gguf", kind=kind, tied=kind != "Q4_1")
    np.testing.assert_allclose(ours(path), theirs(path), atol=1e-4)
    assert read_gguf(path).quantization == kind


def k_blocks(kind, rows):
    """Rows of one block of 256 random numbers with plausible scales, which stand at either end of a block."""
    size, scales = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,)), "Q2_K": (84, (80, 82))}[kind]
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, (rows, size), dtype=np.uint8)
    for start in scales:
        data[:, start : start + 2] = rng.uniform(1e-3, 2e-3, (rows, 1)).astype(np.float16).view(np.uint8)
    return data


def q4_k(block):
    """One block by the format's definition: 8 groups of 32 numbers, each with a scale and a minimum of 6 bits."""
    scale, least = block[:4].view(np.float16).astype(np.float64)
    packed, nibbles = block[4:16].astype(int), block[16:].astype(int).reshape(4, 32)
    numbers = []
    for group in range(8):
        if group < 4:
            factor, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            factor = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            minimum = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        row = nibbles[group // 2]
        numbers.append(scale * factor * (row >> 4 if group % 2 else row & 15) - least * minimum)
    return np.concatenate(numbers)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q2_K"])
def test_k_quantizations(tmp_path, kind):
    """Against Q4_K by hand, as mlx 0.32.4 misreads every other group of it; else against mlx's reader, in fp16."""
    wide = {f"blk.{n}.ffn_{k}.weight": np.full((256, 64), 0.1, np.float32) for n in range(2) for k in ("gate", "up")}
    blocks = k_blocks(kind, 64)
    path = write_gguf_file(
        tmp_path / "model.gguf",
        settings={"llama.feed_forward_length": 256},
        tensors={**wide, **{f"blk.{n}.ffn_down.weight": None for n in range(2)}},
        blocks={f"blk.{n}.ffn_down.weight": (kind, blocks) for n in range(2)},
    )
    if kind == "Q4_K":
        expected = np.stack([q4_k(block) for block in blocks])
    else:
        expected = np.array(mx.load(str(path))["blk.1.ffn_down.weight"].astype(mx.float32))
    got = dict(read_gguf(path).weights())["model.layers.1.mlp.down_proj.weight"]
    assert got.shape == (64, 256) and expected.std() > 1e-3
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6)
    assert np.isfinite(ours(path)).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_four_bit_files_keep_their_own_numbers_for_mlx(tmp_path, kind):
    path = write_gguf_file(tmp_path / "model.gguf", kind=kind, tied=kind == "Q4_0")
    source = resolve(str(path))
    folder = four_bit_folder(path, source)
    model = load(str(folder)).model
    assert model.model.layers[1].mlp.up_proj.bits == (8 if kind == "Q8_0" else 4)
    got = np.array(model(mx.array([TOKENS])))
    np.testing.assert_allclose(got, ours(path), atol=2e-3)
    assert four_bit_folder(path, source) == folder


def test_numbers_that_mlx_does_not_compute_with_are_no_four_bit_form(tmp_path):
    path = write_gguf_file(tmp_path / "model.gguf", kind="Q5_0")
    with pytest.raises(UserError, match=r"token_embd\.weight is Q5_0, none of Q4_0, Q4_1, Q8_0"):
        four_bit_folder(path, resolve(str(path)))


@pytest.mark.parametrize(
    "settings",
    [{"llama.attention.head_count_kv": None}, {"llama.rope.freq_base": None}, {"llama.rope.dimension_count": None}],
)
def test_what_the_metadata_may_leave_out(tmp_path, settings):
    keys = (64, 64) if "llama.attention.head_count_kv" in settings else (32, 64)
    tensors = {f"blk.{n}.attn_{k}.weight": np.ones(keys, np.float32) / 9 for n in range(2) for k in "kv"}
    path = write_gguf_file(tmp_path / "model.gguf", settings=settings, tensors=tensors)
    config = read_gguf(path).config
    assert config["num_key_value_heads"] == keys[0] // 16 and config["head_dim"] == 16
    assert config["rope_theta"] == (10000.0 if "llama.rope.freq_base" in settings else 5000.0)
    assert config["rms_norm_eps"] == 1e-5  # not float32's 9.99999974e-06
    assert np.isfinite(ours(path)).all()


def test_a_linear_rope_stretches_positions(tmp_path):
    settings = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf_file(tmp_path / "model.gguf", settings=settings)
    stretched, plain = ours(path), ours(write_gguf_file(tmp_path / "plain.gguf"))
    assert np.abs(stretched - plain).max() > 0.01
    np.testing.assert_allclose(stretched[:, 0], plain[:, 0], atol=1e-5)  # position 0 stays where it is
    assert read_gguf(path).config["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 4.0}


def llama3_factors(factor, dims=16, theta=5000.0):
    """transformers' formula, written the other way round: the frequency before over the frequency after."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.configuration_llama import LlamaConfig

    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": theta}  # fmt: skip
    config = LlamaConfig(hidden_size=4 * dims, num_attention_heads=4, head_dim=dims, rope_parameters=rope)
    after, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (theta ** -(np.arange(0, dims, 2) / dims) / after.numpy()).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_of_llama_3_is_read_from_its_factors(tmp_path, factor):
    tensors = {"rope_freqs.weight": llama3_factors(factor, theta=500000.0)}
    settings = {"llama.rope.freq_base": 500000.0}
    path = write_gguf_file(tmp_path / "model.gguf", settings=settings, tensors=tensors)
    assert read_gguf(path).config["rope_scaling"] == {
        **{"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192,
    }
    tensors = {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}
    path = write_gguf_file(tmp_path / "other.gguf", settings=settings, tensors=tensors)
    with pytest.raises(UserError, match="factors of its rope are not those of a Llama 3"):
        read_gguf(path)


def test_bfloat16_is_rounded_to_the_nearest(tmp_path):
    path = write_gguf_file(tmp_path / "model.gguf")
    folder = convert(path, tmp_path / "folder", "bfloat16", "0")
    rounded = mx.load(str(folder / "model.safetensors"))
    for name, weight in read_gguf(path).weights():
        assert rounded[name].dtype == mx.bfloat16
        assert mx.array_equal(rounded[name], mx.array(weight).astype(mx.bfloat16)).item(), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_fuse_exports_comes_back(tmp_path, family, tied):
    tokenizer = llama2_tokenizer()
    expected, out = fused(model_folder(tmp_path / "base", family, tokenizer, tie_word_embeddings=tied), tmp_path)
    loaded = load(str(out / "ggml-model-f16.gguf"))
    got = np.array(loaded.model(mx.array([[1, 5, 262, 270, 281]])).astype(mx.float32))
    np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(expected).max(), rtol=0)  # fp16
    for text in ("abba abba", "baab 12", "bab", "babab ab", "  a  b ", "über\n"):
        assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
        assert loaded.tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


# tokenizers


def ids_of(path, text, **settings):
    return AutoTokenizer.from_pretrained(resolve(str(path))).encode(text, **settings)


def test_byte_level_tokens_by_hand(tmp_path):
    fields = byte_level()
    path = write_gguf_file(tmp_path / "model.gguf", fields)
    names = fields["tokens"]

    def cut(text):
        return [names[index] for index in ids_of(path, text)]

    assert cut("hello world") == ["hell", "o", "Ġw", "o", "r", "l", "d"]
    assert cut("é") == ["Ã", "©"]  # the two bytes of UTF-8
    assert cut("a<|im_end|>\n<think>") == ["a", "<|im_end|>", "Ċ", "<think>"]
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(path)))
    ids = tokenizer.encode("hello <think>wé<|im_end|>")
    assert tokenizer.decode(ids) == "hello <think>wé<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello <think>wé"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=1)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("split", "words"),
    [("gpt-2", ["a", "Ġ", "Ġ123", "'s", "Ġb"]), ("smollm", ["a", "ĠĠ", "1", "2", "3", "'s", "Ġb"]),
     ("llama-bpe", ["a", "Ġ", "Ġ", "123", "'s", "Ġb"]), ("tekken", ["a", "Ġ", "Ġ", "1", "2", "3", "'s", "Ġb"])],
)  # fmt: skip
def test_each_pre_tokenizer_cuts_as_its_models_do(split, words):
    cuts = [word for word, _ in SPLITS[split]().pre_tokenize_str("a  123's b")]
    assert cuts == words


@pytest.mark.parametrize(("split", "adds"), [("smollm", False), ("llama-bpe", True), ("tekken", True)])
def test_bos_where_the_file_does_not_say(tmp_path, split, adds):
    path = write_gguf_file(tmp_path / "model.gguf", byte_level(pre=split, add_bos_token=None))
    assert (ids_of(path, "a")[0] == 1) is adds
    assert ids_of(path, "a", add_special_tokens=False)[0] != 1


def test_words_that_are_tokens_are_taken_whole_by_llama_3(tmp_path):
    """The merges of "hello" do not lead to it, yet it is a token."""
    fields = byte_level()
    tokens, kinds = [*fields["tokens"], "hello"], [*fields["token_type"], 1]
    for split, whole in (("llama-bpe", True), ("smollm", False)):
        changed = byte_level(tokens=tokens, token_type=kinds, pre=split)
        path = write_gguf_file(tmp_path / f"{split}.gguf", changed)
        assert (len(tokens) - 1 in ids_of(path, "hello")) is whole


def test_sentence_pieces_by_hand(tmp_path):
    fields = sentence_pieces()
    path = write_gguf_file(tmp_path / "model.gguf", fields)
    names = fields["tokens"]

    def cut(text):
        return [names[index] for index in ids_of(path, text)]

    # "▁a" is joined before "ab" could be; in "aab" that leaves the second "a" to "ab".
    assert cut("ab ba") == ["<s>", "▁ab", "▁", "ba"]
    assert cut("aab") == ["<s>", "▁a", "ab"]
    assert cut("é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert cut("a</s>b") == ["<s>", "▁a", "</s>", "▁", "b"]  # as llama.cpp: a space after each special token
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(path)))
    for text in ("ab  ba", " a", "é\n", ""):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    path = write_gguf_file(tmp_path / "bare.gguf", sentence_pieces(add_space_prefix=False, add_bos_token=False))
    assert [names[index] for index in ids_of(path, "ab ba")] == ["ab", "▁", "ba"]
    path = write_gguf_file(tmp_path / "ends.gguf", sentence_pieces(add_eos_token=True))
    assert [names[index] for index in ids_of(path, "a")] == ["<s>", "▁a", "</s>"]


def test_sentence_pieces_as_transformers_reads_them(tmp_path):
    path = write_gguf_file(tmp_path / "model.gguf", sentence_pieces())
    own, other = tokenizer_of(read_gguf(path)), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    rng = np.random.default_rng(3)
    for _ in range(300):
        text = "x" + "".join(rng.choice(list("aabb hé9\n"), size=rng.integers(0, 20)))
        assert own.encode(text) == other.encode(text), text


def test_every_token_that_ends_a_text(tmp_path):
    path = write_gguf_file(tmp_path / "model.gguf", byte_level(eot_token_id=0))
    folder = resolve(str(path))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert load(str(path)).tokenizer.eos_token_ids == {0, 2}


# the cache


def test_converted_once_and_found_again_wherever_it_lies(tmp_path, cache, monkeypatch):
    path = write_gguf_file(tmp_path / "model.gguf", kind="Q8_0")
    folder = resolve(str(path))
    source = json.loads((folder / "source.json").read_text())
    assert folder.parent == cache and source["file"] == "model.gguf" and source["quantization"] == "Q8_0"
    assert source["sha256"].startswith(folder.name.split("-")[1]) and source["name"] == "random"
    assert torch_resolve(str(path)) == folder

    def fail(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf_folder, "convert", fail)
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "model.gguf")
    assert resolve(str(moved)) == folder
    monkeypatch.setattr(gguf_folder.hashlib, "file_digest", fail)
    assert resolve(str(moved)) == folder  # nor is the file read again


def test_another_content_under_the_same_name_is_converted(tmp_path):
    path = write_gguf_file(tmp_path / "model.gguf")
    first = resolve(str(path))
    write_gguf_file(path, settings={"general.name": "other"})
    second = resolve(str(path))
    assert first != second and first.is_dir()
    assert json.loads((second / "source.json").read_text())["name"] == "other"


def test_an_incomplete_folder_is_made_anew(tmp_path):
    path = write_gguf_file(tmp_path / "model.gguf")
    folder = resolve(str(path))
    (folder / "model.safetensors").unlink()
    assert resolve(str(path)) == folder and (folder / "model.safetensors").is_file()


def test_one_process_converts_while_others_wait(tmp_path, monkeypatch, capsys):
    path = write_gguf_file(tmp_path / "model.gguf")
    folder = resolve(str(path))
    shutil.move(folder, tmp_path / "made")
    waiting = threading.Thread(target=resolve, args=(str(path),))
    with gguf_folder.only_one(folder):
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        monkeypatch.setattr(gguf_folder, "convert", lambda *_: 1 / 0)  # it finds what was made meanwhile
        shutil.move(tmp_path / "made", folder)
    waiting.join(10)
    assert not waiting.is_alive() and resolve(str(path)) == folder
    assert f"another process is making {folder.name}; waiting for it" in capsys.readouterr().err


def test_a_failed_conversion_leaves_nothing(tmp_path, cache, monkeypatch):
    path = write_gguf_file(tmp_path / "model.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_folder, "_rounded", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resolve(str(path))
    assert [entry.name for entry in cache.iterdir() if not entry.name.startswith(".")] == ["hashes"]


def test_the_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    path = write_gguf_file(tmp_path / "model.gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        resolve(str(path))


def test_the_command_prints_the_folder_and_needs_neither_mlx_nor_torch(tmp_path, cache):
    path = write_gguf_file(tmp_path / "model.gguf")
    code = "import sys\nsys.modules['torch'] = sys.modules['mlx'] = None\nfrom models.gguf_folder import main\nmain()\n"
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(cache)) and done.stdout.rstrip().endswith("-bfloat16-v1")


# refusals


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "qwen2": ({"architecture": "qwen2"}, "its architecture is qwen2, not llama"),
    "a part": ({"settings": {"split.count": 3}}, "it is one of 3 parts"),
    "experts": ({"settings": {"llama.expert_count": 8}}, "it is a mixture of experts"),
    "no layers": ({"settings": {"llama.block_count": None}}, "its metadata lacks llama.block_count"),
    "varied": ({"settings": {"llama.feed_forward_length": [96, 64]}}, "llama.feed_forward_length differs by layer"),
    "yarn": ({"settings": {"llama.rope.scaling.type": "yarn"}}, "its rope is of the type yarn"),
    "partial rope": ({"settings": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count is 8, its heads"),
    "bias": ({"tensors": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, "such as blk.0.attn_q.bias"),
    "no norm": ({"tensors": {"output_norm.weight": None}}, "it holds no tensor output_norm.weight"),
    "shape": ({"tensors": {"blk.1.ffn_up.weight": np.zeros((9, 64), np.float32)}},
              "blk.1.ffn_up.weight has the shape (9, 64) in place of (96, 64)"),
    "no eos": ({"tokenizer": byte_level(eos_token_id=None)}, "names no token that ends a text"),
    "eos": ({"tokenizer": byte_level(eos_token_id=9999)}, "its eos token 9999 is none of its"),
    "bert": ({"tokenizer": byte_level(model="bert")}, "its tokenizer is of the kind bert"),
    "split": ({"tokenizer": byte_level(pre="default")}, "its pre-tokenizer default is none of gpt-2"),
    "no merges": ({"tokenizer": byte_level(merges=None)}, "its tokenizer has no merges"),
    "no scores": ({"tokenizer": sentence_pieces(scores=None)}, "neither merges nor a score for every token"),
    "twice": ({"tokenizer": sentence_pieces(tokens=["a"] * 9)}, "8 of its tokens occur twice"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_not_served_is_one_line(tmp_path, cache, capsys, wrong):
    changes, why = WRONG[wrong]
    path = write_gguf_file(tmp_path / "model.gguf", **changes)
    line = fails(capsys, talk_to_model.main, "--model", path)
    assert why in line and str(path) in line
    assert not list(cache.glob("model-*"))


def test_a_quantization_that_gguf_cannot_undo_is_one_line(tmp_path, monkeypatch):
    path = write_gguf_file(tmp_path / "model.gguf", kind="Q8_0")
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(UserError, match=r"cannot undo the quantization Q8_0 of token_embd\.weight"):
        resolve(str(path))


DAMAGES = {
    "empty": (lambda content: b"", "is no GGUF file"),
    "text": (lambda content: b"not a model\n", "is no GGUF file (it starts with b'not ')"),
    "magic only": (lambda content: content[:4], "is damaged or cut short"),
    "cut metadata": (lambda content: content[:2000], "is damaged or cut short"),
    "cut weights": (lambda content: content[: len(content) // 2], "is damaged or cut short"),
    "version": (lambda content: content[:4] + b"\x63" + content[5:], "is damaged or cut short"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line(tmp_path, damage):
    change, why = DAMAGES[damage]
    path = write_gguf_file(tmp_path / "model.gguf")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        resolve(str(path))
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_folder_of_that_name(tmp_path, tiny_folder):
    for function in (resolve, torch_resolve):
        with pytest.raises(UserError, match=r"absent\.gguf is no file; check the path"):
            function(str(tmp_path / "absent.gguf"))
    (tmp_path / "folder.gguf").symlink_to(tiny_folder)
    assert resolve(str(tmp_path / "folder.gguf")) == tmp_path / "folder.gguf"
    assert is_gguf("Model.Q4_K_M.GGUF") and not is_gguf("TheBloke/Llama-2-7B-GGUF")
    assert is_made_here("a.gguf") and is_made_here("tiny-digits") and not is_made_here("org/model")


def test_without_the_gguf_package_one_line_says_so(tmp_path, monkeypatch):
    path = write_gguf_file(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="run: pip install gguf"):
        resolve(str(path))


# what comes after


def lora(path, tmp_path):
    model = load(str(path)).model
    config = AdapterConfig("lora", -1, {"rank": 4, "scale": 2.0, "dropout": 0.0}, model=str(path))
    attach_adapter(model, config)
    save_adapter(tmp_path / "adapters", model, config)
    return tmp_path / "adapters"


def test_peft_is_told_the_folder_of_a_gguf_base(tmp_path):
    path = write_gguf_file(tmp_path / "model.gguf")
    call(fuse.main, "--adapter-file", lora(path, tmp_path), "--export-peft", tmp_path / "peft")
    named = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(resolve(str(path)))


@pytest.mark.parametrize("split", ["smollm", "llama-bpe"])
def test_a_byte_level_model_goes_out_and_comes_back(tmp_path, split):
    path = write_gguf_file(tmp_path / "model.gguf", byte_level(pre=split, eot_token_id=0), tied=split == "smollm")
    call(fuse.main, "--model", path, "--adapter-file", lora(path, tmp_path), "--save-path", tmp_path / "out",
         "--export-gguf")  # fmt: skip
    back, fused_ = load(str(tmp_path / "out" / "ggml-model-f16.gguf")), load(str(tmp_path / "out"))
    expected = dict(tree_flatten(fused_.model.parameters()))
    for name, array in tree_flatten(back.model.parameters()):
        stored = expected[name].astype(mx.float16) if array.ndim > 1 else expected[name]
        assert mx.array_equal(array, stored).item(), name
    for text in ("hello  world 123's", "a<|im_end|>\n<think>é", ""):
        assert back.tokenizer.encode(text) == fused_.tokenizer.encode(text)
    assert back.tokenizer.chat_template == fused_.tokenizer.chat_template
    assert (back.tokenizer.eos_token_id, back.tokenizer.pad_token_id) == (2, 2)
    kinds = read_gguf(tmp_path / "out" / "ggml-model-f16.gguf").metadata["tokenizer.ggml.token_type"]
    assert kinds[:5] == [3, 3, 3, 4, 1]
