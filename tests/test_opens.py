"""Every cell of the table in tests/opens.py: what should open does, with the output of adapter and base; the rest is
rejected."""

import importlib
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.server
import pytest
import torch
from mlx.utils import tree_map
from openai import OpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import fuse
from common.errors import OPENING_ERRORS, UserError
from models.adapters import AdapterConfig, adapter_weights, attach_adapter, load_adapter, save_adapter
from models.generation import ChatSession, sample
from models.loading import load
from models.value_head import new_value_head
from rewards.reward_model import load_reward_model
from tests import test_gguf_export
from tests.conftest import tiny_random_folder
from tests.flag_tables import PARSERS
from tests.mlx_server import serving
from tests.opens import COLUMNS, NO, OPENS, table
from tests.scripts import call, with_words

PROMPT, LENGTH = "2 4 6", 12  # words, tokens
TEXTS = (["2 4", "10"], [" 6 8", ""])
GENERATE = importlib.import_module("mlx_lm.generate")  # mlx_lm has a function of that name
REFUSALS = (UserError, AssertionError, IndexError, *OPENING_ERRORS)
KINDS = {"LoRA adapter folder": "lora", "DoRA adapter folder": "dora", "adapter as `.npz`": "lora",
         "soft prompt folder": "soft_prompt", "peft folder": "lora", "fused model": "lora",
         "fused soft prompt": "soft_prompt", "fused reward model": "lora",
         "reward model by `--sequence-classification`": "lora", "GGUF": "lora"}  # fmt: skip


class Made:
    """Every row's folder, on one base, with its expected output."""

    def __init__(self, base, folder):
        self.base, self.folder = str(base), folder
        self.paths, self.replies, self.scores = {}, {}, {}
        for number, row in enumerate(OPENS):
            self.paths[row] = str(self.make(row, folder / f"row{number}"))

    def make(self, row, place):
        if row == "GGUF":
            pieces = test_gguf_export.sentence_pieces()
            base = test_gguf_export.model_folder(self.folder / "llama", "llama", pieces, tie_word_embeddings=True)
            place.mkdir()
            _, out = test_gguf_export.fused(base, place)
            loaded = load(str(out))
            rounded = tree_map(lambda w: w.astype(mx.float16) if w.ndim > 1 else w, loaded.model.parameters())
            loaded.model.update(tree_map(lambda w: w.astype(mx.float32), rounded))
            self.replies[row] = continuation(loaded)
            return out / test_gguf_export.FILE
        scores = "reward" in row
        adapter = place.with_suffix(".npz") if "npz" in row else place.with_name(f"{place.name}-adapter")
        self.train(row, adapter, with_head=scores)
        words = ("--model", self.base, "--adapter-file", adapter)
        if row == "peft folder":
            call(fuse.main, *words, "--export-peft", place)
        elif "fused" in row or scores:
            flags = ["--sequence-classification"] if "classification" in row else []
            call(fuse.main, *words, "--save-path", place, *flags)
        else:
            return adapter
        return place

    def train(self, row, path, with_head):
        """An adapter with weights as if trained; keeps its output."""
        kind = KINDS[row]
        config = AdapterConfig(kind, -1, {"rank": 4, "scale": 3.0, "dropout": 0.0}, 3, model=self.base)
        loaded = load(self.base)
        attach_adapter(loaded.model, config)
        mx.random.seed(list(OPENS).index(row))
        moved = [(name, w + 0.3 * mx.random.normal(w.shape)) for name, w in adapter_weights(loaded.model).items()]
        loaded.model.load_weights(moved, strict=False)
        save_adapter(path, loaded.model, config, new_value_head(loaded.model, std=None) if with_head else None)
        self.replies[row] = reply_of(loaded)
        if with_head:
            self.scores[row] = load_reward_model(str(path)).reward(*TEXTS)


def continuation(loaded):
    """What follows a text without a template, decoded as a whole: bytes that are not characters differ in a stream."""
    ids = loaded.tokenizer.encode("abba")
    return loaded.tokenizer.decode(sample(loaded.model, [ids], [], LENGTH, temperature=0)[0])


def reply_of(loaded):
    """The most likely reply, by our code."""
    return "".join(ChatSession(loaded.model, loaded.tokenizer).reply(PROMPT, LENGTH)).strip()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opens")
    # A seed with which no reply ends early and all rows differ.
    return Made(tiny_random_folder(folder / "base", seed=1), folder)


def is_adapter(row):
    return "folder" in row or "npz" in row


# --- who opens ---


def ours(made, row, cell):
    path = made.paths[row]
    if cell == "as a reward model":
        return load_reward_model(path).reward(*TEXTS)
    loaded = load(made.base if is_adapter(row) else path)
    if is_adapter(row):
        load_adapter(loaded.model, path)
    return continuation(loaded) if row == "GGUF" else reply_of(loaded)


def by_generate(made, row, cell, capsys):
    path = made.paths[row]
    words = ["--model", made.base, "--adapter-path", path] if is_adapter(row) else ["--model", path]
    capsys.readouterr()
    with_words(GENERATE.main, *words, "--prompt", PROMPT, "--max-tokens", LENGTH, "--temp", 0)
    return capsys.readouterr().out.split("==========")[1].strip()


def by_server(made, row, cell, client):
    path = made.paths[row]
    model, extra = (made.base, {"adapters": path}) if is_adapter(row) else (path, {})
    if cell.startswith(NO):  # in this process: the server would be dead after it
        return mlx_lm.server.load(model, adapter_path=extra.get("adapters"))
    message = {"role": "user", "content": PROMPT}
    answer = client.chat.completions.create(
        model=model, messages=[message], max_tokens=LENGTH, temperature=0, extra_body=extra
    )
    return answer.choices[0].message.content.strip()


def by_transformers(made, row, cell):
    path = Path(made.paths[row])
    if cell == "as a classifier":
        texts = [prompt + completion for prompt, completion in zip(*TEXTS, strict=True)]
        inputs = AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            return AutoModelForSequenceClassification.from_pretrained(path)(**inputs).logits[:, 0].tolist()
    if cell == "by `gguf_file=`":
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        return reply_in_torch(model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), "abba")
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"transformers would make weights up: {report}")
    return reply_in_torch(model, AutoTokenizer.from_pretrained(made.base if is_adapter(row) else path))


def by_peft(made, row, cell):
    base = AutoModelForCausalLM.from_pretrained(made.base)
    return reply_in_torch(PeftModel.from_pretrained(base, made.paths[row]), AutoTokenizer.from_pretrained(made.base))


def reply_in_torch(model, tokenizer, prompt=PROMPT):
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer.encode(prompt)
    whole = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False)[0].tolist()
    return tokenizer.decode(whole[len(ids) :]).strip()


@pytest.fixture(scope="module")
def client(made):
    """The openai client of a server that opens any model it is asked for."""
    with serving(made.base) as url:
        yield OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30)


OPENERS: dict[str, Any] = dict(zip(COLUMNS, (ours, by_generate, by_server, by_transformers, by_peft), strict=True))
NEEDS: dict[Any, str] = {by_generate: "capsys", by_server: "client"}
CELLS = [(row, column, cell) for row, cells in OPENS.items() for column, cell in zip(COLUMNS, cells, strict=True)]


@pytest.mark.parametrize(("row", "column", "cell"), CELLS, ids=[f"{row}-{column}" for row, column, _ in CELLS])
def test_every_cell_is_true(made, request, row, column, cell):
    if row == "GGUF":
        pytest.importorskip("gguf")
    opener = OPENERS[column]
    extra = [request.getfixturevalue(NEEDS[opener])] if opener in NEEDS else []
    if cell.startswith(NO):
        with pytest.raises(REFUSALS):
            opener(made, row, cell, *extra)
    elif cell in ("as a reward model", "as a classifier"):
        assert opener(made, row, cell, *extra) == pytest.approx(made.scores[row], abs=1e-5)
    else:
        assert opener(made, row, cell, *extra) == made.replies[row]


def test_every_row_says_something_of_its_own(made):
    base = reply_of(load(made.base))
    assert base not in made.replies.values() and len(set(made.replies.values())) >= len(OPENS) - 1


def test_a_remedy_is_a_flag_or_a_row():
    remedies = {match for cells in OPENS.values() for cell in cells for match in re.findall(r"`(--[\w-]+)`", cell)}
    known = {option for action in PARSERS["fuse.py"]()._actions for option in action.option_strings}
    assert remedies and remedies <= known


def test_the_table_is_markdown_of_one_width():
    assert {line.count("|") for line in table().replace("\\|", "").splitlines()} == {7}
